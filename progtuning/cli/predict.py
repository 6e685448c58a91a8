"""The commands `evaluate` and `predict`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from progtuning.base.errors import InputError
from progtuning.base.files import check_new_folder, check_no_input, check_output_file
from progtuning.cli.options import label_map
from progtuning.cli.streams import is_standard_output, print_json, put_line, say, tell, write_result
from progtuning.report import tables
from progtuning.settings.options import given, option_name
from progtuning.settings.train import DataConfig, SquadConfig, TrainConfig


def run_evaluate(args: argparse.Namespace) -> None:
    from progtuning.run.saved import evaluate_checkpoint, load_checkpoint, load_held_out
    from progtuning.step.device import choose_device

    if args.output_dir is not None:
        check_new_folder(args.output_dir)
    device = choose_device(args.device)
    TrainConfig.check(batch_size=args.batch_size, precision=args.precision)
    options = (given(args, SquadConfig), args.base_model, label_map(args), say)
    checkpoint = load_checkpoint(Path(args.checkpoint), args.max_length, *options)
    splits = load_held_out(args.task, args.data, checkpoint, DataConfig(**given(args, DataConfig)))
    measured = evaluate_checkpoint(checkpoint, splits, device, args.batch_size, args.precision, args.output_dir)
    if splits.division is not None:
        share, count = splits.division["dev_share"], len(splits.dev["dev"])
        text = f"{args.data}: {count:,} of {count + len(splits.train):,} rows, held out by --dev-share {share:g}, are"
        known = "" if checkpoint.division else " Whether the model trained on them is not known."
        say(f"{text} measured; --dev-share 1 measures all.{known}")
    if args.json:
        count = {name: len(rows) for name, rows in splits.dev.items()}
        print_json({"task": splits.task.name, "rows": count} | measured._asdict())
        return
    values = [[name, f"{value:.4f}"] for name, value in measured.metrics.items()]
    put_line(tables.table(["metric", splits.task.name], values))
    if measured.by_class:
        put_line("\n" + tables.class_table(measured.by_class))


def run_predict(args: argparse.Namespace) -> None:
    from progtuning.run.saved import checkpoint_files, load_checkpoint, predict_file, write_glue_submission
    from progtuning.step.device import choose_device

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
    kind = output_kind(args.output, checkpoint.task.kinds)
    reading = DataConfig(**given(args, DataConfig))
    text = predict_file(checkpoint, args.input, device, args.batch_size, args.precision, reading, kind)
    write_result(args.output, text)
    if args.json:
        print_json({"written": [args.output]})


def output_kind(output: str, kinds: Sequence[str]) -> str:
    """Return which of `kinds` the name of a file says that it is, the first where it says none.

    Raises InputError where it says another kind of file: what reads it would go by its name.
    """
    end = Path(output.lower()).suffix.removeprefix(".")
    if end not in kinds and end in ("csv", "tsv", "jsonl", "json", "parquet", "gz"):
        expected = " or ".join(f".{kind}" for kind in kinds)
        raise InputError(f"--output {output}: got a name that ends in .{end}, expected {expected}")
    return end if end in kinds else kinds[0]


def check_predict_options(args: argparse.Namespace) -> None:
    """Raise InputError unless the options are those of a file, or those of a submission."""
    if args.json and args.output is not None and is_standard_output(args.output):
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
    columns = given(args, DataConfig)
    if args.glue_submission is not None and columns:
        raise InputError(f"{option_name(DataConfig, min(columns))} does not go with {what}")
    if args.output is not None:
        check_output_file(args.output)
