"""From the settings of a run to its schedule: a calendar of the paper, or one that decides while it trains."""

from progtuning.methods.autofreeze import AdaptiveSchedule
from progtuning.settings.train import TrainConfig
from progtuning.stages import Schedule, make_schedule


def build_schedule(settings: TrainConfig, num_blocks: int) -> Schedule | AdaptiveSchedule:
    """Return the schedule that `settings` name, over `num_blocks` blocks."""
    arguments = (num_blocks, settings.num_stages, settings.embeddings)
    if settings.schedule == AdaptiveSchedule.name:
        return AdaptiveSchedule(*arguments, settings.freeze_percentile)
    return make_schedule(settings.schedule, *arguments)
