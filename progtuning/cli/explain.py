"""The command `explain`: the algorithm as one page of HTML, for a run that `plan` plans or one that was made."""

import argparse
from dataclasses import replace
from pathlib import Path

from progtuning.base.errors import InputError
from progtuning.base.files import check_no_input, check_output_file, made_folder, write_text
from progtuning.cli.options import Parser
from progtuning.cli.plan import Asked, kernels_of
from progtuning.cli.streams import tell
from progtuning.cost.explain import Explained
from progtuning.cost.plan import plan
from progtuning.model.config import BertConfig, sequence_head
from progtuning.report.explained import explained_page, run_document
from progtuning.report.summary import SUMMARY, Summary, read_worked_summary
from progtuning.run.log import LOG, read_log
from progtuning.settings.options import given, option_name, options
from progtuning.settings.peft import PeftConfig
from progtuning.settings.train import TrainConfig
from progtuning.stages import EMBEDDING_POLICIES, make_schedule

MAX_STAGES = 200  # columns of a page


def add_explain_options(parser: Parser) -> None:
    run = "instead of a model and options, output folder of train: that run's plan, and what it was"
    parser.add_argument("--run", dest="run_folder", metavar="DIR", help=run)
    parser.add_argument("-o", "--output", required=True, metavar="FILE", help="the page, HTML; it needs no network")


def run_explain(args: argparse.Namespace) -> None:
    check_output_file(args.output)
    if args.run_folder is None:
        if args.model is None:
            raise InputError("explain needs --model, or --run with the output folder of a run")
        document = explained_document(Asked.of(args))
    else:
        folder = Path(args.run_folder)
        check_no_input(args.output, (folder / SUMMARY, folder / LOG))
        document = document_of_run(folder, args)
    page = explained_page(document)
    made_folder(Path(args.output).parent, "--output")
    write_text(args.output, page)
    tell(f"Written: {args.output}")


def explained_document(asked: Asked) -> dict:
    """Return what the page shows. Raises InputError where the run has more stages than MAX_STAGES."""
    settings, config = asked.settings, asked.config
    if (count := len(asked.schedule(settings).stages)) > MAX_STAGES:
        raise InputError(f"{settings.named_schedule} must have at most {MAX_STAGES} stages for a page, got {count}")
    shape = (settings.batch_size, asked.length)
    full = plan(
        config, make_schedule("full", config.num_hidden_layers, 1), 1, settings.peft, *shape, kernels=asked.kernels
    )
    full = full["stages"][0]
    forecast = asked.forecast(cache=False)
    explained = Explained(config, settings.peft, forecast, settings.epochs, full, asked.kernels)
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
        "rows": asked.rows,
        "trains_embeddings": explained.model.embeddings.num_trainable > 0,
        "full": full,
        "policies": policies,
        "units": explained.units,
    }


def document_of_run(folder: Path, args: argparse.Namespace) -> dict:
    """Return what the page shows of a run: its plan, and beside it what was measured."""
    own = [option_name(kind, name) for kind in (TrainConfig, PeftConfig) for name in given(args, kind)]
    if own := [*(["--model"] if args.model is not None else []), *own]:
        raise InputError(f"--run has a model and options of its own: leave out {', '.join(own)}")
    summary = read_worked_summary(folder)
    document = explained_document(asked_of_run(folder, summary))
    planned = document["policies"][document["embeddings"]]["plan"]["stages"]
    return document | {"run": run_document(summary, read_log(folder), planned)}


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
    config = BertConfig.from_json(folder / "config.json")
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
