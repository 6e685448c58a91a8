"""DPS against a reference in plain loops, and what it promises of every bit, step, stage and resumed run."""

import json
import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from progtuning.base.errors import InputError
from progtuning.engine import StageEngine
from progtuning.methods.apply import apply_peft
from progtuning.methods.dps import DPS, num_kept, window_length
from progtuning.model.names import BLOCK_LINEARS
from progtuning.settings.peft import PeftConfig
from progtuning.settings.train import DPSConfig, TrainConfig
from progtuning.stages import Stage, make_schedule
from progtuning.step.optim import build_optimizer
from tests.models import tiny_batch, tiny_model

LABELS = torch.tensor([0, 1, 2, 1, 0])
BLOCK_WEIGHTS = {f"encoder.layer.{i}.{layer}.weight" for i in range(4) for layer in BLOCK_LINEARS.values()}
HEAD_WEIGHTS = {"pooler.dense.weight", "classifier.weight"}


# The reference: lists, loops, double precision. y = W2 tanh(W1 x + b1) + b2, loss = sum over the batch |y - t|^2 / 2.


class Reference:
    """DPS and AdamW for two linear layers, one entry at a time. Entries are W[layer][row][column]."""

    def __init__(self, model, mode, p, window, lr, decay, seed):
        self.W = [model[0].weight.tolist(), model[2].weight.tolist()]
        self.b = [model[0].bias.tolist(), model[2].bias.tolist()]
        self.pretrained = [[list(row) for row in W] for W in self.W]
        self.mode, self.p, self.window, self.lr, self.decay = mode, p, window, lr, decay
        self.generator = torch.Generator().manual_seed(seed)
        self.step = 0
        self.moments = {}

    def train(self, batch):
        number = self.step // self.window + 1  # of the window, from 1
        odd, first = number % 2 == 1, self.step % self.window == 0
        if first and odd:
            self.score = [[[0.0 for _ in row] for row in W] for W in self.W]
            self.times = [[0 for _ in W[0]] for W in self.W]
        if first and not odd:
            self.start = [[list(row) for row in W] for W in self.W]
            self.subnetwork = [self.choose(layer) for layer in (0, 1)]
        if not odd:
            mask = self.subnetwork
        elif self.mode == "dense":
            mask = [[[True for _ in row] for row in W] for W in self.W]
        else:
            kept = [self.draw(len(W[0])) for W in self.W]
            mask = [[columns for _ in W] for W, columns in zip(self.W, kept)]
        used = self.W
        if self.mode == "mix":
            target = self.pretrained if odd else self.start
            used = [
                [
                    [self.mixed(mask[l][i][j], self.W[l][i][j], target[l][i][j]) for j in range(len(self.W[l][i]))]
                    for i in range(len(self.W[l]))
                ]
                for l in (0, 1)
            ]
        dW, db = self.gradients(used, batch)
        for l in (0, 1):
            for i in range(len(self.W[l])):
                self.b[l][i] = self.adamw(("b", l, i), self.b[l][i], db[l][i])
                for j in range(len(self.W[l][i])):
                    g = dW[l][i][j] if mask[l][i][j] else 0.0
                    if odd:
                        self.score[l][i][j] += g * g
                    moved = self.adamw(("W", l, i, j), self.W[l][i][j], g)
                    if mask[l][i][j]:
                        self.W[l][i][j] = moved
            if odd and self.mode == "mix":
                for j in range(len(self.times[l])):
                    self.times[l][j] += mask[l][0][j]
        self.step += 1

    def draw(self, num_columns):
        row = torch.empty(1, num_columns).bernoulli_(1 - self.p, generator=self.generator)
        return [value == 1 for value in row[0].tolist()]

    def mixed(self, kept, w, target):
        return ((w if kept else target) - self.p * target) / (1 - self.p)

    def choose(self, layer):
        scores = []
        for i, row in enumerate(self.score[layer]):
            for j, score in enumerate(row):
                if self.mode == "mix":
                    times = max(1, self.times[layer][j])
                    score /= times
                    if self.window >= 50:
                        score *= math.exp(-times / self.window)
                scores.append((-score, i, j))
        count = math.ceil(len(scores) * (1 - Fraction(str(self.p))))
        lowest = sorted(scores)[count - 1][0]
        best = {(i, j) for score, i, j in scores if score <= lowest}
        return [[(i, j) in best for j in range(len(row))] for i, row in enumerate(self.score[layer])]

    def gradients(self, W, batch):
        dW = [[[0.0 for _ in row] for row in w] for w in W]
        db = [[0.0 for _ in b] for b in self.b]
        for x, t in batch:
            h = [math.tanh(sum(w * v for w, v in zip(row, x)) + b) for row, b in zip(W[0], self.b[0])]
            y = [sum(w * v for w, v in zip(row, h)) + b for row, b in zip(W[1], self.b[1])]
            dy = [a - b for a, b in zip(y, t)]
            dh = [sum(W[1][i][j] * dy[i] for i in range(len(dy))) * (1 - h[j] ** 2) for j in range(len(h))]
            for l, (d, v) in enumerate(((dh, x), (dy, h))):
                for i in range(len(d)):
                    db[l][i] += d[i]
                    for j in range(len(v)):
                        dW[l][i][j] += d[i] * v[j]
        return dW, db

    def adamw(self, key, w, g):
        m, v, t = self.moments.get(key, (0.0, 0.0, 0))
        m, v, t = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g, t + 1
        self.moments[key] = (m, v, t)
        decay = self.decay if key[0] == "W" else 0.0
        return w * (1 - self.lr * decay) - self.lr * (m / (1 - 0.9**t)) / (math.sqrt(v / (1 - 0.999**t)) + 1e-8)


