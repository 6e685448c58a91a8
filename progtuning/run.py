"""A whole run: from the names of a model and a task to an output folder, and from there to metrics and predictions."""

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import MappingProxyType

import numpy as np
import torch

from progtuning.bert import Model
from progtuning.build import build_trainer
from progtuning.checkpoint import (
    CONFIG,
    LORA_CONFIG,
    TRAINED_CONFIG,
    base_model_name,
    load_model,
    load_tuned,
    peft_file,
    reorder_classes,
    save_peft,
    save_pretrained,
    tuned_config,
)
from progtuning.config import HEADS, MERGEABLE, BertConfig, CheckpointConfig, SquadConfig, TrainConfig, format_label_map
from progtuning.data import glue
from progtuning.data.batching import EncodedRows
from progtuning.data.hub import load_hub_test
from progtuning.data.own import load_dev
from progtuning.data.registry import HUB, KINDS, OWN, load_splits
from progtuning.data.submission import write_submission
from progtuning.data.task import Splits, Task
from progtuning.data.tokenization import TOKENIZER_FILES, Tokenizer, load_tokenizer
from progtuning.distributed import World
from progtuning.errors import InputError, Interrupted, RunError
from progtuning.evaluate import measure_splits, predict
from progtuning.files import made_folder, new_folder
from progtuning.measure import attention_backends, environment
from progtuning.peft import apply_peft
from progtuning.peft.lora import unwrap
from progtuning.report.summary import SUMMARY, Summary, no_training, read_summary, read_training, write_summary
from progtuning.resume import RunFolder, StopSignals, identify
from progtuning.sources import MODEL, data_folder, model_folder, split_revision
from progtuning.speed.kernels import reporting_compiler
from progtuning.train import Trainer

_log = logging.getLogger(__name__)


def choose_device(name: str | None, world: World = World()) -> torch.device:
    """Return the device of that name; None takes CUDA where there is one.

    Of several processes on a machine each gets the GPU of its local rank. Raises InputError where it cannot be used.
    """
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name not in ("cpu", "cuda"):
        raise InputError(f"--device must be cpu or cuda, got {name!r}")
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: PyTorch finds no CUDA device here")
    if name == "cpu" or world.size == 1:
        return torch.device(name)
    if world.local_size > torch.cuda.device_count():
        raise InputError(
            f"torchrun --nproc-per-node must be at most the {torch.cuda.device_count()} CUDA devices here, "
            f"got {world.local_size}; --device cpu takes any number"
        )
    torch.cuda.set_device(world.local_rank)
    return torch.device("cuda", world.local_rank)


def load_held_out(task: str, data: str | None, checkpoint: "Checkpoint") -> Splits:
    """Read the rows on which a fine-tuned model is measured, for which see `load_splits`.

    Of a folder of one's own `dev` alone is read, with no training rows: the checkpoint has the classes. Raises
    InputError.
    """
    if task not in OWN or data is None:
        return load_splits(task, data)
    check_head(checkpoint, task, task)  # a task of one's own has the name of its head
    folder, classes = data_folder(data), checkpoint.task.labels
    try:
        return OWN[task].load_dev(folder, classes)
    except InputError as error:
        raise InputError(f"{error}{_label_map_hint(classes, _dev_labels(folder))}") from None


def _dev_labels(folder: Path) -> tuple[str, ...]:
    """Return the class names of a folder's dev file, in order; none where they cannot be read."""
    try:
        return load_dev(folder, None).task.labels
    except InputError:
        return ()


def _label_map_hint(classes: Sequence[str], wanted: Sequence[str]) -> str:
    """Say how --label-map would give `classes` of a model the names `wanted`; nothing where it could not."""
    if len(classes) != len(wanted) or set(classes) == set(wanted):
        return ""
    spelt = {_plain(name): name for name in wanted}
    found = {name: spelt.get(_plain(name)) for name in classes}
    if None not in found.values() and len(set(found.values())) == len(wanted):
        hint = f"where they differ in spelling alone, give {format_label_map(found)}"
    else:
        hint = f"if they are the same in this order, give {format_label_map(dict(zip(classes, wanted)))}"
    return f"; {hint}" if len(hint) < 500 else "; --label-map gives the model's classes other names"


