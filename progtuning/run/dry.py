"""What a run would do, before it does it (`train --dry-run`): nothing is trained, and nothing written.

It reads, encodes and checks by the functions of a run, so that whatever would end one before its first step ends this
too, in the same words.
"""

from collections.abc import Callable
from pathlib import Path

import torch

from progtuning.base.files import read_json
from progtuning.cost.plan import knows_bytes, plan_batches
from progtuning.data.task import Splits
from progtuning.report.summary import RUN
from progtuning.run.build import build_shelves, forecast, lay_out
from progtuning.run.finetune import promises, start
from progtuning.run.folder import described, is_run
from progtuning.run.identity import check_same
from progtuning.settings.train import CheckpointConfig, TrainConfig
from progtuning.step.processes import World


def dry_run(
    model_name: str,
    folder: Path,
    splits: Splits,
    settings: TrainConfig,
    device: torch.device,
    output_dir: str | Path,
    merge: bool = False,
    checkpoints: CheckpointConfig = CheckpointConfig(),
    say: Callable[[str], None] = lambda text: None,
    world: World = World(),
) -> dict:
    """Return the plan of the run that `fine_tune` would make of the same arguments: the document of `plan_batches`.

    With `--resume` it is that of the whole run. `say` is told what a run says before it trains. Raises what `fine_tune`
    raises before it trains, but where memory, disk or device give no room for what a run takes.
    """
    with world.agreed():
        begun = start(folder, splits, settings, merge)
        settings, rows, config = begun.settings, begun.train_rows, begun.model.config
        course = lay_out(config, rows, settings, device, world)
        cache = build_shelves(config, settings, course.schedule, rows, device, world, used=False)
        if checkpoints.resume and world.is_main and is_run(output_dir):
            identity = begun.identity(splits.task, device, world)
            check_same(read_json(Path(output_dir) / RUN), described(identity), Path(output_dir))
    lines = promises(settings, course.schedule, course.num_steps, len(course.loader), cache, world)
    for line in (*lines, *begun.notes, *begun.account(splits)):
        say(line)
    prices = forecast(config, course.loader, settings)
    tokens = int(rows.lengths.sum())
    document = plan_batches(prices, course.schedule, settings, course.num_steps, len(rows), tokens, device.type)
    names = {"model": model_name, "task": splits.task.name, "train_rows": len(splits.train)}
    names["dev_rows"] = {name: len(split) for name, split in splits.dev.items()}
    return names | document | {"notes": notes(settings, device)}


def notes(settings: TrainConfig, device: torch.device) -> list[str]:
    """Return what a reader of the plan must know of its bytes and steps, a line each."""
    found = []
    if not knows_bytes(device.type, settings):
        found.append(f"The bytes of a step in {settings.precision} are not known on a CPU.")
    else:
        given = {
            f"--dps {settings.dps.mode}": settings.dps.mode != "off",
            "--compile": settings.compile,
            "--cuda-graphs": settings.cuda_graphs,
        }
        options = [name for name, is_given in given.items() if is_given]
        if options:
            keep = "keeps" if len(options) == 1 else "keep"
            found.append(f"What {' and '.join(options)} {keep} is not among the bytes of a step.")
    if settings.patience is not None:
        found.append(f"--patience {settings.patience} may end the run before.")
    return found
