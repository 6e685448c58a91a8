"""The updated parameters of the paper's Figure 4 and Tables 2 and 3, from the closed forms, beside the printed ones."""

from collections.abc import Iterable

from progtuning.cost.closed_form import PLAIN, updated_parameters
from progtuning.model.config import ARCHITECTURES, BertConfig, sequence_head
from progtuning.settings.peft import PeftConfig
from progtuning.stages import make_schedule

_TOLERANCE = 0.1  # millions: the paper prints one decimal, at times cut off and at times rounded
_BELOW_HALF = "the paper's figure is under half of its full row; stages of equal parts update more than half"
_WHOLE_HEAD = "the paper says BERT-base, whose figures are these only where --lora-pooler trains its pooler too"


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
    model, bert = "bert-base-uncased", _classifier("bert-base-uncased")
    adapter = PeftConfig("adapter", adapter_size=48, adapter_layer_norms=False)  # D / 16, as the full rows have it
    rows = []
    for epochs, paper in {16: (28.6, 9.9), 20: (35.8, 11.9)}.items():
        rows += _pair("Table 3", "Adapter", model, "GLUE, 2 classes", epochs, bert, paper, adapter)
    # The 768 of E's one bias are left out: one decimal does not show them.
    bitfit = PeftConfig("bitfit")
    for epochs, paper in {8: (0.8, 0.5), 10: (1.0, 0.6)}.items():
        rows += _pair("Table 3", "BitFit", model, "GLUE, 2 classes", epochs, bert, paper, bitfit, embeddings="never")
    lora = PeftConfig("lora", lora_r=8, lora_targets=("query", "value"))
    # Epochs of Hu et al. 2021 (arXiv 2106.09685), Table 9, RoBERTa-base; classes (1: regression).
    for task, epochs, classes, *paper in (
        ("MNLI", 30, 3, 26.6, 22.6),
        ("SST-2", 60, 2, 53.2, 45.1),
        ("MRPC", 30, 2, 26.6, 22.6),
        ("CoLA", 80, 2, 70.9, 60.2),
        ("QNLI", 25, 2, 22.2, 18.9),
        ("QQP", 25, 2, 22.2, 18.9),
        ("RTE", 80, 2, 70.9, 60.2),
        ("STS-B", 40, 1, 35.4, 30.1),
    ):
        roberta = _classifier("roberta-base", classes)
        lora_rows = _pair("Table 3", "LoRA", "roberta-base", task, epochs, roberta, paper, lora)
        rows += [row | {"note": _WHOLE_HEAD} for row in lora_rows]
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
