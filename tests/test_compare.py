"""`progtuning compare`: the runs that it makes, their rows, the choice of learning rates, statistics and advice."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from progtuning.base.errors import InputError, Interrupted, RunError
from progtuning.compare import frontier, runs
from progtuning.compare.grid import CHOICE, RESULT, Grid, Run, default_schedules, run_of, settings_of
from progtuning.compare.runs import ROWS, side_by_side
from progtuning.data import metrics
from progtuning.data.answers import Prediction, Span
from progtuning.data.questions import TASKS
from progtuning.data.squad import Answer, Question
from progtuning.data.tables import Example
from progtuning.data.task import Classes, Numbers
from progtuning.settings.train import TrainConfig
from tests.test_cli import call, refused

ROOT = Path(__file__).resolve().parents[1]

GRID = Grid(("full", "shrinking+cache"), (0.5,), (1e-3, 3e-3), (1, 2))


# The grid


def test_every_schedule_tries_the_same_rates_and_is_compared_at_the_best_on_every_seed_and_budget():
    grid = replace(GRID, budgets=(0.25, 0.5, 1.0))
    assert grid.choices() == [Run(CHOICE, *of, 1) for of in product(grid.schedules, [0.5], grid.lrs)]
    rows = [run._asdict() | {"metrics": {"f1": run.lr if "c" in run.schedule else -run.lr}} for run in grid.choices()]
    chosen = grid.choose(rows, "f1")
    assert chosen == {"full": 1e-3, "shrinking+cache": 3e-3}
    results = grid.results(chosen)
    assert len(results) == len(set(results)) == 12 and {run.part for run in results} == {RESULT}
    assert {(run.schedule, run.lr) for run in results} == set(chosen.items())


def test_of_equal_rates_the_lowest_is_chosen_and_a_schedule_whose_choices_all_failed_is_left_out():
    rows = [run._asdict() | {"metrics": {"f1": 0.5}} for run in GRID.choices() if run.schedule == "full"]
    rows += [run._asdict() | {"error": "diverged"} for run in GRID.choices() if run.schedule != "full"]
    chosen = GRID.choose(rows, "f1")
    assert chosen == {"full": 1e-3} and {run.schedule for run in GRID.results(chosen)} == {"full"}


def test_with_one_rate_nothing_is_chosen():
    grid = replace(GRID, lrs=(1e-4,))
    assert not grid.choices() and grid.choose([], "f1") == dict.fromkeys(grid.schedules, 1e-4)


def test_a_schedule_is_a_named_one_or_a_calendar_with_or_without_a_cache():
    base = TrainConfig(stages=4, epochs=2)
    run = Run(RESULT, "", 0.5, 1e-4, 7)
    for name, schedule, calendar, cache, stages in (
        ("growing", "growing", None, "off", 4),
        ("shrinking+cache", "shrinking", None, "memory", 4),
        ("adaptive", "adaptive", None, "off", 4),
        ("0:2,4:1+cache", TrainConfig.schedule, "0:2,4:1", "memory", None),
    ):
        found = settings_of(run._replace(schedule=name), base)
        assert (found.schedule, found.calendar, found.cache, found.stages) == (schedule, calendar, cache, stages)
        assert (found.budget, found.lr, found.seed, found.epochs) == (0.5, 1e-4, 7, 2)
    assert settings_of(run._replace(schedule="2+cache"), replace(base, cache="disk")).cache == "disk"
    found = settings_of(run._replace(schedule="full+never"), base)
    assert (found.schedule, found.embeddings, found.cache) == ("full", "never", "off")
    found = settings_of(run._replace(schedule="1+eval+always"), base)
    assert (found.embeddings, found.prefix_dropout, found.cache) == ("always", False, "off")
    assert settings_of(run._replace(schedule="full+lr0.8"), base).lr_decay == 0.8
    assert settings_of(run._replace(schedule="2+cache+lr.75"), base).lr_decay == 0.75
    for name in ("fastest", "4:0", "2+cash", "2+", "full+lr1.2", "full+lr"):
        with pytest.raises(InputError):
            settings_of(run._replace(schedule=name), base)


def test_the_schedules_by_default_are_those_of_the_study():
    assert default_schedules(6, 3) == ("full", "shrinking+cache", "growing+cache", "2+cache", "2:2,4:1+cache")
    assert default_schedules(12, 1) == ("full", "4+cache", "4:2,8:1+cache")


def test_the_schedules_by_default_can_be_run_with_any_number_of_blocks_and_stages():
    for blocks, stages in product(range(1, 14), (1, 3)):
        found = default_schedules(blocks, stages)
        assert found[0] == "full" and len(set(found)) == len(found)
        assert ("shrinking+cache" in found) == ("growing+cache" in found) == (stages > 1 and blocks > 1)
        assert sum(":" in name for name in found) == (blocks > 2)
        for name in found:
            settings_of(Run(RESULT, name, 1.0, 1e-4, 1), TrainConfig(stages=stages))


# The command


def arguments(tiny_folder, data, output, *more) -> list:
    options = "--task classification --schedules full 2+cache --budgets 0.5 --lrs 1e-3 4e-3 --seeds 2 --epochs 2"
    options += " --batch-size 32 --max-train-rows 96 --max-length 16 --device cpu"
    return ["compare", "--model", tiny_folder, "--data", data, "--output-dir", output, *options.split(), *more]


@pytest.fixture(scope="module")
def compared(tiny_folder, tiny_task, tmp_path_factory):
    """A comparison's folder, and what the command printed."""
    folder = tmp_path_factory.mktemp("compared") / "new" / "folder"
    status, out, err = call(*arguments(tiny_folder, tiny_task, folder, "--json"))
    assert status == 0, err
    return folder, out, err


