"""From a model, its training rows and the settings of a run to a `Trainer`: makes the parts that the loop is given.

What can be said of a run before any of them is made is its `Course`; `lay_out` checks all that can be checked by then.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from progtuning.base.errors import InputError
from progtuning.cost.budget import Forecast, Piece
from progtuning.cost.closed_form import kept_levels, units
from progtuning.cost.plan import check_keeps
from progtuning.data.batching import EncodedRows
from progtuning.engine import StageEngine
from progtuning.methods.autofreeze import AdaptiveSchedule
from progtuning.methods.dps import DPS, window_length
from progtuning.methods.schedules import build_schedule, priced_schedule
from progtuning.model import heads
from progtuning.model.bert import Model
from progtuning.model.config import HEADS, BertConfig
from progtuning.settings.train import TrainConfig, parse_class_weights
from progtuning.speed.cache import CachedEngine, PrefixCache, Shelves
from progtuning.speed.checkpointing import checkpoint_blocks
from progtuning.speed.graphs import MULTIPLE, graph_blocks
from progtuning.speed.kernels import compile_blocks
from progtuning.speed.unpad import unpad
from progtuning.stages import Schedule
from progtuning.step.guard import FiniteCheck, Guard
from progtuning.step.ledger import Ledger
from progtuning.step.loader import Loader, make_batches
from progtuning.step.masks import NoMasks
from progtuning.step.measure import matmul_peak
from progtuning.step.optim import build_optimizer, learning_rate_schedule
from progtuning.step.processes import Replica, World
from progtuning.step.progress import Progress
from progtuning.train import Trainer


@dataclass(frozen=True)
class Course:
    """What a run does, step by step, known before anything is made that trains."""

    schedule: Schedule | AdaptiveSchedule
    loader: Loader
    class_weights: np.ndarray | None  # (C,) float32; None: all the same
    num_steps: int


def lay_out(config: BertConfig, data: EncodedRows, settings: TrainConfig, device: torch.device, world: World) -> Course:
    """Return the course of a run on the rows `data`.

    Raises InputError where the settings do not fit the model's `config`, the rows, the device or the processes.
    """
    if settings.batch_tokens is None and settings.batch_size < world.size:
        raise InputError(f"--batch-size must be at least the {world.size} processes, got {settings.batch_size}")
    if settings.cuda_graphs and (device.type != "cuda" or world.size > 1):
        got = device.type if device.type != "cuda" else f"{world.size} processes"
        raise InputError(f"--cuda-graphs is for one process on a CUDA device, got {got}")
    schedule = build_schedule(settings, config.num_hidden_layers)
    weights = class_weights(settings, config, data)
    row_weights = None if weights is None else weights[data.labels.numpy()]
    loader = build_loader(config, data, settings, device, world, row_weights)
    num_steps = steps_of(config, loader, settings)
    if settings.dps.mode != "off":
        window_length(settings.dps.update_ratio, num_steps)
    check_keeps(config, settings, schedule)
    return Course(schedule, loader, weights, num_steps)


def build_loader(
    config: BertConfig,
    data: EncodedRows,
    settings: TrainConfig,
    device: torch.device,
    world: World = World(),
    row_weights: np.ndarray | None = None,
) -> Loader:
    """Return what gives the batches of a run on the rows `data`. Raises InputError as `make_batches` does."""
    batches, pieces = make_batches(data.lengths, settings), settings.accumulation_steps
    multiple = MULTIPLE if settings.cuda_graphs else 1
    return Loader(data, batches, device, world, pieces, row_weights, multiple, most=config.max_length)


def build_trainer(
    model: Model,
    data: EncodedRows,
    settings: TrainConfig,
    device: torch.device,
    log: Callable[[Mapping], None] = lambda row: None,
    world: World = World(),
) -> Trainer:
    """Return what trains `model`, whose trainable parameters are selected already (requires_grad), on the rows `data`.

    `log` takes every row of `metrics.jsonl`. Nothing is drawn from the global generators. Raises InputError where the
    settings do not fit the model, the rows, the device or the processes.
    """
    course = lay_out(model.config, data, settings, device, world)
    schedule, loader, num_steps = course.schedule, course.loader, course.num_steps
    model.to(device)
    optimizer = build_optimizer(model, settings.lr, settings.weight_decay, settings.adam_epsilon, settings.lr_decay)
    # The first step of a warm-up has the learning rate 0: a run of one step would train nothing.
    warmup_steps = math.ceil(settings.warmup * num_steps) if num_steps > 1 else 0
    lr_schedule = learning_rate_schedule(optimizer, num_steps, warmup_steps, settings.lr_schedule)
    masks = DPS(model, settings.dps, num_steps, settings.seed) if settings.dps.mode != "off" else NoMasks()
    engine = build_engine(model, optimizer, settings, schedule, data, device, world)
    schedule.watch(engine.candidates)
    if settings.checkpoint_activations:
        checkpoint_blocks(model)
    if settings.compile:
        compile_blocks(model)
    if settings.cuda_graphs:
        graph_blocks(model)
    if settings.unpadded:
        unpad(model)
    cache = engine.cache if isinstance(engine, CachedEngine) else None
    ledger = Ledger(
        engine=engine,
        schedule=schedule,
        cache=cache,
        peft=settings.peft,
        checkpointed=settings.checkpoint_activations,
        epochs=settings.epochs,
        steps_per_epoch=len(loader),
        lengths=loader.batches.lengths,
        device=device,
        matmul_peak=peak_of(settings, device),
        world=world,
    )
    progress = Progress(log, ledger, quiet=not world.is_main)
    # A GPU is asked for what was not finite when the loss is read; until then nothing is saved.
    at_once = device.type == "cpu" or settings.skip_nonfinite
    guard = Guard(FiniteCheck(device), settings.skip_nonfinite, at_once, loader, ledger, progress, world)
    return Trainer(
        schedule=schedule,
        engine=engine,
        loader=loader,
        replica=Replica(engine, world),
        loss=loss_of(settings, model.config, course.class_weights, device),
        optimizer=optimizer,
        lr_schedule=lr_schedule,
        masks=masks,
        guard=guard,
        ledger=ledger,
        progress=progress,
        num_steps=num_steps,
        precision=settings.precision,
        max_grad_norm=settings.max_grad_norm,
        seed=world.seed(settings.seed),
    )


def class_weights(settings: TrainConfig, config: BertConfig, data: EncodedRows) -> np.ndarray | None:
    """Return how much each class counts in the loss, (C,) float32; None where all count the same.

    "balanced" is N / (C n_c) for a class of n_c of the N training rows, as in scikit-learn; one without a row counts 1.
    Raises InputError where the task has no classes, or not those that are named.
    """
    head = HEADS[config.head]
    if (settings.class_weights or settings.label_smoothing) and (not head.has_labels or head.has_several):
        option = "--class-weights" if settings.class_weights else "--label-smoothing"
        raise InputError(f"{option} is for classification, got it with a {config.head} head")
    if settings.class_weights is None:
        return None
    named = parse_class_weights(settings.class_weights)
    if named is None:
        counts = np.bincount(data.labels.numpy(), minlength=len(config.labels))
        found = np.where(counts, len(data) / (len(counts) * np.maximum(counts, 1)), 1.0)
    elif unknown := sorted(named.keys() - set(config.labels)):
        got = f"--class-weights: got the class {unknown[0]}"
        raise InputError(f"{got}, expected one of {', '.join(config.labels[:20])}")
    else:
        found = [named.get(label, 1.0) for label in config.labels]
    return np.asarray(found, dtype=np.float32)


def loss_of(settings: TrainConfig, config: BertConfig, weights: np.ndarray | None, device: torch.device) -> Callable:
    """Return the loss of the head, with what the settings change in it."""
    loss = heads.CLASSES[config.head].loss
    if weights is None and not settings.label_smoothing:
        return loss
    on_device = None if weights is None else torch.from_numpy(weights).to(device)
    return partial(loss, class_weights=on_device, label_smoothing=settings.label_smoothing)


def steps_of(config: BertConfig, loader: Loader, settings: TrainConfig) -> int:
    """Return the optimizer steps of a run: those of its epochs, or what its budget pays.

    Raises InputError where the budget pays none.
    """
    if settings.budget is None:
        return settings.epochs * len(loader)
    priced = priced_schedule(settings, config.num_hidden_layers)
    return forecast(config, loader, settings).num_steps(priced, settings.budget, settings.epochs)


def peak_of(settings: TrainConfig, device: torch.device) -> float | None:
    """Return the FLOP/s of the fastest product of matrices: as the settings say, on CUDA else measured, else None."""
    if settings.matmul_peak is not None:
        return 1e12 * settings.matmul_peak
    return matmul_peak(device, settings.precision) if device.type == "cuda" else None


def forecast(config: BertConfig, loader: Loader, settings: TrainConfig) -> Forecast:
    """Return what the run's batches will cost, those of all its processes together."""
    lengths, size = loader.batches.lengths, loader.world.size
    ranks = [World(rank, size) for rank in range(size)]

    def batches(epoch: int) -> list[list[Piece]]:
        return [
            [
                Piece(rank.rank, rows, loader.padded_length(rows))
                for rank in ranks
                for rows, _ in rank.pieces(batch, loader.pieces)
            ]
            for batch in loader.batches.epoch(epoch)
        ]

    keeper = None if settings.cache == "off" else [row % size for row in range(len(lengths))]
    return Forecast(config, settings.peft, batches, len(loader), keeper, settings.checkpoint_activations)