def _plain(name: str) -> str:
    return "".join(filter(str.isalnum, name.casefold()))


def prepare(
    folder: Path, splits: Splits, settings: TrainConfig
) -> tuple[BertConfig, TrainConfig, Tokenizer, EncodedRows, dict[str, EncodedRows]]:
    """Return what a run on `splits` needs beside the weights.

    That is the architecture under the task's head, the settings with what they leave to the model filled in, the
    tokenizer, and the encoded training and held-out rows. Raises InputError.
    """
    task = splits.task
    config = BertConfig.from_json(folder / CONFIG, keep_head=False).with_head(task.head, task.labels)
    dropouts = {name: getattr(settings, name) for name in ("hidden_dropout_prob", "attention_probs_dropout_prob")}
    config = replace(config, **{name: value for name, value in dropouts.items() if value is not None})
    if settings.max_length is None:
        settings = replace(settings, max_length=min(task.max_length, config.max_length))
    settings = replace(settings, prefix_dropout=settings.drops_out_prefix)
    task.check(settings)
    tokenizer = load_tokenizer(folder, config)
    train_rows = task.encode(splits.train, tokenizer, settings)
    dev_rows = {name: task.encode(rows, tokenizer, settings) for name, rows in splits.dev.items()}
    return config, settings, tokenizer, train_rows, dev_rows


def fine_tune(
    model_name: str,
    folder: Path,
    splits: Splits,
    settings: TrainConfig,
    device: torch.device,
    output_dir: str | Path | None = None,
    merge: bool = False,
    checkpoints: CheckpointConfig = CheckpointConfig(),
    say: Callable[[str], None] = lambda text: None,
    world: World = World(),
) -> Summary | None:
    """Fine-tune the model of `folder` on a task and return its summary.

    With `output_dir`, a new or empty folder, the tokenizer, `metrics.jsonl`, `summary.json` and the model are written
    there; every input has been checked before it is made. A model that a PEFT method trained is written as what was
    trained alone, or with `merge` as a whole one in Hugging Face layout. `checkpoints` says when the run is saved
    there, and whether it goes on from what is saved. `say` is told what a person may want to know meanwhile. Where
    `world` has several processes, all call this; rank 0 writes, says, and returns the summary, and the others None.

    Raises InputError for a wrong input, RunError for a run that fails, and Interrupted where SIGINT or SIGTERM stops
    it; where there is a folder, the run has been saved in it then.
    """
    task = splits.task
    with world.agreed():
        if merge and settings.peft.method not in MERGEABLE:
            methods = f"{', '.join(MERGEABLE[:-1])} or {MERGEABLE[-1]}"
            raise InputError(f"--merge needs --peft {methods}, got {settings.peft.method}")
        config, settings, tokenizer, train_rows, dev_rows = prepare(folder, splits, settings)
        model, loaded = load_model(folder, config, settings.seed)
        apply_peft(model, settings.peft, settings.seed)
        trainer = build_trainer(model, train_rows, settings, device, world=world)
    cache = trainer.ledger.cache
    if cache:
        tokens, size = cache.num_tokens, cache.nbytes
        whose = "The prefix cache" if world.size == 1 else f"Each of the {world.size} processes' prefix caches"
        say(f"{whose} takes {size / 1e9:.3g} GB of {settings.cache}: {tokens:,} tokens in {settings.cache_dtype}.")

    def identity() -> dict:
        return identify(settings, task, train_rows, dev_rows, tokenizer, model, device, world.size)

    cache = cache or nullcontext()
    with StopSignals(world) as signals, RunFolder(output_dir, checkpoints, identity, say, world) as run, cache:
        for note in loaded.notes:
            say(note)
        if run.is_resumed and world.first((run.path / SUMMARY).is_file()):
            say(f"The run in {output_dir} is finished already.")
            return read_summary(run.path) if world.is_main else None
        run.restore(trainer)
        trainer.progress.log = run.log

        def measure(epoch: int) -> None:
            if settings.evaluate == "epoch" or epoch == settings.epochs - 1:
                # To evaluate again changes nothing; but several processes stop between two steps, where they agree to.
                with signals.held(world.size > 1):
                    values = measure_splits(
                        model, dev_rows, task, settings.batch_size, device, settings.precision, settings, world
                    )
                run.log({"epoch": epoch + 1, "metrics": values})

        with signals.held(), reporting_compiler():
            fit_and_save(trainer, measure, run, signals)
            summary = Summary(
                model=model_name,
                task=task.name,
                num_blocks=model.num_blocks,
                train_rows=len(splits.train),
                dev_rows={name: len(rows) for name, rows in splits.dev.items()},
                **task.shape(splits.train, train_rows),
                metrics=run.log.rows[-1]["metrics"],
                **trainer.ledger.account(),
                fresh_parameters=loaded.fresh,
                unused_tensors=loaded.unused,
                settings=asdict(settings),
                **environment(device),
                attention_backends=attention_backends(config, device, settings.precision),
            )
            if output_dir is not None and world.is_main:
                write_model(model, Path(output_dir), settings, model_name, merge, loaded.fresh)
                tokenizer.save(output_dir)
                write_summary(Path(output_dir), summary)
    return summary if world.is_main else None