def rows_in(folder: Path) -> list[dict]:
    """Return a comparison's rows without their seconds, dates and peaks."""
    rows = [json.loads(line) for line in (folder / ROWS).read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in ("seconds", "date", "peak_bytes")} for row in rows]


def test_a_comparison_has_a_row_a_run_and_says_its_cost_before(compared, tiny_task):
    folder, out, err = compared
    rows = rows_in(folder)
    runs = [run_of(row) for row in rows]
    choices = [run for run in runs if run.part == CHOICE]
    assert choices == [Run(CHOICE, *of, 42) for of in product(("full", "2+cache"), [0.5], (1e-3, 4e-3))]
    chosen = {run.schedule: run.lr for run in runs if run.part == RESULT}
    for schedule, lr in chosen.items():
        of_schedule = {row["lr"]: row["metrics"]["accuracy"] for row in rows[:4] if row["schedule"] == schedule}
        assert of_schedule[lr] == max(of_schedule.values())
    results = [Run(RESULT, schedule, 0.5, chosen[schedule], seed) for seed in (42, 43) for schedule in chosen]
    assert runs[4:] == results
    assert "4 runs to choose learning rates and 4 to compare: 3.6 times the FLOPs" in err
    held_out = [json.loads(line)["label"] for line in (tiny_task / "dev.jsonl").read_text().splitlines()]
    for row in rows[4:]:
        assert 0.35 < row["flops"] / row["flops_full"] <= 0.5
        right = np.array([("dislike", "like")[answer] for answer in row["predictions"]]) == held_out
        assert right.mean() == pytest.approx(row["metrics"]["accuracy"])
    document = json.loads(out)
    assert document == json.loads((folder / "compare.json").read_text())
    assert document["advice"] in (folder / "README.md").read_text()
    for cell in document["cells"]:
        own = [row for row in rows[4:] if row["schedule"] == cell["schedule"]]
        assert cell["metric"] == pytest.approx(np.mean([row["metrics"]["accuracy"] for row in own]))
        assert cell["seeds"] == 2 and cell["failed"] == 0 and ("to_full" in cell) == (cell["schedule"] != "full")


