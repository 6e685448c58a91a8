"""The README and the laboratory book: commands and code run as they stand, or are taken by their programs."""

import argparse
import json
import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from progtuning.cli.command import main
from tests.squad_files import write_squad

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BOOK = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def commands() -> list[str]:
    return [line for block in blocks("sh") for line in block.replace("\\\n", " ").splitlines()]


def test_the_first_screen_has_the_two_commands_and_ci_runs_the_second_word_for_word():
    first_screen = "\n".join(README.splitlines()[:25])
    demo, tests = (block.strip() for block in blocks("sh")[:2])
    assert demo in first_screen and demo.endswith("progtuning demo")
    assert tests in first_screen and tests.endswith("pytest")
    script = (ROOT / ".ci" / "run").read_text()
    pattern = re.search(r"grep -E '(.*)' README\.md", script)[1]
    assert [line for line in README.splitlines() if re.search(pattern, line)] == [tests]
    for command in (demo, tests):
        assert command.startswith("python3 -m venv .venv && .venv/bin/python -m pip install -c requirements.txt -e ")


def test_the_python_blocks_run_as_they_stand(minilm, tmp_path):
    for block in blocks("python"):
        if "TrainerCallback" in block:  # tests/test_trainer.py runs it, under a Trainer
            continue
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        subprocess.run([sys.executable, "-c", block], check=True, cwd=tmp_path, env=environment)


def write_mrpc(folder: Path) -> None:
    """Write a small folder in MRPC's format."""
    folder.mkdir(parents=True)
    names = "Ann Bob Cleo Dan Eve Finn Gus Hal".split()
    for split, count in (("train", 16), ("dev", 8)):
        lines = ["Quality\t#1 ID\t#2 ID\t#1 String\t#2 String"]
        for i in range(count):
            first, second = names[i % 8], names[(i + i % 2) % 8]
            pair = f"{first} left the house early .\tIt was early when {second} left ."
            lines.append(f"{1 - i % 2}\t{i}\t{i + 100}\t{pair}")
        (folder / f"{split}.tsv").write_text("\ufeff" + "\n".join(lines) + "\n", encoding="utf-8")
    rows = [f"{i}\t{i}\t{i}\t{names[i]} left .\t{names[i]} went ." for i in range(3)]
    (folder / "test.tsv").write_text("index\t#1 ID\t#2 ID\t#1 String\t#2 String\n" + "\n".join(rows) + "\n")


