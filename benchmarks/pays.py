"""Where freezing pays: what `progtuning compare` left of several tasks, side by side at equal cost.

    python benchmarks/pays.py benchmarks/results/pays/sts-b benchmarks/results/pays/mrpc --glue glue_data --output both

Every folder has the `run.json` and `rows.jsonl` of one comparison. Of each schedule and budget the table has the
difference to full fine-tuning at the same budget, in points of the task's first metric, and its mean over the tasks,
with 95 % intervals: a paired bootstrap over held-out rows and seeds, the tasks themselves fixed. The mean stands only
where every task has the schedule. A second table has the budget at which each schedule that has three budgets is first
as good as full fine-tuning at a budget of 1, and what else it takes. `--output` names two pictures: of the differences
(NAME.png), and of metric against budget (NAME-curves.png).
"""

import argparse
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from accuracy import Data, HeldOut, interval, mean
from harness import read_rows, run_script, spread

from progtuning.base.files import read_json
from progtuning.compare.frontier import BASE, bootstrap, ended, percentiles, results
from progtuning.compare.runs import ROWS
from progtuning.report import tables
from progtuning.report.pictures import new_figure, save_figure
from progtuning.report.summary import RUN

MEAN = "mean"
Found = dict[tuple[float, str], dict[str, list[dict]]]  # by budget and schedule, and by task: a row for each seed
Draws = dict[tuple[float, str], dict[str, np.ndarray]]  # by budget and schedule, and by task: (1 + resamples,)


def compared(folders: Sequence[Path], data: Data) -> tuple[Draws, Found]:
    """Return the differences to full fine-tuning, and the results themselves, {(budget, schedule): {folder: rows}}.

    Raises InputError where a folder is none of a comparison, or a task's files are not given.
    """
    draws, found = {}, {}
    for folder in folders:
        task = read_json(folder / RUN)["identity"]["task"]["name"]
        held_out, rows = HeldOut(task, data), {}
        for key, of_key in results(read_rows(folder / ROWS)).items():
            if whole := ended(of_key):
                rows[key] = whole
                found.setdefault(key, {})[folder.name] = whole
        for (budget, schedule), of_key in rows.items():
            base = rows.get((budget, BASE), [])
            difference = bootstrap(of_key, base, held_out.sampled, len(held_out.examples))
            if schedule != BASE and not np.isnan(difference[0]):
                draws.setdefault((budget, schedule), {})[folder.name] = difference
    for of_tasks in draws.values():
        if len(of_tasks) == len(folders) > 1:
            of_tasks[MEAN] = np.mean(list(of_tasks.values()), axis=0)
    return draws, found


def table(draws: Draws, found: Found) -> str:
    """Return a line for each budget and schedule: of full fine-tuning the metric, of the others the difference."""
    metrics = metric_names(found)
    lines = []
    for budget, schedule in sorted(found, key=lambda key: (key[0], key[1] != BASE)):
        rows, cells = found[budget, schedule], []
        for name in metrics:
            own = rows.get(name)
            if own is None:
                cells.append(None)
            elif schedule == BASE:
                cells.append(f"{spread(scores(own))}, {_seeds(own)}")
            else:
                difference = _interval(draws, budget, schedule, name)
                cells.append(difference and f"{difference}, {_seeds(own)}")
        lines.append([f"{budget:g}", schedule, *cells, _interval(draws, budget, schedule, MEAN)])
    header = ["budget", "schedule", *(f"{name}, {metric}" for name, metric in metrics.items()), "mean of the tasks"]
    return tables.table(header, lines)


def metric_names(found: Found) -> dict[str, str]:
    """Return the name of each task's first metric."""
    return {name: next(iter(rows[0]["metrics"])) for of_tasks in found.values() for name, rows in of_tasks.items()}


def scores(rows: Sequence[Mapping]) -> list[float]:
    """Return each row's first metric, in hundredths."""
    return [100 * next(iter(row["metrics"].values())) for row in rows]


def curves(found: Found, task: str) -> dict[str, dict[float, list[dict]]]:
    """Return the rows of each schedule that `task` has at three budgets or more, by budget."""
    by_schedule: dict[str, dict[float, list[dict]]] = {}
    for (budget, schedule), of_tasks in sorted(found.items(), key=lambda item: item[0][0]):
        if task in of_tasks:
            by_schedule.setdefault(schedule, {})[budget] = of_tasks[task]
    return {schedule: rows for schedule, rows in by_schedule.items() if len(rows) > 2}


def reached(curve: Mapping[float, float], level: float) -> float | None:
    """Return the budget at which the line through {budget: metric} first is at `level`, None where it never is.

    The lowest budget itself where the line begins above: what less would do was not measured.
    """
    budgets = sorted(curve)
    if curve[budgets[0]] >= level:
        return budgets[0]
    for low, high in zip(budgets, budgets[1:]):
        if curve[high] >= level:
            return low + (high - low) * (level - curve[low]) / (curve[high] - curve[low])
    return None


