"""Fine-tuning: the loop of Algorithm 1 (Progtuning, arXiv 2506.21119), and what it costs."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import islice

import torch
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from tqdm import tqdm

from progtuning.bert import Model
from progtuning.cache import PrefixCache
from progtuning.config import TrainConfig
from progtuning.data.batching import EncodedRows, TokenBatches, TrainBatches, prefetch
from progtuning.distributed import Replica, World
from progtuning.dps import DPS
from progtuning.engine import GradientSums, StageEngine, compile_blocks
from progtuning.errors import InputError, RunError
from progtuning.measure import reset_peak_bytes
from progtuning.model import heads
from progtuning.optim import FiniteCheck, build_optimizer, learning_rate_schedule
from progtuning.resume import random_states, set_random_states
from progtuning.stages import AdaptiveSchedule, Stage, make_schedule
from progtuning.step.ledger import Ledger
from progtuning.unpad import unpad

LOG_EVERY = 10  # optimizer steps; the loss is read from the device only then
MAX_SKIPS = 10  # batches in a row that are not finite, after which `skip_nonfinite` gives up


@dataclass
class Trainer:
    """A model, its training data and the settings of a run; `fit` trains it.

    `model` has its trainable parameters selected already (requires_grad). `log` takes every row of `metrics.jsonl`.
    `ledger` has the account of each stage. Between two steps `state_dict` gives all that a trainer built from the same
    arguments needs to go on, after `load_state_dict`, as this one would.
    """

    model: Model
    data: EncodedRows
    settings: TrainConfig
    device: torch.device
    log: Callable[[Mapping], None] = lambda row: None
    world: World = World()

    def __post_init__(self):
        settings = self.settings
        processes = self.world.size
        if settings.batch_tokens is None and settings.batch_size < processes:
            raise InputError(f"--batch-size must be at least the {processes} processes, got {settings.batch_size}")
        self.model.to(self.device)
        self.loss = heads.CLASSES[self.model.config.head].loss
        adaptive = partial(AdaptiveSchedule, percentile=settings.freeze_percentile)
        make = adaptive if settings.schedule == "adaptive" else partial(make_schedule, settings.schedule)
        self.schedule = make(self.model.num_blocks, settings.num_stages, settings.embeddings)
        self.batches = make_batches(self.data.lengths, settings)
        self.num_steps = settings.epochs * len(self.batches)
        self.optimizer = build_optimizer(self.model, settings.lr, settings.weight_decay, settings.adam_epsilon)
        # The first step of a warm-up has the learning rate 0: a run of one step would train nothing.
        warmup_steps = math.ceil(settings.warmup * self.num_steps) if self.num_steps > 1 else 0
        self.lr_schedule = learning_rate_schedule(self.optimizer, self.num_steps, warmup_steps, settings.lr_schedule)
        self.dps = DPS(self.model, settings.dps, self.num_steps, settings.seed) if settings.dps.mode != "off" else None
        self.engine = StageEngine(self.model, self.optimizer, settings.drops_out_prefix)
        self.sums = GradientSums(self.engine.candidates) if settings.schedule == "adaptive" else None
        self.engine.cache = self.open_cache()
        if settings.compile:
            compile_blocks(self.model)
        if settings.unpadded:
            unpad(self.model, self.device)
        self.replica = Replica(self.engine, self.world)
        names, steps_per_epoch = self.engine.trainable_names, len(self.batches)
        self.ledger = Ledger(
            self.model, names, settings.peft, settings.epochs, steps_per_epoch, self.device, self.world
        )
        self.finite = FiniteCheck(self.device)
        # A GPU is asked for what was not finite when the loss is read; until then nothing is saved.
        self.check_at_once = self.device.type == "cpu" or settings.skip_nonfinite
        self.epoch, self.batch = 0, 0  # where the run is: epochs done, batches of this epoch done
        self.losses: list[Tensor] = []  # of the steps since the last row of the log
        self.skips = 0  # batches in a row that were not finite

    @property
    def step(self) -> int:
        """Batches done: optimizer steps, and batches that were skipped."""
        return self.epoch * len(self.batches) + self.batch

    def fit(
        self,
        after_epoch: Callable[[int], None] = lambda epoch: None,
        after_step: Callable[[bool], None] = lambda stage_ends: None,
    ) -> None:
        """Algorithm 1. Its first lines stand outside: PEFT selects or adds parameters before the engine is built, and
        Eq. 2 and 3 divide the blocks into the stages of `self.schedule`. Then

            for each epoch e = 1 .. T                                              (1)
                for each batch                                                     (2)
                    S_t <- the blocks that train in this stage, and H              (3)
                    forward; backward through S_t alone                            (4)
                    update S_t                                                     (5)

        `after_step` is called between two steps, and told where a stage ends. Raises RunError where the loss or the
        gradient's norm is not finite.
        """
        if self.step == 0:
            torch.manual_seed(self.world.seed(self.settings.seed))  # of dropout
        quiet = None if self.world.is_main else True  # None: where standard error is no terminal
        with tqdm(total=self.num_steps, initial=self.step, unit="step", disable=quiet) as bar:
            for epoch in range(self.epoch, self.settings.epochs):  # (1)
                self.engine.train()
                for pieces in self.collated(self.batches.epoch(epoch)[self.batch :]):  # (2)
                    stage = self.schedule.at_step(self.step, self.num_steps)
                    if stage != self.engine.stage:  # (3)
                        if self.ledger.costs:
                            after_step(True)
                        self.enter(stage)
                    loss = self.backward(pieces)  # (4)
                    self.update(loss)  # (5)
                    self.batch += 1
                    self.report(bar)
                    after_step(self.step == self.num_steps)
                self.ledger.measure_peak()
                self.check_finite()
                after_epoch(epoch)
                self.epoch, self.batch = epoch + 1, 0

    def backward(self, pieces: list[tuple]) -> Tensor:
        """Run forward and backward over a batch, in the pieces of `collated`; return its mean loss, (), on the device.

        Loss and gradients are summed over all processes.
        """
        cost, total = self.ledger.now, torch.zeros((), device=self.device)
        if self.dps:
            self.dps.before_step()
        for number, (rows, weight, tensors) in enumerate(pieces, 1):
            inputs, labels = to_device(tensors, self.device)
            self.ledger.count(rows, inputs["input_ids"].shape[1], self.kept(rows))
            with self.replica.reducing(last=number == len(pieces)):
                with cost.clock.phase("forward"), autocast(self.device, self.settings.precision):
                    outputs = self.replica(**inputs, rows=rows)
                    loss = self.loss(outputs, labels, inputs.get("attention_mask")) * weight
                with cost.clock.phase("backward"):
                    loss.backward()
            total += loss.detach()
        cost.allreduced_bytes += self.replica.take_bytes()
        return self.world.sum(total)

    def update(self, loss: Tensor) -> None:
        """Take the optimizer's step, or none where loss or gradient is not finite and such batches are skipped."""
        cost = self.ledger.now
        with cost.clock.phase("optimizer"):
            norm = self.gradient_norm()
            if self.accepts(loss, norm):
                if self.sums:
                    self.sums.add()  # what backward gave: the batch's gradient, neither masked nor clipped
                if self.dps:
                    self.dps.after_backward()
                    norm = self.gradient_norm()  # of what trains alone
                clip_grads_with_norm_(self.active_parameters(), self.settings.max_grad_norm or math.inf, norm)
                self.optimizer.step()
                if self.dps:
                    self.dps.after_step()
                self.losses.append(loss)
                cost.steps += 1
            else:
                if self.dps:
                    self.dps.skip_step()
                self.optimizer.zero_grad()
                self.optimizer.step()  # moves nothing without a gradient; the schedule warns where no step was taken
                cost.skipped_steps += 1
            if self.sums and self.schedule.ends_interval(self.step, self.num_steps):
                self.schedule.observe(self.sums.take())
            self.lr_schedule.step()
            self.optimizer.zero_grad()

    def accepts(self, loss: Tensor, norm: Tensor) -> bool:
        """Say whether to take a step: loss and norm are finite, or that is not known yet (see `check_at_once`)."""
        self.finite.add(self.step, loss, norm)
        if not self.check_at_once:
            return True
        if not self.settings.skip_nonfinite:
            self.check_finite()
            return True
        found = self.finite.read()
        self.skips = self.skips + 1 if found else 0
        if found:
            stage, rows = self.engine.stage.index + 1, self.rows_of(self.step)
            self.log({"step": self.step + 1, "epoch": self.epoch + 1, "stage": stage, "skipped_rows": rows})
        if self.skips > MAX_SKIPS:
            raise self.world.once(RunError(f"{self.describe(*found)}, as in {MAX_SKIPS} batches before it"))
        return not found

    def check_finite(self) -> None:
        """Raise RunError, with step, stage and rows, where loss or gradient norm of a step so far was not finite."""
        if found := self.finite.read():
            raise self.world.once(RunError(f"{self.describe(*found)}: try a lower --lr, or --skip-nonfinite"))

    def describe(self, step: int, loss: float, norm: float) -> str:
        """Say of a 0-based step that was not finite which it was, and in what."""
        where = f"step {step + 1} (stage {self.ledger.stage_of(step)}, rows {', '.join(self.rows_of(step))})"
        return f"{where}: the loss is {loss:g}, the norm of the gradient {norm:g}"

    def rows_of(self, step: int) -> list[str]:
        """Return the ids of the rows of 0-based step `step`."""
        epoch, batch = divmod(step, len(self.batches))
        return [self.data.name(row) for row in self.batches.epoch(epoch)[batch]]

    def state_dict(self) -> dict:
        """Return what a resumed run needs, between two steps: a nested dict of tensors, numbers and names.

        All processes must call it; each gets the random states and costs of all, under "processes". Of the weights,
        those that a stage so far has trained. The tensors are the run's own: the next step changes them. Raises
        RunError where a step so far was not finite.
        """
        self.check_finite()
        candidates = self.engine.candidates
        changed = set().union(*(self.engine.trainable_names(cost.stage) for cost in self.ledger.costs))
        own = {"costs": self.ledger.state_dict(), "random": random_states(self.device)}
        return {
            "epoch": self.epoch,
            "batch": self.batch,
            "skips": self.skips,
            "losses": torch.stack(self.losses) if self.losses else torch.empty(0),
            "weights": {name: candidates[name].detach() for name in sorted(changed)},
            "optimizer": {name: self.optimizer.state[p] for name, p in candidates.items() if p in self.optimizer.state},
            "lr_schedule": self.lr_schedule.state_dict(),
            "schedule": self.schedule.state_dict() if isinstance(self.schedule, AdaptiveSchedule) else {},
            "gradient_sums": self.sums.state_dict() if self.sums else {},
            "dps": self.dps.state_dict() if self.dps else {},
            "processes": {str(rank): own for rank, own in enumerate(self.world.gather(own))},
        }

    def load_state_dict(self, state: Mapping) -> None:
        """Take up what `state_dict` gave in as many processes."""
        own = state["processes"][str(self.world.rank)]
        self.epoch, self.batch, self.skips = (state[name] for name in ("epoch", "batch", "skips"))
        self.losses = list(state["losses"].to(self.device))
        with torch.no_grad():
            for name, tensor in state["weights"].items():
                self.engine.candidates[name].copy_(tensor)
        self.ledger.load_state_dict(own["costs"])
        if self.engine.cache:
            self.refill_cache()
        self.engine.enter(self.ledger.now.stage)
        for name, moments in state["optimizer"].items():
            parameter = self.engine.candidates[name]
            self.optimizer.state[parameter] = {
                key: tensor.to(parameter.device, copy=True) for key, tensor in moments.items()
            }
        self.lr_schedule.load_state_dict(state["lr_schedule"])
        for group, lr in zip(self.optimizer.param_groups, self.lr_schedule.get_last_lr(), strict=True):
            group["lr"] = lr
        if isinstance(self.schedule, AdaptiveSchedule):
            self.schedule.load_state_dict(state["schedule"])
            self.sums.load_state_dict(state["gradient_sums"])
        if self.dps:
            self.dps.load_state_dict(state["dps"])
        reset_peak_bytes(self.device)
        set_random_states(own["random"], self.device)

    def collated(self, batches: Iterable[list[int]]) -> Iterator[list[tuple[Sequence[int], float, dict[str, Tensor]]]]:
        """Yield the pieces of this process's share of each batch: rows, weight in the batch's mean loss, and tensors.

        For CUDA a thread has the next batch ready in pinned memory.
        """
        on_cuda = self.device.type == "cuda"

        def collate(batch: list[int]) -> list[tuple[Sequence[int], float, dict[str, Tensor]]]:
            pieces = self.world.pieces(batch, self.settings.accumulation_steps)
            return [(piece, weight, collate_inputs(self.data, piece, pin=on_cuda)) for piece, weight in pieces]

        return prefetch(batches, collate) if on_cuda else map(collate, batches)

    def enter(self, stage: Stage) -> None:
        """Begin a stage: its account, its trainable set."""
        self.ledger.enter(stage)
        self.engine.enter(stage)
        if self.sums:
            self.ledger.now.gradient_sum_bytes = self.sums.nbytes()
        if self.engine.cache and self.engine.cut:
            self.ledger.now.cache_bytes = self.engine.cache.nbytes

    def open_cache(self) -> PrefixCache | None:
        """Return the cache of `settings`. Raises InputError where it is too large, or no stage has anything to keep."""
        settings = self.settings
        if settings.cache == "off":
            return None
        stages = [self.schedule.furthest] if settings.schedule == "adaptive" else self.schedule.stages
        if not any(self.engine.cut_of(stage) for stage in stages):
            raise InputError(
                f"--cache {settings.cache} has nothing to keep: under --schedule {settings.schedule}, --embeddings "
                f"{settings.embeddings} and {settings.num_stages} stages no block is ever frozen below all that trains"
            )
        hidden_size = self.model.config.hidden_size
        return PrefixCache(
            self.data.lengths,
            hidden_size,
            settings.cache,
            settings.cache_dtype,
            settings.cache_limit,
            kept=self.world.owns(len(self.data)),
            num_sharing=self.world.local_size,
        )

    def refill_cache(self) -> None:
        """Make the entries that the steps of the ledger made, bit for bit: run their batches' prefix again, in order.

        For a run that is resumed: the frozen blocks still have the weights that they had then. It costs what making the
        entries did, at most one forward pass of the frozen blocks for each example.
        """
        batches = (batch for epoch in range(self.settings.epochs) for batch in self.batches.epoch(epoch))
        for cost in self.ledger.costs:
            self.engine.enter(cost.stage)
            self.engine.train()
            for pieces in self.collated(islice(batches, cost.steps + cost.skipped_steps)):
                for piece, _, tensors in pieces:
                    if self.engine.cut and self.engine.cache.lacks(piece, self.engine.cut):
                        inputs, _ = to_device(tensors, self.device)
                        with autocast(self.device, self.settings.precision):
                            self.engine.cached_prefix(**inputs, rows=piece)

    def kept(self, rows: list[int]) -> list[int] | None:
        """Return, of each row, how many of its lowest blocks the cache has kept; None where none is read."""
        return self.engine.cache.levels[rows].tolist() if self.engine.cache and self.engine.cut else None

    def active_parameters(self) -> list[Tensor]:
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    def gradient_norm(self) -> Tensor:
        """Return the norm of all gradients together, a tensor of one element."""
        return get_total_norm([p.grad for p in self.active_parameters() if p.grad is not None])

    def account(self) -> dict:
        """Return what `summary.json` says of the stages: all processes' work and cache together, this one's seconds."""
        account = self.ledger.account()
        found = {"decisions": decisions(self.schedule)} if self.settings.schedule == "adaptive" else {}
        return {key: account.pop(key) for key in ("processes", "stages")} | found | account

    def report(self, bar: tqdm) -> None:
        """Log the mean loss every LOG_EVERY steps; only then does the host wait for the device."""
        bar.update()
        if self.step % LOG_EVERY and self.step != self.num_steps:
            return
        self.check_finite()
        if not self.losses:  # all were skipped
            return
        loss, stage = torch.stack(self.losses).mean().item(), self.engine.stage.index + 1
        lr = self.optimizer.param_groups[0]["lr"]
        self.log({"step": self.step, "epoch": self.epoch + 1, "stage": stage, "loss": loss, "lr": lr})
        bar.set_postfix(stage=stage, loss=f"{loss:.3f}")
        self.losses.clear()


