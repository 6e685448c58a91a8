"""The documents of `progtuning plan` and of `train --dry-run`: what every stage of a run will cost, without weights."""

from collections.abc import Iterable
from dataclasses import replace
from fractions import Fraction
from itertools import product

from progtuning.base.checks import check_number
from progtuning.base.errors import InputError
from progtuning.cost.budget import Forecast
from progtuning.cost.closed_form import (
    ON_CPU,
    ON_CUDA,
    PLAIN,
    Kernels,
    bytes_of,
    bytes_of_sums,
    cache_bytes,
    kept_levels,
    largest_batch,
    planned_updates,
    run_trace,
    state_bytes,
    step_flops,
    units,
    updated_by_stage,
    updated_parameters,
)
from progtuning.model.config import BertConfig, sequence_head
from progtuning.settings.peft import PeftConfig
from progtuning.settings.train import TrainConfig
from progtuning.stages import SCHEDULES, Schedule, make_schedule

# Documents


def plan(
    config: BertConfig,
    schedule: Schedule,
    num_epochs: int,
    peft: PeftConfig = PLAIN,
    batch: int = 32,
    length: int = 128,
    model_name: str = "",
    tokens: int | None = None,
    cache_dtype: str = "fp32",
    kernels: Kernels = ON_CPU,
    memory: int | None = None,
    run_epochs: Fraction | None = None,
) -> dict:
    """Return the document that `progtuning plan --json` prints: what every stage of a run costs.

    The run is `num_epochs` long, or with a budget `run_epochs`; full fine-tuning, which it stands beside, `num_epochs`.

    FLOPs and bytes are those of one training step over (batch, length) tokens by the `kernels` given; the cache holds
    `tokens` tokens, one batch where None. With `memory`, in bytes, each stage has the largest batch whose step fits.
    Of a schedule that decides while it trains, the plan is the most that it can cost: its first stage throughout, with
    the sums by which it decides, and the cache of its furthest. The baseline, "full", is plain fine-tuning by the same
    method: every block and E in every epoch.
    A config that names no head is given a classification head. Raises InputError where an argument is out of range.
    """
    check_number("--epochs", num_epochs, int, low=1)
    if config.head is None:
        config = config.with_head(sequence_head(len(config.labels)), config.labels)
    model = units(config, peft)
    full = make_schedule("full", config.num_hidden_layers, 1)
    full_updated = sum(planned_updates(model, full, num_epochs))
    of_full = model.during(full.stages[0])
    full_backward = step_flops(config, of_full, peft, batch, length, kernels.checkpointed)[1]
    run_epochs = num_epochs if run_epochs is None else run_epochs
    updated = planned_updates(model, schedule, run_epochs)
    stages = []
    num_tokens = batch * length if tokens is None else tokens
    shelves = kept_levels([model.during(kept).cut() for _, kept in schedule.planned])
    for (stage, kept), share, stage_updated in zip(schedule.planned, schedule.shares, updated):
        epochs = Fraction(run_epochs * share, sum(schedule.shares))
        active = model.during(stage)
        trace = run_trace(config, active, peft, batch, length, kernels)
        sizes = bytes_of(active, trace)
        forward, backward = trace.flops
        stages.append(
            {
                "stage": stage.index + 1,
                "epochs": int(epochs) if epochs.denominator == 1 else float(epochs),
                "active_blocks": active.active_blocks(),
                "embeddings": bool(active.embeddings.trainable),
                "trainable_parameters": active.num_trainable,
                "updated_parameters": stage_updated,
                "forward_flops": forward,
                "backward_flops": backward,
                "share_of_full": backward / full_backward,
                **sizes,
                "step_bytes": sum(sizes.values()),
                "gradient_sum_bytes": bytes_of_sums(active) if schedule.sums_gradients else 0,
                "cache_bytes": len(shelves[stage.index]) * cache_bytes(config, kept, num_tokens, cache_dtype, peft),
            }
        )
        if memory is not None:
            stages[-1]["largest_batch"] = largest_batch(config, active, peft, length, kernels, memory)
    return {
        "model": model_name,
        "num_blocks": config.num_hidden_layers,
        "stages": stages,
        "updated_parameters": sum(updated),
        "updated_parameters_full": full_updated,
        "updated_share_of_full": sum(updated) / full_updated,
        "backward_share_of_full": sum(stage["share_of_full"] * share for stage, share in zip(stages, schedule.shares))
        / sum(schedule.shares),
    } | ({} if memory is None else {"memory": memory, "largest_batch": min(one["largest_batch"] for one in stages)})


def plan_run(forecast: Forecast, schedule: Schedule, num_epochs: int, budget: float | None = None) -> dict:
    """Return what a whole run costs: of `num_epochs` epochs, or of as many steps as `budget` pays."""
    steps = num_epochs * forecast.steps_per_epoch
    steps = steps if budget is None else forecast.num_steps(schedule, budget, num_epochs)
    return plan_steps(forecast, num_epochs, steps, forecast.flops(schedule, steps))


def plan_steps(forecast: Forecast, num_epochs: int, steps: int, flops: int) -> dict:
    """Return what a run of so many steps and FLOPs is beside full fine-tuning of `num_epochs` epochs."""
    full = forecast.full(num_epochs)
    return {
        "steps": steps,
        "epochs": steps / forecast.steps_per_epoch,
        "flops": flops,
        "flops_full": full,
        "flops_share_of_full": flops / full,
    }


