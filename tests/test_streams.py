"""Standard streams that are closed, full or of another encoding; who may read what a run writes; a full disk."""

import io
import json
import os
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from progtuning.base.errors import InputError, RunError
from progtuning.cli.command import main
from progtuning.model.weights import load_model
from progtuning.run.log import RunLog
from tests.test_cli import FAST, call, refused, trained  # noqa: F401 (a fixture)
from tests.test_files import another_user, as_root, public, umask  # noqa: F401 (fixtures)

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def full(tmp_path):
    """A device that is always full, our own."""
    path = tmp_path / "full"
    try:
        os.mknod(path, 0o666 | stat.S_IFCHR, os.makedev(1, 7))
    except PermissionError:
        pytest.skip("this user cannot make a device")
    return path


def shell(line: str, **environment: str) -> subprocess.CompletedProcess:
    """Run a line of shell in which `$P` is the command."""
    places = {"P": f"{sys.executable} -m progtuning", "PYTHONPATH": str(ROOT)}
    return subprocess.run(["bash", "-c", line], capture_output=True, env=os.environ | places | environment)


def test_a_result_that_standard_output_does_not_take_is_an_error_of_one_line(full):
    done = shell(f"for c in paper --version 'train --help'; do $P $c > {full}; echo $?; done")
    error = "progtuning: error: standard output: cannot be written: No space left on device"
    assert done.stdout.split() == [b"1"] * 3 and done.stderr.decode().splitlines() == [error] * 3


def test_a_reader_that_goes_away_ends_the_command_in_silence():
    done = shell("($P paper; echo $? >&2) | true")
    assert (done.stdout, done.stderr) == (b"", b"1\n")


def test_without_standard_error_the_result_is_the_same_and_an_error_still_has_its_status(full):
    done = shell(f"$P paper 2>&- && $P plan --model x 2> {full}; echo $?")
    assert done.stdout.decode() == call("paper")[1] + "2\n" and done.stderr == b""


def test_a_closed_stream_leaves_its_descriptor_to_no_other_file(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\nfrom progtuning.cli.streams import standard_streams\n"
        f"with standard_streams(), open({str(tmp_path / 'log')!r}, 'w') as log:\n"
        "    print('lost', file=sys.stderr)\n    log.write(f'{log.fileno() > 2}')\n"
    )
    assert shell(f"{sys.executable} {script} <&- >&- 2>&-").returncode == 0
    assert (tmp_path / "log").read_text() == "True"


@pytest.mark.parametrize("output", ["closed", "full"])
def test_a_run_is_whole_where_only_streams_for_messages_are_missing(
    output, full, tiny_folder, tiny_task, tmp_path, monkeypatch
):
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, None if output == "closed" else open(full, "w"))
    task = ["--task", "classification", "--data", str(tiny_task), "--max-train-rows", "16"]
    run, page = tmp_path / "run", tmp_path / "new" / "folder" / "page.md"
    assert main(["train", "--model", str(tiny_folder), *task, *FAST, "--output-dir", str(run)]) == 0
    (tmp_path / "in.tsv").write_text("text\ngood film\n")
    files = ["--input", str(tmp_path / "in.tsv"), "--output", str(tmp_path / "out.tsv")]
    assert main(["predict", "--checkpoint", str(run), *files]) == 0
    assert main(["report", str(run), "-o", str(page)]) == 0
    if output == "full":  # what the first command could not write there has made it the null device
        monkeypatch.setattr(sys, "stdout", open(full, "w"))
    measured = ["--checkpoint", str(run), "--task", "classification", "--data", str(tiny_task)]
    assert main(["evaluate", *measured]) == (2 if output == "closed" else 1)
    monkeypatch.undo()
    assert json.loads((run / "summary.json").read_text())["metrics"] and (run / "README.md").is_file()
    assert (tmp_path / "out.tsv").read_text().count("\n") == 2 and "# Runs" in page.read_text()


