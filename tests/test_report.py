"""Tables and pictures of runs."""

import json
import os
import re
import shutil
import sys
from dataclasses import replace
from urllib.parse import unquote_to_bytes

import pytest

from progtuning.report import tables
from progtuning.report.pages import speed_lines
from progtuning.report.summary import SUMMARY, read_summary, write_summary
from tests.test_cli import FAST, call, refused

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def runs(tiny_folder, tiny_task, tmp_path_factory):
    """Output folders of full fine-tuning, Progtuning and adaptive freezing."""
    folder = tmp_path_factory.mktemp("runs")
    task = ["--model", tiny_folder, "--task", "classification", "--data", tiny_task]
    for schedule in ("full", "shrinking", "adaptive"):
        status, _, err = call("train", *task, "--output-dir", folder / schedule, *FAST, "--schedule", schedule)
        assert status == 0, err
    return folder


def test_report_compares_runs_in_a_table_with_pictures(runs, tmp_path):
    pytest.importorskip("matplotlib")
    folders = [runs / name for name in ("full", "shrinking", "adaptive")]
    status, _, err = call("report", *folders, "-o", tmp_path / "page.md")
    assert status == 0, err
    page = (tmp_path / "page.md").read_text()
    for folder in folders:
        summary = json.loads((folder / "summary.json").read_text())
        row = next(line for line in page.splitlines() if line.startswith(f"| {folder.name} "))
        assert f"{summary['metrics']['accuracy']:.4f}" in row and tables.millions(summary["updated_parameters"]) in row
    pictures = re.findall(r"!\[.*?\]\((.*?)\)", page)
    assert len(pictures) == 4
    assert all((tmp_path / name).read_bytes().startswith(PNG) for name in pictures)
    assert {path.name for path in tmp_path.iterdir()} == {"page.md", *pictures}


def test_no_picture_has_the_metrics_of_different_tasks_on_one_axis(runs, tmp_path):
    pytest.importorskip("matplotlib")
    summary = json.loads((runs / "full" / "summary.json").read_text())
    other = summary | {"task": "scores", "metrics": {"pearson": 0.5}}
    (tmp_path / "scores").mkdir()
    (tmp_path / "scores" / "summary.json").write_text(json.dumps(other))
    status, _, err = call("report", runs / "full", tmp_path / "scores", "-o", tmp_path / "page.md")
    assert status == 0, err
    assert len(re.findall(r"!\[", (tmp_path / "page.md").read_text())) == 2
    assert not (tmp_path / "page-metric.png").exists()


