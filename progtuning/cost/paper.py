"""Every figure that the paper prints in its Tables 1 to 5; its updated parameters beside ours, from the closed forms.

A cell is a figure in a column of a table: 58 of updated parameters (Tables 2 and 3) and 140 of metrics (Tables 1, 2, 4
and 5, means of 5 runs, on GLUE of 3 epochs), which no closed form gives: see `metric_cells`. MNLI has two columns,
matched and mismatched, of one training.
"""

from collections.abc import Iterable

from progtuning.cost.closed_form import PLAIN, updated_parameters
from progtuning.model.config import ARCHITECTURES, BertConfig, sequence_head
from progtuning.settings.peft import PeftConfig
from progtuning.stages import make_schedule

COLUMNS = ("CoLA", "MNLI-m", "MNLI-mm", "MRPC", "QNLI", "QQP", "RTE", "SST-2", "STS-B")  # of Tables 1, 3 and 4
# {table: {row: a figure for each column}}; Tables 1 and 4 end with the average.
PRINTED_METRICS = {
    "Table 1": {
        "bert-base": (58.2, 84.6, 83.7, 89.9, 91.4, 88.2, 66.5, 92.7, 88.4, 82.6),
        "bert-base + Progtuning": (59.6, 83.9, 84.0, 89.8, 91.0, 87.6, 68.7, 92.0, 88.3, 82.8),
        "bert-large": (58.7, 85.8, 86.0, 89.9, 92.3, 88.2, 67.7, 93.2, 89.2, 83.4),
        "bert-large + Progtuning": (59.6, 86.1, 86.0, 89.5, 91.9, 88.0, 70.3, 93.5, 89.7, 83.8),
        "roberta-base": (58.1, 85.5, 85.7, 92.1, 91.3, 86.5, 63.2, 93.1, 89.8, 82.8),
        "roberta-base + Progtuning": (59.0, 86.3, 86.4, 91.8, 91.9, 87.2, 65.8, 93.3, 89.6, 83.5),
    },
    "Table 2": {
        "bert-base": (79.0, 87.2, 72.5, 74.5),
        "bert-base + Progtuning": (80.3, 88.1, 71.6, 75.0),
    },
    "Table 4": {
        "Adapter": (60.5, 83.8, 84.2, 90.8, 91.1, 87.4, 72.9, 92.8, 89.1, 83.6),
        "Adapter + Progtuning": (58.8, 83.9, 84.3, 90.9, 91.2, 87.4, 69.6, 92.7, 89.0, 83.1),
        "BitFit": (55.9, 78.2, 78.7, 90.1, 87.5, 82.3, 68.8, 91.8, 87.2, 80.1),
        "BitFit + Progtuning": (54.2, 76.8, 77.8, 89.8, 87.1, 82.4, 68.2, 91.5, 86.5, 79.4),
        "LoRA": (64.8, 86.4, 85.9, 92.5, 92.8, 86.2, 79.5, 95.0, 90.5, 86.0),
        "LoRA + Progtuning": (62.9, 86.7, 86.2, 92.7, 92.9, 86.7, 78.8, 95.0, 90.6, 85.8),
    },
    "Table 5": {
        "bert-base + Progtuning": (59.6, 89.8, 68.7, 88.3),
        "Progtuning without low blocks": (54.6, 68.5, 65.3, 66.8),
        "Progtuning from high blocks": (56.5, 67.9, 67.6, 68.5),
    },
}
METRIC_COLUMNS = {
    "Table 1": (*COLUMNS, "average"),
    "Table 2": ("SQuAD v1.1, exact match", "SQuAD v1.1, F1", "SQuAD v2.0, exact match", "SQuAD v2.0, F1"),
    "Table 4": (*COLUMNS, "average"),
    "Table 5": ("CoLA", "MRPC", "RTE", "STS-B"),
}
# Millions of updated parameters, without and with Progtuning, for each of COLUMNS (Table 3).
PRINTED_UPDATES = {
    "Adapter": (
        (28.6, 35.8, 35.8, 28.6, 35.8, 35.8, 28.6, 28.6, 28.6),
        (9.9, 11.9, 11.9, 9.9, 11.9, 11.9, 9.9, 9.9, 9.9),
    ),
    "BitFit": ((0.8, 1.0, 1.0, 0.8, 1.0, 1.0, 0.8, 0.8, 0.8), (0.5, 0.6, 0.6, 0.5, 0.6, 0.6, 0.5, 0.5, 0.5)),
    "LoRA": (
        (70.9, 26.6, 26.6, 26.6, 22.2, 22.2, 70.9, 53.2, 35.4),
        (60.2, 22.6, 22.6, 22.6, 18.9, 18.9, 60.2, 45.1, 30.1),
    ),
}
# Epochs: of Adapter and BitFit those that the full rows fit, of LoRA those of Hu et al. 2021 (arXiv 2106.09685),
# Table 9, RoBERTa-base.
_EPOCHS = {
    "Adapter": dict(zip(COLUMNS, (16, 20, 20, 16, 20, 20, 16, 16, 16))),
    "BitFit": dict(zip(COLUMNS, (8, 10, 10, 8, 10, 10, 8, 8, 8))),
    "LoRA": dict(zip(COLUMNS, (80, 30, 30, 30, 25, 25, 80, 60, 40))),
}
_METHODS = {
    "Adapter": ("bert-base-uncased", PeftConfig("adapter", adapter_size=48, adapter_layer_norms=False)),  # D / 16
    "BitFit": ("bert-base-uncased", PeftConfig("bitfit")),
    "LoRA": ("roberta-base", PeftConfig("lora", lora_r=8, lora_targets=("query", "value"))),
}
_CLASSES = {"MNLI-m": 3, "MNLI-mm": 3, "STS-B": 1}  # 2 elsewhere; 1: a number

