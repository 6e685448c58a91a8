"""A whole run: from the names of a model and a task to an output folder, and from there to metrics and predictions."""

import json
import platform
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch

from progtuning import __version__
from progtuning.bert import Model
from progtuning.checkpoint import CONFIG, base_model_name, load_model, load_peft, save_peft, save_pretrained
from progtuning.config import BertConfig, TrainConfig
from progtuning.data.batching import EncodedRows, encode_examples
from progtuning.data.glue import load_glue
from progtuning.data.text import Splits, load_folder, movie_reviews, read_table
from progtuning.data.tokenization import Tokenizer, load_tokenizer
from progtuning.errors import InputError
from progtuning.files import new_folder, read_json, write_json
from progtuning.measure import attention_backends, describe_device
from progtuning.peft import apply_peft
from progtuning.peft.lora import unwrap
from progtuning.sources import data_folder, model_folder
from progtuning.train import LOSSES, Trainer, measure_splits, predict

SUMMARY, LOG = "summary.json", "metrics.jsonl"


def choose_device(name: str | None) -> torch.device:
    """Return the device of that name; None takes CUDA where there is one. Raises InputError where it cannot be used."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name not in ("cpu", "cuda"):
        raise InputError(f"--device must be cpu or cuda, got {name!r}")
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: PyTorch finds no CUDA device here")
    return torch.device(name)


def load_splits(task: str, data: str | None) -> Splits:
    """Read a task's training and held-out rows. `data` names a folder or what `sources.data_folder` takes.

    `task` is a GLUE task, "movie-reviews", or "classification" or "regression" for a folder of one's own. Raises InputError.
    """
    if task == "movie-reviews":
        return movie_reviews(data_folder(data or "movie-reviews"))
    if data is None:
        raise InputError(f"--task {task} needs --data, the folder with its files")
    if task in ("classification", "regression"):
        return load_folder(data_folder(data), regression=task == "regression")
    return load_glue(task, data_folder(data))


def prepare(
    folder: Path, splits: Splits, settings: TrainConfig
) -> tuple[BertConfig, TrainConfig, Tokenizer, EncodedRows, dict[str, EncodedRows]]:
    """Return what a run on `splits` needs beside the weights: the architecture under the task's head, the settings with what they
    leave to the model filled in, the tokenizer, and the encoded training and held-out rows. Raises InputError."""
    task = splits.task
    config = BertConfig.from_json(folder / CONFIG)
    config = config.with_head("regression" if task.is_regression else "classification", task.labels)
    dropouts = {name: getattr(settings, name) for name in ("hidden_dropout_prob", "attention_probs_dropout_prob")}
    config = replace(config, **{name: value for name, value in dropouts.items() if value is not None})
    if settings.max_length is None:
        settings = replace(settings, max_length=min(128, config.max_length))
    settings = replace(settings, prefix_dropout=settings.drops_out_prefix)
    tokenizer = load_tokenizer(folder, config)
    train_rows = encode_examples(splits.train, tokenizer, settings.max_length)
    dev_rows = {name: encode_examples(rows, tokenizer, settings.max_length) for name, rows in splits.dev.items()}
    return config, settings, tokenizer, train_rows, dev_rows


def fine_tune(
    model_name: str,
    folder: Path,
    splits: Splits,
    settings: TrainConfig,
    device: torch.device,
    output_dir: str | Path | None = None,
    merge: bool = False,
    say: Callable[[str], None] = lambda text: None,
) -> dict:
    """Fine-tune the model of `folder` on a task and return the document of `summary.json`.

    With `output_dir`, a new or empty folder, the tokenizer, `metrics.jsonl`, `summary.json` and the model are written there; every
    input has been checked before it is made. `say` is told of the prefix cache's size. A model that a PEFT method trained is written as what was trained alone, or with
    `merge` as a whole one in Hugging Face layout. Raises InputError for a wrong input, RunError for a run that fails.
    """
    if merge and settings.peft.method in ("none", "adapter"):
        raise InputError(f"--merge needs --peft lora, bitfit or spafit, got {settings.peft.method}")
    config, settings, tokenizer, train_rows, dev_rows = prepare(folder, splits, settings)
    task = splits.task
    model, loaded = load_model(folder, config, settings.seed)
    apply_peft(model, settings.peft, settings.seed)
    trainer = Trainer(model, train_rows, settings, device)
    if trainer.engine.cache:
        tokens, size = train_rows.lengths.sum(), trainer.engine.cache.nbytes
        say(f"The prefix cache takes {size / 1e9:.3g} GB of {settings.cache}: {tokens:,} tokens in {settings.cache_dtype}.")
    with RunLog(None if output_dir is None else new_folder(output_dir)) as log, trainer.engine.cache or nullcontext():
        trainer.log = log

        def measure(epoch: int) -> None:
            if settings.evaluate == "epoch" or epoch == settings.epochs - 1:
                values = measure_splits(model, dev_rows, task, settings.batch_size, device, settings.precision)
                log({"epoch": epoch + 1, "metrics": values})

        trainer.fit(after_epoch=measure)
    summary = {
        "model": model_name,
        "task": task.name,
        "num_blocks": model.num_blocks,
        "train_rows": len(train_rows),
        "dev_rows": {name: len(rows) for name, rows in dev_rows.items()},
        "metrics": log.rows[-1]["metrics"],
        **trainer.account(),
        "fresh_parameters": loaded.fresh,
        "unused_tensors": loaded.unused,
        "settings": asdict(settings),
        "device": describe_device(device),
        "attention_backends": attention_backends(config, device, settings.precision),
        "versions": {"progtuning": __version__, "torch": torch.__version__, "python": platform.python_version()},
    }
    if output_dir is not None:
        if settings.peft.method == "none" or merge:
            unwrap(model)
            save_pretrained(model, output_dir)
        else:
            base = str(Path(model_name).resolve()) if Path(model_name).is_dir() else model_name
            save_peft(model, output_dir, settings.peft, base)
        tokenizer.save(output_dir)
        write_json(Path(output_dir) / SUMMARY, summary)
    return summary


def probe(
    folder: Path, splits: Splits, settings: TrainConfig, device: torch.device, blocks: Sequence[int] | None = None
) -> list[dict]:
    """Figure 1 of the paper: for each block, train E, that block and the head alone, from the same start.

    `settings` must have the schedule "full"; with embeddings "never" E is frozen too. Returns a row for each block (0-based
    `blocks`; all where None): {"block" (counted from 1), "metrics"}. Raises InputError and RunError as `fine_tune` does.
    """
    config, settings, tokenizer, train_rows, dev_rows = prepare(folder, splits, settings)
    rows = []
    for index in range(config.num_hidden_layers) if blocks is None else blocks:
        model, _ = load_model(folder, config, settings.seed)
        for other, block in enumerate(model.encoder.layer):
            block.requires_grad_(other == index)
        Trainer(model, train_rows, settings, device).fit()
        values = measure_splits(model, dev_rows, splits.task, settings.batch_size, device, settings.precision)
        rows.append({"block": index + 1, "metrics": values})
    return rows


class RunLog:
    """The rows of `metrics.jsonl`, kept and, where there is a folder, appended to the file at once."""

    def __init__(self, folder: Path | None):
        self.rows: list[dict] = []
        self._file = open(folder / LOG, "w", encoding="utf-8", newline="\n") if folder else None

    def __call__(self, row: dict) -> None:
        self.rows.append(row)
        if self._file:
            self._file.write(json.dumps(row, allow_nan=False) + "\n")
            self._file.flush()

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *error) -> None:
        if self._file:
            self._file.close()


def load_checkpoint(folder: Path, max_length: int | None) -> tuple[Model, Tokenizer, int]:
    """Load a fine-tuned model, its tokenizer, and the longest sequence: `max_length`, or where None that of its training.

    What a PEFT method trained is put on its base model, which is fetched by the name that the folder has for it. Raises InputError where the folder has no head, or where a file is missing or damaged.
    """
    config = BertConfig.from_json(folder / CONFIG)
    if config.head not in LOSSES:
        raise InputError(f"--checkpoint {folder} must have a classification or regression head, got {config.head}")
    base = base_model_name(folder)
    if base is None:
        model, _ = load_model(folder, fresh_head=False)
    else:
        model, _ = load_model(model_folder(base), config)
        load_peft(model, folder)
    tokenizer = load_tokenizer(folder, config)
    if max_length is None and (folder / SUMMARY).is_file():
        try:
            max_length = read_json(folder / SUMMARY)["settings"]["max_length"]
        except (KeyError, TypeError):
            raise InputError(f"{folder / SUMMARY}: expected settings.max_length; give --max-length") from None
    return model, tokenizer, tokenizer.check_max_length(max_length)


def evaluate_checkpoint(
    folder: Path,
    splits: Splits,
    device: torch.device,
    batch_size: int = 32,
    max_length: int | None = None,
    precision: str = "fp32",
) -> dict[str, float]:
    """Return the metrics of a fine-tuned model on a task's held-out rows. Raises InputError where its classes are others."""
    model, tokenizer, max_length = load_checkpoint(folder, max_length)
    task = splits.task
    if (model.config.head == "regression") != task.is_regression:
        raise InputError(f"--checkpoint {folder} has a {model.config.head} head, which does not fit --task {task.name}")
    if not task.is_regression and model.config.labels != task.labels:
        got, expected = ", ".join(model.config.labels), ", ".join(task.labels)
        raise InputError(f"--checkpoint {folder} has the classes {got}, expected those of --task {task.name}: {expected}")
    rows = {name: encode_examples(examples, tokenizer, max_length) for name, examples in splits.dev.items()}
    return measure_splits(model, rows, task, batch_size, device, precision)


def predict_file(
    folder: Path,
    file: str,
    device: torch.device,
    batch_size: int = 32,
    max_length: int | None = None,
    precision: str = "fp32",
) -> str:
    """Return the predictions for a TSV or JSONL file (`-`: standard input) as a TSV, a row for each of its rows.

    Columns: the predicted class `label` and its `probability`, or for regression `score`. Raises InputError.
    """
    _, examples = read_table(file, require_label=False)
    model, tokenizer, max_length = load_checkpoint(folder, max_length)
    outputs = predict(model, encode_examples(examples, tokenizer, max_length), batch_size, device, precision)
    if model.config.head == "regression":
        return "score\n" + "".join(f"{score:.6g}\n" for score in outputs[:, 0])
    exponentials = np.exp(outputs - outputs.max(axis=1, keepdims=True))
    probabilities = exponentials / exponentials.sum(axis=1, keepdims=True)
    rows = (f"{model.config.labels[row.argmax()]}\t{row.max():.6f}\n" for row in probabilities)
    return "label\tprobability\n" + "".join(rows)
