"""`train --dry-run`: what the run would be, to the FLOP, and every error of it; nothing trains, nothing is written."""

import json
import subprocess
from pathlib import Path

import pytest

from progtuning.cli.command import build_parser
from progtuning.cli.options import train_config
from progtuning.cost.closed_form import stage_bytes
from progtuning.cost.plan import kernels_of
from progtuning.methods.schedules import build_schedule
from progtuning.model.config import BertConfig
from progtuning.step.ledger import Ledger
from tests.squad_files import write_squad
from tests.test_cli import BAD_OPTIONS, FAST, call, refused
from tests.test_distributed import ENVIRONMENT, TORCHRUN, train_command

RUNS = {
    "plain": [],
    "sample": ["--max-train-rows", "50", "--stages", "2", "--class-weights", "balanced"],
    "pieces": ["--accumulation-steps", "3", "--embeddings", "never"],
    "tokens": ["--batch-tokens", "40", "--accumulation-steps", "2", "--schedule", "without-low-blocks"],
    "cache": ["--cache", "memory", "--cache-dtype", "bf16", "--schedule", "growing", "--peft", "bitfit"],
    "lora": ["--peft", "lora", "--lora-r", "2", "--cache", "disk", "--checkpoint-activations"],
    "budget": ["--calendar", "0:2,1:3,4:1", "--budget", "0.6", "--cache", "memory"],
}
OF_STAGE = (
    "stage steps active_blocks embeddings trainable_parameters updated_parameters forward_flops backward_flops "
    "cache_bytes gradient_sum_bytes"
).split()
OF_RUN = "model task num_blocks train_rows dev_rows updated_parameters updated_parameters_full".split()


def command(name: str, tiny_folder: Path, data: Path, task: str = "classification") -> list:
    options = FAST if name != "tokens" else FAST[:2] + FAST[4:]
    return ["train", "--model", tiny_folder, "--task", task, "--data", data, *options, *RUNS[name]]


@pytest.fixture
def no_training(monkeypatch):
    """Let what trains, and what takes room for it, fail."""
    for place in (
        "run.finetune.build_trainer",
        "run.build.build_optimizer",
        "speed.cache._on_disk",
        "run.build.Trainer",
    ):
        monkeypatch.setattr(f"progtuning.{place}", lambda *_, **__: pytest.fail("the run has begun"))
    return monkeypatch


@pytest.mark.parametrize("name", RUNS)
def test_its_plan_is_the_account_of_the_run_and_its_words_are_those_before_training(
    name, tiny_folder, tiny_task, tmp_path, no_training
):
    output = tmp_path / "new" / "run"
    arguments = [*command(name, tiny_folder, tiny_task), "--output-dir", output, "--json"]
    status, out, said = call(*arguments, "--dry-run")
    assert status == 0, said
    assert list(tmp_path.iterdir()) == []
    no_training.undo()
    plan = json.loads(out)
    status, out, err = call(*arguments)
    assert status == 0, err
    summary = json.loads(out)
    assert len(plan["stages"]) == len(summary["stages"])
    for planned, made in zip(plan["stages"], summary["stages"]):
        assert {key: planned[key] for key in OF_STAGE} == {key: made[key] for key in OF_STAGE}
    assert {key: plan[key] for key in OF_RUN} == {key: summary[key] for key in OF_RUN}
    assert plan["run"]["steps"] == sum(stage["steps"] for stage in summary["stages"])
    flops = sum(stage["forward_flops"] + stage["backward_flops"] for stage in summary["stages"])
    assert plan["run"]["flops"] == flops > 0
    lines = [line for line in err.splitlines() if "|" not in line]  # but for the bar
    assert said.splitlines() == lines[: len(said.splitlines())] and any(
        line.startswith("dev: 40 rows") for line in lines
    )


