"""GLUE and SQuAD from the Hugging Face Hub: the rows of the official files, by way of a server on the loopback."""

import io
import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from progtuning.base.errors import InputError, RunError
from progtuning.data import hub
from progtuning.data.glue import TASKS, load_glue, load_glue_test
from progtuning.data.questions import load_squad
from progtuning.data.tables import Example
from tests.hub_server import HubServer
from tests.squad_files import write_squad

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

# The repository's folder and the names of its columns of text, for each task.
GLUE = {
    "cola": ("cola", ["sentence"]),
    "sst-2": ("sst2", ["sentence"]),
    "mrpc": ("mrpc", ["sentence1", "sentence2"]),
    "sts-b": ("stsb", ["sentence1", "sentence2"]),
    "qqp": ("qqp", ["question1", "question2"]),
    "mnli": ("mnli", ["premise", "hypothesis"]),
    "qnli": ("qnli", ["question", "sentence"]),
    "rte": ("rte", ["sentence1", "sentence2"]),
}
SQUAD = {"squad": ("rajpurkar/squad", "plain_text", "v1.1"), "squad_v2": ("rajpurkar/squad_v2", "squad_v2", "v2.0")}

LOAD = """
import json, sys
from dataclasses import asdict
from progtuning.data.glue import TASKS
from progtuning.data.hub import load_hub, load_hub_test
from progtuning.base.errors import InputError, RunError
try:
    found = {task: [load_hub(task), load_hub_test(task) if task in TASKS else {}] for task in sys.argv[1:]}
    print(json.dumps(["found", found], default=asdict))
except (InputError, RunError) as error:
    print(json.dumps([type(error).__name__, str(error)]))
"""


def run_python(home: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """Run Python with `home` as the user's home, and of huggingface_hub's settings only these."""
    outside = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    outside |= {"HOME": str(home), "PYTHONPATH": str(Path(__file__).resolve().parents[1]), "HF_HUB_ETAG_TIMEOUT": "1"}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, env=outside | environment, capture_output=True, text=True, timeout=200)


