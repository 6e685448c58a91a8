"""The command `explain`: the algorithm as one page of HTML, for a run that `plan` plans or one that was made."""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from progtuning.base.errors import InputError
from progtuning.base.files import check_no_input, check_output_file, read_json
from progtuning.cli.compare import DOCUMENT
from progtuning.cli.options import Parser, named
from progtuning.cli.plan import Asked, names_of
from progtuning.cli.streams import tell_written, write_result
from progtuning.cost.explain import Explained
from progtuning.cost.plan import kernels_of, plan
from progtuning.model.config import BertConfig, sequence_head
from progtuning.report.explained import explained_page, run_document
from progtuning.report.summary import LOG, SUMMARY, Summary, read_worked_summary
from progtuning.run.log import read_log
from progtuning.settings.options import given, option_name, options
from progtuning.settings.peft import PeftConfig
from progtuning.settings.train import TrainConfig
from progtuning.stages import EMBEDDING_POLICIES, make_schedule

CONFIG = "config.json"
MAX_STAGES = 200  # columns of a page
COMPARED = ("budget", "lr", "seeds", "metric", "cost", "seconds", "updated_parameters")


def add_explain_options(parser: Parser) -> None:
    runs = "instead of a model and options, output folders of train: what they were, and the plan of the first"
    parser.add_argument("--run", dest="runs", nargs="+", type=named, metavar="DIR", help=runs)
    text = "output folder of compare, whose result stands beside it"
    parser.add_argument("--comparison", type=named, metavar="DIR", help=text)
    text = "the page, HTML; it needs no network; - is standard output"
    parser.add_argument("-o", "--output", required=True, type=named, metavar="FILE", help=text)


def run_explain(args: argparse.Namespace) -> None:
    check_output_file(args.output)
    if args.runs is not None:
        folders = [Path(folder) for folder in args.runs]
        check_no_input(args.output, (folder / name for folder in folders for name in (SUMMARY, LOG, CONFIG)))
        document = document_of_runs(folders, args)
    elif args.model is not None:
        document = explained_document(Asked.of(args))
    else:
        what = ", of what was compared" if args.comparison is not None else ""
        raise InputError(f"explain needs --model{what}, or --run with the output folder of a run")
    if args.comparison is not None:
        check_no_input(args.output, [Path(args.comparison) / DOCUMENT])
        document["comparison"] = read_comparison(Path(args.comparison))
    write_result(args.output, explained_page(document))
    tell_written(args.output)


def explained_document(asked: Asked) -> dict:
    """Return what the page shows. Raises InputError where the run has more stages than MAX_STAGES."""
    settings, config, kernels = asked.settings, asked.config, asked.kernels
    precision, attention = "bf16" if kernels.itemsize == 2 else "fp32", "fused" if kernels.fused else "math"
    if (count := len(asked.schedule(settings).stages)) > MAX_STAGES:
        raise InputError(f"{settings.named_schedule} must have at most {MAX_STAGES} stages for a page, got {count}")
    shape = (settings.batch_size, asked.length)
    full = plan(config, make_schedule("full", config.num_hidden_layers, 1), 1, settings.peft, *shape, kernels=kernels)
    full = full["stages"][0]
    forecast = asked.forecast(cache=False)
    explained = Explained(config, settings.peft, forecast, settings.epochs, full, kernels)
    policies = {}
    for policy in EMBEDDING_POLICIES:
        under = replace(settings, embeddings=policy)
        policies[policy] = explained.policy(asked.schedule(under), asked.plan(under), *shape)
    return {
        "model": asked.model_name,
        "schedule": settings.named_schedule,
        "peft": settings.peft.method,
        "embeddings": settings.embeddings,
        "epochs": settings.epochs,
        "batch": shape,
        "kernels": f"{precision} with {attention} attention",
        "rows": asked.rows,
        "trains_embeddings": explained.model.embeddings.num_trainable > 0,
        "full": full,
        "policies": policies,
        "units": explained.units,
    }


