"""What the GLUE server takes: for each test file a TSV of the rows' official numbers and the predictions.

Classes are written as the task's own files write them: 0 and 1, or words for MNLI, AX, QNLI and RTE. STS-B's scores are
clipped to the 0..5 of its labels. The server takes a zip of all eleven files.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from progtuning.base.files import write_text
from progtuning.data.glue import glue_task
from progtuning.data.tables import Example

# (task, split) -> name, as gluebenchmark.com gives them.
FILES = {
    ("cola", "test"): "CoLA.tsv",
    ("sst-2", "test"): "SST-2.tsv",
    ("mrpc", "test"): "MRPC.tsv",
    ("sts-b", "test"): "STS-B.tsv",
    ("qqp", "test"): "QQP.tsv",
    ("mnli", "test_matched"): "MNLI-m.tsv",
    ("mnli", "test_mismatched"): "MNLI-mm.tsv",
    ("qnli", "test"): "QNLI.tsv",
    ("rte", "test"): "RTE.tsv",
    ("ax", "test"): "AX.tsv",
    ("wnli", "test"): "WNLI.tsv",
}


def write_submission(
    task: str, split: str, predictions: Sequence[int] | Sequence[float], examples: Sequence[Example], folder: str | Path
) -> Path:
    """Write the predictions for one test file into an existing folder, and return the path of what was written.

    `split` is one of the task's `test` splits. `predictions` are class indices in the order of the task's labels, or
    for STS-B scores: one for each of `examples`, whose ids are the official numbers of the rows. Raises InputError for
    an unknown task, ValueError where split, number or values of the predictions do not fit, and RunError where the disk
    refuses.
    """
    glue = glue_task(task, tests=True)
    if split not in glue.test:
        raise ValueError(f"split must be one of {', '.join(glue.test)}, got {split!r}")
    values = np.asarray(predictions)
    if values.shape != (len(examples),):
        raise ValueError(f"predictions must be one for each of {len(examples)} rows, got {values.shape}")
    cells = glue.task.cells(values, glue.file_labels, glue.bounds)
    rows = (f"{example.id}\t{cell}\n" for example, cell in zip(examples, cells))
    path = Path(folder) / FILES[glue.task.name, split]
    write_text(path, "index\tprediction\n" + "".join(rows))
    return path
