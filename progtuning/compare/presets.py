"""The paper's tables and figures of results as series of runs (arXiv 2506.21119, Tables 1, 2, 4 and 5, Figure 1)."""

from dataclasses import dataclass
from typing import NamedTuple

from progtuning.cost.paper import METRIC_COLUMNS, PRINTED_METRICS

# The paper's columns: the task, the key of `summary.json`'s metrics. STS-B has Pearson's correlation (Section 5.1); the
# others as BERT's authors report GLUE (arXiv 1810.04805, Section 4.1): F1 of MRPC and QQP, Matthews' correlation of
# CoLA, accuracy of the rest. Section 5.2 calls MRPC's an accuracy, which its two lowest figures are (METRIC_NOTES).
COLUMNS = {
    "CoLA": ("cola", "matthews"),
    "MNLI-m": ("mnli", "dev_matched/accuracy"),
    "MNLI-mm": ("mnli", "dev_mismatched/accuracy"),
    "MRPC": ("mrpc", "f1"),
    "QNLI": ("qnli", "accuracy"),
    "QQP": ("qqp", "f1"),
    "RTE": ("rte", "accuracy"),
    "SST-2": ("sst-2", "accuracy"),
    "STS-B": ("sts-b", "pearson"),
    "SQuAD v1.1, exact match": ("squad", "exact"),
    "SQuAD v1.1, F1": ("squad", "f1"),
    "SQuAD v2.0, exact match": ("squad_v2", "exact"),
    "SQuAD v2.0, F1": ("squad_v2", "f1"),
}


class Method(NamedTuple):
    """A row of a table: its settings, its name, and the row of the paper whose figures stand beside."""

    row: str
    schedule: str
    peft: str
    printed: str


@dataclass(frozen=True)
class Preset:
    """A table: its rows, of each of which the paper prints a figure in every column."""

    table: str
    methods: tuple[Method, ...]

    @property
    def columns(self) -> tuple[str, ...]:
        return tuple(column for column in METRIC_COLUMNS[self.table] if column in COLUMNS)

    @property
    def tasks(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(COLUMNS[column][0] for column in self.columns))

    def printed(self, method: Method, column: str) -> float:
        """Return the paper's figure, times 100."""
        return dict(zip(METRIC_COLUMNS[self.table], PRINTED_METRICS[self.table][method.printed]))[column]


def _with_and_without(row: str, peft: str = "none", printed: str | None = None) -> tuple[Method, Method]:
    rows, printed = (row, f"{row} + Progtuning"), printed or row
    return (
        Method(rows[0], "full", peft, printed),
        Method(rows[1], "shrinking", peft, f"{printed} + Progtuning"),
    )


def preset(name: str, model: str) -> Preset:
    """Return the preset of "table1", "table2", "table4" or "table5", whose rows of whole models are those of `model`.

    Beside a model that the paper does not have stand the figures of bert-base.
    """
    base = model.rpartition("/")[2].partition("@")[0].removesuffix("-uncased").removesuffix("-cased")
    printed = base if base in PRINTED_METRICS[f"Table {name.removeprefix('table')}"] else "bert-base"
    methods = {
        "table1": _with_and_without(base, printed=printed),
        "table2": _with_and_without(base, printed=printed),
        "table4": sum((_with_and_without(row, row.lower()) for row in ("Adapter", "BitFit", "LoRA")), ()),
        "table5": (
            Method(f"{base} + Progtuning", "shrinking", "none", "bert-base + Progtuning"),
            *(
                Method(row, schedule, "none", row)
                for row, schedule in (
                    ("Progtuning without low blocks", "without-low-blocks"),
                    ("Progtuning from high blocks", "growing"),
                )
            ),
        ),
    }
    return Preset(f"Table {name.removeprefix('table')}", methods[name])


PRESETS = ("table1", "table2", "table4", "table5")