def document_of_runs(folders: Sequence[Path], args: argparse.Namespace) -> dict:
    """Return what the page shows of runs: the plan of the first, and of each what was measured beside its own plan."""
    own = [
        f"--{name}"
        for name in ("model", "length", "labels", "head", "rows", "device")
        if getattr(args, name) is not None
    ]
    own += [option_name(kind, name) for kind in (TrainConfig, PeftConfig) for name in given(args, kind)]
    if own:
        raise InputError(f"--run has a model and options of its own: leave out {', '.join(own)}")
    summaries = [read_worked_summary(folder) for folder in folders]
    runs = [asked_of_run(folder, summary) for folder, summary in zip(folders, summaries)]
    documents = [
        run_document(name, summary, read_log(folder), run.plan(run.settings)["stages"])
        for name, folder, summary, run in zip(names_of(folders), folders, summaries, runs)
    ]
    return explained_document(runs[0]) | {"runs": documents}


def asked_of_run(folder: Path, summary: Summary) -> Asked:
    """Return what was asked of a run, its rows all of its mean length with padding.

    Raises InputError where its settings are not what train writes.
    """
    values, peft = summary.settings, summary.settings["peft"]
    try:
        peft = {name: peft[name] for name in options(PeftConfig) if name in peft}
        peft = {name: tuple(value) if isinstance(value, list) else value for name, value in peft.items()}
        values = {name: values[name] for name in options(TrainConfig) if name in values}
        settings = TrainConfig(**values, peft=PeftConfig(**peft))
    except (AttributeError, TypeError, ValueError):
        raise InputError(f"{folder / SUMMARY}: settings is not what train writes there") from None
    config = BertConfig.from_json(folder / CONFIG)
    if config.head is None:
        config = config.with_head(sequence_head(2), ("0", "1"))
    counts = ("examples", "slots", "steps")
    examples, slots, steps = (sum(getattr(one, name) or 0 for one in summary.stages) for name in counts)
    length = min(config.max_length, max(1, round(slots / examples)) if examples else settings.max_length or 128)
    if settings.batch_tokens is not None:
        settings = replace(settings, batch_tokens=None, batch_size=max(1, round(examples / steps)))
    rows = summary.train_windows or summary.train_rows or 1
    kernels = kernels_of("cpu" if (summary.device or "CPU").startswith("CPU") else "cuda", settings)
    return Asked(summary.model, config, settings, length, rows, kernels)


def read_comparison(folder: Path) -> dict:
    """Return what the page shows of the document of `compare`. Raises InputError that names the file where it is none.

    Of each budget the cell with the highest metric is marked: the frontier.
    """
    from progtuning.compare.frontier import frontier

    path = folder / DOCUMENT
    document = read_json(path)
    try:
        ended = [cell for cell in document["cells"] if "metric" in cell]
        is_good = all("schedule" in cell and is_cell(cell) for cell in ended)
        metric, advice = document["metric"], document["advice"]
    except (KeyError, TypeError, AttributeError):
        is_good = False
    if not is_good:
        raise InputError(f"{path}: expected the document that compare writes")
    best = frontier(ended)
    cells = [
        {"schedule": str(cell["schedule"]), "to_full": cell.get("to_full"), "best": cell in best}
        | {name: cell[name] for name in COMPARED}
        for cell in ended
    ]
    return {"metric": str(metric), "advice": str(advice), "cells": cells}


def is_cell(cell: Mapping) -> bool:
    """Say whether all that is shown of a cell is there: numbers, and to full three of them or none."""
    numbers = [cell[name] for name in COMPARED] + list(cell.get("to_full") or (0, 0, 0))
    good = (isinstance(one, (int, float)) and not isinstance(one, bool) and abs(one) < 1e30 for one in numbers)
    return len(numbers) == len(COMPARED) + 3 and all(good)
