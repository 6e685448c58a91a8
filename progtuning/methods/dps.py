"""DPS, dynamic parameter selection (Zhang et al. 2022, arXiv 2211.01642): train subnetworks that gradients choose.

    W  a weight matrix (n_out, n_in)    W0  as it was pre-trained    g  its gradient    p  share that is left out

The optimizer steps are divided in windows of `update_ratio` of all steps, rounded down. Windows 1, 3, 5, ... measure,
windows 2, 4, 6, ... train in every matrix the ceil((1 - p) n_out n_in) entries of the highest score:

            windows 1, 3, ...                                     windows 2, 4, ...
    dense   every entry trains                                    score = sum of g^2
            score += g^2
    mix     every step draws which columns (input neurons)        score = sum of g^2 / times kept
            are kept, each with probability 1 - p; they train             * exp(-times kept / window)
            score += g^2, times kept += 1 for them                (the exponential from 50 steps a window on)
            forward: the other columns as in W0                   forward: the other entries as at the window's start

Entries that tie with the lowest of them train too, as in the authors' code (ZhangHaojie077/DPS, grads_ops.py in
transformers/DPSDense and DPSMix). So where fewer have a score than are to train, as mix leaves it after a window of one
step that drew few columns, the whole matrix trains.

"As in" is Mixout's mixture (Lee et al. 2020, arXiv 1909.11299), whose expectation is W:

    M = ((1 - m) target + m W - p target) / (1 - p),    m 1 where kept

and dL/dW is m * dL/dM, without the factor 1 / (1 - p), in the code of both papers and here.

The matrices are those of every linear layer above E: query, key, value, attention output, both of the feed-forward
network, the pooler's and the classifier's. Biases, LayerNorms and embeddings train in every step. A matrix that is
frozen, as below the boundary of a stage, is neither scored nor masked. One that joins in a window that trains a
subnetwork has no score yet, and trains whole until that window ends.

An entry that a step does not train does not move in that step by a single bit. (In the authors' code its gradient is
zero, but AdamW's weight decay and momentum move it.) Its moments do see the zero gradient, and decay.
"""

from collections.abc import Iterator, Mapping
from fractions import Fraction
from math import ceil

import torch
from torch import Tensor, nn

from progtuning.base.errors import InputError
from progtuning.settings.train import DPSConfig
from progtuning.step.masks import NoMasks

EXPONENTIAL_FROM = 50  # steps a window
_TENSORS = ("initial", "start", "score", "times_kept", "kept")


