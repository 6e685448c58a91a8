"""The command line. Exit status 0; 1 a run that failed; 2 wrong use. An error is one line on standard error."""

import argparse
import re
import sys
from collections.abc import Sequence

from progtuning import __version__
from progtuning.base.errors import InputError, Interrupted, RunError
from progtuning.cli.compare import add_compare_options, run_compare
from progtuning.cli.explain import add_explain_options, run_explain
from progtuning.cli.options import (
    MODEL_HELP,
    SETTINGS,
    Parser,
    add_checkpoint_options,
    add_command,
    add_run_options,
    add_task_options,
    named,
)
from progtuning.cli.plan import add_memory_options, add_plan_options, run_paper, run_plan, run_report
from progtuning.cli.predict import run_evaluate, run_predict
from progtuning.cli.reproduce import add_reproduce_options, run_reproduce
from progtuning.cli.streams import fail, is_standard_output, let_first_speak, several_processes, standard_streams
from progtuning.cli.train import run_demo, run_probe, run_train
from progtuning.settings.options import add_options, options
from progtuning.settings.peft import PeftConfig
from progtuning.settings.train import CheckpointConfig, DPSConfig, SquadConfig, TrainConfig


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


def prints_result(args: argparse.Namespace) -> bool:
    """Say whether the command's result goes to standard output alone, or is asked for there."""
    output = getattr(args, "output", None) or ""
    is_all = args.run in (run_evaluate, run_plan, run_paper) or getattr(args, "dry_run", False)
    return is_standard_output(output) or getattr(args, "json", False) or is_all


def build_parser() -> Parser:
    parser = Parser(
        prog="progtuning", description="Fine-tune an encoder of the BERT family while the trained blocks shrink."
    )
    parser.add_argument("--version", action="version", version=f"progtuning {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    demo = add_command(
        commands, "demo", run_demo, "full fine-tuning beside Progtuning on real reviews, in minutes on a CPU"
    )
    text = "for summary.json and a picture, not the folder of a run (%(default)s)"
    demo.add_argument("--output-dir", type=named, default="progtuning-demo", help=text)
    add_run_options(demo)

    train = add_command(commands, "train", run_train, "fine-tune a model on a task")
    train.add_argument("--model", required=True, type=named, help=MODEL_HELP)
    add_task_options(train)
    text = "a new or empty folder, or with --resume that of the run"
    train.add_argument("--output-dir", required=True, type=named, help=text)
    add_options(train, CheckpointConfig)
    train.add_argument("--max-train-rows", type=int, metavar="N", help="train on a sample of N rows")
    train.add_argument(
        "--recipe", choices=("paper",), help="for all options not given what the method's authors have, and E always"
    )
    train.add_argument(
        "--merge", action="store_true", help="write a whole model, the PEFT method's update merged into it"
    )
    train.add_argument(
        "--dry-run",
        action="store_true",
        help="check everything, say plan, data and memory, and train and write nothing",
    )
    for settings in SETTINGS:
        add_options(train, settings)
    add_run_options(train)

    compare = add_command(
        commands, "compare", run_compare, "which schedule is best on a task, at equal cost: a table and one sentence"
    )
    add_compare_options(compare)
    for settings in (PeftConfig, DPSConfig, SquadConfig):
        add_options(compare, settings)
    add_run_options(compare)

    reproduce = add_command(
        commands,
        "reproduce",
        run_reproduce,
        "a table of the paper beside ours; an option that is not given has its authors' value",
    )
    add_reproduce_options(reproduce)
    for settings in (PeftConfig, DPSConfig, SquadConfig):
        add_options(reproduce, settings, only=options(settings).keys() - {"method"}, defaults=None)
    add_run_options(reproduce)

    evaluate = add_command(commands, "evaluate", run_evaluate, "measure a fine-tuned model on a task's held-out rows")
    add_checkpoint_options(evaluate)
    add_task_options(evaluate)
    evaluate.add_argument("--output-dir", type=named, help="a new or empty folder, for SQuAD's prediction files")
    add_options(evaluate, SquadConfig)
    add_run_options(evaluate)

    predict = add_command(commands, "predict", run_predict, "label texts, or answer questions, with a fine-tuned model")
    add_checkpoint_options(predict)
    text = (
        "file of text and text_pair, as for train, or JSONL of question and context; - is standard input (TSV or JSONL)"
    )
    predict.add_argument("--input", type=named, help=text)
    text = "label and probability, or score, as TSV, or by its name .csv or .jsonl; answers as JSONL; - is standard "
    text += "output (TSV or JSONL)"
    predict.add_argument("--output", type=named, help=text)
    text = "write what the GLUE server takes, for --task (ax and wnli too) and --data, into DIR"
    predict.add_argument("--glue-submission", type=named, metavar="DIR", help=text)
    add_task_options(predict, required=False)
    add_options(predict, SquadConfig)
    add_run_options(predict)

    plan_command = add_command(commands, "plan", run_plan, "what every stage of a run will cost; needs no weights")
    add_plan_options(plan_command)
    add_memory_options(plan_command)
    plan_command.add_argument("--json", action="store_true", help="print JSON")

    explain = add_command(
        commands, "explain", run_explain, "the same as a page to study: every stage, product by product"
    )
    add_plan_options(explain, needs_model=False)
    add_explain_options(explain)

    paper = add_command(commands, "paper", run_paper, "the paper's Tables 2 and 3 and Figure 4 from the closed forms")
    paper.add_argument("--json", action="store_true", help="print JSON")

    probe = add_command(
        commands, "probe", run_probe, "the paper's Figure 1: train E, one block and the head alone, block by block"
    )
    probe.add_argument("--model", required=True, type=named, help="as for train")
    add_task_options(probe)
    text = "a new or empty folder, for probe.json and a picture"
    probe.add_argument("--output-dir", required=True, type=named, help=text)
    probe.add_argument("--max-train-rows", type=int, metavar="N", help="train on a sample of N rows")
    left_out = {"schedule", "stages", "calendar", "budget", "freeze_percentile", "evaluate", "keep", "patience"}
    left_out |= {"cache", "cache_dtype", "cache_limit"}
    own = {"embeddings": "always"}  # as Figure 1 trains E
    add_options(probe, TrainConfig, only=options(TrainConfig).keys() - left_out, defaults=own)
    add_run_options(probe)

    report_command = add_command(commands, "report", run_report, "compare runs: a table, and with matplotlib pictures")
    report_command.add_argument("folders", nargs="+", type=named, metavar="DIR", help="output folders of train")
    text = "Markdown; pictures are put beside it; - is standard output, without pictures"
    report_command.add_argument("-o", "--output", required=True, type=named, metavar="FILE", help=text)
    return parser
