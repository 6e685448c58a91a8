"""The README.md of an output folder as the Hub wants it: metadata, the card, and the code that loads the folder."""

import os
from collections.abc import Iterator, Mapping

from progtuning.base.sources import hub_model, split_revision
from progtuning.model.config import HEADS
from progtuning.report.pages import card
from progtuning.report.summary import Summary
from progtuning.settings.peft import MERGEABLE

# What the Hub calls a metric of `data.metrics`; the others have no name there.
METRICS = {
    "accuracy": "accuracy",
    "f1": "f1",
    "matthews": "matthews_correlation",
    "pearson": "pearsonr",
    "spearman": "spearmanr",
    "micro_f1": "f1",
    "macro_f1": "f1",
    "exact": "exact_match",
}
# By head: the Hub's name of the task, what a text is in code, and how its answer is read.
_TEXT = ("text-classification", '"A text."')
USES = {
    "classification": (*_TEXT, "print(model.config.id2label[outputs.logits.argmax().item()])"),
    "regression": (*_TEXT, "print(outputs.logits.item())"),
    "multi-label": (
        *_TEXT,
        "print([model.config.id2label[i] for i in (outputs.logits[0] > 0).nonzero().flatten().tolist()])",
    ),
    "question-answering": (
        "question-answering",
        '"Who left?", "Ann left the house early."',
        "first, last = outputs.start_logits.argmax(), outputs.end_logits.argmax()\n"
        'print(tokenizer.decode(inputs["input_ids"][0, first : last + 1]))',
    ),
}


def model_card(summary: Summary, head: str, is_whole: bool, dataset: Mapping[str, str] | None = None) -> str:
    """Return the README.md of an output folder in which a whole model lies, or what a PEFT method trained.

    `dataset` is what the Hub calls the data (`data.hub.dataset_of`), None where it has no name for them.
    """
    method = summary.settings["peft"]["method"]
    library = "transformers" if is_whole else {"lora": "peft"}.get(method, "progtuning")
    use = use_elsewhere(summary, head, library) if library != "progtuning" else use_here(head, method)
    metadata = metadata_of(summary, head, library, dataset)
    return f"---\n{metadata}\n---\n\n{card(summary)}\n## How to use it\n\n{use}"


def metadata_of(summary: Summary, head: str, library: str, dataset: Mapping[str, str] | None) -> str:
    """Return the metadata of the card as YAML, as huggingface.co/docs/hub/model-cards has them."""
    from huggingface_hub import ModelCardData  # when imported it reads HF_ENDPOINT

    task, base, method = USES[head][0], hub_model(summary.model), summary.settings["peft"]["method"]
    results = list(results_of(summary, task, dataset or {"name": summary.task, "type": summary.task}))
    data = ModelCardData(
        base_model=base and base[0],
        datasets=[dataset["type"]] if dataset else None,
        library_name=library,
        pipeline_tag=task,
        tags=["progtuning", *([method] if method != "none" else [])],
        metrics=list(dict.fromkeys(result.metric_type for result in results)),
        model_name=f"{summary.model} fine-tuned on {summary.task}",
        eval_results=results,
    )
    return data.to_yaml()


def results_of(summary: Summary, task: str, dataset: Mapping[str, str]) -> Iterator:
    """Yield an EvalResult for each metric of each held-out split, whose name it begins with where it is not alone."""
    from huggingface_hub import EvalResult

    splits = list(summary.dev_rows or ["dev"])
    for split in splits:
        before = "" if len(splits) == 1 else f"{split}/"
        of_set = {f"dataset_{key}": value for key, value in dataset.items()}
        if "split" in dataset:
            of_set["dataset_split"] = split.replace("dev", dataset["split"])
        for name, known in METRICS.items():
            if before + name in summary.metrics:
                measured = {"metric_value": summary.metrics[before + name], "metric_name": before + name}
                yield EvalResult(task_type=task, task_name=summary.task, metric_type=known, **of_set, **measured)


def use_elsewhere(summary: Summary, head: str, library: str) -> str:
    """Return the code by which transformers, with the library peft where it is needed, loads the folder.

    LoRA is merged into the model of transformers: the one of peft 0.21 for questions loses token_type_ids.
    """
    auto, (_, text, answer) = f"AutoModel{HEADS[head].architecture}", USES[head]
    text = f'{text}, "Its pair."' if summary.pairs else text
    load = [f"model = {auto}.from_pretrained(folder)"]
    imports, loaded = ["import torch"], [auto, "AutoTokenizer"]
    if library == "peft":
        imports.append("from peft import PeftModel")
        loaded.insert(0, "AutoConfig")
        base, revision = split_revision(summary.model)
        pinned, base = f", revision={revision!r}" if revision else "", repr(base)
        if not hub_model(summary.model) and not os.path.isdir(summary.model):  # a name of ours
            imports.append("from progtuning import model_folder")
            base = f"model_folder({base})"
        load = [
            f"base = {base}",
            "config = AutoConfig.from_pretrained(folder)",
            f"model = {auto}.from_pretrained(base, config=config, ignore_mismatched_sizes=True{pinned})",
            "model = PeftModel.from_pretrained(model, folder).merge_and_unload()",
        ]
    code = [
        *imports,
        f"from transformers import {', '.join(loaded)}",
        "",
        'folder = "."  # in which this file lies',
        *load,
        "tokenizer = AutoTokenizer.from_pretrained(folder)",
        f"inputs = tokenizer({text}, truncation=True, max_length={summary.settings['max_length']}, "
        'return_tensors="pt")',
        "with torch.no_grad():",
        "    outputs = model(**inputs)",
        answer,
    ]
    return "```python\n" + "\n".join(code) + "\n```\n"


def use_here(head: str, method: str) -> str:
    """Return what to do with a folder that holds what a method trained in this package's own format."""
    files = ("questions.jsonl", "answers.jsonl") if HEADS[head].per_token else ("texts.tsv", "predictions.tsv")
    merge = " `train --merge` writes a whole model, for transformers." if method in MERGEABLE else ""
    command = f"progtuning predict --checkpoint . --input {files[0]} --output {files[1]}"
    return f"What `--peft {method}` trained is read by progtuning alone.{merge}\n\n```sh\n{command}\n```\n"
