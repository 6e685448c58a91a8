"""The names of tasks: which rows each has, and which task a fine-tuned model is for."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from progtuning.base.errors import InputError
from progtuning.base.sources import DATA, data_folder
from progtuning.data import glue, questions
from progtuning.data.hub import load_hub
from progtuning.data.multi_label import MultiLabel
from progtuning.data.own import load_dev, load_own, movie_reviews
from progtuning.data.questions import Questions, load_squad
from progtuning.data.task import Classes, Numbers, Splits, Task
from progtuning.settings.options import option_name, options
from progtuning.settings.train import DataConfig

HUB = "hub"  # in place of a folder: the task's data set on the Hugging Face Hub


@dataclass(frozen=True)
class Own:
    """A task whose files are the user's: what reads them, and the held-out rows alone for a model's classes."""

    load: Callable[[str, DataConfig], Splits]
    load_dev: Callable[[str, tuple[str, ...] | None, DataConfig], Splits]


OWN = {  # by the name of the task, which is that of its head
    "classification": Own(partial(load_own, regression=False), load_dev),
    "regression": Own(partial(load_own, regression=True), load_dev),
    "multi-label": Own(partial(load_own, multi_label=True), partial(load_dev, multi_label=True)),
}
KINDS: dict[str, type[Task]] = {kind.head: kind for kind in (Classes, Numbers, MultiLabel, Questions)}


def load_splits(task: str, data: str | None, reading: DataConfig = DataConfig()) -> Splits:
    """Read a task's training and held-out rows. `data` is "hub", or names a folder or what `sources.data_folder` takes;
    for one of OWN it is what `own.load_own` takes.

    `task` is a GLUE task, "squad", "squad_v2", "movie-reviews", or one of OWN, which alone `reading` is for. Raises
    InputError.
    """
    check_reading(task, reading)
    if task == "movie-reviews":
        return movie_reviews(data_folder(data or DATA.built_in[task]))
    if task.lower() in glue.TEST_TASKS:
        raise InputError(
            f"--task {task} is for predict --glue-submission alone, expected a task to train or measure on"
        )
    if task not in (*questions.TASKS, *OWN) and not glue.is_task(task):
        names = ", ".join((*glue.TASKS, *questions.TASKS, "movie-reviews", *OWN))
        raise InputError(f"--task must be one of {names}, got {task!r}")
    if data is None:
        raise InputError(f"--task {task} needs --data, the folder with its files")
    if task in OWN:
        return OWN[task].load(data, reading)
    if data == HUB:
        return load_hub(task)
    return load_squad(task, data_folder(data)) if task in questions.TASKS else glue.load_glue(task, data_folder(data))


def own_name(task: str) -> str:
    """Return the name that a task of GLUE has itself, whose case and dash may be given otherwise; of others `task`."""
    return glue.glue_task(task).task.name if glue.is_task(task) else task


def check_reading(task: str, reading: DataConfig) -> None:
    """Raise InputError where the rows of a task are its own, and yet an option says how to read them."""
    given = [name for name in options(DataConfig) if getattr(reading, name) != getattr(DataConfig, name)]
    if given and task not in OWN:
        raise InputError(f"{option_name(DataConfig, given[0])} is for --task {' or '.join(OWN)}, got {task}")
