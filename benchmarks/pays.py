"""Where freezing pays: what `progtuning compare` left of several tasks, side by side at equal cost.

    python benchmarks/pays.py benchmarks/results/pays/sts-b benchmarks/results/pays/mrpc --glue glue_data --output both

Every folder has the `run.json` and `rows.jsonl` of one comparison. Of each schedule and budget the table has the
difference to full fine-tuning at the same budget, in points of the task's first metric, and its mean over the tasks,
with 95 % intervals: a paired bootstrap over held-out rows and seeds, the tasks themselves fixed. The mean stands only
where every task has the schedule. `--output` names a picture (.png).
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from accuracy import Data, HeldOut, interval
from harness import read_rows, run_script, spread

from progtuning.base.files import read_json
from progtuning.compare.frontier import BASE, bootstrap, ended, percentiles, results
from progtuning.compare.runs import ROWS
from progtuning.report import tables
from progtuning.report.pictures import new_figure, save_figure
from progtuning.run.log import RUN

MEAN = "mean"
Draws = dict[tuple[float, str], dict[str, np.ndarray]]  # by budget and schedule, and by task: (1 + resamples,)


def compared(folders: Sequence[Path], data: Data) -> tuple[Draws, dict[tuple[float, str], dict[str, list]]]:
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


def table(draws: Draws, found: Mapping[tuple[float, str], Mapping[str, list]]) -> str:
    """Return a line for each budget and schedule: of full fine-tuning the metric, of the others the difference."""
    names = list(dict.fromkeys(name for of_tasks in found.values() for name in of_tasks))
    metrics = {name: next(iter(rows[0]["metrics"])) for of_tasks in found.values() for name, rows in of_tasks.items()}
    lines = []
    for budget, schedule in sorted(found, key=lambda key: (key[0], key[1] != BASE)):
        rows, cells = found[budget, schedule], []
        for name in names:
            own = rows.get(name)
            if own is None:
                cells.append(None)
            elif schedule == BASE:
                cells.append(f"{spread([100 * row['metrics'][metrics[name]] for row in own])}, {_seeds(own)}")
            else:
                difference = _interval(draws, budget, schedule, name)
                cells.append(difference and f"{difference}, {_seeds(own)}")
        lines.append([f"{budget:g}", schedule, *cells, _interval(draws, budget, schedule, MEAN)])
    header = ["budget", "schedule", *(f"{name}, {metrics[name]}" for name in names), "mean of the tasks"]
    return tables.table(header, lines)


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


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="of a comparison")
    parser.add_argument("--glue", type=Path, help="folder of the GLUE tasks' official folders")
    parser.add_argument("--output", type=Path, metavar="FILE", help="draw a picture (.png)")
    args = parser.parse_args(arguments)
    draws, found = compared(args.folders, Data(args.glue, None))
    print(table(draws, found))
    if args.output:
        draw(draws, args.output.with_suffix(".png"))


if __name__ == "__main__":
    run_script(main)
