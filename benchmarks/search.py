"""Is the search as good as the whole grid, for less? On the same labels: every value in full, the search, and then
students with other seeds at the best of the one and at the choice of the other.

python benchmarks/search.py --config demo --work-dir runs/search --json search.json

The grid trains each of its thresholds to the end, once; the search does what `softlabel search` does, its repeats with
other seeds included. Compared is the mean mAP50 on the validation split, where both chose.
"""

import argparse
import json
import sys
from math import sqrt
from pathlib import Path
from statistics import mean, stdev

import ray
from common import machine  # what the benchmarks share

from softlabel.recipe_file import load_recipe
from softlabel.workflows.search import search_experiment

_KEY = "train.threshold"


def main() -> int:
    """Run all, print what to compare, and write the JSON file."""
    arguments = _arguments()
    grid_set = ["search.sampler=grid", "search.stop_early=false"]
    over_range = [*grid_set, f"search.grid_points={arguments.points}", f"search.trials={arguments.points}"]
    ray.init(address="local", include_dashboard=True)
    grid, search = _search(arguments, over_range), _search(arguments, [])
    best = max(grid["trials"], key=_map50)["values"][_KEY]
    students = {}
    for threshold in dict.fromkeys((best, search["answer"]["values"][_KEY])):
        alone = [f"search.space={{{_KEY}: {{choices: [{threshold}]}}}}", f"search.trials={arguments.seeds}"]
        found = _search(arguments, [*grid_set, *alone, f"search.seeds={arguments.seeds}"])
        students[threshold] = [_map50(trial) for trial in found["trials"]]
    ray.shutdown()
    compared = compare(grid, search, best, students)
    print(_table(compared))
    if arguments.json:
        arguments.json.write_text(json.dumps(compared, indent=1))
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", type=Path, required=True, help="the recipe, YAML; its search section is the search")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a recipe value")
    parser.add_argument("--points", type=int, default=9, help="thresholds of the grid (default: 9)")
    parser.add_argument("--seeds", type=int, default=3, help="students at the best and at the choice (default: 3)")
    parser.add_argument("--work-dir", type=Path, default=Path("runs/search"), help="where results go")
    parser.add_argument("--resume", action="store_true", help="go on with what is there")
    parser.add_argument("--json", type=Path, help="write the numbers here too")
    return parser.parse_args()


def _search(arguments: argparse.Namespace, settings: list[str]) -> dict:
    """One search in the work folder, with tiles, teacher and labels of all."""
    recipe = load_recipe(arguments.config, [f"name={arguments.work_dir.name}", *arguments.set, *settings])
    return search_experiment(recipe, arguments.work_dir.resolve(), None, resume=arguments.resume)


def _map50(trial: dict) -> float:
    return max((row["map50"] for row in trial["history"]), default=0.0)  # nothing where no label was left


def compare(grid: dict, search: dict, best: float, students: dict[float, list[float]]) -> dict:
    """The grid's best and the search's choice, by students of both with the same seeds; and what finding them cost."""
    choice = search["answer"]["values"][_KEY]
    return {
        "machine": machine(),
        "grid": {
            "map50": {f"{trial['values'][_KEY]:g}": _map50(trial) for trial in grid["trials"]},
            "best": best,
            "students": students[best],
            "epochs": grid["epochs"],
            "seconds": grid["seconds"],
        },
        "search": {
            "choice": choice,
            "students": students[choice],
            "epochs": search["epochs"],
            "seconds": search["seconds"],
            "tried": len({trial["values"][_KEY] for trial in search["trials"]}),
            "start_up_share": search["start_up_share"],
            "answer": search["answer"],
        },
        "difference": mean(students[choice]) - mean(students[best]),
        "two_standard_errors": 2 * _pooled_error(students[best], students[choice]),
    }


def _pooled_error(*groups: list[float]) -> float:
    """Standard error of the difference of two means, from their pooled variance."""
    degrees = sum(len(group) - 1 for group in groups)
    squares = sum((value - mean(group)) ** 2 for group in groups for value in group)
    return sqrt(squares / max(degrees, 1) * sum(1 / len(group) for group in groups))


def _table(found: dict) -> str:
    grid, search, about = found["grid"], found["search"], found["machine"]
    lines = [
        f"{about['cpu']}, {about['cores']} cores, no GPU; {about['date']}, commit {about['commit']}",
        "",
        "| | threshold | mean mAP50 (validation) | standard deviation | seeds | epochs to find it | time |",
        "|---|---|---|---|---|---|---|",
        f"| grid's best of {len(grid['map50'])} | {grid['best']:g} | {_row(grid)} |",
        f"| search's choice of {search['tried']} | {search['choice']:g} | {_row(search)} |",
        "",
        f"Difference {found['difference']:+.4f} (two pooled standard errors: {found['two_standard_errors']:.4f}); the "
        f"search used {search['epochs'] / grid['epochs']:.0%} of the grid's epochs.",
        "",
        f"| threshold | {' | '.join(grid['map50'])} |",
        f"|---|{'---|' * len(grid['map50'])}",
        f"| mAP50 in the grid | {' | '.join(f'{value:.3f}' for value in grid['map50'].values())} |",
    ]
    return "\n".join(lines)


def _row(found: dict) -> str:
    students = found["students"]
    sd = f"{stdev(students):.4f}" if len(students) > 1 else "-"
    return f"{mean(students):.4f} | {sd} | {len(students)} | {found['epochs']} | {found['seconds'] / 60:.0f} min"


if __name__ == "__main__":
    sys.exit(main())
