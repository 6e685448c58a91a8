"""A fine-tuned model, from its folder to metrics, predictions and GLUE submissions."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

import numpy as np
import torch

from progtuning.base.errors import InputError, RunError
from progtuning.base.files import made_folder, new_folder, read_json
from progtuning.base.sources import MODEL, data_folder, model_folder
from progtuning.data import glue
from progtuning.data.batching import EncodedRows
from progtuning.data.hub import load_hub_test
from progtuning.data.own import as_divided
from progtuning.data.registry import HUB, KINDS, OWN, load_splits
from progtuning.data.submission import write_submission
from progtuning.data.task import Splits, Task
from progtuning.data.tokenization import TOKENIZER_FILES, Tokenizer, load_tokenizer
from progtuning.methods.saved import LORA_CONFIG, TRAINED_CONFIG, base_model_name, load_tuned, peft_file, tuned_config
from progtuning.model.bert import Model
from progtuning.model.config import HEADS, BertConfig, format_label_map
from progtuning.model.weights import CONFIG, load_model, reorder_classes
from progtuning.report.summary import RUN, SUMMARY, check_finished, no_training, read_training
from progtuning.run.checkpoint import flatten
from progtuning.run.evaluate import Measured, measure_splits, predict
from progtuning.settings.train import DataConfig, SquadConfig

_log = logging.getLogger(__name__)


def load_held_out(task: str, data: str | None, checkpoint: "Checkpoint", reading: DataConfig = DataConfig()) -> Splits:
    """Read the rows on which a fine-tuned model is measured, for which see `load_splits`.

    Of one's own files the held-out rows alone are read, with no training rows: the checkpoint has the classes. Raises
    InputError.
    """
    if task not in OWN or data is None:
        return load_splits(task, data, reading)
    check_head(checkpoint, task, task)  # a task of one's own has the name of its head
    classes = checkpoint.task.labels
    reading = as_divided(data, reading, checkpoint.division)
    try:
        return OWN[task].load_dev(data, classes, reading)
    except InputError as error:
        hint = _label_map_hint(checkpoint.own_labels, _dev_labels(task, data, reading))
        raise InputError(f"{error}{hint}") from None


def _dev_labels(task: str, data: str, reading: DataConfig) -> tuple[str, ...]:
    """Return the class names of the held-out rows, in order; none where they cannot be read."""
    try:
        return OWN[task].load_dev(data, None, reading).task.labels
    except InputError:
        return ()


def _label_map_hint(classes: Sequence[str], wanted: Sequence[str]) -> str:
    """Say how --label-map would give `classes`, as a model's file names them, the names `wanted`; nothing where it
    could not."""
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


@dataclass(frozen=True)
class Checkpoint:
    """A fine-tuned model and what its predictions need: its tokenizer, and of its `summary.json` some settings."""

    folder: Path
    model: Model
    tokenizer: Tokenizer
    max_length: int  # tokens
    squad: SquadConfig
    null_answers: bool  # whether it was trained on questions that have no answer
    own_labels: tuple[str, ...]  # the names that its classes have in its file, in order; --label-map gives others
    pairs: bool | None = None  # whether it was trained on pairs of texts; None: not known, or on questions
    division: dict | None = None  # options by which its file was divided into rows to train on and to hold out

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
    tokenizer, it has the base's. Raises InputError where the folder is of a run that has not finished, where it has no
    head, where a file is missing or damaged, or where an option is out of range.
    """
    is_described = (folder / CONFIG).exists() or peft_file(folder) is not None
    if not is_described or not any(folder.glob("*.safetensors")):
        check_finished(folder)  # a whole model may have lost its summary by somebody's hand
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
    pairs, division = (None, None) if training is None else (training.pairs, training.division)
    own_labels = config.labels
    return Checkpoint(folder, model, tokenizer, max_length, squad_settings, null_answers, own_labels, pairs, division)


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
        got, expected = ", ".join(classes), ", ".join(task.labels)
        hint = _label_map_hint(checkpoint.own_labels, task.labels)
        where = f"--checkpoint {checkpoint.folder}"
        raise InputError(f"{where} has the classes {got}, expected those of the task {task.name}: {expected}{hint}")
    if task.labels:
        reorder_classes(checkpoint.model, task.labels)
    task.check(checkpoint)


def check_division(checkpoint: Checkpoint, splits: Splits, rows: Mapping[str, EncodedRows]) -> None:
    """Raise InputError where the run's division holds other rows of this file out than the run held out.

    Then the file is another, or has changed, and some of `rows` may be rows that the run trained on. It is known by the
    digests in the run's `run.json`, where that is there and rows are cut as in training.
    """
    path = checkpoint.folder / RUN
    if splits.division is None or splits.division != checkpoint.division or not path.exists():
        return
    run = dict(flatten({"run": read_json(path)}))
    if run.get("run/identity/settings/max_length") != checkpoint.max_length:
        return
    if any(run.get(f"run/identity/held-out rows/{name}") not in (None, data.digest()) for name, data in rows.items()):
        share = f"--dev-share {splits.division['dev_share']:g}"
        raise InputError(
            f"{share} holds other rows of this file out than the run did, as it is another or has changed, and some "
            "may be rows that the run trained on: --dev-share 1 measures all of its rows"
        )


def evaluate_checkpoint(
    checkpoint: Checkpoint,
    splits: Splits,
    device: torch.device,
    batch_size: int = 32,
    precision: str = "fp32",
    output_dir: str | Path | None = None,
) -> Measured:
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
    check_division(checkpoint, splits, rows)
    if output_dir is None:
        return measure_splits(checkpoint.model, rows, task, batch_size, device, precision, checkpoint)
    folder, (data,) = new_folder(output_dir), rows.values()
    decisions = task.decide(predict(checkpoint.model, data, batch_size, device, precision), data, checkpoint)
    task.write(decisions, folder, checkpoint)
    return Measured(task.score(decisions, data, checkpoint))


def predict_file(
    checkpoint: Checkpoint,
    file: str,
    device: torch.device,
    batch_size: int = 32,
    precision: str = "fp32",
    reading: DataConfig = DataConfig(),
    kind: str | None = None,
) -> str:
    """Return the predictions for a file (`-`: standard input), a row for each of its rows.

    For a table of texts, in which `reading` names the columns, they are a table of `kind` as its task's `lines` has it;
    for one of questions and contexts, or SQuAD's own JSON, the lines of `answers.to_jsonl`. `kind` is one of the task's
    `kinds`, None the first. Raises InputError.
    """
    task = checkpoint.task
    task.check(checkpoint)
    examples = task.read(file, reading)
    check_pairs(checkpoint, examples, file)
    rows = task.encode(examples, checkpoint.tokenizer, checkpoint)
    outputs = predict(checkpoint.model, rows, batch_size, device, precision)
    return task.lines(outputs, rows, checkpoint, kind or task.kinds[0])


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
