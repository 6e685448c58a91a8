"""From the settings of a run to its schedule: a calendar of the paper, or one that decides while it trains."""

from progtuning.base.errors import InputError
from progtuning.methods.autofreeze import AdaptiveSchedule
from progtuning.settings.train import TrainConfig, parse_calendar
from progtuning.stages import Schedule, make_calendar, make_schedule


def build_schedule(settings: TrainConfig, num_blocks: int) -> Schedule | AdaptiveSchedule:
    """Return the schedule that `settings` name, over `num_blocks` blocks.

    Raises InputError where a calendar freezes more blocks than there are.
    """
    if settings.calendar is not None:
        calendar = parse_calendar(settings.calendar)
        if max(frozen for frozen, _ in calendar) > num_blocks:
            raise InputError(f"--calendar {settings.calendar} freezes more blocks than the model has, {num_blocks}")
        return make_calendar(settings.calendar, calendar, num_blocks, settings.embeddings)
    arguments = (num_blocks, settings.num_stages, settings.embeddings)
    if settings.schedule == AdaptiveSchedule.name:
        return AdaptiveSchedule(*arguments, settings.freeze_percentile)
    return make_schedule(settings.schedule, *arguments)


def priced_schedule(settings: TrainConfig, num_blocks: int) -> Schedule:
    """Return the schedule by whose cost a budget is counted: of one that decides while it trains, whose cost nobody
    knows before, full fine-tuning, which is the most that it can cost."""
    return build_schedule(settings, num_blocks) if settings.kind.is_planned else make_schedule("full", num_blocks, 1)