def fit_and_save(trainer: Trainer, measure: Callable[[int], None], run: RunFolder, signals: StopSignals) -> None:
    """Train, and save the run when it is time and where a signal stops it; Interrupted then says how to go on."""
    save_every = run.options.save_every

    def after_step(stage_ends: bool) -> None:
        signals.check()
        if save_every and (stage_ends or trainer.step % save_every == 0):
            run.save(trainer)

    try:
        trainer.fit(measure, after_step)
    except Interrupted as error:
        run.save(trainer)
        hint = f"; to go on: the same command with --resume (saved in {run.path})" if run.path else ""
        message = f"{error} at step {trainer.step} of {trainer.num_steps}{hint}"
        raise run.world.once(Interrupted(message, error.signal)) from None


def write_model(
    model: Model, output_dir: Path, settings: TrainConfig, model_name: str, merge: bool, fresh: Sequence[str]
) -> None:
    """Write a fine-tuned model: whole, or of one that a PEFT method trained (unless `merge`) what was trained.

    With the latter goes what was drawn `fresh`, trained or not: the base does not have it.
    """
    if settings.peft.method == "none" or merge:
        unwrap(model)
        save_pretrained(model, output_dir)
    else:
        base, revision = split_revision(model_name)
        save_peft(model, output_dir, settings.peft, base, fresh, revision)