def test_without_matplotlib_the_report_is_the_tables_alone(runs, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    status, _, err = call("report", runs / "full", "-o", tmp_path / "page.md")
    assert status == 0, err
    assert "![" not in (tmp_path / "page.md").read_text() and len(list(tmp_path.iterdir())) == 1


def test_the_folder_of_the_page_is_made_and_where_it_cannot_be_the_runs_are_not_drawn(runs, tmp_path, monkeypatch):
    page = tmp_path / "new" / "folder" / "page.md"
    status, out, err = call("report", runs / "full", "-o", page)
    assert (status, out) == (0, f"Written: {page}\n"), err
    assert page.read_text().startswith("# Runs\n")
    monkeypatch.setattr("progtuning.report.pages.compare", lambda *_: pytest.fail("the work has begun"))
    line = refused(*call("report", runs / "full", "-o", page / "under" / "a file.md"))
    assert f"--output {page}/under/a file.md: cannot be written: Not a directory" in line
    assert [path.name for path in page.parent.parent.iterdir()] == ["folder"]


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    assert "summary.json: cannot be read" in refused(*call("report", tmp_path, "-o", tmp_path / "page.md"))
    (tmp_path / "summary.json").write_text("{}")
    line = refused(*call("report", tmp_path, "-o", tmp_path / "page.md"))
    assert "summary.json: expected the summary of a run" in line


def altered(summary: dict, place: str, value) -> dict:
    """Return a copy of a summary with another value at a place such as "stages.0.steps"; DROPPED leaves the key out."""
    copy = json.loads(json.dumps(summary))
    *path, last = [int(key) if key.isdigit() else key for key in place.split(".")]
    inner = copy
    for key in path:
        inner = inner[key]
    if value is DROPPED:
        del inner[last]
    else:
        inner[last] = value
    return copy


DROPPED = object()
NAMES, SIZES, COUNTS = (
    "task, settings.schedule or settings.peft.method",
    "num_blocks or updated_parameters",
    ("stages[0].embeddings or .steps"),
)
WRONG = [  # place, what is wrong there, and how the message names it
    ("settings", [None, [], {}, {"peft": None, "schedule": "full"}], "settings"),
    ("task", [None, 1, ["x"]], NAMES),
    ("settings.schedule", [None, 1, DROPPED], NAMES),
    ("settings.peft.method", [None, 1, DROPPED], NAMES),
    (
        "metrics",
        [None, [], {}, {"accuracy": "1"}, {"accuracy": True}, {"accuracy": -1e10}, {"accuracy": None}],
        "metrics",
    ),
    ("num_blocks", [None, 0, 1001, 4.0, True, "4"], SIZES),
    ("updated_parameters", [None, -1, True, "1", 10**31], SIZES),
    ("stages", [None, {}, [1], [None], []], "stages"),
    (
        "stages.0.active_blocks",
        [DROPPED, 1, [1], [1, 2, 3], [0, 4], [1, 5], [1.0, 4], [True, 4], [3, 1], {}],
        "stages[0].active_blocks",
    ),
    ("stages.0.embeddings", [DROPPED, None, 1], COUNTS),
    ("stages.0.steps", [DROPPED, None, -1, 10**12 + 1, True, 1.5], COUNTS),
    *(
        (f"stages.0.{key}", [DROPPED, None, -1, True, "1", 10**31], f"stages[0].{key}")
        for key in ("stage", "updated_parameters", "forward_flops", "backward_flops")
    ),
    (
        "stages.0.seconds",
        [DROPPED, None, [], {"forward": None}, {"forward": -1}, {"forward": "1"}],
        "stages[0].seconds",
    ),
    ("stages.0.peak_bytes", [DROPPED, "1", -1, True], "stages[0].peak_bytes"),
    *((f"stages.0.{key}", ["1", -1, True, 1.5], f"stages[0].{key}") for key in ("examples", "tokens", "slots")),
    *(
        (f"stages.0.{key} of steps", [0], "stages[0]")
        for key in ("forward_flops", "backward_flops", "examples", "tokens", "slots")
    ),
    ("train_rows", ["1", 0, -1, True], "train_rows"),
    ("matmul_peak", ["1", -1, True], "matmul_peak"),
]


@pytest.mark.parametrize("place, values, name", WRONG, ids=[place for place, _, _ in WRONG])
def test_a_wrong_value_of_a_summary_is_refused_by_its_name(place, values, name, runs, tmp_path):
    summary = json.loads((runs / "full" / SUMMARY).read_text())
    for value in values:
        (tmp_path / SUMMARY).write_text(json.dumps(altered(summary, place.removesuffix(" of steps"), value)))
        line = refused(*call("report", tmp_path, "-o", tmp_path / "page.md"))
        assert line.endswith(f"{SUMMARY}: {name} is not what train writes there"), (value, line)


@pytest.mark.parametrize("schedule", ["full", "adaptive"])
def test_a_summary_that_is_read_and_written_is_the_same_file(schedule, runs, tmp_path):
    write_summary(tmp_path, read_summary(runs / schedule))
    assert (tmp_path / SUMMARY).read_bytes() == (runs / schedule / SUMMARY).read_bytes()


def test_a_summary_without_the_keys_that_came_later_is_read_and_reported(runs, tmp_path):
    summary = json.loads((runs / "full" / SUMMARY).read_text())
    needed = {"model", "task", "metrics", "stages", "settings", "num_blocks", "updated_parameters"}
    of_stage = "stage steps active_blocks embeddings updated_parameters forward_flops backward_flops seconds peak_bytes"
    old = {key: summary[key] for key in summary if key in needed}
    old["stages"] = [{key: stage[key] for key in stage if key in of_stage.split()} for stage in summary["stages"]]
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / SUMMARY).write_text(json.dumps(old))
    assert read_summary(tmp_path / "old").to_json() == old
    pages = []
    for folder in (runs / "full", tmp_path / "old"):
        assert call("report", folder, "-o", tmp_path / f"{folder.name}.md")[0] == 0
        pages.append((tmp_path / f"{folder.name}.md").read_text().replace("old", "full"))
    speed = "\n".join(speed_lines(read_summary(runs / "full"))) + "\n"
    assert pages[0].replace(speed, "").splitlines()[6:] == pages[1].splitlines()[6:] and speed in pages[0]
    for key in needed:
        (tmp_path / SUMMARY).write_text(json.dumps(altered(old, key, DROPPED)))
        assert "expected the summary of a run of train" in refused(
            *call("report", tmp_path, "-o", tmp_path / "page.md")
        )


def test_the_speed_of_stages_and_run_is_their_work_by_their_seconds_and_by_all_processes_peaks(runs):
    summary = replace(read_summary(runs / "full"), matmul_peak=2e9, processes=2)
    document = summary.to_json()
    for speed, stages in ((document["speed"], summary.stages), (document["stages"][1]["speed"], summary.stages[1:2])):
        seconds = sum(stage.seconds[phase] for stage in stages for phase in ("forward", "backward", "optimizer"))
        flops = sum(stage.forward_flops + stage.backward_flops for stage in stages)
        for name in ("examples", "tokens", "slots"):
            assert speed[f"{name}_per_second"] == pytest.approx(sum(getattr(one, name) for one in stages) / seconds)
        assert speed["flops_per_second"] == pytest.approx(flops / seconds)
        assert speed["share_of_matmul_peak"] == pytest.approx(flops / seconds / 4e9)
    assert 0 < summary.speed().tokens_per_second <= summary.speed().slots_per_second