def test_a_result_asked_for_on_a_closed_output_is_refused_before_the_work(trained, tiny_task, monkeypatch, capfd):
    for work in ("finetune.fine_tune", "saved.predict_file", "saved.evaluate_checkpoint"):
        monkeypatch.setattr(f"progtuning.run.{work}", lambda *_: pytest.fail("the work has begun"))
    task = ["--task", "classification", "--data", str(tiny_task)]
    commands = [
        ["train", "--model", "x", *task, "--output-dir", "y", "--json"],
        ["predict", "--checkpoint", str(trained), "--input", "-", "--output", "-"],
        ["predict", "--checkpoint", str(trained), "--input", "-", "--output", "/dev/stdout"],
        ["evaluate", "--checkpoint", str(trained), *task],
    ]
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", None)
        assert [main(command) for command in commands] == [2, 2, 2, 2]
    assert capfd.readouterr().err.count("standard output is closed") == 4
    monkeypatch.setattr(sys, "stdin", None)
    assert main(["predict", "--checkpoint", str(trained), "--input", "-", "--output", "x"]) == 2
    assert "--input -: standard input is closed" in capfd.readouterr().err


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-16"])
def test_results_are_utf_8_whatever_the_encoding_of_standard_output(encoding, trained, tmp_path, monkeypatch):
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    names = ("naïve 😀", "schlecht")
    config = json.loads((run / "config.json").read_text())
    config["id2label"] = dict(enumerate(names))
    config["label2id"] = {name: i for i, name in enumerate(names)}
    (run / "config.json").write_text(json.dumps(config))
    data = tmp_path / "café 😀"
    data.mkdir()
    (data / "dev.tsv").write_text("text\tlabel\ngood film\tnaïve 😀\nbad film\tschlecht\n", encoding="utf-8")
    (tmp_path / "in.tsv").write_text("text\ngood film\nbad film\n")

    def printed(*arguments) -> str:
        out = io.BytesIO()
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", io.TextIOWrapper(out, encoding=encoding))
            assert main([str(argument) for argument in arguments]) == 0
            sys.stdout.detach()
        return out.getvalue().decode("utf-8")

    task = ["--task", "classification", "--data", data, "--json"]
    assert json.loads(printed("evaluate", "--checkpoint", run, *task))["task"] == "café 😀"
    rows = printed("predict", "--checkpoint", run, "--input", tmp_path / "in.tsv", "--output", "-").splitlines()
    assert {row.split("\t")[0] for row in rows[1:]} <= set(names) and len(rows) == 3
    report = ["report", run, "-o", tmp_path / "page \udcff.md"]
    assert b"Written: " in os.fsencode(printed(*report))


def test_predictions_that_would_take_the_place_of_an_input_are_refused(trained, tmp_path):
    source, link = tmp_path / "in.tsv", tmp_path / "link"
    source.write_text("text\ngood film\n")
    link.symlink_to(source)
    for output in (source, link, trained / "config.json", trained / "model.safetensors"):
        line = refused(*call("predict", "--checkpoint", trained, "--input", source, "--output", output))
        assert f"--output {output} is the same file as the input" in line
    line = refused(*call("report", trained, "-o", trained / "summary.json"))
    assert "is the same file as the input" in line
    assert source.read_text() == "text\ngood film\n"


@pytest.mark.parametrize("command", ["report", "explain"])
def test_a_page_on_standard_output_is_the_whole_page_and_nothing_else(command, trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = {"report": [trained], "explain": ["--run", trained]}[command]
    assert call(command, *run, "-o", "page")[0] == 0
    page = (tmp_path / "page").read_text(encoding="utf-8")
    page = re.sub(r"\n\n!\[.*|\n\n## Metric against work", "", page) if command == "report" else page
    for path in tmp_path.iterdir():
        path.unlink()
    assert call(command, *run, "-o", "-") == (0, page, "")
    to_descriptor = shell(f"$P {command} {' '.join(map(str, run))} -o /dev/stdout")
    assert (to_descriptor.stdout.decode(), to_descriptor.stderr) == (page, b"")
    monkeypatch.setattr(sys, "stdout", None)
    assert main([command, *map(str, run), "-o", "-"]) == 2
    assert not list(tmp_path.iterdir())


def test_report_into_a_pipe_or_a_device_draws_no_pictures_beside_it(trained, full, tmp_path):
    status, out, err = call("report", trained, "-o", full)
    assert (status, out) == (1, "") and f"{full}: cannot be written: No space left on device" in err
    assert [path.name for path in tmp_path.iterdir()] == ["full"] and full.is_char_device()


@pytest.mark.parametrize("options", [["--save-every", "1"], ["--peft", "lora"], ["--peft", "bitfit"]])
@pytest.mark.parametrize("mask", [0o002, 0o077])
def test_every_file_and_folder_of_a_run_has_the_mode_that_the_umask_leaves(
    mask, options, tiny_folder, tiny_task, tmp_path
):
    os.umask(mask)
    task = ["--task", "classification", "--data", tiny_task, "--max-train-rows", "16", "--evaluate", "end"]
    arguments = ["--model", tiny_folder, *task, *FAST, *options, "--output-dir", tmp_path / "new" / "run"]
    status, _, err = call("train", *arguments)
    assert status == 0, err
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "new").rglob("*")}
    expected = {path: (0o777 if path.is_dir() else 0o666) & ~mask for path in modes}
    assert modes == expected and any(path.suffix == ".safetensors" for path in modes)


@as_root
def test_a_model_that_one_may_not_read_is_said_to_be_that(public, tiny_folder):
    for file in tiny_folder.iterdir():
        (public / file.name).write_bytes(file.read_bytes())
    (public / "model.safetensors").chmod(0o600)
    with another_user(), pytest.raises(InputError, match="model.safetensors: cannot be read: Permission denied"):
        load_model(public)


def test_a_log_on_a_full_disk_is_an_error_that_names_it(full, tmp_path):
    (tmp_path / "metrics.jsonl").symlink_to(full)
    log = RunLog.__new__(RunLog)
    log.rows, log._file = [], open(tmp_path / "metrics.jsonl", "wb")
    with pytest.raises(RunError) as error:
        log({"step": 1})
    assert str(error.value) == f"{tmp_path / 'metrics.jsonl'}: cannot be written: No space left on device"
    log.close()
