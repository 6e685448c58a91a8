"""The command `compare`: which schedule is best on one's own data, at equal cost."""

import argparse
from pathlib import Path

from progtuning.base.checks import check_number
from progtuning.base.errors import InputError, RunError
from progtuning.base.files import write_json, write_text
from progtuning.cli.options import Parser, add_task_options, check_beside, device_of, named, train_config
from progtuning.cli.streams import print_json, say, tell
from progtuning.compare.grid import CACHED, Grid, default_rates, default_schedules, seeds_of, settings_of
from progtuning.model.config import BertConfig
from progtuning.settings.options import add_options, given, options
from progtuning.settings.train import DataConfig, TrainConfig

DOCUMENT, PAGE, PICTURE = "compare.json", "README.md", "frontier.png"
# What the grid has of its own, and batches by tokens, whose steps no budget counts.
OF_THE_GRID = {"schedule", "calendar", "budget", "lr", "seed", "evaluate", "prefix_dropout", "keep", "patience"}
OF_THE_GRID |= {"batch_tokens"}


def add_compare_options(parser: Parser) -> None:
    """Add what the command has beside the options of a run."""
    parser.add_argument("--model", required=True, type=named, help="as for train")
    add_task_options(parser)
    text = "a new or empty folder, or with --resume that of before"
    parser.add_argument("--output-dir", required=True, type=named, help=text)
    text = "schedules, or calendars (2, or 0:2,4:1), each with what stands behind it: +cache, +eval (frozen blocks do "
    text += "not drop out), +never or +always (when E trains), +lr0.8 (--lr-decay)"
    text += " (full, and +cache: shrinking, growing, a third of the blocks frozen, and a third and at the end two)"
    parser.add_argument("--schedules", nargs="+", metavar="SCHEDULE", help=text)
    text = "shares of the FLOPs of full fine-tuning for --epochs (0.5 1)"
    parser.add_argument("--budgets", nargs="+", type=float, default=[0.5, 1.0], metavar="B", help=text)
    text = "learning rates of which each schedule chooses one (half of --lr, --lr, twice --lr); one: no choice"
    parser.add_argument("--lrs", nargs="+", type=float, metavar="LR", help=text)
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="runs of each, from --seed on (%(default)s)")
    text = "share of the training rows on which a choice is measured; held-out rows never are (%(default)s)"
    parser.add_argument("--choice-share", type=float, default=0.2, metavar="S", help=text)
    parser.add_argument("--max-train-rows", type=int, metavar="N", help="train on a sample of N rows")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at a time (%(default)s)")
    parser.add_argument("--resume", action="store_true", help="go on with the comparison in --output-dir, or add to it")
    add_options(parser, TrainConfig, only=options(TrainConfig).keys() - OF_THE_GRID | {"lr", "seed"})


def run_compare(args: argparse.Namespace) -> None:
    from progtuning.base.sources import model_folder
    from progtuning.compare import frontier
    from progtuning.compare.runs import ROWS, Setup, compare
    from progtuning.step.measure import environment

    check_number("--jobs", args.jobs, int, 1, 1000)
    check_number("--choice-share", args.choice_share, float, 0.01, 0.9)
    device = device_of(args)
    folder = model_folder(args.model)
    num_blocks = BertConfig.from_json(folder / "config.json", keep_head=False).num_hidden_layers
    if args.lrs and hasattr(args, "lr"):
        raise InputError("--lr says nothing beside --lrs: leave one of them out")
    base = train_config(args, num_blocks, args.task)
    grid = Grid(
        schedules=tuple(args.schedules or default_schedules(num_blocks, base.num_stages)),
        budgets=tuple(sorted(args.budgets)),
        lrs=tuple(sorted(args.lrs or default_rates(base.lr))),
        seeds=seeds_of(args.seeds, base.seed),
    )
    runs = [settings_of(run, base) for run in grid.results(dict.fromkeys(grid.schedules, base.lr))]
    if base.cache != "off" and all(run.cache == "off" for run in runs):
        raise InputError(f"--cache {base.cache} says nothing without a schedule that has {CACHED}: leave it out")
    check_beside(args, *runs)
    reading = DataConfig(**given(args, DataConfig))
    data = (args.task, args.data, reading)
    setup = Setup(args.model, folder, *data, args.max_train_rows, args.choice_share, base, args.device)
    rows = compare(setup, grid, args.output_dir, args.resume, args.jobs, say)
    splits, output = setup.splits, Path(args.output_dir)
    task, (name, examples) = splits.task, next(iter(splits.dev.items()))
    chosen = grid.choose(rows, task.main_metric)
    found = frontier.cells(rows, grid, lambda answers: task.sampled(answers, examples), len(examples), chosen)
    here, metric = environment(device), task.main_metric
    versions = ", ".join(f"{name} {version}" for name, version in here["versions"].items())
    edge = frontier.rates_at_an_edge(found, grid)
    lines = [
        f"{args.model}, --peft {base.peft.method}, batch {base.batch_size}, {base.epochs} epochs of full as budget 1",
        f"{len(splits.train):,} training rows; {len(examples):,} held-out rows ({name})",
        f"{here['device']} ({here['processor']}), {versions}",
        *([edge] if edge else []),
    ]
    document = {"metric": metric, "cells": found, "advice": frontier.advice(found, metric), "account": lines}
    drawn = frontier.draw_frontier(found, metric, output / PICTURE)
    write_json(output / DOCUMENT, document)
    write_text(
        output / PAGE,
        frontier.page(found, metric, f"Which schedule for {task.name}?", lines, PICTURE if drawn else None),
    )
    if not any("metric" in cell for cell in found):
        raise RunError(f"no run of {len(rows)} ended with a metric, their reasons are in {output / ROWS}: lower --lrs")
    if args.json:
        print_json(document)
        return
    tell(frontier.comparison_table(found, metric))
    tell("\n" + "\n".join([document["advice"], *([f"Note: {edge}."] if edge else []), f"Written: {output / PAGE}"]))
