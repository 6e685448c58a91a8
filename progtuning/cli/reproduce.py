"""The command `reproduce`: a table or figure of the paper, its printed figures beside ours."""

import argparse
from pathlib import Path

from progtuning.base.checks import check_choices, check_number
from progtuning.base.errors import InputError, RunError
from progtuning.base.files import write_text
from progtuning.cli.options import Parser, check_beside, device_of, named, train_config
from progtuning.cli.streams import print_json, put_line, say, tell
from progtuning.compare.grid import seeds_of
from progtuning.compare.presets import COLUMNS, PRESETS, Method, preset
from progtuning.cost.paper import paper_rows
from progtuning.model.config import BertConfig
from progtuning.report import tables
from progtuning.settings.options import add_options, given, option_name, options
from progtuning.settings.peft import PeftConfig
from progtuning.settings.train import DPSConfig, SquadConfig, TrainConfig

CLOSED_FORMS = {"table3": "Table 3", "figure4": "Figure 4"}
NAMES = (*PRESETS[:2], "table3", *PRESETS[2:], "figure1", "figure4")
FIGURE_1 = Method("E, one block and the head", "full", "none", "")
OF_RUNS = ("model", "glue", "squad", "tasks", "seeds", "max_train_rows", "output_dir", "resume", "jobs", "device")
SEEDS = 5  # the paper's
_OF_THE_TABLE = {"schedule", "stages", "calendar", "seed", "evaluate", "keep", "patience"}


def add_reproduce_options(parser: Parser) -> None:
    """Add what the command has beside the options of a run."""
    parser.add_argument("name", choices=NAMES, metavar="TABLE", help=f"{', '.join(NAMES[:-1])} or {NAMES[-1]}")
    parser.add_argument("--model", type=named, help="as for train (bert-base-uncased)")
    parser.add_argument("--glue", type=named, help="folder of the GLUE tasks' official folders, or hub")
    parser.add_argument("--squad", type=named, help="folder of SQuAD's files, or hub")
    tasks = dict.fromkeys(task for task, _ in COLUMNS.values())
    parser.add_argument("--tasks", nargs="+", metavar="TASK", help=f"of {', '.join(tasks)} (all of the table)")
    parser.add_argument("--seeds", type=int, metavar="N", help=f"runs of each, from --seed on ({SEEDS})")
    parser.add_argument("--max-train-rows", type=int, metavar="N", help="train on a sample of N rows")
    parser.add_argument("--output-dir", type=named, help="a new or empty folder, or with --resume that of before")
    parser.add_argument("--resume", action="store_true", help="go on with the runs in --output-dir, or add to them")
    parser.add_argument("--jobs", type=int, metavar="N", help="runs at a time (1)")
    add_options(parser, TrainConfig, only=options(TrainConfig).keys() - _OF_THE_TABLE | {"seed"}, defaults=None)


