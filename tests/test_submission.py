"""What is written for the GLUE server: names, columns, classes in the words of each task's files."""

import numpy as np
import pytest

from progtuning.base.errors import InputError, RunError
from progtuning.data.glue import TASKS, TEST_TASKS
from progtuning.data.submission import FILES, write_submission
from progtuning.data.tables import Example

EXAMPLES = [Example("a", id="0"), Example("b", id="7"), Example("c", id="2")]
NLI = "entailment neutral contradiction"
EXPECTED = {
    ("cola", "test"): ("CoLA.tsv", "0 1"),
    ("sst-2", "test"): ("SST-2.tsv", "0 1"),
    ("mrpc", "test"): ("MRPC.tsv", "0 1"),
    ("qqp", "test"): ("QQP.tsv", "0 1"),
    ("mnli", "test_matched"): ("MNLI-m.tsv", NLI),
    ("mnli", "test_mismatched"): ("MNLI-mm.tsv", NLI),
    ("qnli", "test"): ("QNLI.tsv", "entailment not_entailment"),
    ("rte", "test"): ("RTE.tsv", "entailment not_entailment"),
    ("ax", "test"): ("AX.tsv", NLI),
    ("wnli", "test"): ("WNLI.tsv", "0 1"),
}


@pytest.mark.parametrize(("task", "split"), EXPECTED)
def test_classes_are_written_as_the_tasks_files_write_them_under_the_official_row_numbers(task, split, tmp_path):
    name, words = EXPECTED[task, split]
    words = words.split()
    predictions = np.array([1, 0, len(words) - 1])
    path = write_submission(task, split, predictions, EXAMPLES, tmp_path)
    assert path == tmp_path / name and list(tmp_path.iterdir()) == [path]
    assert path.read_text() == f"index\tprediction\n0\t{words[1]}\n7\t{words[0]}\n2\t{words[-1]}\n"


def test_scores_of_sts_b_are_clipped_to_its_0_to_5(tmp_path):
    path = write_submission("stsb", "test", np.array([-0.25, 2.5, 5.01], np.float32), EXAMPLES, tmp_path)
    assert path.name == "STS-B.tsv"
    assert [line.split("\t") for line in path.read_text().splitlines()[1:]] == [
        ["0", "0.000000"],
        ["7", "2.500000"],
        ["2", "5.000000"],
    ]


def test_every_test_split_of_every_task_has_a_file():
    assert set(FILES) == {(name, split) for name, task in (TASKS | TEST_TASKS).items() for split in task.test}
    assert len(set(FILES.values())) == 11  # as many as the server wants in a zip


def test_predictions_that_do_not_fit_are_refused_and_nothing_is_written(tmp_path):
    bad = {
        "split must be one of test, got 'test_matched'": ("rte", "test_matched", [0, 1, 0]),
        r"one for each of 3 rows, got \(2,\)": ("rte", "test", [0, 1]),
        r"one for each of 3 rows, got \(3, 2\)": ("rte", "test", np.zeros((3, 2), int)),
        r"class indices 0\.\.1, got \[0 1 2\]": ("rte", "test", [0, 1, 2]),
        r"class indices 0\.\.1, got \[ 0  1 -1\]": ("rte", "test", [0, 1, -1]),
        r"class indices 0\.\.1, got \[0\. 1\. 0\.\]": ("rte", "test", [0.0, 1.0, 0.0]),
        "predictions must be finite numbers": ("sts-b", "test", [0.0, np.nan, 1.0]),
    }
    for message, arguments in bad.items():
        with pytest.raises(ValueError, match=message):
            write_submission(*arguments, EXAMPLES, tmp_path)
    with pytest.raises(InputError, match="--task must be one of"):
        write_submission("snli", "test", [0, 1, 0], EXAMPLES, tmp_path)
    with pytest.raises(RunError, match="RTE.tsv: cannot be written"):
        write_submission("rte", "test", [0, 1, 0], EXAMPLES, tmp_path / "nowhere")
    assert not list(tmp_path.iterdir())
