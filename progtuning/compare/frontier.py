"""What a comparison shows: every schedule beside full fine-tuning at the same budget, and the best at each budget."""

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType

import numpy as np

from progtuning.compare.grid import CHOICE, RESULT, Grid
from progtuning.report.pictures import new_figure, save_figure
from progtuning.report.tables import millions, table

BASE = "full"
RESAMPLES = 2000
Sampled = Callable[[Sequence], Callable[[np.ndarray], float]]  # predictions -> metric of rows drawn (`Task.sampled`)


def bootstrap(
    rows: Sequence[Mapping], base: Sequence[Mapping], sampled: Sampled, num_rows: int, resamples: int = RESAMPLES
) -> np.ndarray:
    """Return one method's metric less another's, averaged over the seeds that both have: (1 + resamples,).

    First on all held-out rows, then on rows and seeds drawn with replacement, the same for both methods: the paired
    bootstrap (Efron and Tibshirani, 1993, chapter 8). NaN where the two have no seed in common.
    """
    by_seed = {row["seed"]: row for row in base}
    pairs = [(row, by_seed[row["seed"]]) for row in sorted(rows, key=lambda row: row["seed"]) if row["seed"] in by_seed]
    pairs = [tuple(sampled(row["predictions"]) for row in pair) for pair in pairs]
    rng = np.random.default_rng(0)
    samples = [np.arange(num_rows), *(rng.integers(num_rows, size=num_rows) for _ in range(resamples))]
    if not pairs:
        return np.full(len(samples), np.nan)
    scores = [[one(rows) - other(rows) for one, other in pairs] for rows in samples]
    seeds = np.random.default_rng(1).integers(len(pairs), size=(resamples, len(pairs)))
    seeds = np.concatenate([[np.arange(len(pairs))], seeds])
    return np.take_along_axis(np.array(scores), seeds, axis=1).mean(axis=1)


def percentiles(draws: np.ndarray, level: float = 0.95) -> tuple[float, float]:
    """Return the ends of the interval that holds `level` of the resamples."""
    outside = 50 * (1 - level)
    low, high = np.percentile(draws[1:], [outside, 100 - outside])
    return float(low), float(high)


def points(difference: float, low: float, high: float) -> str:
    """Return a difference in hundredths with its interval."""
    return f"{100 * difference:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})"


def results(
    rows: Iterable[Mapping], chosen: Mapping[str, float] = MappingProxyType({})
) -> dict[tuple[float, str], list[Mapping]]:
    """Return the rows of each budget and schedule that has results. Of a schedule several of whose learning rates have
    some, those of the `chosen` one count, else of the one that came last."""
    made: dict[tuple[float, str], dict[float, list]] = {}
    for row in rows:
        if row["part"] == RESULT:
            made.setdefault((row["budget"], row["schedule"]), {}).setdefault(row["lr"], []).append(row)
    return {key: by_rate.get(chosen.get(key[1])) or list(by_rate.values())[-1] for key, by_rate in made.items()}


def ended(rows: Iterable[Mapping]) -> list[Mapping]:
    """Return the rows of runs that did not fail."""
    return [row for row in rows if "predictions" in row]