def load(home: Path, *tasks: str, **environment: str):
    done = run_python(home, "-c", LOAD, *tasks, **environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def parquet_file(rows: list[dict], **types) -> bytes:
    """A Parquet file of `rows`, some row groups long; `types` are those of columns that pyarrow takes for others."""
    table = pyarrow.Table.from_pylist(rows)
    for name, kind in types.items():
        table = table.set_column(table.schema.get_field_index(name), name, table[name].cast(kind))
    file = io.BytesIO()
    parquet.write_table(table, file, row_group_size=3)
    return file.getvalue()


def glue_rows(task: str, split: str) -> list[dict]:
    """Rows as the Hub has them: texts, label (-1 in a test file) and idx."""
    _, columns = GLUE[task]
    rows = []
    for i in range(7):
        label = 0.5 * i if task == "sts-b" else i % len(TASKS[task].task.labels)
        texts = {column: f'{split} "{column}" of {task}, 東京 {i}' for column in columns}
        rows.append({**texts, "label": -1 if split.startswith("test") else label, "idx": i})
    return rows


def write_official(task: str, folder: Path) -> Path:
    """Write the same rows into the task's official files."""
    glue, (_, columns) = TASKS[task], GLUE[task]
    folder.mkdir()
    for split in ("train", *glue.dev, *glue.test):
        test = split.startswith("test")
        header = [glue.index, glue.text, *filter(None, [glue.text_pair]), *([] if test else [glue.label])]
        lines = [] if glue.columns and not test else [header]
        for row in glue_rows(task, split):
            label = str(row["label"]) if task == "sts-b" else glue.file_labels[row["label"]]
            texts = [row[column] for column in columns]
            if lines[:1] == [header]:
                lines.append([str(row["idx"]), *texts, *([] if test else [label])])
            else:
                lines.append(["source", label, "", *texts])  # CoLA, without a header
        (folder / f"{split}.tsv").write_text("".join("\t".join(line) + "\n" for line in lines), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def squad_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("squad")
    for version in ("v1.1", "v2.0"):
        write_squad(folder, version, train=24, dev=9)
    return folder


def squad_rows(file: Path) -> list[dict]:
    """The rows of an official file as the Hub has them."""
    rows = []
    for article in json.loads(file.read_text())["data"]:
        for paragraph in article["paragraphs"]:
            for qa in paragraph["qas"]:
                answers = {key: [answer[key] for answer in qa["answers"]] for key in ("text", "answer_start")}
                rows.append({"id": qa["id"], "title": article["title"], "context": paragraph["context"]})
                rows[-1] |= {"question": qa["question"], "answers": answers}
    return rows


@pytest.fixture(scope="module")
def server(squad_folder):
    """The three repositories; the rows of GLUE's training in two files, as large sets have them."""
    files = {"README.md": b"", "mnli_matched/test-00000-of-00001.parquet": b"not asked for"}
    for task, glue in TASKS.items():
        label = pyarrow.float32() if task == "sts-b" else pyarrow.int64()
        for split in ("train", *glue.dev, *glue.test):
            rows, name = glue_rows(task, split), f"{GLUE[task][0]}/{split.replace('dev', 'validation')}"
            pieces = [rows[:4], rows[4:]] if split == "train" else [rows]
            for i, piece in enumerate(pieces):
                content = parquet_file(piece, label=label, idx=pyarrow.int32())
                files[f"{name}-{i:05}-of-{len(pieces):05}.parquet"] = content
    with HubServer() as server:
        server.add("nyu-mll/glue", files, kind="dataset")
        for repository, folder, version in SQUAD.values():
            lists = {"text": pyarrow.list_(pyarrow.string()), "answer_start": pyarrow.list_(pyarrow.int32())}
            content = {}
            for split, name in (("train", "train"), ("validation", "dev")):
                rows = squad_rows(squad_folder / f"{name}-{version}.json")
                content[f"{folder}/{split}-00000-of-00001.parquet"] = parquet_file(rows, answers=pyarrow.struct(lists))
            server.add(repository, content, kind="dataset")
        yield server


def as_json(value):
    return json.loads(json.dumps(value, default=asdict))


def test_every_task_has_the_rows_of_its_official_files(server, squad_folder, tmp_path):
    kind, found = load(tmp_path, *TASKS, *SQUAD, HF_ENDPOINT=server.url)
    assert kind == "found", found
    for task in TASKS:
        folder = write_official(task, tmp_path / task)
        assert found[task] == as_json([load_glue(task, folder), load_glue_test(task, folder)])
    for task in SQUAD:
        assert found[task] == as_json([load_squad(task, squad_folder), {}])
    fetched = {request.split("/resolve/")[1].split("/", 1)[1] for request in server.requests if "/resolve/" in request}
    assert len(fetched) == 8 * 4 + 2 + 2 * 2
    assert all(name.endswith(".parquet") and not name.startswith("mnli_matched/") for name in fetched)


@pytest.mark.parametrize(("task", "columns"), [("ax", ("premise", "hypothesis")), ("wnli", ("sentence1", "sentence2"))])
def test_the_test_rows_of_ax_and_wnli_are_read_for_a_submission(tmp_path, monkeypatch, task, columns):
    rows = [{**dict(zip(columns, ("a", f"b {i}"))), "label": -1, "idx": i} for i in range(3)]
    (tmp_path / task).mkdir()
    (tmp_path / task / "test-00000-of-00001.parquet").write_bytes(parquet_file(rows))
    monkeypatch.setattr(hub, "data_folder", lambda name, files: tmp_path)
    assert hub.load_hub_test(task) == {"test": [Example("a", f"b {i}", None, str(i)) for i in range(3)]}
    with pytest.raises(InputError, match="^--task must be one of cola, .*, rte, got"):
        hub.load_hub(task)


def test_what_is_cached_is_read_without_the_hub_and_what_is_not_is_refused(server, tmp_path):
    first = load(tmp_path, "rte", HF_ENDPOINT=server.url)
    assert load(tmp_path, "rte", HF_ENDPOINT=server.url, HF_HUB_OFFLINE="1") == first
    kind, message = load(tmp_path, "cola", HF_ENDPOINT=server.url, HF_HUB_OFFLINE="1")
    assert kind.endswith("Error") and "not in huggingface_hub's cache" in message and "\n" not in message


def test_a_cached_folder_with_other_tasks_alone_is_a_failed_run(tmp_path, monkeypatch):
    # As older versions of huggingface_hub give it.
    monkeypatch.setattr(hub, "data_folder", lambda name, files: tmp_path)
    with pytest.raises(RunError, match=r"^nyu-mll/glue: cola/train-\*.parquet is not in huggingface_hub's cache"):
        hub.load_hub("cola")


def test_train_evaluate_and_submit_with_data_of_the_hub(server, tiny_folder, tmp_path):
    environment = {"HF_ENDPOINT": server.url}
    task = ["--task", "mnli", "--data", "hub"]
    options = ["--epochs", "1", "--batch-size", "4", "--device", "cpu"]
    arguments = ["train", "--model", tiny_folder, *task, "--output-dir", tmp_path / "run", *options]
    done = run_python(tmp_path, "-m", "progtuning", *arguments, **environment)
    assert done.returncode == 0, done.stderr
    arguments = ["predict", "--checkpoint", tmp_path / "run", *task, "--glue-submission", tmp_path / "submission"]
    done = run_python(tmp_path, "-m", "progtuning", *arguments, **environment)
    assert done.returncode == 0, done.stderr
    assert {path.name for path in (tmp_path / "submission").iterdir()} == {"MNLI-m.tsv", "MNLI-mm.tsv"}
    lines = (tmp_path / "submission" / "MNLI-mm.tsv").read_text().splitlines()
    assert [line.split("\t")[0] for line in lines] == ["index", *map(str, range(7))]


def test_without_pyarrow_the_error_names_the_extra(tiny_folder, tmp_path):
    (tmp_path / "pyarrow.py").write_text("raise ImportError('none here')")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\nfrom progtuning.cli.command import main\n"
    arguments = ["train", "--model", str(tiny_folder), "--task", "rte", "--data", "hub", "--output-dir", "run"]
    code += f"sys.exit(main({arguments}))"
    done = run_python(tmp_path, "-c", code)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "progtuning: error: --data hub needs pyarrow: pip install 'progtuning[hub]'\n"


def answers(text=("x",), start=(0,)) -> dict:
    return {"text": list(text), "answer_start": list(start)}


QA = {"id": "q", "question": "?", "context": "x y", "answers": answers()}
PAIR = {"sentence1": "a", "sentence2": "b", "label": 0, "idx": 0}
BAD_ROWS = {
    "a class too high": ("rte", [PAIR, PAIR | {"label": 2}], "row 1: got label 2, expected a class in 0..1"),
    "no label": ("rte", [PAIR | {"label": -1}], "row 0: got label -1, expected a class in 0..1"),
    "a score that is none": ("sts-b", [PAIR | {"label": float("nan")}], "row 0: got label nan, expected a finite"),
    "null text": ("rte", [PAIR, PAIR | {"sentence2": None}], "row 1: got ['a', None], expected text in sentence1 and"),
    "no column": ("rte", [{"sentence1": "a", "label": 0, "idx": 0}], "got no column 'sentence2', expected sentence1,"),
    "no row": ("rte", [], "got no rows, expected at least one"),
    "an answer elsewhere": ("squad", [QA | {"answers": answers(start=[2])}], "row 0 (id 'q').answers[0]: got 'x' at 2"),
    "more texts than starts": ("squad", [QA | {"answers": answers(("x", "y"))}], "expected as many texts as starts"),
    "answers that are text": ("squad", [QA | {"answers": "x"}], "row 0: got answers 'x', expected as many texts as"),
    "no answer in v1.1": ("squad", [QA, QA | {"answers": answers([], [])}], "row 1 (id 'q'): got a question without"),
    "an id twice": ("squad_v2", [QA, QA], "rajpurkar/squad_v2 train: got the id 'q' twice, expected each id once"),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_rows_that_are_not_the_tasks_are_refused_in_one_line_with_file_and_row(name, tmp_path, monkeypatch):
    task, rows, message = BAD_ROWS[name]
    folder = GLUE[task][0] if task in GLUE else SQUAD[task][1]
    (tmp_path / folder).mkdir()
    empty = pyarrow.table({key: pyarrow.array([], pyarrow.string()) for key in PAIR})
    path = tmp_path / folder / "train-00000-of-00001.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(rows) if rows else empty, path)
    monkeypatch.setattr(hub, "data_folder", lambda name, files: tmp_path)
    with pytest.raises(InputError) as caught:
        hub.load_hub(task)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"PAR1", b"not parquet" * 100, b"PAR1" + bytes(100) + b"PAR1"])
def test_a_file_that_is_not_parquet_is_refused_by_name(content, tmp_path, monkeypatch):
    path = tmp_path / "rte" / "train-00000-of-00001.parquet"
    path.parent.mkdir()
    path.write_bytes(content)
    monkeypatch.setattr(hub, "data_folder", lambda name, files: tmp_path)
    with pytest.raises(InputError, match=f"^{path}: not a Parquet file that can be read: ") as caught:
        hub.load_hub("rte")
    assert "\n" not in str(caught.value)