class DPS(NoMasks):
    """The subnetworks of one run over `num_steps` optimizer steps. A training loop calls, once for each step,

        before_step()       before the first forward pass, and after the step's stage has been entered
        after_backward()    after the last backward pass, before gradients are clipped
        after_step()        after the optimizer's step

    (or, for a step that is not taken, `skip_step()` in place of the last two), so that gradients accumulated over
    several passes count once. In between, the model's weights are not for reading: mix keeps the mixture in them until
    `after_backward`, and the optimizer may move what does not train.

    Build it when the model is on its device, and before the stage engine enters a stage: it takes the matrices that the
    model has, and as W0 what they are then. Of every matrix it keeps the score or the mask and, during the optimizer's
    step, a copy; mix keeps two copies more, W0 and in every other window its start.

    Raises InputError where a matrix is frozen, where `num_steps` is unknown, or where a window has no step.
    """

    def __init__(self, model: nn.Module, settings: DPSConfig, num_steps: int | None, seed: int = 0):
        if settings.mode == "off":
            raise ValueError("DPS needs mode dense or mix, got off")
        layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
        above = {name: layer for name, layer in layers.items() if not name.startswith("embeddings.")}
        self.weights = {f"{name}.weight": layer.weight for name, layer in above.items()}
        frozen = next((name for name, weight in self.weights.items() if not weight.requires_grad), None)
        if frozen is not None:
            raise InputError(f"--dps needs every weight matrix to train (--peft none), got {frozen} frozen")
        self.mix = settings.mode == "mix"
        self.settings = settings
        self.p = Fraction(str(settings.p))  # as it was written: 100 * (1 - 0.45) is more than 55 in floating point
        self.window = window_length(settings.update_ratio, num_steps)
        self.generator = torch.Generator().manual_seed(seed)
        self.step = 0  # optimizer steps taken
        self.initial: dict[str, Tensor] = {}  # W0; mix
        self.start: dict[str, Tensor] = {}  # W at the start of a window that trains a subnetwork; mix
        self.score: dict[str, Tensor] = {}  # (n_out, n_in)
        self.times_kept: dict[str, Tensor] = {}  # (n_in,) int64; mix
        self.kept: dict[str, Tensor] = {}  # bool: (n_out, n_in), or (1, n_in) in a step of mix that measures
        self.before: dict[str, Tensor] = {}  # W before the step, of what has a mask
        if self.mix:
            self.initial = {name: weight.detach().clone() for name, weight in self.weights.items()}

    @property
    def measures(self) -> bool:
        """Whether the current window measures; otherwise it trains a subnetwork."""
        return self.step // self.window % 2 == 0

    def before_step(self) -> None:
        """Begin a window where one begins; draw the columns, and put the mixture in the weights."""
        self._forget_frozen()
        first = self.step % self.window == 0
        if first and self.measures:
            self.start.clear()
            self.kept.clear()
        elif first:
            self._choose()
        if self.mix and self.measures:
            self.kept = {name: self._draw(weight) for name, weight in self._active()}
        if self.mix:
            self._mix()

    @torch.no_grad()
    def after_backward(self) -> bool:
        """Put the weights back, keep the gradients of what trains, and add their squares to the scores; say so."""
        for name, before in self.before.items():
            self.weights[name].copy_(before)
        for name, weight in self._active():
            if weight.grad is None:
                continue
            if name in self.kept:
                weight.grad.masked_fill_(~self.kept[name], 0)
                if not self.mix:
                    self.before[name] = weight.clone()
            if self.measures:
                _add(self.score, name, weight.grad.square())
                if self.mix:
                    _add(self.times_kept, name, self.kept[name][0].long())
        return True

    @torch.no_grad()
    def after_step(self) -> None:
        """Undo what the optimizer's momentum and weight decay did to entries that do not train; count the step."""
        for name, before in self.before.items():
            weight = self.weights[name]
            weight.copy_(torch.where(self.kept[name], weight, before))
        self.before.clear()
        if self.measures:
            self.kept.clear()
        self.step += 1

    @torch.no_grad()
    def skip_step(self) -> None:
        """Put the weights back without use of the gradients; the step is not counted."""
        for name, before in self.before.items():
            self.weights[name].copy_(before)
        self.before.clear()
        if self.measures:
            self.kept.clear()

    def state_dict(self) -> dict[str, Tensor | int | float | str]:
        """Return what a resumed run needs, between two steps: tensors, numbers and strings in one flat dict."""
        state = {"mode": self.settings.mode, "p": self.settings.p, "window": self.window, "step": self.step}
        state["generator"] = self.generator.get_state()
        for kind in _TENSORS:
            state |= {f"{kind}.{name}": tensor for name, tensor in getattr(self, kind).items()}
        return state

    def load_state_dict(self, state: Mapping[str, Tensor | int | float | str]) -> None:
        """Take up a state of the same run. Raises InputError where it is that of another run or another model."""
        for key, ours in {"mode": self.settings.mode, "p": self.settings.p, "window": self.window}.items():
            if state.get(key) != ours:
                raise InputError(f"--resume: DPS has {key} {ours!r}, the checkpoint {state.get(key)!r}")
        tensors = {kind: {} for kind in _TENSORS}
        for key, value in state.items():
            kind, _, name = key.partition(".")
            if kind not in tensors:
                continue
            if name not in self.weights or (kind != "times_kept" and value.shape != self.weights[name].shape):
                raise InputError(f"--resume: the checkpoint's DPS state of {name!r} is not of this model")
            tensors[kind][name] = value.to(self.weights[name].device, copy=True)
        for kind, values in tensors.items():
            setattr(self, kind, values)
        self.generator.set_state(state["generator"].cpu())
        self.step = state["step"]

    def _active(self) -> Iterator[tuple[str, Tensor]]:
        return ((name, weight) for name, weight in self.weights.items() if weight.requires_grad)

    def _forget_frozen(self) -> None:
        for name, weight in self.weights.items():
            if not weight.requires_grad:
                for tensors in (self.start, self.score, self.times_kept, self.kept):
                    tensors.pop(name, None)

    def _draw(self, weight: Tensor) -> Tensor:
        """Draw which columns are kept: (1, n_in) bool. On the CPU, so that every device draws the same."""
        row = torch.empty(1, weight.shape[1]).bernoulli_(float(1 - self.p), generator=self.generator)
        return row.bool().to(weight.device, non_blocking=True)

    @torch.no_grad()
    def _choose(self) -> None:
        """Choose the subnetwork of a window from the scores."""
        for name, score in self.score.items():
            if self.mix:
                times_kept = self.times_kept[name].clamp(min=1)  # what was never kept has score 0
                score = score / times_kept
                if self.window >= EXPONENTIAL_FROM:
                    score = score * torch.exp(-times_kept / self.window)
                self.start[name] = self.weights[name].clone()
            self.kept[name] = score >= threshold(score, num_kept(score.numel(), self.p))
        self.score.clear()
        self.times_kept.clear()

    @torch.no_grad()
    def _mix(self) -> None:
        p = float(self.p)
        for name, kept in self.kept.items():
            weight, target = self.weights[name], (self.initial if self.measures else self.start)[name]
            self.before[name] = weight.clone()
            weight.copy_((torch.where(kept, weight, target) - p * target) / (1 - p))


def window_length(update_ratio: float, num_steps: int | None) -> int:
    """Return floor(update_ratio * num_steps), in exact arithmetic. Raises InputError where it is unknown or 0."""
    if num_steps is None:
        raise InputError("--dps needs a known number of optimizer steps: a window is a share of them")
    window = int(Fraction(str(update_ratio)) * num_steps)
    if window < 1:
        least = f"at least {ceil(1000 / num_steps) / 1000}" if num_steps > 0 else "a run with steps"
        raise InputError(f"--dps-update-ratio {update_ratio} of {num_steps} steps is less than one step: give {least}")
    return window


def num_kept(size: int, p: Fraction) -> int:
    """Return ceil((1 - p) * size), in exact arithmetic: at least 1, as p < 1."""
    return size - int(p * size)


def threshold(score: Tensor, count: int) -> Tensor:
    """Return the lowest of the `count` highest entries, ()."""
    return score.flatten().kthvalue(score.numel() - count + 1).values


def _add(sums: dict[str, Tensor], name: str, term: Tensor) -> None:
    if name in sums:
        sums[name] += term
    else:
        sums[name] = term
