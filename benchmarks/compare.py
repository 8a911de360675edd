"""Run a recipe's comparison of ways to train and print its section for RESULTS.md: machine, seeds, times, table.

python benchmarks/compare.py --config methods --run-dir runs/methods --set train.teacher.weights=yolov5n.pt --set ...
"""

import json
import sys

from common import machine, run_recipe

from softlabel.report.methods import sentences


def main() -> int:
    """Run (or finish, or find done) the comparison, then print what it measured as Markdown."""
    code, arguments = run_recipe("compare", (__doc__ or "").splitlines()[0])
    if code == 0:
        print(section(json.loads((arguments.run_dir / "compare.json").read_text())))
    return code


def section(results: dict) -> str:
    """One run as a section of RESULTS.md."""
    here, seeds = machine(), ", ".join(map(str, results["seeds"]))
    libraries = ", ".join(f"{name} {here[name]}" for name in ("torch", "ray", "ultralytics"))
    minutes = sum(results["times_s"].values()) / 60
    lines = [
        f"## Ways to train: {results['name']} ({here['date']}, commit {here['commit']})",
        "",
        f"On {here['cpu']}, {here['cores']} cores, no GPU; {libraries}; seeds {seeds}; {minutes:.0f} min together. In "
        "brackets 95 % over test images and seeds.",
        "",
        "| method | train set | boxes | mAP50 | gain over plain | gap closed | mAP50-95 | of each seed | AP50 |",
        "|---|---|---|---|---|---|---|---|---|",
        *[_row(row, results) for row in results["rows"]],
        "",
        *[f"- {sentence}" for sentence in sentences(results)],
    ]
    return "\n".join(lines)


def _row(row: dict, results: dict) -> str:
    chance = "" if row["method"] == "plain" or row["gain"]["distinguishable"] else ", not distinguishable"
    boxes = results["train_boxes"][row["method"]].get(row["train_set"], "")
    cells = [
        row["method"],
        row["train_set"],
        str(boxes),
        _interval(row["map50"]),
        _interval(row["gain"], "+") + chance,
        _interval(row["gap_closed"], "+"),
        _interval(row["map50_95"]),
        ", ".join(f"{value:.3f}" for value in row["seeds"].values()),
        ", ".join(f"{name} {value:.3f}" for name, value in row["per_class"].items() if value is not None),
    ]
    return "| " + " | ".join(cells) + " |"


def _interval(found: dict, sign: str = "") -> str:
    if found["value"] is None:
        return "-"
    value, low, high = (f"{found[key]:{sign}.3f}" for key in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"


if __name__ == "__main__":
    sys.exit(main())
