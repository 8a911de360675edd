"""Is the search as good as the whole grid, for less? The same labels, twice: every value in full, and the search.

python benchmarks/search.py --config jobs/recipes/demo.yaml --work-dir runs/search --json search.json

The grid trains each of its thresholds to the end, then other seeds for its best and for the first points; the search
does what `softlabel search` does. Both share tiles, teacher and labels. Compared is the mean mAP50 of students with
different seeds, at the grid's best threshold and at the search's choice, on the validation split, where both chose.
"""

import argparse
import json
import sys
from math import sqrt
from pathlib import Path
from statistics import mean, stdev

import ray
from common import machine  # what the benchmarks share

from softlabel.config import load_recipe
from softlabel.search_experiment import search_experiment

_KEY = "train.threshold"


def main() -> int:
    """Run both, print what to compare, and write the JSON file."""
    arguments = _arguments()
    common = [f"name={arguments.work_dir.name}", *arguments.set]
    grid_set = ["search.sampler=grid", f"search.grid_points={arguments.points}", "search.stop_early=false"]
    grid_set += [f"search.trials={arguments.grid_trials}"]
    ray.init(address="local", include_dashboard=True)
    found = {}
    for name, settings in (("grid", grid_set), ("search", [f"search.trials={arguments.trials}"])):
        recipe = load_recipe(arguments.config, [*common, *settings])
        found[name] = search_experiment(recipe, arguments.work_dir.resolve(), None, resume=arguments.resume)
    ray.shutdown()
    compared = compare(found["grid"], found["search"], arguments.points)
    print(_table(compared))
    if arguments.json:
        arguments.json.write_text(json.dumps(compared, indent=1))
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", type=Path, required=True, help="the recipe, YAML")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a recipe value")
    parser.add_argument("--points", type=int, default=9, help="thresholds of the grid (default: 9)")
    parser.add_argument("--grid-trials", type=int, default=20, help="its students, repeats included (default: 20)")
    parser.add_argument("--trials", type=int, default=20, help="the search's students (default: 20)")
    parser.add_argument("--work-dir", type=Path, default=Path("runs/search"), help="where results go")
    parser.add_argument("--resume", action="store_true", help="go on with what is there")
    parser.add_argument("--json", type=Path, help="write the numbers here too")
    return parser.parse_args()


def compare(grid: dict, search: dict, num_points: int) -> dict:
    """Students at the grid's best and at the search's choice, from wherever they were trained in full."""
    full = [trial for found in (grid, search) for trial in found["trials"] if _is_full(trial)]
    by_threshold: dict[float, dict[int, float]] = {}
    for trial in full:
        by_threshold.setdefault(trial["values"][_KEY], {})[trial["seed"]] = max(
            row["map50"] for row in trial["history"]
        )
    first = grid["trials"][:num_points]
    tried = [trial["values"][_KEY] for trial in first]
    best = max(tried, key=lambda threshold: mean(by_threshold[threshold].values()))
    chosen = search["answer"]["values"][_KEY]
    return {
        "machine": machine(),
        "grid": {
            "thresholds": {f"{t:g}": list(by_threshold[t].values()) for t in tried},
            "best": best,
            **_of(by_threshold[best]),
            "epochs": sum(len(trial["history"]) for trial in first),
            "seconds": grid["seconds"],
        },
        "search": {
            "choice": chosen,
            **_of(by_threshold[chosen]),
            "epochs": sum(len(trial["history"]) for trial in search["trials"]),
            "explored_epochs": sum(len(t["history"]) for t in search["trials"] if t["role"] != "repeat"),
            "seconds": search["seconds"],
            "students": len(search["trials"]),
            "start_up_share": search["start_up_share"],
            "answer": search["answer"],
        },
        "difference": mean(by_threshold[chosen].values()) - mean(by_threshold[best].values()),
        "two_standard_errors": 2 * _pooled_error(by_threshold[best], by_threshold[chosen]),
    }


def _is_full(trial: dict) -> bool:
    return trial["status"] == "finished" and trial["subset"] == 1


def _of(students: dict[int, float]) -> dict:
    values = list(students.values())
    return {"map50": mean(values), "sd": stdev(values) if len(values) > 1 else None, "seeds": len(values)}


def _pooled_error(a: dict[int, float], b: dict[int, float]) -> float:
    """Standard error of the difference of two means, from their pooled variance."""
    groups = [list(one.values()) for one in (a, b)]
    degrees = sum(len(group) - 1 for group in groups)
    squares = sum((value - mean(group)) ** 2 for group in groups for value in group)
    return sqrt(squares / max(degrees, 1) * sum(1 / len(group) for group in groups))


def _table(found: dict) -> str:
    grid, search, about = found["grid"], found["search"], found["machine"]
    share = search["epochs"] / grid["epochs"]
    lines = [
        f"{about['cpu']}, {about['cores']} cores, no GPU; {about['date']}, commit {about['commit']}",
        "",
        "| | threshold | mean mAP50 (validation) | standard deviation | seeds | epochs | time |",
        "|---|---|---|---|---|---|---|",
        f"| grid's best of {len(grid['thresholds'])} | {grid['best']:g} | {_row(grid)} |",
        f"| search's choice, {search['students']} students | {search['choice']:g} | {_row(search)} |",
        "",
        f"Difference {found['difference']:+.4f} (two pooled standard errors: {found['two_standard_errors']:.4f}); the "
        f"search used {share:.0%} of the grid's epochs (grid: one seed each, without its repeats).",
        "",
        "| threshold | mAP50 per seed |",
        "|---|---|",
        *(f"| {t} | {', '.join(f'{v:.3f}' for v in values)} |" for t, values in grid["thresholds"].items()),
    ]
    return "\n".join(lines)


def _row(found: dict) -> str:
    sd = "-" if found["sd"] is None else f"{found['sd']:.4f}"
    return f"{found['map50']:.4f} | {sd} | {found['seeds']} | {found['epochs']} | {found['seconds'] / 60:.0f} min"


if __name__ == "__main__":
    sys.exit(main())