def as_good_table(found: Found) -> str | None:
    """Return what each schedule takes to be as good as full fine-tuning at a budget of 1; None where none ran at 1.

    By task the budget, on the means over seeds; over the tasks seconds and peak bytes at a budget of 1, of full
    fine-tuning's there.
    """
    names = list(metric_names(found))
    by_task = {name: curves(found, name) for name in names if name in found.get((1, BASE), {})}
    lines = []
    for schedule in dict.fromkeys(schedule for of_task in by_task.values() for schedule in of_task):
        cells, at_one = {}, []
        for name, of_task in by_task.items():
            if schedule in of_task:
                means = {budget: statistics.mean(scores(rows)) for budget, rows in of_task[schedule].items()}
                at = reached(means, statistics.mean(scores(found[1, BASE][name])))
                bound = "over" if at is None else "at most" if at == min(means) else ""
                cells[name] = f"{bound} {max(means) if at is None else at:.2f}".strip()
                at_one += [(of_task[schedule][1], found[1, BASE][name])] if 1 in means else []
        shares = ([mean(own, key) / mean(base, key) for own, base in at_one] for key in ("seconds", "peak_bytes"))
        lines.append([schedule, *map(cells.get, names), *(f"{np.mean(s):.2f}" if s else None for s in shares)])
    header = ["schedule", *names, "seconds at 1, of full's", "peak bytes at 1, of full's"]
    return tables.table(header, lines) if lines else None


def _interval(draws: Draws, budget: float, schedule: str, name: str) -> str | None:
    found = draws.get((budget, schedule), {}).get(name)
    return None if found is None else interval(found)


def _seeds(rows: Sequence[Mapping]) -> str:
    return f"{len(rows)} seed{'s' * (len(rows) > 1)}"


def draw(draws: Draws, path: Path) -> bool:
    """Draw the differences with their intervals, a panel for each budget. False without matplotlib."""
    budgets = sorted({budget for budget, _ in draws})
    names = list(dict.fromkeys(name for of_tasks in draws.values() for name in of_tasks if name != MEAN))
    figure = new_figure(9, 1.5 + 0.6 * len(draws))
    if figure is None:
        return False
    sizes = [sum(budget == one for one, _ in draws) for budget in budgets]
    panels = figure.subplots(len(budgets), 1, squeeze=False, height_ratios=sizes)[:, 0]
    for axes, budget in zip(panels, budgets):
        schedules = [schedule for one, schedule in draws if one == budget]
        for place, name in enumerate([*names, MEAN]):
            own = [(y, draws[budget, s][name]) for y, s in enumerate(schedules) if name in draws[budget, s]]
            middles = np.array([100 * one[0] for _, one in own])
            ends = 100 * np.array([percentiles(one) for _, one in own]).reshape(-1, 2)
            heights = [y + 0.7 * (place / len(names) - 0.5) for y, _ in own]
            color, marker = ("black", "D") if name == MEAN else (f"C{place}", "osv^<>pPX*"[place % 10])
            axes.errorbar(
                middles, heights, xerr=[middles - ends[:, 0], ends[:, 1] - middles], fmt=marker, color=color, label=name
            )
        axes.axvline(0, color="0.5", linewidth=1)
        for edge in range(1, len(schedules)):
            axes.axhline(edge - 0.5, color="0.85", linewidth=1)
        axes.set(yticks=range(len(schedules)), yticklabels=schedules, ylim=(len(schedules) - 0.5, -0.5))
        axes.set_title(f"budget {budget:g}")
    panels[-1].set_xlabel("points of the first metric, to full fine-tuning at the same FLOPs")
    panels[0].legend(fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
    save_figure(figure, path)
    return True


def draw_curves(found: Found, path: Path) -> bool:
    """Draw metric against budget, a panel for each task. False without matplotlib or three budgets of a schedule."""
    by_task = {name: own for name in metric_names(found) if (own := curves(found, name))}
    schedules = list(dict.fromkeys(schedule for own in by_task.values() for schedule in own))
    lines = -(-len(by_task) // 2)
    figure = new_figure(10, 3.5 * lines) if by_task else None
    if figure is None:
        return False
    panels = list(figure.subplots(lines, 2, squeeze=False).flat)
    for axes, (name, own) in zip(panels, by_task.items()):
        for schedule, rows in own.items():
            place = schedules.index(schedule)
            apart = 1.015 ** (place - len(schedules) // 2)  # so that no bar hides another
            middles = [statistics.mean(scores(of_budget)) for of_budget in rows.values()]
            bars = [statistics.stdev(scores(one)) if len(one) > 1 else 0 for one in rows.values()]
            style = {"color": f"C{place}", "marker": "osv^<>pPX*"[place % 10], "capsize": 3, "label": schedule}
            axes.errorbar([apart * budget for budget in rows], middles, bars, **style)
        budgets = sorted({budget for rows in own.values() for budget in rows})
        axes.set(title=name, ylabel=metric_names(found)[name], xlabel="FLOPs, of full fine-tuning", xscale="log")
        axes.set_xticks(budgets, [f"{budget:g}" for budget in budgets])
        axes.minorticks_off()
    panels[0].legend(fontsize="small")
    for axes in panels[len(by_task) :]:
        axes.remove()
    save_figure(figure, path)
    return True


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="of a comparison")
    parser.add_argument("--glue", type=Path, help="folder of the GLUE tasks' official folders")
    parser.add_argument("--output", type=Path, metavar="FILE", help="draw two pictures (.png)")
    args = parser.parse_args(arguments)
    draws, found = compared(args.folders, Data(args.glue, None))
    print("\n\n".join(filter(None, [table(draws, found), as_good_table(found)])))
    if args.output:
        draw(draws, args.output.with_suffix(".png"))
        draw_curves(found, args.output.with_name(f"{args.output.stem}-curves.png"))


if __name__ == "__main__":
    run_script(main)