def run_reproduce(args: argparse.Namespace) -> None:
    if args.name in CLOSED_FORMS:
        given_here = [name for name in OF_RUNS if getattr(args, name) not in (None, False)]
        given_here += all_given(args)
        if given_here:
            name, inner = given_here[0], all_given(args).get(given_here[0])
            flag = option_name(TrainConfig, f"{name}/{min(inner)}" if isinstance(inner, dict) else name)
            raise InputError(f"reproduce {args.name} is of closed forms, which train nothing: leave out {flag}")
        rows = [row for row in paper_rows() if row["table"] == CLOSED_FORMS[args.name]]
        print_json(rows) if args.json else put_line(tables.paper_table(rows))
        return
    from progtuning.base.sources import model_folder
    from progtuning.compare.reproduce import Blocks, Trial, blocks_page, cells, page, reproduce
    from progtuning.compare.runs import ROWS, of_model, splits_of
    from progtuning.data.glue import FOLDERS
    from progtuning.run.checkpoint import flatten
    from progtuning.step.measure import environment

    jobs, seeds = 1 if args.jobs is None else args.jobs, SEEDS if args.seeds is None else args.seeds
    check_number("--jobs", jobs, int, 1, 1000)
    if args.output_dir is None:
        raise InputError(f"reproduce {args.name} needs --output-dir, the folder of its runs")
    model = args.model or "bert-base-uncased"
    of_paper = None if args.name == "figure1" else preset(args.name, model)
    methods, tasks = (of_paper.methods, of_paper.tasks) if of_paper else ((FIGURE_1,), ("sst-2",))
    if args.tasks is not None:
        check_choices("--tasks", args.tasks, tasks if of_paper else [*FOLDERS])
        tasks = tuple(dict.fromkeys(args.tasks))
    places = {task: data_of(task, args) for task in tasks}
    device = device_of(args)
    folder = model_folder(model)
    num_blocks = BertConfig.from_json(folder / "config.json", keep_head=False).num_hidden_layers
    trials = []
    for seed in seeds_of(seeds, getattr(args, "seed", TrainConfig.seed)):
        for method in methods:
            for task in tasks:
                num_rows = 0  # which DPS's recipe alone asks for
                if hasattr(args, "dps"):
                    num_rows = len(splits_of(task, places[task], args.max_train_rows).train)
                settings = settings_of(args, method, task, seed, num_blocks, num_rows)
                kind = Trial if of_paper else Blocks
                which = (method.row, task, places[task], args.max_train_rows)
                trials.append(kind(model, folder, *which, settings, args.device))
    check_beside(args, *(trial.settings for trial in trials))
    shared = {key: value for key, value in all_given(args).items() if key != "seed"}
    config = BertConfig.from_json(folder / "config.json", keep_head=False)
    identity = {"options": shared, "task": {"name": args.name}, "device": device.type} | of_model(folder, config)
    identity |= {"size of the training sample": args.max_train_rows}
    rows = reproduce(trials, identity, args.output_dir, args.resume, jobs, say)
    here = environment(device)
    sample = "all training rows" if args.max_train_rows is None else f"at most {args.max_train_rows:,} training rows"
    but = "".join(f", {option_name(TrainConfig, path)} {value}" for path, value in flatten(shared))
    account = [f"{model}, by --recipe paper{but}", sample, f"{here['device']}"]
    text = page(of_paper, cells(of_paper, rows), account) if of_paper else blocks_page(rows, account)
    output = Path(args.output_dir) / "README.md"
    write_text(output, text)
    if not any("metrics" in row for row in rows):
        raise RunError(f"none of {len(rows)} runs ended with a metric, their reasons are in {output.parent / ROWS}")
    if args.json:
        print_json([cell._asdict() for cell in cells(of_paper, rows)] if of_paper else rows)
        return
    tell(f"{text}\nWritten: {output}")


def all_given(args: argparse.Namespace) -> dict:
    """Return the settings that stand in place of the recipe's, as TrainConfig holds them."""
    inner = {"peft": PeftConfig, "dps": DPSConfig, "squad": SquadConfig}
    return given(args, TrainConfig) | {name: values for name in inner if (values := given(args, inner[name]))}


def data_of(task: str, args: argparse.Namespace) -> str:
    """Return where a task's files are. Raises InputError that names the option which says so."""
    from progtuning.data.glue import FOLDERS

    option = "glue" if task in FOLDERS else "squad"
    place = getattr(args, option)
    if place is None:
        raise InputError(f"the task {task} needs --{option}, the folder of its files, or hub")
    if place != "hub" and not Path(place).is_dir():
        raise InputError(f"--{option} {place}: no such folder")
    return place if place == "hub" or option == "squad" else str(Path(place) / FOLDERS[task])


def settings_of(
    args: argparse.Namespace, method: Method, task: str, seed: int, num_blocks: int, num_rows: int = 0
) -> TrainConfig:
    """Return the authors' settings of a method on a task, with what was given on the command line in their place."""
    of_method = {"schedule": method.schedule, "peft": method.peft, "seed": seed, "evaluate": "end"}
    return train_config(argparse.Namespace(**vars(args) | of_method, recipe="paper"), num_blocks, task, num_rows)
