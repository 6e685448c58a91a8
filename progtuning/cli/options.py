"""Options that several commands share, and the settings that they make."""

import argparse
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from progtuning.base.errors import InputError
from progtuning.cli.streams import let_first_speak, one_line, put
from progtuning.model.config import parse_label_map
from progtuning.settings.options import add_options, given, option_name, options
from progtuning.settings.peft import PeftConfig, parse_bounds
from progtuning.settings.recipes import TASK_DEFAULTS, recipe
from progtuning.settings.train import DataConfig, DPSConfig, SquadConfig, TrainConfig, parse_size

if TYPE_CHECKING:  # a command loads torch when it needs it
    import torch

    from progtuning.step.processes import World

SETTINGS = (TrainConfig, PeftConfig, DPSConfig, SquadConfig)
MODEL_HELP = (
    "folder, org/name[@revision] or bert-base-uncased and the like on the Hub, pypi:NAME==VERSION, or minilm-l6"
)


class Parser(argparse.ArgumentParser):
    """argparse, but that an error is one line and no option can be abbreviated."""

    def __init__(self, **values):
        super().__init__(**values, allow_abbrev=False)

    def error(self, message: str):
        let_first_speak()
        self.exit(2, f"{self.prog}: error: {one_line(message)}\n")

    def _print_message(self, message: str, file=None) -> None:
        put(message) if file is sys.stdout else super()._print_message(message, file)


def named(text: str) -> str:
    """Return the value of an option that names a file, a folder or a model. None is an error: it comes of a variable of
    the shell that is not set, and as a path it would be the current folder."""
    if not text:
        raise argparse.ArgumentTypeError("got no name, expected one")
    return text


def add_command(commands, name: str, run: Callable, text: str) -> Parser:
    parser = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
    parser.set_defaults(run=run)
    return parser


def add_task_options(parser: Parser, required: bool = True) -> None:
    text = "a GLUE task, squad, squad_v2, movie-reviews, or classification, regression or multi-label for your own data"
    parser.add_argument("--task", required=required, help=text)
    text = "folder with the task's files, or hub (movie-reviews needs none); your own are a file or a folder of CSV, "
    text += "TSV without quoting, JSONL or Parquet, plain or .gz, or hub:org/name[@revision][:config]"
    parser.add_argument("--data", type=named, help=text)
    add_options(parser, DataConfig, only=None if required else ("text_column", "pair_column"))


def add_checkpoint_options(parser: Parser) -> None:
    text = "output folder of train, or of the library peft"
    parser.add_argument("--checkpoint", required=True, type=named, help=text)
    text = "where the base model of a --checkpoint of --peft is, if no longer where its file says; as --model of train"
    parser.add_argument("--base-model", type=named, metavar="MODEL", help=text)
    parser.add_argument("--batch-size", type=int, default=TrainConfig.batch_size)
    parser.add_argument("--max-length", type=int, help="tokens a sequence (as in training)")
    parser.add_argument("--precision", default=TrainConfig.precision, help="fp32 or bf16")
    text = "other names for the model's classes, by those it has; or a JSON object"
    parser.add_argument("--label-map", metavar="OLD=NEW,...", help=text)


def add_run_options(parser: Parser) -> None:
    parser.add_argument("--device", help="cpu or cuda (cuda where there is one)")
    parser.add_argument("--json", action="store_true", help="print the result as JSON on standard output")


def device_of(args: argparse.Namespace, world: "World | None" = None) -> "torch.device":
    """Return the device that a command asks for, on which all can run that it asks for. Raises InputError."""
    from progtuning.speed.kernels import check_compiler
    from progtuning.step.device import choose_device
    from progtuning.step.processes import World

    device = choose_device(args.device, world or World())
    if getattr(args, "compile", False):
        check_compiler(device)
    return device


def train_config(args: argparse.Namespace, num_blocks: int, task: str | None = None, num_rows: int = 0) -> TrainConfig:
    """Build the settings from the options given. Where none is given, the task's own values stand, and with
    `--recipe paper` the authors' for `num_rows` training rows before them."""
    values = {settings: given(args, settings) for settings in SETTINGS}
    if "spafit_bounds" in values[PeftConfig]:
        values[PeftConfig]["spafit_bounds"] = parse_bounds(values[PeftConfig]["spafit_bounds"], num_blocks)
    if {"batch_size", "batch_tokens"} <= set(values[TrainConfig]):
        raise InputError("--batch-size and --batch-tokens exclude each other: give one of them")
    if "cache_limit" in values[TrainConfig]:
        values[TrainConfig]["cache_limit"] = parse_size("--cache-limit", values[TrainConfig]["cache_limit"])
    peft, dps = PeftConfig(**values[PeftConfig]), DPSConfig(**values[DPSConfig])
    if getattr(args, "recipe", None) == "paper":
        authors = recipe(peft.method, task, dps.mode, num_rows, values[TrainConfig])
        of_dps = {key.removeprefix("dps_"): value for key, value in authors.items() if key.startswith("dps_")}
        for settings, known in ((TrainConfig, authors), (PeftConfig, authors), (DPSConfig, of_dps)):
            names = options(settings)
            values[settings] = {key: value for key, value in known.items() if key in names} | values[settings]
        peft, dps = PeftConfig(**values[PeftConfig]), DPSConfig(**values[DPSConfig])
    defaults = TASK_DEFAULTS.get(task, {})
    return TrainConfig(**defaults | values[TrainConfig], peft=peft, dps=dps, squad=SquadConfig(**values[SquadConfig]))


def check_beside(args: argparse.Namespace, *runs: TrainConfig, own: bool = True) -> None:
    """Raise InputError where an option is given that says nothing in any of the runs, for want of another.

    Of the method's options alone, unless `own` ones of TrainConfig and DPSConfig are to be looked at too.
    """
    for parts in zip(*((run.peft, run.dps, run) if own else (run.peft,) for run in runs)):
        kind = type(parts[0])
        for name in given(args, kind):
            main, values = options(kind)[name].metadata["option"].beside or (name, None)
            if values and not any(getattr(part, main) in values for part in parts):
                flag, needed = option_name(kind, name), f"{option_name(kind, main)} {' or '.join(values)}"
                raise InputError(f"{flag} says nothing without {needed}: leave it out, or give that too")


def label_map(args: argparse.Namespace) -> dict[str, str]:
    return {} if args.label_map is None else parse_label_map(args.label_map)
