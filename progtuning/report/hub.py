"""The README.md of an output folder as the Hugging Face Hub wants it: metadata before the card, code to load it after.

The metadata are YAML. Text stands there as a JSON string, which is YAML too, whatever the text.
"""

import json
import os
import re
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
# What YAML takes for a line's end, or does not take, and JSON lets stand.
_UNPRINTABLE = re.compile("[\x7f-\x9f\u2028\u2029\ud800-\udfff\ufeff\ufffe\uffff]")


def model_card(summary: Summary, head: str, is_whole: bool, dataset: Mapping[str, str] | None = None) -> str:
    """Return the README.md of an output folder in which a whole model lies, or what a PEFT method trained.

    `dataset` is what the Hub calls the data (`data.hub.dataset_of`), None where it has no name for them.
    """
    method = summary.settings["peft"]["method"]
    library = "transformers" if is_whole else {"lora": "peft"}.get(method, "progtuning")
    use = use_elsewhere(summary, head, library) if library != "progtuning" else use_here(head, method)
    metadata = "\n".join(yaml_lines(metadata_of(summary, head, library, dataset)))
    return f"---\n{metadata}\n---\n\n{card(summary)}\n## How to use it\n\n{use}"


def metadata_of(summary: Summary, head: str, library: str, dataset: Mapping[str, str] | None) -> dict:
    """Return the metadata of the card, as huggingface.co/docs/hub/model-cards has them."""
    task, base, method = USES[head][0], hub_model(summary.model), summary.settings["peft"]["method"]
    name = f"{summary.model} fine-tuned on {summary.task}"
    results = list(results_of(summary, task, dataset or {"name": summary.task, "type": summary.task}))
    found = dict.fromkeys(metric["type"] for result in results for metric in result["metrics"])
    return {
        **({"base_model": base[0]} if base else {}),
        **({"datasets": [dataset["type"]]} if dataset else {}),
        "library_name": library,
        "pipeline_tag": task,
        "tags": ["progtuning", *([method] if method != "none" else [])],
        "metrics": list(found),
        "model-index": [{"name": name, "results": results}],
    }


def results_of(summary: Summary, task: str, dataset: Mapping[str, str]) -> Iterator[dict]:
    """Yield what was measured on each held-out split. Names of metrics begin with the split's where it is not alone."""
    splits = list(summary.dev_rows or ["dev"])
    for split in splits:
        before = "" if len(splits) == 1 else f"{split}/"
        metrics = [
            {"type": known, "value": summary.metrics[before + name], "name": before + name}
            for name, known in METRICS.items()
            if before + name in summary.metrics
        ]
        named = {"split": split.replace("dev", dataset["split"])} if "split" in dataset else {}
        yield {"task": {"type": task, "name": summary.task}, "dataset": {**dataset, **named}, "metrics": metrics}


def yaml_lines(values: Mapping, indent: str = "") -> Iterator[str]:
    """Yield the lines of YAML that say `values`, of text, numbers, and mappings and lists of such; keys are plain."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield f"{indent}{key}:"
            yield from yaml_lines(value, f"{indent}  ")
        elif isinstance(value, list):
            yield f"{indent}{key}:"
            for item in value:
                lines = yaml_lines(item, f"{indent}  ") if isinstance(item, Mapping) else [scalar(item)]
                yield from (f"{indent}- {line.lstrip()}" if i == 0 else line for i, line in enumerate(lines))
        else:
            yield f"{indent}{key}: {scalar(value)}"


def scalar(value: str | float) -> str:
    """Return text or a number as YAML: of a number with a point, without which some readers take 1e-05 for text.

    >>> scalar('say "no"'), scalar(1e-05), scalar(3)
    ('"say \\\\"no\\\\""', '1.0e-05', '3')
    """
    if isinstance(value, float):
        mantissa, e, exponent = repr(value).partition("e")
        return mantissa + (".0" if e and "." not in mantissa else "") + e + exponent
    return _UNPRINTABLE.sub(lambda found: f"\\u{ord(found[0]):04x}", json.dumps(value, ensure_ascii=False))


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