def cells(
    rows: Iterable[Mapping],
    grid: Grid,
    sampled: Sampled,
    num_rows: int,
    chosen: Mapping[str, float] = MappingProxyType({}),
) -> list[dict]:
    """Return a document for each budget and schedule that has results, at the learning rate `chosen` for it.

    "to_full" has the difference to full fine-tuning at that budget and its 95 % interval, None without a seed in
    common; "choice_share" the cost of the schedule's choice of its learning rate, as a share of full fine-tuning.
    """
    rows = list(rows)
    of_grid = [row for row in rows if row["budget"] in grid.budgets and row["schedule"] in grid.schedules]
    made, found = results(of_grid, chosen), []
    for budget in grid.budgets:
        for schedule in grid.schedules:
            if (budget, schedule) not in made:
                continue
            own = made[budget, schedule]
            whole, base = ended(own), ended(made.get((budget, BASE), []))
            spent = [row for row in rows if row["part"] == CHOICE and row["schedule"] == schedule and "flops" in row]
            cell = {
                "budget": budget,
                "schedule": schedule,
                "lr": own[0]["lr"],
                "seeds": len(whole),
                "failed": len(own) - len(whole),
            }
            if whole:
                everything = np.arange(num_rows)
                cell["scores"] = [sampled(row["predictions"])(everything) for row in whole]
                cell["metric"] = statistics.mean(cell["scores"])
                cell["cost"] = statistics.mean(row["flops"] / row["flops_full"] for row in whole)
                for key in ("seconds", "steps", "updated_parameters"):
                    cell[key] = statistics.mean(row[key] for row in whole)
                cell["choice_share"] = sum(row["flops"] for row in spent) / whole[0]["flops_full"]
                if schedule != BASE:
                    draws = bootstrap(whole, base, sampled, num_rows)
                    if not np.isnan(draws[0]):
                        cell["to_full"] = [float(draws[0]), *percentiles(draws)]
                        # for the sentence, which makes one statement of all: Bonferroni
                        others = sum(1 for _, other in made if other != BASE)
                        cell["to_full_of_all"] = list(percentiles(draws, 1 - 0.05 / others))
            found.append(cell)
    return found


def comparison_table(found: Sequence[Mapping], metric: str) -> str:
    """Return the cells as a table: metric in hundredths, mean and standard deviation over the seeds."""
    lines = []
    for cell in found:
        head = [f"{cell['budget']:g}", cell["schedule"], f"{cell['lr']:g}", _seeds(cell)]
        if "metric" not in cell:
            lines.append([*head, *[None] * 7])
            continue
        to_full = points(*cell["to_full"]) if "to_full" in cell else None
        lines.append(
            [*head, spread(cell["scores"]), to_full, f"{cell['cost']:.3f}", f"{cell['steps']:,.0f}"]
            + [f"{cell['seconds']:.0f}", millions(cell["updated_parameters"]), f"{cell['choice_share']:.2f}"]
        )
    header = [
        "budget",
        "schedule",
        "lr",
        "seeds",
        metric,
        "to full at this budget",
        "FLOPs, of full",
        "steps",
        "seconds",
    ]
    return table([*header, "updated, M", "choice of lr, of full"], lines)


def _seeds(cell: Mapping) -> str:
    return f"{cell['seeds']}" + (f" ({cell['failed']} failed)" if cell["failed"] else "")


def spread(scores: Sequence[float]) -> str:
    deviation = f" ± {100 * statistics.stdev(scores):.1f}" if len(scores) > 1 else ""
    return f"{100 * statistics.mean(scores):.1f}{deviation}"


def frontier(found: Sequence[Mapping]) -> list[Mapping]:
    """Return for each budget the cell with the highest metric; of equal ones the first."""
    best = {}
    for cell in found:
        if "metric" in cell and cell["metric"] > best.get(cell["budget"], {"metric": -np.inf})["metric"]:
            best[cell["budget"]] = cell
    return list(best.values())


def frontier_table(found: Sequence[Mapping], metric: str) -> str:
    lines = []
    for cell in frontier(found):
        to_full = points(*cell["to_full"]) if "to_full" in cell else None
        lines.append([f"{cell['budget']:g}", cell["schedule"], spread(cell["scores"]), to_full])
    return table(["budget", "best", metric, "to full at this budget"], lines)