def test_a_stage_that_saves_flops_but_no_time_shows_both(runs):
    summary = read_summary(runs / "shrinking")
    first, *_, last = summary.stages
    last = replace(last, backward_flops=0, forward_flops=first.flops // 2, seconds=first.seconds)
    last = replace(last, examples=first.examples)
    header, _, *lines = tables.speed_table(replace(summary, stages=[first, last], matmul_peak=1e12)).splitlines()
    assert re.sub(" +", " ", header).endswith("| TFLOP/s | of peak | FLOPs, of stage 1 | time, of stage 1 |")
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert [(row[0], *row[-2:]) for row in cells] == [
        ("1", "1.00", "1.00"),
        (str(last.stage), "0.50", "1.00"),
        ("all", "0.75", "1.00"),
    ]


def test_adaptive_decisions_stand_in_the_summary_with_their_scores(runs):
    summary = json.loads((runs / "adaptive" / "summary.json").read_text())
    assert summary["decisions"] and summary["settings"]["schedule"] == "adaptive"
    for decision in summary["decisions"]:
        assert set(decision["scores"]) <= {"1", "2", "3", "4"} and 0 <= decision["frozen_blocks"] <= 3


@pytest.mark.parametrize("policy, reached", [([], True), (["--embeddings", "never"], False)])
def test_probe_trains_one_block_at_a_time_and_draws_the_metric_by_block(
    policy, reached, tiny_folder, tiny_task, tmp_path
):
    task = ["--task", "classification", "--data", tiny_task]
    arguments = ["--model", tiny_folder, *task, "--output-dir", tmp_path / "probe"]
    options = [option for option in FAST] + policy
    status, out, err = call("probe", *arguments, *options, "--max-train-rows", 64, "--json")
    assert status == 0, err
    document = json.loads(out)
    assert [row["block"] for row in document["rows"]] == [1, 2, 3, 4]
    assert all(0 <= row["metrics"]["accuracy"] <= 1 for row in document["rows"])
    assert document["settings"]["embeddings"] == ("always" if reached else "never")
    assert document["device"].startswith(("CPU, ", "NVIDIA"))
    assert set(document["versions"]) == {"progtuning", "torch", "python"}
    assert json.loads((tmp_path / "probe" / "probe.json").read_text()) == document
    pytest.importorskip("matplotlib")
    assert (tmp_path / "probe" / "probe.png").read_bytes().startswith(PNG)


def test_tables_align_numbers_to_the_right_and_words_to_the_left():
    text = tables.table(["name", "count"], [["a", 1], ["bcd", 23.5], ["e", None]])
    assert text.splitlines() == [
        "| name | count |",
        "|------|------:|",
        "| a    |     1 |",
        "| bcd  |  23.5 |",
        "| e    |       |",
    ]


def test_two_runs_of_one_name_are_told_apart_by_their_folders(runs, tmp_path):
    for place in ("a", "b"):
        shutil.copytree(runs / "full", tmp_path / place / "run")
    assert call("report", tmp_path / "a" / "run", tmp_path / "b" / "run", "-o", tmp_path / "page.md")[0] == 0
    page = (tmp_path / "page.md").read_text()
    assert f"## {tmp_path / 'a' / 'run'}" in page and f"## {tmp_path / 'b' / 'run'}" in page


def test_the_pictures_of_a_page_of_any_name_are_links_by_markdowns_rules(runs, tmp_path):
    pytest.importorskip("matplotlib")
    shutil.copytree(runs / "full", tmp_path / "a]b\\")
    page = tmp_path / "my (1st) \u00fc%20 \udcff.md"
    status, _, err = call("report", tmp_path / "a]b\\", "-o", page)
    assert status == 0, err
    text = page.read_text()
    links = re.findall(r"^!\[(?:[^\[\]\\]|\\.)*\]\(([!-\'*-~]+)\)$", text, re.MULTILINE)
    names = [os.fsdecode(unquote_to_bytes(link)) for link in links]
    assert names == [f"{page.stem}-1.png", f"{page.stem}-metric.png"] and text.count("![") == 2
    assert all((tmp_path / name).read_bytes().startswith(PNG) for name in names)


def test_a_bar_in_a_cell_is_no_column():
    header, rule, row = tables.table(["class", "rows"], [["a|b", 3]]).splitlines()
    assert row.startswith("| a\\|b ") and row.count("|") == header.count("|") + 1