def make_batches(lengths: Sequence[int], settings: TrainConfig) -> TrainBatches:
    """Return the training batches of `settings`. Raises InputError where a row exceeds the tokens of a batch."""
    if settings.batch_tokens is None:
        return TrainBatches(lengths, settings.batch_size, settings.seed, settings.group_by_length)
    return TokenBatches(lengths, settings.batch_tokens, settings.epochs, settings.seed, settings.group_by_length)


def decisions(schedule: AdaptiveSchedule) -> list[dict]:
    """Return the decisions as `summary.json` has them: blocks counted from 1, null for a score that is infinite."""
    return [
        decision | {"scores": {int(block) + 1: score for block, score in decision["scores"].items()}}
        for decision in schedule.state_dict()["decisions"]
    ]


def autocast(device: torch.device, precision: str):
    """The context of a forward pass: bf16 autocast, or none for fp32."""
    return torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else nullcontext()


def collate_inputs(data: EncodedRows, rows: list[int], pin: bool = False) -> dict[str, Tensor]:
    """Return the model's inputs and the labels of `rows`; with `pin` in memory that CUDA copies from without a wait."""
    batch = {key: value for key, value in data.collate(rows).items() if value is not None and key != "index"}
    return {key: value.pin_memory() for key, value in batch.items()} if pin else batch


def to_device(tensors: Mapping[str, Tensor], device: torch.device) -> tuple[dict[str, Tensor], Tensor | None]:
    """Return the model's inputs and the labels, None where there are none, on the device."""
    batch = {key: value.to(device, non_blocking=True) for key, value in tensors.items()}
    return {key: value for key, value in batch.items() if key != "labels"}, batch.get("labels")


def load(data: EncodedRows, rows: list[int], device: torch.device) -> tuple[dict[str, Tensor], Tensor | None]:
    """Return the model's inputs and the labels of `rows`, on the device."""
    return to_device(collate_inputs(data, rows), device)