def probe(
    folder: Path,
    splits: Splits,
    settings: TrainConfig,
    device: torch.device,
    blocks: Sequence[int] | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> list[dict]:
    """Figure 1 of the paper: for each block, train E, that block and the head alone, from the same start.

    `settings` must have the schedule "full"; with embeddings "never" E is frozen too. Returns a row for each block
    (0-based `blocks`; all where None): {"block" (counted from 1), "metrics"}. `say` is told what `load_model` has to
    note. Raises InputError and RunError as `fine_tune` does.
    """
    config, settings, tokenizer, train_rows, dev_rows = prepare(folder, splits, settings)
    rows = []
    for index in range(config.num_hidden_layers) if blocks is None else blocks:
        model, loaded = load_model(folder, config, settings.seed)
        for note in () if rows else loaded.notes:
            say(note)
        for other, block in enumerate(model.encoder.layer):
            block.requires_grad_(other == index)
        with reporting_compiler():
            build_trainer(model, train_rows, settings, device).fit()
            values = measure_splits(
                model, dev_rows, splits.task, settings.batch_size, device, settings.precision, settings
            )
        rows.append({"block": index + 1, "metrics": values})
    return rows


@dataclass(frozen=True)
class Checkpoint:
    """A fine-tuned model and what its predictions need: its tokenizer, and of its `summary.json` some settings."""

    folder: Path
    model: Model
    tokenizer: Tokenizer
    max_length: int  # tokens
    squad: SquadConfig
    null_answers: bool  # whether it was trained on questions that have no answer
    pairs: bool | None = None  # whether it was trained on pairs of texts; None: not known, or on questions

    @property
    def head(self) -> str:
        return self.model.config.head

    @property
    def task(self) -> Task:
        """The task that the model alone tells of: by its head."""
        return KINDS[self.head].of_model(self.model.config.labels, self.null_answers)


def base_folder(folder: Path, base_model: str | None = None) -> Path | None:
    """Return the folder of a fine-tuned model's base, fetched where need be; None where the model is a whole one.

    `base_model` says where the base is, as --model does; None: as the folder's own file has it. Raises InputError, and
    RunError where network or disk fail; both say which file and key named the base.
    """
    if base_model is not None:
        if peft_file(folder) is None:
            raise InputError(
                f"--base-model is for what a PEFT method trained, and --checkpoint {folder} is a whole model"
            )
        return model_folder(base_model, option="--base-model")
    base = base_model_name(folder)
    if base is None:
        return None
    try:
        return model_folder(base.name, True, f"{base.path}: key {base.key!r}", base.revision)
    except (InputError, RunError) as error:
        raise type(error)(f"{error}; if the base model has moved, give --base-model") from None


def load_checkpoint(
    folder: Path,
    max_length: int | None = None,
    squad_options: Mapping = MappingProxyType({}),
    base_model: str | None = None,
    label_map: Mapping[str, str] = MappingProxyType({}),
    say: Callable[[str], None] = lambda text: None,
) -> Checkpoint:
    """Load a fine-tuned model. `max_length` None, and fields of SquadConfig that `squad_options` lacks, are as in its
    training.

    `label_map` gives its classes other names, by those they have. `say` is told which keys of config.json are passed
    over. What a PEFT method trained is put on its base model, which `base_folder` finds; where the folder has no
    tokenizer, it has the base's. Raises InputError where the folder has no head, where a file is missing or damaged, or
    where an option is out of range.
    """
    base = base_folder(folder, base_model)
    config = BertConfig.from_json(folder / CONFIG) if base is None else tuned_config(folder, base)
    if config.head not in HEADS:
        raise InputError(f"--checkpoint {folder} must have a head for {', '.join(HEADS)}, got {config.head}")
    renamed = config.renamed(label_map) if label_map else config
    path, training = folder / SUMMARY, read_training(folder)
    try:
        settings = {} if training is None else training.settings
        squad_settings = SquadConfig(**(settings.get("squad") or {}))
        longest = min(KINDS[config.head].max_length, config.max_length)
        length = longest if training is None else max_length or settings["max_length"]
        if type(length) is not int:
            raise TypeError
    except (KeyError, TypeError):
        raise no_training(folder) from None
    except InputError as error:
        raise InputError(f"{path}: settings.squad: {error}") from None
    squad_settings = replace(squad_settings, **squad_options)
    null_answers = (training is not None and training.task == "squad_v2") or squad_settings.null_threshold is not None
    if base is None:
        model, loaded = load_model(folder, fresh_head=False)
        for note in loaded.notes:
            say(note)
    else:
        model = load_tuned(folder, base, config)
    model.config = renamed
    own_tokenizer = base is None or any((folder / name).exists() for name in TOKENIZER_FILES)
    tokenizer = load_tokenizer(folder if own_tokenizer else base, config)
    try:
        max_length = tokenizer.check_max_length(length if max_length is None else max_length)
    except InputError as error:
        raise error if max_length is not None else InputError(f"{path}: settings.max_length: {error}") from None
    return Checkpoint(folder, model, tokenizer, max_length, squad_settings, null_answers, training and training.pairs)


def checkpoint_files(folder: Path) -> list[Path]:
    """Return those files of a folder that `load_checkpoint` may read."""
    others = (SUMMARY, LORA_CONFIG, TRAINED_CONFIG)
    return [file for file in folder.glob("*") if MODEL.takes(file.name) or file.name in others]


def check_pairs(checkpoint: Checkpoint, examples: Sequence, where: str) -> None:
    """Raise InputError where the model was trained on pairs of texts and `examples` are single ones, or inversely."""
    kinds = ("single texts", "pairs of texts")
    got = checkpoint.task.pairs(examples)
    if None not in (checkpoint.pairs, got) and checkpoint.pairs != got:
        expected = kinds[checkpoint.pairs]
        raise InputError(f"{where}: got {kinds[got]}, --checkpoint {checkpoint.folder} was trained on {expected}")


def check_head(checkpoint: Checkpoint, head: str, task: str) -> None:
    """Raise InputError where the model's head is not `head`, that of `task`."""
    if checkpoint.head != head:
        where = f"--checkpoint {checkpoint.folder}"
        raise InputError(f"{where} has a {checkpoint.head} head, which does not fit the task {task}")


def fit_task(checkpoint: Checkpoint, task: Task) -> None:
    """Put the model's classes, in place, in the order in which the task has them.

    Raises InputError where the model's head or the names of its classes are not the task's.
    """
    check_head(checkpoint, task.head, task.name)
    classes = checkpoint.model.config.labels
    if task.labels and set(classes) != set(task.labels):
        got, expected, hint = ", ".join(classes), ", ".join(task.labels), _label_map_hint(classes, task.labels)
        where = f"--checkpoint {checkpoint.folder}"
        raise InputError(f"{where} has the classes {got}, expected those of the task {task.name}: {expected}{hint}")
    if task.labels:
        reorder_classes(checkpoint.model, task.labels)
    task.check(checkpoint)


def evaluate_checkpoint(
    checkpoint: Checkpoint,
    splits: Splits,
    device: torch.device,
    batch_size: int = 32,
    precision: str = "fp32",
    output_dir: str | Path | None = None,
) -> dict[str, float]:
    """Return the metrics of a fine-tuned model on a task's held-out rows.

    With `output_dir`, a new or empty folder, SQuAD's prediction files are written there. Raises InputError where the
    model is not one for the task.
    """
    task = splits.task
    fit_task(checkpoint, task)
    if output_dir is not None and not task.writes_files:
        raise InputError(f"--output-dir is for the prediction files of SQuAD, got it with the task {task.name}")
    check_pairs(checkpoint, next(iter(splits.dev.values())), f"the task {task.name}")
    rows = {name: task.encode(examples, checkpoint.tokenizer, checkpoint) for name, examples in splits.dev.items()}
    if output_dir is None:
        return measure_splits(checkpoint.model, rows, task, batch_size, device, precision, checkpoint)
    folder, (data,) = new_folder(output_dir), rows.values()
    decisions = task.decide(predict(checkpoint.model, data, batch_size, device, precision), data, checkpoint)
    task.write(decisions, folder, checkpoint)
    return task.score(decisions, data, checkpoint)


def predict_file(
    checkpoint: Checkpoint, file: str, device: torch.device, batch_size: int = 32, precision: str = "fp32"
) -> str:
    """Return the predictions for a file (`-`: standard input), a row for each of its rows.

    For a TSV or JSONL of texts they are a TSV of the predicted class `label` and its `probability`, or for regression
    `score`; for one of questions and contexts, or SQuAD's own JSON, the lines of `answers.to_jsonl`. Raises InputError.
    """
    task = checkpoint.task
    examples = task.read(file)
    check_pairs(checkpoint, examples, file)
    rows = task.encode(examples, checkpoint.tokenizer, checkpoint)
    return task.lines(predict(checkpoint.model, rows, batch_size, device, precision), rows, checkpoint)


def write_glue_submission(
    checkpoint: Checkpoint,
    task_name: str,
    data: str,
    folder: str | Path,
    device: torch.device,
    batch_size: int = 32,
    precision: str = "fp32",
) -> list[Path]:
    """Predict the test rows of a GLUE task and write the files that the GLUE server expects; return their paths.

    `data` is "hub", or names a folder with the task's test.tsv (MNLI: test_matched.tsv and test_mismatched.tsv; AX:
    AX.tsv, by a model of MNLI). `folder` is made where it does not exist; files of other tasks in it are left alone.
    Every row of WNLI has the majority class, whatever the model. Raises InputError.
    """
    task = glue.glue_task(task_name, tests=True)
    if task.constant is None:
        fit_task(checkpoint, task.task)
    tests = load_hub_test(task_name) if data == HUB else glue.load_glue_test(task_name, data_folder(data))
    folder, paths = made_folder(folder, "--glue-submission"), []
    for split, examples in tests.items():
        if task.constant is None:
            rows = task.task.encode(examples, checkpoint.tokenizer, checkpoint)
            outputs = predict(checkpoint.model, rows, batch_size, device, precision)
            predictions = task.task.decide(outputs, rows, checkpoint)
        else:
            name = task.task.labels[task.constant]
            _log.warning("%s: every row has the majority class, %s; the model is not asked", task.task.name, name)
            predictions = np.full(len(examples), task.constant)
        paths.append(write_submission(task_name, split, predictions, examples, folder))
    return paths