@pytest.mark.parametrize("name", ["plain", "pieces", "tokens", "lora"])
def test_the_bytes_of_a_step_are_the_most_that_any_of_its_batches_needs(
    name, tiny_folder, tiny_task, tmp_path, monkeypatch
):
    arguments = [*command(name, tiny_folder, tiny_task), "--output-dir", tmp_path / "run", "--json"]
    plan, shapes, count = json.loads(call(*arguments, "--dry-run")[1]), set(), Ledger.count

    def noting(ledger, rows, length, weight):
        shapes.add((len(rows), length))
        count(ledger, rows, length, weight)

    monkeypatch.setattr(Ledger, "count", noting)
    assert call(*arguments)[0] == 0
    settings = train_config(build_parser().parse_args([str(one) for one in arguments]), 4)
    config = BertConfig.from_json(tiny_folder / "config.json").with_head("classification", ("dislike", "like"))
    assert len(shapes) >= 3 and config.hidden_dropout_prob > 0
    kernels = kernels_of("cpu", settings)
    for stage, planned in zip(build_schedule(settings, 4).stages, plan["stages"], strict=True):
        sizes = [sum(stage_bytes(config, stage, settings.peft, *shape, kernels).values()) for shape in shapes]
        assert planned["step_bytes"] == max(sizes) > min(sizes)


def test_of_questions_the_windows_are_planned(tiny_folder, tmp_path, no_training):
    write_squad(tmp_path / "squad", "v1.1", train=20, dev=4, words=40)
    arguments = [
        *command("plain", tiny_folder, tmp_path / "squad", "squad"),
        "--output-dir",
        tmp_path / "run",
        "--json",
    ]
    arguments += ["--doc-stride", "2"]
    status, out, err = call(*arguments, "--dry-run")
    assert status == 0, err
    no_training.undo()
    plan, summary = json.loads(out), json.loads(call(*arguments)[1])
    assert plan["run"]["rows"] == summary["train_windows"] > plan["train_rows"] == 20
    assert [stage["backward_flops"] for stage in plan["stages"]] == [
        stage["backward_flops"] for stage in summary["stages"]
    ]


def test_of_adaptive_the_plan_is_the_most_that_it_costs(tiny_folder, tiny_task, tmp_path):
    arguments = [*command("plain", tiny_folder, tiny_task), "--schedule", "adaptive", "--stages", "6"]
    arguments += ["--output-dir", tmp_path / "run", "--cache", "memory"]
    status, text, err = call(*arguments, "--dry-run")
    assert status == 0 and "adaptive decides while it trains: this is the most it costs." in text, err
    plan, summary = json.loads(call(*arguments, "--dry-run", "--json")[1]), json.loads(call(*arguments, "--json")[1])
    assert len(summary["stages"]) > 1 and plan["run"]["steps"] == sum(stage["steps"] for stage in summary["stages"])
    flops = sum(stage["forward_flops"] + stage["backward_flops"] for stage in summary["stages"])
    assert flops < plan["run"]["flops"] == plan["run"]["flops_full"]
    assert plan["stages"][0]["cache_bytes"] == max(stage["cache_bytes"] for stage in summary["stages"]) > 0


@pytest.mark.parametrize(
    "options, note",
    [
        (["--precision", "bf16"], "The bytes of a step in bf16 are not known on a CPU."),
        (["--dps", "mix"], "What --dps mix keeps is not among the bytes of a step."),
        (["--patience", "2"], "--patience 2 may end the run before."),
    ],
)
def test_the_table_says_what_is_not_known(options, note, tiny_folder, tiny_task, tmp_path):
    arguments = [*command("plain", tiny_folder, tiny_task), "--output-dir", tmp_path / "run", *options, "--dry-run"]
    status, out, err = call(*arguments)
    assert status == 0, err
    assert out.splitlines()[-1] == note
    first = next(line for line in out.splitlines() if line.startswith("|     1 |"))
    plan = json.loads(call(*arguments, "--json")[1])
    assert (plan["stages"][0]["step_bytes"] is None) == (first.split("|")[9].strip() == "") == ("bf16" in options)
    assert plan["run"]["flops"] > 0 and not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind", BAD_OPTIONS)
def test_a_wrong_option_is_refused_in_the_words_of_the_run(kind, tiny_folder, tiny_task, tmp_path, no_training):
    task = ["--task", "classification", "--data", tiny_task]
    arguments = ["train", "--model", tiny_folder, *task, "--output-dir", tmp_path / "run", *FAST, *BAD_OPTIONS[kind][0]]
    dry = call(*arguments, "--dry-run")
    refused(*dry)
    no_training.undo()
    assert dry == call(*arguments)