def advice(found: Sequence[Mapping], metric: str) -> str:
    """Return one sentence that says which schedule to use.

    A schedule is above full fine-tuning where the interval of the difference, of all comparisons together (0.95,
    Bonferroni), lies above 0.
    """
    measured = [cell for cell in found if "metric" in cell]
    compared = [cell for cell in measured if "to_full_of_all" in cell]
    above = [cell for cell in compared if cell["to_full_of_all"][0] > 0]
    full = max((cell for cell in measured if cell["schedule"] == BASE), key=_metric, default=None)
    if not measured:
        return "No run ended with a metric: lower --lrs."
    if not compared:
        best = max(measured, key=_metric)
        where = f"{best['schedule']} at {best['budget']:g}"
        return f"Nothing stands beside full fine-tuning at the same cost; the highest {metric} has {where}."
    if above:
        best = max(above, key=_metric)
        where = f"{best['schedule']} (lr {best['lr']:g}): at {best['budget']:g} of full fine-tuning's FLOPs"
        return f"Use {where} it is above full at the same cost, by {points(*best['to_full'])} points of {metric}."
    below = all(cell["to_full_of_all"][1] < 0 for cell in compared)
    rest = "every other schedule is below it" if below else "no other schedule is above it beyond chance"
    return f"Use full fine-tuning (lr {full['lr']:g}), for as long as you can pay: at the same cost {rest}."


def rates_at_an_edge(found: Sequence[Mapping], grid: Grid) -> str | None:
    """Return a line on schedules that chose the lowest or the highest learning rate; None where none did."""
    edges = {"lowest": grid.lrs[0], "highest": grid.lrs[-1]} if len(grid.lrs) > 1 else {}
    at = [
        f"the {name} for {', '.join(dict.fromkeys(cell['schedule'] for cell in found if cell['lr'] == lr))}"
        for name, lr in edges.items()
        if any(cell["lr"] == lr for cell in found)
    ]
    return f"the learning rate chosen is {' and '.join(at)}: a rate beyond may be better" if at else None


def _metric(cell: Mapping) -> float:
    return cell["metric"]


def draw_frontier(found: Sequence[Mapping], metric: str, path) -> bool:
    """Draw the metric of each schedule against its cost, with the spread over seeds.

    Return False where there is nothing to draw, or no matplotlib.
    """
    measured = [cell for cell in found if "metric" in cell]
    figure = new_figure(7, 4.5) if measured else None
    if figure is None:
        return False
    axes = figure.subplots()
    for marker, schedule in zip("osD^vP*Xhd" * 9, dict.fromkeys(cell["schedule"] for cell in measured)):
        own = sorted((cell for cell in measured if cell["schedule"] == schedule), key=lambda cell: cell["cost"])
        deviation = [100 * statistics.stdev(c["scores"]) if len(c["scores"]) > 1 else 0 for c in own]
        values = ([cell["cost"] for cell in own], [100 * cell["metric"] for cell in own], deviation)
        axes.errorbar(*values, marker=marker, capsize=3, label=schedule)
    best = sorted(frontier(found), key=lambda cell: cell["cost"])
    axes.plot(
        [c["cost"] for c in best], [100 * c["metric"] for c in best], color="0.6", linewidth=6, alpha=0.4, zorder=0
    )
    axes.set(xlabel="FLOPs, of full fine-tuning for all epochs", ylabel=f"{metric}, in hundredths")
    axes.legend()
    save_figure(figure, path)
    return True


def page(found: Sequence[Mapping], metric: str, title: str, account: Sequence[str], picture: str | None) -> str:
    """Return the comparison as Markdown."""
    parts = [
        f"# {title}",
        advice(found, metric),
        "\n".join(f"- {line}" for line in account),
        comparison_table(found, metric),
        f"The best at each budget:\n\n{frontier_table(found, metric)}",
        *([f"![metric against cost]({picture})"] if picture else []),
        "A budget is a share of the FLOPs of full fine-tuning for all epochs. Scores are in hundredths, mean and\n"
        "standard deviation over the seeds. Differences have a 95 % interval, a paired bootstrap over held-out rows\n"
        "and seeds; the first sentence counts as above what is so for all comparisons together (Bonferroni).",
    ]
    return "\n\n".join(parts) + "\n"