ONE_ANSWER = "what one answer for all rows scores in accuracy; the other rows of the column are an F1"
METRIC_NOTES = {
    ("Table 5", "Progtuning without low blocks", "MRPC"): ONE_ANSWER,
    ("Table 5", "Progtuning from high blocks", "MRPC"): ONE_ANSWER,
}

_TOLERANCE = 0.1  # millions: the paper prints one decimal, at times cut off and at times rounded
_BELOW_HALF = "the paper's figure is under half of its full row; stages of equal parts update more than half"
_WHOLE_HEAD = "the paper says BERT-base, whose figures are these only where --lora-pooler trains its pooler too"


def metric_cells() -> list[dict]:
    """Return the 140 cells of metrics, times 100, of Tables 1, 2, 4 and 5, as the paper prints them.

    A cell has `table`, `row`, `task` (a column) and `paper`; `note` where the figure is not what it seems.
    """
    cells = []
    for table, rows in PRINTED_METRICS.items():
        for row, figures in rows.items():
            for task, figure in zip(METRIC_COLUMNS[table], figures, strict=True):
                note = METRIC_NOTES.get((table, row, task))
                cell = {"table": table, "row": row, "task": task, "paper": figure}
                cells.append(cell | {"note": note} if note else cell)
    return cells


def paper_rows() -> list[dict]:
    """Return the rows that `progtuning paper --json` prints: updated parameters of Figure 4 and Tables 2 and 3.

    `ours` and `paper` are in millions; `paper` is None where it prints no figure, and `agrees` then too. Otherwise
    `agrees` says whether the two differ by at most 0.1. The Adapter + Progtuning rows do not agree, and their `note`
    says why. `model` is the architecture that the figures fit, by its name in ARCHITECTURES; the LoRA rows, which the
    paper ascribes to BERT-base, have a `note` too.
    """
    return [*_figure_4(), *_table_2(), *_table_3()]


def _figure_4() -> list[dict]:
    printed = {"bert-base": (None, None), "bert-large": (1005.4, 703.1), "roberta-base": (None, None)}
    rows = []
    for row, paper in printed.items():
        model = row if row == "roberta-base" else f"{row}-uncased"
        rows += _pair("Figure 4", row, model, "GLUE, 2 classes", 3, _classifier(model), paper)
    return rows


def _table_2() -> list[dict]:
    model = "bert-base-uncased"
    config = ARCHITECTURES[model].with_head("question-answering")
    return [
        *_pair("Table 2", "bert-base", model, "SQuAD v1.1", 3, config, (326.7, 241.6)),
        *_pair("Table 2", "bert-base", model, "SQuAD v2.0", 2, config, (217.7, 175.3)),
    ]


def _table_3() -> list[dict]:
    rows = []
    for method in PRINTED_UPDATES:
        for column, *paper in zip(COLUMNS, *PRINTED_UPDATES[method]):
            epochs, classes = _EPOCHS[method][column], _CLASSES.get(column, 2)
            # The 768 of E's one bias are left out of BitFit's: one decimal does not show them.
            embeddings = "never" if method == "BitFit" else "always"
            model, peft = _METHODS[method]
            pair = _pair("Table 3", method, model, column, epochs, _classifier(model, classes), paper, peft, embeddings)
            rows += [row | {"note": _WHOLE_HEAD} for row in pair] if method == "LoRA" else pair
    return rows


def _classifier(name: str, classes: int = 2) -> BertConfig:
    return ARCHITECTURES[name].with_head(sequence_head(classes), tuple(f"LABEL_{i}" for i in range(classes)))


def _pair(
    table: str,
    row: str,
    model: str,
    task: str,
    epochs: int,
    config: BertConfig,
    paper: Iterable[float | None],
    peft: PeftConfig = PLAIN,
    embeddings: str = "always",
) -> list[dict]:
    """A row without and one with Progtuning, T stages for T epochs. The paper's tables count E in every epoch."""
    rows = []
    for schedule, suffix, printed in zip(("full", "shrinking"), ("", " + Progtuning"), paper):
        stages = make_schedule(schedule, config.num_hidden_layers, epochs, embeddings)
        ours = updated_parameters(config, stages, epochs, peft) / 1e6
        agrees = None if printed is None else abs(ours - printed) <= _TOLERANCE
        values = {"table": table, "row": row + suffix, "model": model, "task": task, "epochs": epochs}
        values |= {"ours": ours, "paper": printed, "agrees": agrees}
        rows.append(values if agrees is not False else values | {"note": _BELOW_HALF})
    return rows