def test_the_commands_run_in_order_as_they_stand(minilm, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_mrpc(tmp_path / "glue_data" / "MRPC")
    write_squad(tmp_path / "squad", "v1.1", train=8, dev=4)
    (tmp_path / "questions.jsonl").write_text('{"question": "Who left?", "context": "Ann left the house early."}\n')
    (tmp_path / "pairs.tsv").write_text("text\ttext_pair\nHe left .\tHe went away .\nIt rains .\tShares rose .\n")
    rows = [f'{i},"Mr {i} cannot log in, again",login\n{i},the bill of {i} is wrong,billing\n' for i in range(8)]
    (tmp_path / "tickets.csv").write_text("id,body,queue\n" + "".join(rows))
    (tmp_path / "new.csv").write_text('body\n"Hello, who can log in?"\n')
    ran = set()
    for command in commands():
        program, *arguments = shlex.split(command)
        if program == "progtuning":
            if arguments[0] == "compare":  # of its grid one run, at the rate that the others lie about
                arguments = ["--lrs" if word == "--lr" else word for word in arguments]
                arguments += "--schedules full --budgets 1 --seeds 1 --jobs 1".split()
            assert main(arguments) == 0, f"{command}\n{capsys.readouterr().err}"
            ran.add(arguments[0])
        elif program == "torchrun":
            module = [sys.executable, "-m", "torch.distributed.run", *arguments]
            subprocess.run(module, check=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
            ran.add(program)
    alone = {"torchrun", "plan", "explain", "paper", "train", "evaluate", "predict", "report", "probe"}
    assert ran == alone | {"compare", "reproduce"}
    predictions = (tmp_path / "predictions.tsv").read_text().splitlines()
    assert predictions[0] == "label\tprobability" and len(predictions) == 3
    assert len((tmp_path / "tickets.tsv").read_text().splitlines()) == 2
    answer = json.loads((tmp_path / "answers.jsonl").read_text())
    assert "Ann left the house early."[answer["start"] : answer["end"]] == answer["answer"] != ""
    written = {path.name for path in (tmp_path / "runs" / "squad-dev").iterdir()}
    assert written == {"predictions.json", "nbest_predictions.json"}
    submission = (tmp_path / "submission" / "MRPC.tsv").read_text().splitlines()
    assert submission[0] == "index\tprediction" and [row.split("\t")[0] for row in submission[1:]] == ["0", "1", "2"]


def test_every_command_of_the_laboratory_book_is_taken_by_its_program(monkeypatch):
    class Taken(BaseException):
        pass

    def parse_args(parser, args=None, namespace=None):
        parse(parser, args, namespace)
        raise Taken

    parse = argparse.ArgumentParser.parse_args
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
    monkeypatch.setattr(sys, "path", [str(ROOT / "benchmarks"), *sys.path])
    found = re.findall(r"`((?:python benchmarks/\w+\.py|progtuning \w+ -)[^`]*)`", BOOK)
    assert len(found) >= 8
    for command in found:
        program, *arguments = shlex.split(command)
        monkeypatch.setattr(sys, "argv", arguments)  # its first is the script, or the name of the command
        with pytest.raises(Taken):
            if program == "progtuning":
                main(arguments)
            runpy.run_path(str(ROOT / arguments[0]), run_name="__main__")


def test_every_module_picture_and_page_that_the_pages_name_exists():
    for name in re.findall(r"[`\s](\w[\w/]*\.py)\b", README):
        assert (ROOT / "progtuning" / name).is_file() or (ROOT / name).is_file(), name
    for page in (ROOT / "README.md", ROOT / "benchmarks" / "README.md"):
        for name in re.findall(r"\]\((?!http)([^)#]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / name).is_file(), name
    tree = re.search(r"^progtuning/\n(.*?)^```", README, re.MULTILINE | re.DOTALL)[1]
    folders = {path.parent.name for path in (ROOT / "progtuning").glob("*/__init__.py")}
    assert folders | {"benchmarks", "tests"} == set(re.findall(r"^ *(\w+)/ ", tree, re.MULTILINE))


def test_only_tables_pictures_and_the_two_commands_are_wider_than_120_columns():
    for text, allowed in ((README, blocks("sh")[:2]), (BOOK, [])):
        wide = [line for line in text.splitlines() if len(line) > 120 and line[:2] not in ("| ", "|-", "![")]
        assert [line + "\n" for line in wide] == [line for line in allowed if len(line) > 121]


@pytest.mark.parametrize("schedule", ["shrinking", "without-low-blocks", "growing", "full", "adaptive"])
def test_every_schedule_is_in_the_readmes_table(schedule):
    assert re.search(rf"^\| `{schedule}` ", README, re.MULTILINE)


def test_the_differences_at_equal_cost_are_those_of_the_laboratory_books_table():
    def cells(text: str, budget: str) -> list[list[str]]:
        lines = [line for line in text.splitlines() if re.match(rf"\| +{re.escape(budget)} \| ", line)]
        return [[cell.strip(" `") for cell in line.split("|")[1:-1]] for line in lines]

    (header,) = [line for line in README.splitlines() if line.startswith("| of the FLOPs of 3 full epochs")]
    schedules = [cell.strip(" `") for cell in header.split("|")[3:-1]]
    for budget in ("0.25", "0.5", "0.75", "1", "1.5"):
        (row,) = cells(README, budget)
        in_book = {line[1]: line[-1] for line in cells(BOOK, budget) if len(line) == 7}
        assert row[2:] == [in_book.get(schedule, "") for schedule in schedules]


def test_the_figures_on_embeddings_are_those_of_the_closed_forms():
    from progtuning.cost.closed_form import updated_parameters
    from progtuning.model.config import ARCHITECTURES
    from progtuning.stages import make_schedule

    config = ARCHITECTURES["bert-base-uncased"].with_head("classification", ("a", "b"))
    full = updated_parameters(config, make_schedule("full", 12, 3), 3)
    for policy, cached, printed_parameters, printed_work in (
        ("always", False, 26, 11),
        ("with-block-1", False, 40, 22),
        ("with-block-1", True, 40, 26),
    ):
        schedule = make_schedule("shrinking", 12, 3, policy)
        assert round(100 * (1 - updated_parameters(config, schedule, 3) / full)) == printed_parameters
        # Forward 1, input gradient 1, weight gradient 1 a block; three epochs of twelve blocks.
        work = kept = 0
        for stage in schedule.stages:
            crossed = 12 if stage.embeddings else len(stage.blocks)
            work += 12 - kept + crossed + len(stage.blocks)
            kept = stage.boundary if cached else 0  # blocks whose output the next stage finds in the cache
        assert round(100 * (1 - work / (3 * 12 * 3))) == printed_work
        row = f"`{policy}`, with `--cache`" if cached else f"`{policy}`[^,|]*"
        assert re.search(rf"^\| {row} *\|.*\|\s+{printed_parameters} % \|\s+{printed_work} % \|", README, re.MULTILINE)