def build_engine(
    model: Model,
    optimizer: torch.optim.Optimizer,
    settings: TrainConfig,
    schedule: Schedule | AdaptiveSchedule,
    data: EncodedRows,
    device: torch.device,
    world: World,
) -> StageEngine:
    """Return the engine, with a cache where the settings have one. Raises what `build_shelves` does."""
    shelves = build_shelves(model.config, settings, schedule, data, device, world)
    if shelves is None:
        return StageEngine(model, optimizer, settings.drops_out_prefix)
    return CachedEngine(model, optimizer, shelves)


def build_shelves(
    config: BertConfig,
    settings: TrainConfig,
    schedule: Schedule | AdaptiveSchedule,
    data: EncodedRows,
    device: torch.device,
    world: World,
    used: bool = True,
) -> Shelves | None:
    """Return this process's cache, None where the settings have none; one that is not `used` takes no room.

    Raises InputError where it is too large, and RunError where there is no room for it.
    """
    if settings.cache == "off":
        return None
    own = units(config, settings.peft)
    kept = kept_levels([own.during(stage).cut() for _, stage in schedule.planned])
    has_own_memory = settings.cache == "device" and device.type == "cuda"  # a GPU for each process
    make = partial(
        PrefixCache,
        data.lengths,
        config.hidden_size,
        settings.cache,
        settings.cache_dtype,
        settings.cache_limit,
        kept=world.owns(len(data)),
        num_sharing=(1 if has_own_memory else world.local_size) * len(set().union(*kept)),
        device=device,
        used=used,
    )
    return Shelves(kept, make)
