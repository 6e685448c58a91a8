"""The command `explain`: the algorithm as one page of HTML, for the run that `plan` plans."""

import argparse
from dataclasses import replace
from pathlib import Path

from progtuning.base.errors import InputError
from progtuning.base.files import check_output_file, made_folder, write_text
from progtuning.cli.options import Parser
from progtuning.cli.plan import Asked
from progtuning.cli.streams import tell
from progtuning.cost.explain import Explained
from progtuning.cost.plan import plan
from progtuning.report.explained import explained_page
from progtuning.stages import EMBEDDING_POLICIES, make_schedule

MAX_STAGES = 200  # columns of a page


def add_explain_options(parser: Parser) -> None:
    parser.add_argument("-o", "--output", required=True, metavar="FILE", help="the page, HTML; it needs no network")


def run_explain(args: argparse.Namespace) -> None:
    asked = Asked.of(args)
    check_output_file(args.output)
    page = explained_page(explained_document(asked))
    made_folder(Path(args.output).parent, "--output")
    write_text(args.output, page)
    tell(f"Written: {args.output}")


def explained_document(asked: Asked) -> dict:
    """Return what the page shows. Raises InputError where the run has more stages than MAX_STAGES."""
    settings, config = asked.settings, asked.config
    if (count := len(asked.schedule(settings).stages)) > MAX_STAGES:
        raise InputError(f"{settings.named_schedule} must have at most {MAX_STAGES} stages for a page, got {count}")
    shape = (settings.batch_size, asked.length)
    full = plan(config, make_schedule("full", config.num_hidden_layers, 1), 1, settings.peft, *shape)["stages"][0]
    explained = Explained(config, settings.peft, asked.forecast(cache=False), settings.epochs, full)
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