def test_learning_rates_are_chosen_without_a_look_at_the_held_out_rows(compared, tiny_folder, tiny_task, tmp_path):
    other = tmp_path / "data"
    other.mkdir()
    (other / "train.tsv").write_bytes((tiny_task / "train.tsv").read_bytes())
    rows = ['{"text": "the film", "label": "like"}\n', '{"text": "cast", "label": "dislike"}\n']
    (other / "dev.jsonl").write_text("".join(rows))
    status, _, err = call(*arguments(tiny_folder, other, tmp_path / "out", "--seeds", "1"))
    assert status == 0, err
    assert rows_in(tmp_path / "out")[:4] == rows_in(compared[0])[:4]


def test_what_is_missing_is_made_after_a_torn_line_and_a_grid_may_grow(compared, tiny_folder, tiny_task, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    lines = (compared[0] / ROWS).read_text().splitlines(keepends=True)
    (folder / ROWS).write_text("".join(lines[:-1]) + lines[-1][:40])
    (folder / "run.json").write_bytes((compared[0] / "run.json").read_bytes())
    (folder / ".run-killed").mkdir()
    assert "files in it" in refused(*call(*arguments(tiny_folder, tiny_task, folder)))
    status, _, err = call(*arguments(tiny_folder, tiny_task, folder, "--resume"))
    assert status == 0, err
    assert err.count("comparing (") == 1 and "choosing learning rates (" not in err
    assert rows_in(folder) == rows_in(compared[0])
    assert not list(folder.glob(".run-*"))
    more = "--schedules full 2+cache 1 --lrs 1e-3 --budgets 0.3 0.5 --seeds 1 --resume".split()
    status, _, err = call(*arguments(tiny_folder, tiny_task, folder, *more))
    made = {run_of(row)[:-1] for row in rows_in(folder)[8:]}
    assert status == 0 and (RESULT, "1", 0.3, 1e-3) in made and (RESULT, "1", 0.5, 1e-3) in made
    changed = refused(*call(*arguments(tiny_folder, tiny_task, folder, "--resume", "--epochs", "3")))
    assert changed.endswith(f"--resume: {folder} is of another run: --epochs was 2, now 3")


@pytest.mark.parametrize(
    "options, message",
    [
        (("--schedules", "full", "full+cache"), "--cache memory has nothing to keep: under --schedule full"),
        (("--schedules", "shrinking+cache", "--stages", "1"), "--cache memory has nothing to keep"),
        (("--schedules", "9"), "--calendar 9 freezes more blocks than the model has, 4"),
        (("--budgets", "0.001"), "--budget 0.001 pays no step of this run"),
        (("--lrs", "1e-3", "1e-3"), "--lrs must be at least one, each once, got 0.001, 0.001"),
        (("--seeds", "0"), "--seeds must be an integer in 1..1000, got 0"),
        (("--choice-share", "0.01", "--max-train-rows", "20"), "--choice-share 0.01 of 20 training rows is no row"),
        (("--jobs", "0"), "--jobs must be an integer in 1..1000, got 0"),
    ],
)
def test_what_cannot_be_run_is_refused_before_the_first_run(options, message, tiny_folder, tiny_task, tmp_path):
    given = arguments(tiny_folder, tiny_task, tmp_path / "out", *options)
    status, out, err = call(*given)
    assert (status, out) == (2, "") and err.count("\n") == 1 and message.split(".+")[-1] in err
    assert not (tmp_path / "out").exists()


def test_a_run_that_diverges_is_a_row_and_the_others_go_on(tiny_folder, tiny_task, tmp_path):
    options = ("--lrs", "1e-3", "1e30", "--seeds", "1", "--schedules", "full")
    status, out, err = call(*arguments(tiny_folder, tiny_task, tmp_path / "out", *options))
    assert status == 0, err
    assert "lr 1e+30: failed: " in err
    rows = rows_in(tmp_path / "out")
    assert [("error" in row, row["lr"]) for row in rows] == [(False, 1e-3), (True, 1e30), (False, 1e-3)]
    assert "Nothing stands beside full fine-tuning" in out


def test_a_run_that_finds_no_room_is_no_row_and_is_made_when_there_is(tiny_folder, tiny_task, tmp_path, monkeypatch):
    """What a run diverges by is its settings; want of memory or disk says nothing of them."""
    made = []

    def without_room(*arguments):
        if len(made) == 1:
            raise RunError("--cache memory: no room for 3 GB")
        made.append(fine_tune(*arguments))
        return made[-1]

    fine_tune, whole = runs.fine_tune, arguments(tiny_folder, tiny_task, tmp_path / "out")
    monkeypatch.setattr(runs, "fine_tune", without_room)
    status, _, err = call(*whole)
    assert status == 1 and err.splitlines()[-1].endswith("error: --cache memory: no room for 3 GB")
    assert ["error" in row for row in rows_in(tmp_path / "out")] == [False]
    monkeypatch.setattr(runs, "fine_tune", fine_tune)
    status, _, err = call(*whole, "--resume")
    assert status == 0, err
    assert not any("error" in row for row in rows_in(tmp_path / "out"))


def test_a_comparison_that_a_signal_stops_says_what_is_kept_and_how_to_go_on(
    tiny_folder, tiny_task, tmp_path, monkeypatch
):
    made = []

    def stopped(*arguments):
        if made:
            raise Interrupted("stopped by SIGTERM at step 3 of 9", 15)
        made.append(fine_tune(*arguments))
        return made[-1]

    fine_tune = runs.fine_tune
    monkeypatch.setattr(runs, "fine_tune", stopped)
    status, _, err = call(*arguments(tiny_folder, tiny_task, tmp_path / "out"))
    hint = f"1 runs are kept in {tmp_path / 'out'}; to go on: the same command with --resume"
    assert status == 143 and err.splitlines()[-1] == f"progtuning: error: stopped by SIGTERM: {hint}"
    assert len(rows_in(tmp_path / "out")) == 1 and not list((tmp_path / "out").glob(".run-*"))


# Side by side


def touch_and_fail(mark: Path, fails: bool) -> dict:
    mark.touch()
    if fails:
        raise RunError("the disk is full")
    time.sleep(0.5)
    return {"mark": mark.name}


def test_where_a_call_fails_those_that_have_not_begun_are_not_begun(tmp_path):
    calls = [partial(touch_and_fail, tmp_path / str(i), fails=i == 1) for i in range(12)]
    with pytest.raises(RunError, match="the disk is full"):
        list(side_by_side(calls, jobs=2))
    begun = {path.name for path in tmp_path.iterdir()}
    assert {"0", "1"} <= begun and "11" not in begun  # some lie in the workers' queue already


# Statistics


@dataclass
class Rows:
    """Labels of held-out rows, and predictions that are wrong for some share of them."""

    labels: np.ndarray

    def predictions(self, wrong: float, seed: int) -> list[int]:
        flips = np.random.default_rng(seed).random(len(self.labels)) < wrong
        return (self.labels ^ flips).tolist()

    def sampled(self, answers):
        examples = [Example("a", label=int(label)) for label in self.labels]
        return Classes("t", ("no", "yes"), ("accuracy",)).sampled(answers, examples)


@pytest.fixture
def held_out() -> Rows:
    return Rows(np.random.default_rng(0).integers(2, size=300))


def test_differences_are_those_of_scipys_paired_bootstrap(held_out):
    stats = pytest.importorskip("scipy.stats")
    own, full = held_out.predictions(0.2, seed=1), held_out.predictions(0.1, seed=2)
    rows, other = ({"seed": 1, "predictions": predictions} for predictions in (own, full))
    draws = frontier.bootstrap([rows], [other], held_out.sampled, len(held_out.labels))
    gains = 1.0 * (own == held_out.labels) - 1.0 * (full == held_out.labels)
    expected = stats.bootstrap((gains,), lambda x, axis: x.mean(axis), n_resamples=5000, method="percentile", rng=0)
    assert draws[0] == pytest.approx(gains.mean())
    assert frontier.percentiles(draws) == pytest.approx(expected.confidence_interval, abs=0.01)
    same = frontier.bootstrap([other], [other], held_out.sampled, len(held_out.labels))
    assert frontier.points(same[0], *frontier.percentiles(same)) == "+0.0 (+0.0 to +0.0)"
    assert np.isnan(frontier.bootstrap([rows], [other | {"seed": 2}], held_out.sampled, 300)[0])


def test_over_seeds_the_interval_is_wider_where_they_differ(held_out):
    def width(wrongs):
        rows = [{"seed": i, "predictions": held_out.predictions(wrong, i)} for i, wrong in enumerate(wrongs)]
        full = [{"seed": i, "predictions": held_out.predictions(0.1, 100 + i)} for i in range(len(wrongs))]
        low, high = frontier.percentiles(frontier.bootstrap(rows, full, held_out.sampled, len(held_out.labels)))
        return high - low

    assert width([0.05, 0.45, 0.05, 0.45]) > 2 * width([0.25] * 4)


def cell_rows(held_out, schedule, budget, wrong, seeds=4, lr=1e-4):
    common = {"part": RESULT, "schedule": schedule, "budget": budget, "lr": lr, "steps": 10, "seconds": 1.0}
    common |= {"flops": 100 * budget, "flops_full": 100, "updated_parameters": 10**6}
    return [
        common | {"seed": seed, "predictions": held_out.predictions(wrong, 1000 * (schedule == "full") + seed)}
        for seed in range(seeds)
    ]


@pytest.mark.parametrize(
    "wrong, said",
    [
        (0.02, "Use 2+cache (lr 0.0001): at 0.5 of full fine-tuning's FLOPs it is above full at the same cost, by +"),
        (0.2, "Use full fine-tuning (lr 0.0001), for as long as you can pay: at the same cost no other schedule is ab"),
        (
            0.45,
            "Use full fine-tuning (lr 0.0001), for as long as you can pay: at the same cost every other schedule is b",
        ),
    ],
)
def test_the_advice_is_full_fine_tuning_unless_something_is_above_it_beyond_chance(wrong, said, held_out):
    grid = Grid(("full", "2+cache"), (0.5,), (1e-4,), (1,))
    rows = cell_rows(held_out, "full", 0.5, 0.2) + cell_rows(held_out, "2+cache", 0.5, wrong)
    found = frontier.cells(rows, grid, held_out.sampled, len(held_out.labels))
    assert frontier.advice(found, "accuracy").startswith(said)
    assert [cell["cost"] for cell in found] == [0.5, 0.5]
    best = frontier.frontier(found)
    assert [cell["schedule"] for cell in best] == ["2+cache" if found[1]["metric"] > found[0]["metric"] else "full"]
    low, high = found[1]["to_full"][1:]
    wide_low, wide_high = found[1]["to_full_of_all"]
    assert wide_low <= low <= found[1]["to_full"][0] <= high <= wide_high


def test_the_table_has_the_cost_of_the_choice_and_the_runs_that_failed(held_out):
    grid = Grid(("full", "1"), (0.5,), (1e-4, 1e-3), (1,))
    rows = cell_rows(held_out, "full", 0.5, 0.2) + cell_rows(held_out, "1", 0.5, 0.2)
    failed = {key: rows[-1][key] for key in ("part", "schedule", "budget", "lr")} | {"seed": 9, "error": "diverged"}
    choices = [dict(rows[-1], part=CHOICE, lr=lr, flops=40) for lr in grid.lrs]
    found = frontier.cells([*rows, failed, *choices], grid, held_out.sampled, len(held_out.labels))
    assert found[1]["choice_share"] == 0.8 and found[0]["choice_share"] == 0
    line = frontier.comparison_table(found, "f1").splitlines()[3].split("|")
    assert line[4].strip() == "4 (1 failed)" and line[-2].strip() == "0.80"
    assert frontier.rates_at_an_edge(found, grid).startswith("the learning rate chosen is the lowest for full, 1: ")


# The metric of a sample


@given(st.data())
def test_the_metric_of_a_sample_of_all_rows_is_the_tasks_and_that_of_some_rows_is_theirs(data):
    count = data.draw(st.integers(2, 12))
    names = st.sampled_from(["accuracy", "f1", "matthews"])
    labels = data.draw(st.lists(st.integers(0, 1), min_size=count, max_size=count))
    answers = data.draw(st.lists(st.integers(0, 1), min_size=count, max_size=count))
    task = Classes("t", ("no", "yes"), (data.draw(names),))
    indices = np.array(data.draw(st.lists(st.integers(0, count - 1), min_size=1, max_size=count)))
    sampled = task.sampled(answers, [Example("a", label=label) for label in labels])
    metric = metrics.METRICS[task.main_metric]
    assert sampled(np.arange(count)) == metric(np.array(answers), np.array(labels))
    assert sampled(indices) == metric(np.array(answers)[indices], np.array(labels)[indices])


def test_numbers_are_scored_as_their_task_scores_them():
    labels, answers = [0.5, 1.0, 3.0, 2.0], [0.1, 2.0, 2.5, 1.0]
    examples = [Example("a", label=label) for label in labels]
    sampled = Numbers("t", (), ("pearson", "spearman")).sampled(answers, examples)
    assert sampled(np.array([0, 2, 2, 3])) == metrics.pearson([0.1, 2.5, 2.5, 1.0], [0.5, 3.0, 3.0, 2.0])


@pytest.mark.parametrize("name", ["squad", "squad_v2"])
def test_answers_are_scored_as_their_task_scores_decisions(name):
    task, span = TASKS[name], lambda text, score: Span(text, 0, len(text), score, 0.0)
    golds = [["Ann Lee"], ["the house"], ["early", "at dawn"], []][: 4 if task.null_answers else 3]
    texts, nulls = ["Ann", "house", "late", "dawn"], [0.0, 5.0, 0.0, 9.0]
    decisions = [
        Prediction(str(i), (span(text, 1.0),), span("", null) if task.null_answers else None)
        for i, (text, null, _) in enumerate(zip(texts, nulls, golds))
    ]
    questions = [Question(str(i), "q", "c", tuple(Answer(text, 0) for text in gold)) for i, gold in enumerate(golds)]
    expected = task.score(decisions, SimpleNamespace(questions=questions), TrainConfig())
    sampled = task.sampled(task.answers(decisions, TrainConfig()), questions)
    assert sampled(np.arange(len(golds))) == pytest.approx(expected[task.main_metric])


@pytest.mark.parametrize("schedule", ["shrinking+never+always", "growing+eval+eval", "2+lr0.8+lr0.9", "2+cache+cache"])
def test_a_suffix_that_says_again_what_stands_before_it_is_refused(schedule):
    with pytest.raises(InputError, match=rf"--schedules {re.escape(schedule)}: \+\S+ says again what stands before it"):
        settings_of(Run(RESULT, schedule, 0.5, 1e-3, 1), TrainConfig())


WORKERS = """
import time
from functools import partial
from progtuning.compare.runs import side_by_side
if __name__ == "__main__":
    list(side_by_side([partial(time.sleep, 600)] * 2, jobs=2))
"""


def test_workers_end_when_the_process_that_began_them_is_killed(tmp_path):
    (tmp_path / "workers.py").write_text(WORKERS)
    parent = subprocess.Popen([sys.executable, tmp_path / "workers.py"], env=os.environ | {"PYTHONPATH": str(ROOT)})
    children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children")

    def at_work() -> list[str]:
        """The workers that wait in `sleep`, past their imports."""
        return [pid for pid in children.read_text().split() if is_worker(pid) and threads(pid) > 1]

    try:
        wait_until(lambda: len(at_work()) == 2)
        workers = at_work()
    finally:
        parent.kill()
        parent.wait()
    wait_until(lambda: not any(map(is_worker, workers)))


def is_worker(pid: str) -> bool:
    try:
        return b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def threads(pid: str) -> int:
    return len(os.listdir(f"/proc/{pid}/task"))


def wait_until(is_so, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < end
        time.sleep(0.1)


def test_other_weights_are_refused_and_the_same_by_another_name_are_not(compared, tiny_folder, tiny_task, tmp_path):
    folder, model = tmp_path / "folder", tmp_path / "model"
    shutil.copytree(compared[0], folder)
    shutil.copytree(tiny_folder, model)
    again = (*arguments(model, tiny_task, folder), "--matmul-peak", "1", "--resume")
    assert call(*again)[0] == 0
    weights = load_file(model / "model.safetensors")
    save_file({name: 3 * tensor for name, tensor in weights.items()}, model / "model.safetensors")
    assert refused(*call(*again)).endswith(f"{folder} is of another run: the weights differ")


def test_a_comparison_of_before_is_taken_up_by_what_it_says_of_its_model(compared, tiny_folder, tiny_task, tmp_path):
    """It has the model's name, and neither its weights nor its architecture."""
    folder = tmp_path / "folder"
    shutil.copytree(compared[0], folder)
    run = json.loads((folder / "run.json").read_text())
    del run["identity"]["weights"], run["identity"]["architecture"]
    run["identity"]["model"] = "tiny"
    (folder / "run.json").write_text(json.dumps(run))
    assert call(*arguments(tiny_folder, tiny_task, folder), "--resume")[0] == 0
    (folder / ROWS).unlink()  # killed before it had any
    status, _, err = call(*arguments(tiny_folder, tiny_task, folder), "--seeds", "1", "--resume")
    assert status == 0 and err.count("choosing learning rates (") == 4


def test_the_rate_of_the_table_is_the_one_that_is_chosen_now_not_the_one_that_ran_last(held_out):
    grid = Grid(("full",), (0.5,), (1e-4,), (1,))
    rows = cell_rows(held_out, "full", 0.5, 0.2, lr=1e-4) + cell_rows(held_out, "full", 0.5, 0.4, lr=1e-6)
    of = (held_out.sampled, len(held_out.labels))
    assert [cell["lr"] for cell in frontier.cells(rows, grid, *of, grid.choose(rows, "accuracy"))] == [1e-4]
    assert [cell["lr"] for cell in frontier.cells(rows, grid, *of)] == [1e-6]


def test_predictions_of_numbers_keep_all_that_a_float32_holds():
    numbers = np.array([1.2345678e-5, 3.3333333, -7e10], dtype=np.float32)
    kept = np.array(Numbers("any", (), ("pearson",)).plain(numbers), dtype=np.float32)
    assert np.array_equal(kept, numbers)


KILLED = """
import os, signal, sys, threading, time
from functools import partial
from progtuning.base.errors import Interrupted, RunError
from progtuning.compare.runs import side_by_side
from progtuning.run.signals import StopSignals

def run(how):
    if how == "killed":
        os.kill(os.getpid(), 9)
    if how == "signal":
        with StopSignals() as signals:
            os.kill(os.getpid(), 15)
            time.sleep(1)
            signals.check()
    if how == "odd":
        raise Odd(1, code=2)
    if how == "gone":
        threading.Timer(0.5, os._exit, [1]).start()
        return {}
    if how == "last":
        return {}
    time.sleep(600)

class Odd(Exception):  # cannot be read back in another process
    def __init__(self, one, *, code):
        super().__init__("odd")

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job is begun without
    try:
        other = "last" if sys.argv[1] == "odd" else "sleep"  # what has begun is waited for
        calls = side_by_side([partial(run, sys.argv[1]), partial(run, other), partial(run, "last")], jobs=2)
        next(calls)
        time.sleep(2)  # within which "gone" ends, that has no call then
        list(calls)
    except (RuntimeError, KeyboardInterrupt) as error:
        print(type(error).__name__, error, "in run" if "in run" in str(error.__cause__) else "")
"""


@pytest.mark.parametrize("how, said", [
    ("killed", "_Killed a process of a run was killed, perhaps for want of memory: try fewer --jobs"),
    ("gone", "_Killed a process of a run was killed, perhaps for want of memory: try fewer --jobs"),
    ("odd", "RuntimeError Odd: odd in run"),
    ("signal", "Interrupted stopped by SIGTERM"),
    ("sleep", "KeyboardInterrupt "),
])  # fmt: skip
def test_workers_that_are_killed_or_stopped_end_the_comparison_at_once_in_words(how, said, tmp_path):
    (tmp_path / "workers.py").write_text(KILLED)
    command, env = [sys.executable, tmp_path / "workers.py", how], os.environ | {"PYTHONPATH": str(ROOT)}
    parent = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    if how == "sleep":
        children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children")
        wait_until(lambda: sum(is_worker(pid) and threads(pid) > 1 for pid in children.read_text().split()) == 2)
        parent.send_signal(signal.SIGINT)
    try:
        out, err = parent.communicate(timeout=120)
    finally:
        parent.kill()
    assert out.startswith(said), (out, err)
    assert "Traceback" not in err


@pytest.mark.parametrize("options, message", [
    ("--lr 1e-3 --lrs 1e-3", "--lr says nothing beside --lrs: leave one of them out"),
    ("--cache memory --schedules full growing", "--cache memory says nothing without a schedule that has +cache"),
    ("--schedules full foo", "--schedules must be of full, shrinking, "),
    ("--schedules full 9", "--schedules 9 at --budgets 0.5: --calendar 9 freezes more blocks than the model has, 4"),
    ("--schedules full --budgets 0.001", "--schedules full at --budgets 0.001: --budget 0.001 pays no step"),
    ("--batch-tokens 64", "unrecognized arguments: --batch-tokens 64"),
])  # fmt: skip
def test_what_no_grid_can_have_or_use_is_refused_by_the_names_of_its_options(
    options, message, tiny_folder, tiny_task, tmp_path
):
    given = ["--model", tiny_folder, "--task", "classification", "--data", tiny_task, "--output-dir", tmp_path / "out"]
    assert message in refused(*call("compare", *given, "--device", "cpu", *options.split()))
    assert not (tmp_path / "out").exists()


def test_where_no_run_ends_with_a_metric_the_command_fails(tiny_folder, tiny_task, tmp_path):
    options = ("--lrs", "1e30", "--seeds", "1", "--schedules", "full", "2")
    status, out, err = call(*arguments(tiny_folder, tiny_task, tmp_path / "out", *options))
    assert (status, out) == (1, "") and "Warning" not in err
    reason = f"no run of 2 ended with a metric, their reasons are in {tmp_path / 'out' / ROWS}: lower --lrs"
    assert err.splitlines()[-1].endswith(reason)
    assert not (tmp_path / "out" / "frontier.png").exists()


def test_a_signal_between_two_runs_says_how_to_go_on_too(tiny_folder, tiny_task, tmp_path, monkeypatch):
    """Within a run that one's own handlers speak."""
    described = runs.describe
    monkeypatch.setattr(runs, "describe", lambda run: os.kill(os.getpid(), signal.SIGTERM) or described(run))
    status, _, err = call(*arguments(tiny_folder, tiny_task, tmp_path / "out"))
    hint = f"stopped by SIGTERM: 1 runs are kept in {tmp_path / 'out'}; to go on: the same command with --resume"
    assert status == 143 and err.splitlines()[-1] == f"progtuning: error: {hint}"
    assert not list((tmp_path / "out").glob(".run-*"))
