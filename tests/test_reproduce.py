"""`progtuning reproduce`: the paper's tables as series of runs, its printed figures beside ours."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from progtuning.compare.presets import COLUMNS, PRESETS, preset
from progtuning.compare.reproduce import cells, digest_of
from progtuning.compare.runs import splits_of
from progtuning.cost.paper import metric_cells, paper_rows
from progtuning.data.glue import FOLDERS
from tests.test_cli import call, refused

MODELS = {"table1": ("bert-base-uncased", "bert-large-uncased", "FacebookAI/roberta-base")}


@pytest.fixture(scope="module")
def glue(tmp_path_factory) -> Path:
    """Small official folders of CoLA, SST-2 and MRPC, of the words that the tiny model knows."""
    folder = tmp_path_factory.mktemp("glue")
    for name in ("CoLA", "SST-2", "MRPC"):
        (folder / name).mkdir()
    for split, count in (("train", 12), ("dev", 6)):
        sides = [("good film", 1), ("bad film", 0)] * (count // 2)
        (folder / "CoLA" / f"{split}.tsv").write_text("".join(f"x\t{label}\t\t{text}\n" for text, label in sides))
        rows = "".join(f"{text}\t{label}\n" for text, label in sides)
        (folder / "SST-2" / f"{split}.tsv").write_text("sentence\tlabel\n" + rows)
        rows = "".join(f"{label}\t1\t2\t{text}\ta good cast\n" for text, label in sides)
        (folder / "MRPC" / f"{split}.tsv").write_text("Quality\t#1 ID\t#2 ID\t#1 String\t#2 String\n" + rows)
    return folder


def arguments(name, tiny_folder, glue, output, *more) -> list:
    options = "--seeds 2 --epochs 2 --batch-size 4 --max-length 8 --device cpu"
    return ["reproduce", name, "--model", tiny_folder, "--glue", glue, "--output-dir", output, *options.split(), *more]


def test_every_metric_that_the_paper_prints_is_a_cell_but_for_its_averages():
    printed = [cell for cell in metric_cells() if cell["task"] != "average"]
    found = [
        (of.table, cell.row, cell.column, cell.printed)
        for name in PRESETS
        for model in MODELS.get(name, ("bert-base-uncased",))
        for of in [preset(name, model)]
        for cell in cells(of, [])
    ]
    assert sorted(found) == sorted((cell["table"], cell["row"], cell["task"], cell["paper"]) for cell in printed)
    assert len(found) == 140 - 12


def test_beside_a_model_that_the_paper_does_not_have_stand_the_figures_of_bert_base():
    mine, theirs = (preset("table1", model) for model in ("org/mine", "bert-base-cased"))
    assert [method.row for method in mine.methods] == ["mine", "mine + Progtuning"]
    assert [cell.printed for cell in cells(mine, [])] == [cell.printed for cell in cells(theirs, [])]


def test_the_folders_of_glue_are_the_official_ones(shared_data):
    assert {name.name for name in (shared_data / "glue").iterdir()} <= set(FOLDERS.values())
    assert {task for task, _ in COLUMNS.values()} <= {*FOLDERS, "squad", "squad_v2"}


def test_a_table_has_runs_by_the_authors_settings_and_more_tasks_join_it(tiny_folder, glue, tmp_path):
    output = tmp_path / "new" / "table5"
    status, out, err = call(*arguments("table5", tiny_folder, glue, output, "--tasks", "cola"))
    assert status == 0, err
    begun = (output / "rows.jsonl").read_text()
    rows = [json.loads(line) for line in begun.splitlines()]
    assert [(row["row"].rpartition("/")[2], row["task"], row["seed"]) for row in rows] == [
        (row, "cola", seed)
        for seed in (42, 43)
        for row in (
            f"{tiny_folder.name} + Progtuning",
            "Progtuning without low blocks",
            "Progtuning from high blocks",
        )
    ]
    assert all(row["lr"] == 2e-5 and row["epochs"] == 2 and row["train_rows"] == 12 for row in rows)
    # E in every stage, as the paper counts: growing trains as many as shrinking, without-low-blocks fewer.
    updated = [row["updated_parameters"] for row in rows[:3]]
    assert updated[0] == updated[2] > updated[1]
    status, _, err = call(*arguments("table5", tiny_folder, glue, output, "--tasks", "cola", "mrpc", "--resume"))
    assert status == 0 and err.count("reproducing (") == 6
    assert (output / "rows.jsonl").read_text().startswith(begun)
    page = (output / "README.md").read_text()
    rows = [json.loads(line) for line in (output / "rows.jsonl").read_text().splitlines()]
    assert "6 of 12 cells have runs of ours." in page
    assert "Progtuning without low blocks, MRPC: the paper's 68.5 is what one answer for all rows scores" in page
    own = [100 * row["metrics"]["f1"] for row in rows if row["task"] == "mrpc" and "high" in row["row"]]
    assert f"{sum(own) / 2:.1f} ± " in page and "(2) / 67.9" in page
    more = ("--tasks", "cola", "--lr", "1e-3", "--resume")
    line = refused(*call(*arguments("table5", tiny_folder, glue, output, *more)))
    assert line.endswith(f"--resume: {output} is of another run: --lr was the recipe's, now 0.001")


def test_figure_1_trains_each_block_alone_with_each_seed(tiny_folder, glue, tmp_path):
    status, out, err = call(*arguments("figure1", tiny_folder, glue, tmp_path / "run", "--json"))
    assert status == 0, err
    rows = json.loads(out)
    assert [row["seed"] for row in rows] == [42, 43] and all(row["task"] == "sst-2" for row in rows)
    assert all(len(row["blocks"]) == 4 for row in rows)
    page = (tmp_path / "run" / "README.md").read_text()
    assert [line.split("|")[2].strip() for line in page.splitlines() if line.startswith("| sst-2")] == list("1234")


@pytest.mark.parametrize("name, where", [("table3", "Table 3"), ("figure4", "Figure 4")])
def test_closed_forms_need_no_run(name, where):
    status, out, _ = call("reproduce", name, "--json")
    assert status == 0 and json.loads(out) == [row for row in paper_rows() if row["table"] == where]


@pytest.mark.parametrize(
    "given, message",
    [
        (["table9"], "argument TABLE: invalid choice: 'table9'"),
        (["table1"], "reproduce table1 needs --output-dir, the folder of its runs"),
        (["table1", "--output-dir", "out", "--tasks", "mrpc"], "the task mrpc needs --glue, the folder of its files"),
        (["table2", "--output-dir", "out", "--tasks", "mrpc"], "--tasks must be among squad, squad_v2, got mrpc"),
        (["table2", "--output-dir", "out"], "the task squad needs --squad, the folder of its files, or hub"),
        (["table1", "--output-dir", "out", "--jobs", "0"], "--jobs must be an integer in 1..1000, got 0"),
    ],
)
def test_wrong_use_is_one_line(given, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert message in refused(*call("reproduce", *given))
    assert not (tmp_path / "out").exists()


def test_runs_of_other_rows_or_another_model_are_not_taken_up(tiny_folder, glue, tmp_path):
    output, data, model = tmp_path / "run", tmp_path / "glue", tmp_path / "model"
    shutil.copytree(glue, data)
    shutil.copytree(tiny_folder, model)
    one = (*arguments("table5", model, data, output, "--tasks", "cola", "cola"), "--seeds", "1")
    status, _, err = call(*one)
    assert status == 0 and err.count("reproducing (") == 3  # a task that is named twice is run once
    assert call(*one, "--resume")[2].count("reproducing (") == 0
    with open(data / "CoLA" / "train.tsv", "a") as file:
        file.write("x\t1\t\tgood\n")
    splits_of.cache_clear(), digest_of.cache_clear()  # as in another process
    assert f"--resume: {output} has runs of other rows of cola" in refused(*call(*one, "--resume"))
    shutil.copy(glue / "CoLA" / "train.tsv", data / "CoLA" / "train.tsv")
    splits_of.cache_clear(), digest_of.cache_clear()
    weights = load_file(model / "model.safetensors")
    save_file({name: 3 * tensor for name, tensor in weights.items()}, model / "model.safetensors")
    assert refused(*call(*one, "--resume")).endswith(f"{output} is of another run: the weights differ")


@pytest.mark.parametrize("name, failed", [("table5", "2 failed / 67.9"), ("figure1", "# Figure 1")])
def test_runs_that_fail_are_told_from_those_that_were_not_made(name, failed, tiny_folder, glue, tmp_path):
    task = ("--tasks", "mrpc") if name == "table5" else ()
    output = tmp_path / "run"
    status, out, err = call(*arguments(name, tiny_folder, glue, output, *task, "--lr", "1e38"))
    assert (status, out) == (1, "") and err.count("failed: ") == (6 if name == "table5" else 2)
    count = err.count("failed: ")
    assert err.splitlines()[-1].endswith(
        f"none of {count} runs ended with a metric, their reasons are in {output}/rows.jsonl"
    )
    page = (output / "README.md").read_text()
    assert failed in page and "by --recipe paper, --epochs 2, --batch-size 4, --lr 1e+38, --max-length 8\n" in page


def test_a_folder_of_tasks_that_is_not_there_is_named_by_its_option(tiny_folder, tmp_path):
    line = refused(*call(*arguments("table5", tiny_folder, tmp_path / "none", tmp_path / "run")))
    assert line.endswith(f"--glue {tmp_path / 'none'}: no such folder")


OF_RUNS = "--model m; --tasks cola; --output-dir x; --lora-r 2; --seeds 5; --jobs 1; --device cpu".split("; ")


@pytest.mark.parametrize("option", [text.split() for text in OF_RUNS])
def test_a_closed_form_refuses_the_options_of_runs(option):
    line = refused(*call("reproduce", "table3", *option))
    assert line.endswith(f"reproduce table3 is of closed forms, which train nothing: leave out {option[0]}")


def test_what_a_run_would_be_refused_for_is_refused_before_the_folder_is_made(tiny_folder, glue, tmp_path):
    """Of the whole table: a folder that has begun takes no other options."""
    output = tmp_path / "runs"
    more = ["--tasks", "cola", "--dps", "dense", "--dps-update-ratio", "0.0001"]
    line = refused(*call(*arguments("table5", tiny_folder, glue, output, *more)))
    assert "--dps-update-ratio 0.0001 of " in line and not output.exists()