@pytest.mark.parametrize(
    "more, message",
    [
        (["--class-weights", "love=2"], "--class-weights: got the class love"),
        (["--budget", "0.000001"], "pays no step"),
        (["--keep", "best", "--evaluate", "end"], "--keep best compares evaluations"),
        (["--null-threshold", "1"], "--null-threshold is for --task squad_v2"),
        (["--calendar", "5"], "--calendar 5 freezes more blocks than the model has, 4"),
        (["--output-dir", "FILE/run"], "cannot be made a folder: Not a directory"),
        (["--model", "PICKLE"], "is a pickle, which is never read"),
    ],
)
def test_so_is_what_shows_later(more, message, tiny_folder, tiny_task, tmp_path, no_training):
    (tmp_path / "file").write_text("")
    (tmp_path / "pickle").mkdir()
    for name in ("config.json", "vocab.txt"):
        (tmp_path / "pickle" / name).write_bytes((tiny_folder / name).read_bytes())
    (tmp_path / "pickle" / "pytorch_model.bin").write_bytes(b"")
    places = {"FILE": str(tmp_path / "file"), "PICKLE": str(tmp_path / "pickle")}
    for word, place in places.items():
        more = [option.replace(word, place) for option in more]
    arguments = [*command("plain", tiny_folder, tiny_task), "--output-dir", tmp_path / "run", *more]
    dry = call(*arguments, "--dry-run")
    assert message in refused(*dry)
    no_training.undo()
    assert dry == call(*arguments)


def test_with_resume_another_run_is_refused_and_the_folder_stays_as_it_is(tiny_folder, tiny_task, tmp_path):
    run = tmp_path / "run"
    arguments = [*command("sample", tiny_folder, tiny_task), "--output-dir", run]
    assert call(*arguments)[0] == 0
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in run.iterdir()}
    status, out, err = call(*arguments, "--resume", "--dry-run")
    assert status == 0 and "The run: 21 steps" in out, err
    other = [*arguments, "--resume", "--seed", "5"]
    dry = call(*other, "--dry-run")
    assert "--resume: " in refused(*dry) and "--seed was" in dry[2]
    assert dry == call(*other)
    assert before == {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in run.iterdir()}


def test_several_processes_say_it_once(tiny_folder, tiny_task, tmp_path):
    more = ["--batch-size", "30", "--cache", "memory", "--dry-run", "--json"]
    command = [*TORCHRUN, "-m", "progtuning", *train_command(tiny_folder, tiny_task, tmp_path / "two", *more)]
    ran = subprocess.run(command, env=ENVIRONMENT, cwd=tmp_path, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    two, one = json.loads(ran.stdout), json.loads(call(*train_command(tiny_folder, tiny_task, tmp_path, *more))[1])
    assert ran.stderr.count("train: 320 rows") == 1 and list(tmp_path.iterdir()) == []
    assert two["run"]["steps"] == one["run"]["steps"] == 33
    assert two["stages"][0]["step_bytes"] < one["stages"][0]["step_bytes"]  # each has half of a batch


@pytest.mark.parametrize(
    "options, idle, num_stages",
    [
        ("--epochs 2 --stages 4", "stages 2, 4 come", 4),
        ("--epochs 1 --calendar 0:1,2:1", "stage 2 comes", 2),
        ("--epochs 2 --stages 2", None, 2),
        ("--epochs 3 --schedule adaptive", None, 15),
    ],
)
def test_stages_that_come_to_no_step_are_named(options, idle, num_stages, tiny_folder, tiny_task, tmp_path):
    fixed = ["--max-train-rows", "8", "--batch-size", "8", "--max-length", "16", "--device", "cpu", "--dry-run"]
    given = ["--model", tiny_folder, "--task", "classification", "--data", tiny_task, "--output-dir", tmp_path / "run"]
    status, _, said = call("train", *given, *fixed, *options.split())
    assert status == 0, said
    steps = options.split()[1]
    expected = f"Of {num_stages} stages in {steps} steps, {idle} to none: nothing is trained there."
    assert (expected in said.splitlines()) == bool(idle) and ("to none" in said) == bool(idle)