@pytest.mark.parametrize("mode", ["dense", "mix"])
@pytest.mark.parametrize("ratio, window", [(0.005, 1), (0.05, 10), (0.3, 60)])  # the last with the exponential
def test_200_steps_equal_those_of_plain_loops(mode, ratio, window):
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    p, lr, decay = 0.3, 3e-2, 0.1
    reference = Reference(model, mode, p, window, lr, decay, seed=17)
    dps = DPS(model, DPSConfig(mode, p, ratio), num_steps=200, seed=17)
    assert dps.window == window
    weights, biases = [model[0].weight, model[2].weight], [model[0].bias, model[2].bias]
    groups = [{"params": weights, "weight_decay": decay}, {"params": biases, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=lr)
    for step in range(200):
        x, t = torch.randn(3, 5, dtype=torch.float64), torch.randn(3, 3, dtype=torch.float64)
        reference.train(list(zip(x.tolist(), t.tolist())))
        dps.before_step()
        ((model(x) - t).square().sum() / 2).backward()
        dps.after_backward()
        optimizer.step()
        dps.after_step()
        optimizer.zero_grad()
        for layer in (0, 1):
            expected = torch.tensor(reference.W[layer], dtype=torch.float64)
            torch.testing.assert_close(weights[layer].data, expected, rtol=1e-9, atol=1e-11, msg=f"step {step}")
            expected = torch.tensor(reference.b[layer], dtype=torch.float64)
            torch.testing.assert_close(biases[layer].data, expected, rtol=1e-9, atol=1e-11, msg=f"step {step}")


@pytest.mark.parametrize("num_steps, chosen", [(490, 0), (500, 1)])
def test_from_windows_of_50_steps_on_columns_that_were_kept_often_lose_by_the_exponential(num_steps, chosen):
    model = nn.Sequential(nn.Linear(2, 1, bias=False))
    dps = DPS(model, DPSConfig("mix", 0.5, 0.1), num_steps)
    dps.step = dps.window
    dps.score["0.weight"] = torch.tensor([[40.0, 9.0]])
    dps.times_kept["0.weight"] = torch.tensor([40, 10])  # 1.0 and 0.9 a time; times exp(-0.8) and exp(-0.2)
    dps.before_step()
    assert dps.kept["0.weight"].tolist() == [[chosen == 0, chosen == 1]]


# A run on a small BERT.


class Run:
    """A model, its engine and optimizer under DPS; `train` does one step on `pieces` parts of the step's batch."""

    def __init__(self, mode, num_steps=40, ratio=0.1, p=0.3, schedule="full", num_stages=1, **changes):
        self.model = tiny_model(**changes)
        self.optimizer = build_optimizer(self.model, lr=1e-2, weight_decay=0.1)
        self.engine = StageEngine(self.model, self.optimizer)
        self.dps = DPS(self.model, DPSConfig(mode, p, ratio), num_steps, seed=1)
        self.schedule, self.num_steps = make_schedule(schedule, 4, num_stages), num_steps

    def train(self, pieces=1, during=lambda: None, after_backward=lambda: None):
        step = self.dps.step
        stage = self.schedule.at_step(step, self.num_steps)
        if stage != self.engine.stage:
            self.engine.enter(stage)
        self.dps.before_step()
        during()
        batch = tiny_batch(self.model.config, seed=step)
        for part in torch.arange(5).chunk(pieces):
            logits = self.engine(**{key: value[part] for key, value in batch.items()})
            (F.cross_entropy(logits, LABELS[part]) * (len(part) / 5)).backward()
        self.dps.after_backward()
        after_backward()
        self.optimizer.step()
        self.dps.after_step()
        self.optimizer.zero_grad()

    def matrices(self):
        return {name: weight.detach().clone() for name, weight in self.dps.weights.items()}


@pytest.mark.parametrize(
    "changes, head",
    [
        ({}, HEAD_WEIGHTS),
        ({"model_type": "roberta"}, {"classifier.dense.weight", "classifier.out_proj.weight"}),
        ({"model_type": "electra"}, {"classifier.dense.weight", "classifier.out_proj.weight"}),  # not E's projection
        ({"head": "question-answering"}, {"qa_outputs.weight"}),
    ],
)
def test_the_matrices_are_those_of_attention_feed_forward_pooler_and_classifier(changes, head):
    assert Run("dense", **changes).dps.weights.keys() == BLOCK_WEIGHTS | head


@pytest.mark.parametrize("mode", ["dense", "mix"])
def test_in_an_even_window_masked_entries_do_not_move_by_a_bit_and_the_kept_fraction_is_exact(mode):
    run = Run(mode)
    for window in range(4):
        before = run.matrices()
        for _ in range(4):
            run.train()
        if window % 2 == 0:
            continue
        for name, weight in run.dps.weights.items():
            kept = run.dps.kept[name]
            assert kept.sum() == math.ceil(Fraction(7, 10) * weight.numel())
            assert torch.equal(weight[~kept], before[name][~kept]), name
            assert (weight[kept] != before[name][kept]).float().mean() > 0.99, name  # decay alone moves an entry


def test_without_dps_adamw_moves_the_same_entries():
    """The promise above is not kept by a zero gradient: momentum and weight decay move entries."""
    run = Run("dense")
    for _ in range(4):
        run.train()
    before = run.matrices()
    run.dps.after_step = lambda: None
    run.train()
    moved = [(weight != before[name])[~run.dps.kept[name]].float().mean() for name, weight in run.dps.weights.items()]
    assert min(moved) > 0.9


def test_dense_trains_every_entry_in_odd_windows():
    run = Run("dense")
    before = run.matrices()
    run.train()
    assert not run.dps.kept
    assert all((weight != before[name]).all() for name, weight in run.dps.weights.items())


def test_mix_moves_in_odd_windows_only_the_columns_that_the_step_drew():
    run = Run("mix")
    for _ in range(3):
        drawn, before = {}, run.matrices()
        run.train(during=lambda: drawn.update(run.dps.kept))
        for name, weight in run.dps.weights.items():
            columns = drawn[name][0]
            assert torch.equal(weight[:, ~columns], before[name][:, ~columns])
            assert columns.sum() == 0 or (weight != before[name])[:, columns].any()
    assert 0 < sum(columns.sum() for columns in drawn.values()) < sum(columns.numel() for columns in drawn.values())


@pytest.mark.parametrize("mode", ["dense", "mix"])
def test_gradients_of_entries_that_do_not_train_are_zero_before_clipping(mode):
    run = Run(mode)
    for _ in range(5):
        run.train()

    def check():
        for name, weight in run.dps.weights.items():
            assert not weight.grad[~run.dps.kept[name]].any() and weight.grad.any()

    run.train(after_backward=check)


@pytest.mark.parametrize("mode", ["dense", "mix"])
def test_biases_layer_norms_and_embeddings_train_in_every_step(mode):
    run = Run(mode)
    others = [p for name, p in run.model.named_parameters() if name not in run.dps.weights]
    for _ in range(9):
        before = [p.detach().clone() for p in others]
        run.train()
        assert all(not torch.equal(p, b) for p, b in zip(others, before))


def test_mix_computes_with_the_mixture_and_gives_the_weights_back():
    run = Run("mix", p=0.4)
    pretrained = run.matrices()
    for step in range(8):
        if step == 4:
            start = run.matrices()
        held = run.matrices()

        def during():
            for name, weight in run.dps.weights.items():
                kept, target = run.dps.kept[name], (pretrained if step < 4 else start)[name]
                m = kept.float().expand_as(target)
                expected = ((1 - m) * target + m * held[name] - 0.4 * target) / 0.6
                torch.testing.assert_close(weight.data, expected, rtol=1e-5, atol=1e-6)

        def after_backward():
            assert all(torch.equal(weight, held[name]) for name, weight in run.dps.weights.items())

        run.train(during=during, after_backward=after_backward)


def test_the_expectation_of_the_mixture_is_the_weight():
    torch.manual_seed(0)
    model = nn.Linear(6, 3)
    dps = DPS(model, DPSConfig("mix", 0.3, 1.0), num_steps=20_000, seed=2)
    with torch.no_grad():
        model.weight.add_(torch.randn(3, 6))  # away from W0
    weight, total = model.weight.detach().clone(), torch.zeros(3, 6)
    for _ in range(4000):
        dps.before_step()
        total += model.weight.detach()
        dps.after_backward()
        dps.after_step()
    torch.testing.assert_close(total / 4000, weight, atol=0.06, rtol=0)


@pytest.mark.parametrize("mode", ["dense", "mix"])
def test_micro_batches_count_as_one_step_and_choose_the_same_subnetwork(mode):
    whole, parts = Run(mode), Run(mode)
    for _ in range(3):
        whole.train()
        parts.train(pieces=3)
    assert parts.dps.step == 3
    for name, score in whole.dps.score.items():
        torch.testing.assert_close(parts.dps.score[name], score, rtol=2e-2, atol=1e-7)
    assert all(torch.equal(parts.dps.times_kept[name], times) for name, times in whole.dps.times_kept.items())
    for _ in range(2):
        whole.train()
        parts.train(pieces=3)
    same = [(whole.dps.kept[name] == parts.dps.kept[name]).float().mean() for name in whole.dps.kept]
    assert len(same) == 26 and min(same) > 0.97  # but for scores that rounding lets change places


def test_scores_are_squares_of_the_accumulated_gradient_not_sums_of_squares():
    model = nn.Sequential(nn.Linear(1, 1, bias=False))
    dps = DPS(model, DPSConfig("dense", 0.0, 1.0), num_steps=10)
    dps.before_step()
    for value in (3.0, -1.0):
        (model[0].weight * value).sum().backward()
    dps.after_backward()
    assert dps.score["0.weight"].item() == (3.0 - 1.0) ** 2


def stored(state, folder):
    """A state through safetensors and JSON."""
    tensors = {key: value for key, value in state.items() if isinstance(value, torch.Tensor)}
    save_file({key: value.contiguous() for key, value in tensors.items()}, folder / "state.safetensors")
    rest = json.loads(json.dumps({key: value for key, value in state.items() if key not in tensors}))
    return {**load_file(folder / "state.safetensors"), **rest}


@pytest.mark.parametrize("mode", ["dense", "mix"])
@pytest.mark.parametrize("at", [0, 1, 3, 4, 6, 8, 11])  # in and between windows of 4 steps
def test_a_resumed_run_ends_with_the_bits_of_one_that_went_through(mode, at, tmp_path):
    options = {"schedule": "shrinking", "num_stages": 2, "num_steps": 20, "ratio": 0.2}
    through, stopped, resumed = (Run(mode, **options) for _ in range(3))
    for _ in range(14):
        through.train()
    for _ in range(at):
        stopped.train()
    resumed.model.load_state_dict(stopped.model.state_dict())
    if at:
        resumed.engine.enter(resumed.schedule.at_step(at - 1, 20))
        resumed.optimizer.load_state_dict(stopped.optimizer.state_dict())
    resumed.dps.load_state_dict(stored(stopped.dps.state_dict(), tmp_path))
    for _ in range(14 - at):
        resumed.train()
    for name, parameter in through.model.named_parameters():
        assert torch.equal(parameter, resumed.model.get_parameter(name)), name


@pytest.mark.parametrize("mode", ["dense", "mix"])
@pytest.mark.parametrize("at", [1, 5])  # in a window that measures, and in one that trains a subnetwork
def test_a_state_after_a_step_that_was_skipped_is_taken_up(mode, at, tmp_path):
    run, other = (Run(mode, num_steps=20, ratio=0.2) for _ in range(2))
    for _ in range(at):
        run.train()
    run.dps.before_step()
    run.dps.skip_step()
    other.dps.load_state_dict(stored(run.dps.state_dict(), tmp_path))
    assert {name: mask.shape for name, mask in other.dps.kept.items()} == (
        {} if at == 1 else {name: weight.shape for name, weight in other.dps.weights.items()}
    )


def test_a_state_of_another_run_is_refused():
    state = Run("mix").dps.state_dict()
    for run, message in (
        (Run("dense"), "DPS has mode 'dense', the checkpoint 'mix'"),
        (Run("mix", p=0.5), "DPS has p 0.5, the checkpoint 0.3"),
        (Run("mix", ratio=0.2), "DPS has window 8, the checkpoint 4"),
        (Run("mix", head="question-answering"), "DPS state of 'pooler.dense.weight' is not of this model"),
        (Run("mix", intermediate_size=32), "intermediate.dense.weight' is not of this model"),
    ):
        with pytest.raises(InputError, match=f"--resume: .*{message}"):
            run.dps.load_state_dict(state)


@pytest.mark.parametrize("mode", ["dense", "mix"])
@pytest.mark.parametrize("schedule", ["shrinking", "growing", "without-low-blocks"])
def test_only_active_matrices_are_scored_masked_and_mixed(mode, schedule):
    run = Run(mode, schedule=schedule, num_stages=4, num_steps=32, ratio=0.1)  # windows of 3, stages of 8 steps
    masked_later = 0
    for step in range(32):
        before = run.matrices()
        drawn = {}

        def during():
            active = {name for name, weight in run.dps.weights.items() if weight.requires_grad}
            assert run.dps.kept.keys() <= active and run.dps.score.keys() <= active
            drawn.update(run.dps.kept)
            for name in run.dps.weights.keys() - active:  # the frozen prefix computes with its own weights
                assert torch.equal(run.dps.weights[name], before[name])

        run.train(during=during)
        stage = run.schedule.at_step(step, 32)
        active = HEAD_WEIGHTS | {
            f"encoder.layer.{i}.{layer}.weight" for i in stage.blocks for layer in BLOCK_LINEARS.values()
        }
        measures = step // 3 % 2 == 0
        assert run.dps.score.keys() == (active if measures else set())
        for name, weight in run.dps.weights.items():
            assert (name in active) or torch.equal(weight, before[name])
        if not measures:
            assert drawn.keys() <= active
            joined = active - drawn.keys()  # without a score yet: they train whole
            assert all((run.dps.weights[name] != before[name]).float().mean() > 0.99 for name in joined)
            assert not joined or schedule == "growing"
            masked_later += len(drawn)
    assert masked_later > 0


def test_the_state_of_frozen_matrices_is_given_back():
    run = Run("mix", schedule="shrinking", num_stages=4, num_steps=32, ratio=0.4)
    for _ in range(9):
        run.train()
    scored = {name for name in run.dps.score}
    assert not any(name.startswith("encoder.layer.0.") for name in scored)
    assert any(name.startswith("encoder.layer.1.") for name in scored)


@pytest.mark.parametrize("method", ["adapter", "bitfit", "lora", "spafit"])
def test_peft_methods_that_freeze_the_matrices_are_refused(method):
    model = tiny_model()
    apply_peft(model, PeftConfig(method))
    with pytest.raises(InputError, match=r"--dps needs every weight matrix to train \(--peft none\), got enc.* frozen"):
        DPS(model, DPSConfig("dense"), 100)
    with pytest.raises(InputError, match=f"--dps masks weights that --peft {method} freezes"):
        TrainConfig(peft=PeftConfig(method), dps=DPSConfig("mix"))


def test_an_unknown_number_of_steps_is_refused():
    with pytest.raises(InputError, match="--dps needs a known number of optimizer steps"):
        DPS(nn.Linear(2, 2), DPSConfig("dense"), None)


@pytest.mark.parametrize("num_steps", [1, 3, 7, 13, 999])
def test_windows_of_less_than_a_step_are_refused_with_a_ratio_that_would_do(num_steps):
    with pytest.raises(InputError, match=f"of {num_steps} steps is less than one step: give at least") as error:
        DPS(nn.Linear(2, 2), DPSConfig("dense", update_ratio=0.001), num_steps)
    assert window_length(float(str(error.value).split()[-1]), num_steps) >= 1


def test_a_run_without_steps_is_refused():
    with pytest.raises(InputError, match="less than one step"):
        DPS(nn.Linear(2, 2), DPSConfig("dense"), 0)


@pytest.mark.parametrize(
    "values, message",
    [
        ({"mode": "sparse"}, "--dps must be one of off, dense, mix, got 'sparse'"),
        ({"p": 1.0}, "--dps-p must be less than 1"),
        ({"p": -0.1}, "--dps-p must be a number in 0..1"),
        ({"p": float("nan")}, "--dps-p must be a number in 0..1"),
        ({"update_ratio": 0}, "--dps-update-ratio must be more than 0"),
        ({"update_ratio": 1.5}, "--dps-update-ratio must be a number in 0..1"),
    ],
)
def test_bad_settings_are_errors_that_say_what_is_allowed(values, message):
    with pytest.raises(InputError, match=message):
        DPSConfig(**{"mode": "dense", **values})


def test_off_is_no_mode_to_build():
    with pytest.raises(ValueError, match="dense or mix"):
        DPS(nn.Linear(2, 2), DPSConfig("off"), 100)


@given(st.integers(1, 5000), st.integers(0, 99))
@settings(max_examples=300, deadline=None, derandomize=True)
def test_the_number_kept_is_the_ceiling_in_exact_arithmetic(size, percent):
    count = num_kept(size, Fraction(str(percent / 100)))
    assert count == -(-size * (100 - percent) // 100)
    assert 1 <= count <= size


@given(st.integers(1, 6), st.integers(1, 6), st.sampled_from(("dense", "mix")), st.integers(0, 9), st.data())
@settings(max_examples=100, deadline=None, derandomize=True)
def test_the_highest_and_all_that_tie_with_the_lowest_of_them_train(rows, columns, mode, tenths, data):
    values = data.draw(st.lists(st.integers(0, 3), min_size=rows * columns, max_size=rows * columns))
    dps = DPS(nn.Sequential(nn.Linear(columns, rows)), DPSConfig(mode, tenths / 10, 0.5), num_steps=2)
    dps.step = 1
    dps.score["0.weight"] = torch.tensor(values, dtype=torch.float32).view(rows, columns)
    dps.times_kept["0.weight"] = torch.ones(columns, dtype=torch.int64)
    dps.before_step()
    # As in the authors' grads_ops.py: no less than the entry at this place in falling order.
    lowest = sorted(values, reverse=True)[math.ceil(rows * columns * Fraction(10 - tenths, 10)) - 1]
    assert dps.kept["0.weight"].flatten().tolist() == [value >= lowest for value in values]


@pytest.mark.parametrize("columns", [1, 8])
def test_where_mix_scored_nothing_in_a_window_of_one_step_the_whole_matrix_trains(columns):
    torch.manual_seed(0)
    model = nn.Linear(columns, 3)
    dps = DPS(model, DPSConfig("mix", 0.9, 0.1), num_steps=10)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    dps.generator.manual_seed(next(s for s in range(999) if not drawn_columns(s, columns, 0.1).any()))
    for step in range(2):
        before = model.weight.detach().clone()
        dps.before_step()
        model(torch.ones(2, columns)).square().sum().backward()
        dps.after_backward()
        optimizer.step()
        dps.after_step()
        optimizer.zero_grad()
        assert (model.weight != before).all() if step else torch.equal(model.weight, before)


def drawn_columns(seed: int, columns: int, probability: float) -> torch.Tensor:
    return torch.empty(1, columns).bernoulli_(probability, generator=torch.Generator().manual_seed(seed))


@given(st.integers(1, 10_000), st.integers(1, 100))
@settings(max_examples=200, deadline=None, derandomize=True)
def test_windows_have_the_floor_of_their_share_of_the_steps(num_steps, percent):
    expected = num_steps * percent // 100
    if expected:
        assert window_length(percent / 100, num_steps) == expected


def test_equal_seeds_draw_equal_columns_and_the_global_random_state_is_not_used():
    runs = [Run("mix"), Run("mix")]
    torch.manual_seed(1)
    runs[0].train()
    state = torch.get_rng_state()
    torch.manual_seed(2)
    runs[1].train()
    assert all(torch.equal(runs[0].dps.times_kept[name], times) for name, times in runs[1].dps.times_kept.items())
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), state)  # this model has no dropout


def test_a_head_that_trains_alone_is_masked_alone():
    run = Run("dense")
    run.engine.enter(Stage(0, 4, 4, False))
    run.schedule = make_schedule("without-low-blocks", 4, 1)
    for _ in range(5):
        run.train()
    assert run.dps.kept.keys() == HEAD_WEIGHTS
