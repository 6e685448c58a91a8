"""The commands `plan`, `paper` and `report`, which train nothing."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from progtuning.base.errors import InputError
from progtuning.base.files import check_no_input, check_output_file, made_folder
from progtuning.cli.options import Parser, check_beside, named, train_config
from progtuning.cli.streams import print_json, put_line, tell_written, write_result
from progtuning.cost.budget import Forecast, even_forecast
from progtuning.cost.closed_form import Kernels
from progtuning.cost.paper import metric_cells, paper_rows
from progtuning.cost.plan import check_keeps, kernels_of, knows_bytes, plan, plan_calendars, plan_run
from progtuning.methods.schedules import build_schedule, priced_schedule
from progtuning.model.config import ARCHITECTURES, HEADS, BertConfig, sequence_head
from progtuning.report import pages, tables
from progtuning.report.summary import SUMMARY, read_worked_summary
from progtuning.settings.options import add_options
from progtuning.settings.peft import PeftConfig
from progtuning.settings.train import TrainConfig, parse_size
from progtuning.stages import Schedule


def add_plan_options(parser: Parser, needs_model: bool = True) -> None:
    help = f"{', '.join(ARCHITECTURES)}, a config.json or its folder"
    parser.add_argument("--model", required=needs_model, type=named, help=help)
    parser.add_argument("--length", type=int, help="tokens a sequence (128, or what the model takes)")
    parser.add_argument("--labels", type=int, help="classes; 1 of --head classification is regression (2)")
    heads = [name for name in HEADS if name != "regression"]
    parser.add_argument("--head", choices=heads, help="(classification)")
    parser.add_argument("--rows", type=int, help="training rows, all of --length, for the cost of a whole run (10000)")
    planned = "schedule stages calendar budget embeddings epochs batch_size precision cache cache_dtype"
    add_options(parser, TrainConfig, only=[*planned.split(), "checkpoint_activations"])
    add_options(parser, PeftConfig)
    parser.add_argument("--device", choices=("cpu", "cuda"), help="whose kernels the bytes of a step are of (cpu)")


def add_memory_options(parser: Parser) -> None:
    text = "say the largest batch that fits into so many GB, or with a unit: 16GiB"
    parser.add_argument("--memory", metavar="SIZE", help=text)


def run_plan(args: argparse.Namespace) -> None:
    asked = Asked.of(args)
    document = asked.plan(asked.settings)
    print_json(document) if args.json else put_line(tables.plan_table(document))


@dataclass(frozen=True)
class Asked:
    """The run that is planned: rows all of `length` tokens."""

    model_name: str
    config: BertConfig
    settings: TrainConfig
    length: int
    rows: int
    kernels: Kernels
    memory: int | None = None  # bytes

    @classmethod
    def of(cls, args: argparse.Namespace) -> "Asked":
        """Raises InputError that names the option where a value is out of range."""
        config = architecture(args.model)
        labels = 2 if args.labels is None else args.labels
        rows = 10_000 if args.rows is None else args.rows
        asked_head = args.head or "classification"
        if args.labels is not None and not HEADS[asked_head].has_labels:
            raise InputError(f"--labels is for heads that have classes, got it with --head {asked_head}")
        least = 2 if HEADS[asked_head].has_several else 1  # 1 of classification is regression
        if not least <= labels <= 100_000:
            raise InputError(f"--labels must be in {least}..100000 for --head {asked_head}, got {labels}")
        head = sequence_head(labels, asked_head) if HEADS[asked_head].has_labels else asked_head
        config = config.with_head(head, tuple(f"LABEL_{i}" for i in range(labels)))
        settings = train_config(args, config.num_hidden_layers)
        check_beside(args, settings, own=False)  # it plans a cache too
        check_keeps(config, settings, build_schedule(settings, config.num_hidden_layers))
        if not 1 <= rows <= 10_000_000:
            raise InputError(f"--rows must be in 1..10000000, got {rows}")
        length = min(128, config.max_length) if args.length is None else args.length
        memory = getattr(args, "memory", None)
        memory = None if memory is None else parse_size("--memory", memory)
        device = args.device or "cpu"
        if not knows_bytes(device, settings):
            got = f"--precision {settings.precision}"
            raise InputError(f"{got}: the bytes of a step in it are known on CUDA alone: --device cuda")
        return cls(args.model, config, settings, length, rows, kernels_of(device, settings), memory)

    def schedule(self, settings: TrainConfig) -> Schedule:
        return build_schedule(settings, self.config.num_hidden_layers)

    def forecast(self, cache: bool) -> Forecast:
        of_rows = (self.config, self.rows, self.settings.batch_size, self.length, self.settings.peft)
        return even_forecast(*of_rows, cache, self.settings.checkpoint_activations)

    def plan(self, settings: TrainConfig) -> dict:
        """Return the document of `plan --json` under `settings`, of the same batches and method."""
        schedule, epochs = self.schedule(settings), settings.epochs
        forecast, run = self.forecast(settings.cache != "off"), None
        if settings.kind.is_planned or settings.budget is not None:  # else nobody knows its cost
            run = plan_run(forecast, priced_schedule(settings, self.config.num_hidden_layers), epochs, settings.budget)
        shape = (settings.peft, settings.batch_size, self.length)
        document = plan(
            self.config,
            schedule,
            epochs,
            *shape,
            self.model_name,
            cache_dtype=settings.cache_dtype,
            kernels=self.kernels,
            memory=self.memory,
            run_epochs=None if settings.budget is None else Fraction(run["steps"], forecast.steps_per_epoch),
        )
        if run is not None:
            document["run"] = {"rows": self.rows} | run
        if settings.budget is not None:
            document["calendars"] = plan_calendars(forecast, epochs, settings.budget, settings.embeddings)
        return document


def architecture(name: str) -> BertConfig:
    """Return that of a config.json or of the folder it lies in, or a named architecture.

    As for train, what exists on the disk wins, and a model of the Hub may have its old name or that of today.
    """
    from progtuning.base.sources import encoder_folder, today_name

    path = Path(name)
    path = encoder_folder(path) / "config.json" if path.is_dir() else path
    known = next((known for known in ARCHITECTURES if name in (known, today_name(known))), None)
    if known and not path.exists():
        return ARCHITECTURES[known]
    if not path.is_file():
        names = ", ".join(ARCHITECTURES)
        raise InputError(f"--model must be one of {names}, a config.json or its folder, got {name!r}")
    return BertConfig.from_json(path, keep_head=False)


def run_paper(args: argparse.Namespace) -> None:
    rows, cells = paper_rows(), metric_cells()
    if args.json:
        print_json({"rows": rows, "metrics": cells})
        return
    put_line(tables.paper_table(rows))
    put_line("\nMetrics, as the paper alone prints them: no closed form gives them.\n")
    put_line(tables.metric_tables(cells))


def run_report(args: argparse.Namespace) -> None:
    folders = [Path(folder) for folder in args.folders]
    runs = list(zip(names_of(folders), map(read_worked_summary, folders)))
    check_output_file(args.output)
    check_no_input(args.output, (folder / SUMMARY for folder in folders))
    path = None if args.output == "-" else Path(args.output)
    if path is not None:
        made_folder(path.parent, "--output")  # the pictures come first
    write_result(args.output, pages.compare(runs, path))
    tell_written(args.output)


def names_of(folders: Sequence[Path]) -> list[str]:
    """Return what each folder is called: by its last name, or where two have the same by the whole path."""
    names = [folder.name or str(folder) for folder in folders]
    return names if len(set(names)) == len(names) else [str(folder) for folder in folders]
