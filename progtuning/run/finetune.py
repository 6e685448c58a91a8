"""Fine-tune a model on a task, from names to an output folder; and the paper's Figure 1 (`probe`)."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from progtuning.base.errors import InputError, Interrupted, NotFinite
from progtuning.base.sources import split_revision
from progtuning.cost.budget import spans
from progtuning.data.batching import EncodedRows
from progtuning.data.task import Splits, Task
from progtuning.data.tokenization import Tokenizer, load_tokenizer
from progtuning.methods.apply import apply_peft
from progtuning.methods.lora import unwrap
from progtuning.methods.saved import save_peft
from progtuning.model.bert import Model
from progtuning.model.config import BertConfig
from progtuning.model.weights import CONFIG, WEIGHTS, LoadReport, load_model, save_pretrained
from progtuning.report.summary import SUMMARY, Summary, read_summary, write_summary
from progtuning.run.best import Best, EnoughEvaluations
from progtuning.run.build import build_trainer
from progtuning.run.evaluate import measure_splits
from progtuning.run.folder import RunFolder
from progtuning.run.identity import identify
from progtuning.run.signals import StopSignals
from progtuning.settings.peft import MERGEABLE
from progtuning.settings.train import CheckpointConfig, TrainConfig
from progtuning.speed.cache import Shelves
from progtuning.speed.kernels import reporting_compiler
from progtuning.stages import Schedule
from progtuning.step.measure import attention_backends, environment
from progtuning.step.processes import World
from progtuning.train import Trainer


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


def encoded(folder: Path, splits: Splits, settings: TrainConfig) -> tuple[BertConfig, TrainConfig, EncodedRows]:
    """Return what `prepare` does of the training rows."""
    config, settings, _, rows, _ = prepare(folder, replace(splits, dev={}), settings)
    return config, settings, rows


@dataclass
class Start:
    """What a run begins with: the settings with nothing left open, the encoded rows, and the model as it starts."""

    settings: TrainConfig
    tokenizer: Tokenizer
    train_rows: EncodedRows
    dev_rows: dict[str, EncodedRows]
    model: Model
    loaded: LoadReport

    @property
    def notes(self) -> list[str]:
        """What a person who trains the model should know, a line each."""
        notes, pooler = list(self.loaded.notes), getattr(self.model, "pooler", None)
        frozen = self.settings.peft.method == "lora" and not self.settings.peft.lora_pooler
        if frozen and pooler is not None and not pooler.dense.bias.any():  # as it is drawn; training moves it
            never = "The model's pooler was never trained (its biases are 0), and --peft lora freezes it"
            notes.append(f"{never}: if nothing is learnt, --lora-pooler trains it with the head.")
        return notes

    def account(self, splits: Splits) -> list[str]:
        """Return the lines that say what was read."""
        return splits.task.account(splits, {"train": self.train_rows, **self.dev_rows}, self.settings)

    def identity(self, task: Task, device: torch.device, world: World) -> dict:
        rows = (self.train_rows, self.dev_rows)
        return identify(self.settings, task, *rows, self.tokenizer, self.model, device, world.size)


def start(folder: Path, splits: Splits, settings: TrainConfig, merge: bool) -> Start:
    """Read all that a run begins with. Raises InputError."""
    if merge and settings.peft.method not in MERGEABLE:
        methods = f"{', '.join(MERGEABLE[:-1])} or {MERGEABLE[-1]}"
        raise InputError(f"--merge needs --peft {methods}, got {settings.peft.method}")
    config, settings, tokenizer, train_rows, dev_rows = prepare(folder, splits, settings)
    model, loaded = load_model(folder, config, settings.seed)
    apply_peft(model, settings.peft, settings.seed)
    return Start(settings, tokenizer, train_rows, dev_rows, model, loaded)


def promises(
    settings: TrainConfig,
    schedule: Schedule,
    num_steps: int,
    steps_per_epoch: int,
    cache: Shelves | None,
    world: World,
) -> list[str]:
    """Return the lines that say how many steps a budget pays, which stages get none, what the prefix cache takes."""
    lines = []
    if settings.budget is not None:
        epochs = num_steps / steps_per_epoch
        lines.append(f"The budget of {settings.budget:g} pays {num_steps:,} steps, {epochs:.2f} epochs.")
    planned = spans(schedule, num_steps) if settings.kind.is_planned else ()
    idle = [str(stage.index + 1) for stage, steps in planned if not steps]
    if idle:
        named = f"stages {', '.join(idle)} come" if len(idle) > 1 else f"stage {idle[0]} comes"
        lines.append(
            f"Of {len(schedule.stages)} stages in {num_steps:,} steps, {named} to none: nothing is trained there."
        )
    if cache:
        tokens, size = cache.num_tokens, cache.nbytes
        whose = "The prefix cache" if world.size == 1 else f"Each of the {world.size} processes' prefix caches"
        takes = f"takes {size / 1e9:.3g} GB of {settings.cache}: {tokens:,} tokens in {settings.cache_dtype}."
        lines.append(f"{whose} {takes}")
    return lines


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
        begun = start(folder, splits, settings, merge)
        settings, train_rows, dev_rows, model = begun.settings, begun.train_rows, begun.dev_rows, begun.model
        trainer = build_trainer(model, train_rows, settings, device, world=world)
    cache = trainer.ledger.cache
    for line in promises(settings, trainer.schedule, trainer.num_steps, len(trainer.loader), cache, world):
        say(line)

    def identity() -> dict:
        return begun.identity(task, device, world)

    cache = cache or nullcontext()
    with StopSignals(world) as signals, RunFolder(output_dir, checkpoints, identity, say, world) as run, cache:
        is_finished = run.is_resumed and world.first((run.path / SUMMARY).is_file())
        if is_finished and merge and not world.first((run.path / WEIGHTS).is_file()):
            got = "is finished and holds what it trained alone: give another --output-dir"
            raise world.once(InputError(f"--merge: the run in {output_dir} {got}"))
        for note in begun.notes:
            say(note)
        if is_finished:
            say(f"The run in {output_dir} is finished already.")
            return read_summary(run.path) if world.is_main else None
        for line in begun.account(splits):
            say(line)
        best = Best(settings, task.main_metric)
        run.restore(trainer, best)
        trainer.progress.log = run.log

        def measure(epoch: int) -> None:
            if settings.evaluate == "epoch" or epoch == trainer.epochs - 1:
                # To evaluate again changes nothing; but several processes stop between two steps, where they agree to.
                with signals.held(world.size > 1):
                    measured = measure_splits(
                        model, dev_rows, task, settings.batch_size, device, settings.precision, settings, world
                    )
                run.log({"epoch": epoch + 1, "metrics": measured.metrics})
                best.see(epoch, measured, trainer.engine)
                trainer.ledger.reset_peak()

        with signals.held(), reporting_compiler():
            fit_and_save(trainer, measure, run, best, signals)
            if not any(cost.steps for cost in trainer.ledger.costs):
                error = f"--skip-nonfinite passed over all {trainer.step} batches: nothing was trained"
                raise world.once(NotFinite(error))
            best.put_back(trainer.engine)
            summary = Summary(
                model=model_name,
                task=task.name,
                num_blocks=model.num_blocks,
                train_rows=len(splits.train),
                dev_rows={name: len(rows) for name, rows in splits.dev.items()},
                **task.shape(splits.train, train_rows),
                division=splits.division,
                metrics=best.written.metrics,
                by_class=best.written.by_class or None,
                epochs=run.log.rows[-1]["epoch"],
                best=best.found,
                **trainer.ledger.account(),
                fresh_parameters=begun.loaded.fresh,
                unused_tensors=begun.loaded.unused,
                settings=asdict(settings),
                **environment(device),
                attention_backends=attention_backends(model.config, device, settings.precision),
            )
            if output_dir is not None and world.is_main:
                write_model(model, Path(output_dir), settings, model_name, merge, begun.loaded.fresh)
                begun.tokenizer.save(output_dir)
                write_summary(Path(output_dir), summary)
    return summary if world.is_main else None


def fit_and_save(
    trainer: Trainer, measure: Callable[[int], None], run: RunFolder, best: Best, signals: StopSignals
) -> None:
    """Train to the end, or until `best` has waited long enough, and save the run when it is time and where a signal
    stops it; Interrupted then says how to go on."""
    save_every = run.options.save_every

    def after_step(stage_ends: bool) -> None:
        signals.check()
        if save_every and (stage_ends or trainer.step % save_every == 0):
            run.save(trainer, best)
            trainer.ledger.reset_peak()

    try:
        trainer.fit(measure, after_step)
    except EnoughEvaluations:
        rate = trainer.optimizer.param_groups[0]["lr"]
        trainer.progress.write(trainer.step, trainer.epoch + 1, trainer.engine.stage.index + 1, rate)
    except Interrupted as error:
        run.save(trainer, best)
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
            measured = measure_splits(
                model, dev_rows, splits.task, settings.batch_size, device, settings.precision, settings
            )
        rows.append({"block": index + 1, "metrics": measured.metrics})
    return rows