def plan_batches(
    forecast: Forecast, schedule: Schedule, settings: TrainConfig, num_steps: int, rows: int, tokens: int, device: str
) -> dict:
    """Return what every stage of a run costs whose batches are known: `num_steps` of those of `forecast`.

    FLOPs, steps and updated parameters are those that its `summary.json` will have; of a schedule that decides while it
    trains, the most that it can cost. The bytes of a step are the most that one of its batches needs in a process, None
    where they are not known. The training set has `rows` and `tokens`.
    """
    config, peft = forecast.config, forecast.peft
    model, kernels, shapes = units(config, peft), kernels_of(device, settings), _largest(forecast.shapes(num_steps))
    cuts = [kept for _, kept in schedule.planned]
    shelves = kept_levels([model.during(kept).cut() for kept in cuts])
    is_known, is_cached, stages = knows_bytes(device, settings), settings.cache != "off", []
    for work in forecast.by_stage(schedule, num_steps):
        active, index = model.during(work.stage), work.stage.index
        sizes = [bytes_of(active, run_trace(config, active, peft, *shape, kernels)) for shape in shapes]
        sizes = max(sizes, key=lambda one: sum(one.values()))
        of_shelf = cache_bytes(config, cuts[index], tokens, settings.cache_dtype, peft) if is_cached else 0
        stages.append(
            {
                "stage": index + 1,
                "steps": work.steps,
                "active_blocks": active.active_blocks(),
                "embeddings": bool(active.embeddings.trainable),
                "trainable_parameters": active.num_trainable,
                "forward_flops": work.forward_flops,
                "backward_flops": work.backward_flops,
                **(sizes if is_known else state_bytes(active)),
                "step_bytes": sum(sizes.values()) if is_known else None,
                "gradient_sum_bytes": bytes_of_sums(active) if schedule.sums_gradients else 0,
                "cache_bytes": len(shelves[index]) * of_shelf,
            }
        )
    lengths = (Fraction(stage["steps"], forecast.steps_per_epoch) for stage in stages)
    updated = updated_by_stage((stage["trainable_parameters"], length) for stage, length in zip(stages, lengths))
    for stage, count in zip(stages, updated):
        stage["updated_parameters"] = count
    full = updated_parameters(config, make_schedule("full", config.num_hidden_layers, 1), settings.epochs, peft)
    flops = sum(stage["forward_flops"] + stage["backward_flops"] for stage in stages)
    return {
        "num_blocks": config.num_hidden_layers,
        "stages": stages,
        "updated_parameters": sum(updated),
        "updated_parameters_full": full,
        "run": {"rows": rows} | plan_steps(forecast, settings.epochs, num_steps, flops),
    }


def _largest(shapes: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return those (rows, length) than which no other has both as many rows and as many tokens a row.

    >>> _largest([(8, 5), (8, 9), (3, 9), (2, 12)])
    [(8, 9), (2, 12)]
    """
    found: list[tuple[int, int]] = []
    for rows, length in sorted(shapes, reverse=True):
        if not found or length > found[-1][1]:
            found.append((rows, length))
    return found


def kernels_of(device: str, settings: TrainConfig) -> Kernels:
    """Return what the bytes of a step depend on beside its shapes. On a CPU they are those of fp32."""
    kernels = ON_CPU if device == "cpu" else ON_CUDA[settings.precision]
    return replace(kernels, checkpointed=settings.checkpoint_activations)


def knows_bytes(device: str, settings: TrainConfig) -> bool:
    """Say whether the bytes of a step are known: on a CPU those of fp32 alone."""
    return device == "cuda" or settings.precision == "fp32"


def check_keeps(config: BertConfig, settings: TrainConfig, schedule: Schedule) -> None:
    """Raise InputError where the settings have a cache and no stage has anything to keep."""
    own = units(config, settings.peft)
    if settings.cache != "off" and not any(own.during(kept).cut() for _, kept in schedule.planned):
        raise InputError(
            f"--cache {settings.cache} has nothing to keep: under {settings.named_schedule}, --embeddings "
            f"{settings.embeddings} and {len(schedule.planned)} stages no block is ever frozen below all that trains"
        )


def plan_calendars(forecast: Forecast, num_epochs: int, budget: float, embeddings: str) -> list[dict]:
    """Return for each named schedule, of T = 1, 2, 3, 4 and L stages, what share of full fine-tuning `num_epochs`
    epochs cost, whether that is within `budget`, and how many steps it pays.

    Of "full" T is 1.
    """
    num_blocks, rows = forecast.config.num_hidden_layers, []
    for name, num_stages in product(SCHEDULES, sorted({1, 2, 3, 4, num_blocks})):
        schedule = make_schedule(name, num_blocks, num_stages, embeddings)
        if (name == "full" and num_stages > 1) or num_stages > num_blocks:
            continue
        share = plan_run(forecast, schedule, num_epochs)["flops_share_of_full"]
        paid = plan_run(forecast, schedule, num_epochs, budget)
        row = {"schedule": name, "num_stages": num_stages, "share_of_full": share, "within_budget": share <= budget}
        rows.append(row | {key: paid[key] for key in ("steps", "epochs", "flops_share_of_full")})
    return rows
