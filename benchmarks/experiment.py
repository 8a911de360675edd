"""Run a recipe's experiment and print its section for RESULTS.md: machine, seeds, times, table.

python benchmarks/experiment.py --config overhead --run-dir runs/overhead --set ...
"""

import json
import subprocess
import sys
from pathlib import Path

from common import run_recipe


def main() -> int:
    """Run (or finish, or find done) the experiment, then print what it measured as Markdown."""
    code, arguments = run_recipe("experiment", (__doc__ or "").splitlines()[0])
    if code == 0:
        print(section(json.loads((arguments.run_dir / "results.json").read_text()), Path(arguments.config)))
    return code


def section(results: dict, config: Path) -> str:
    """One run as a section of RESULTS.md."""
    machine, times = results["machine"], results["times_s"]
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    device = ", ".join(machine["gpus"]) or f"{machine['cpu']}, {machine['cores']} cores, no GPU"
    libraries = ", ".join(f"{name} {machine[name]}" for name in ("torch", "ray", "ultralytics"))
    return "\n".join(
        [
            f"## {results['name']} ({results['date']}, commit {commit})",
            "",
            f"`python benchmarks/experiment.py --config {config} --run-dir runs/{results['name']}` on {device}; "
            f"{libraries}; seed {results['seed']}. Times: "
            + ", ".join(f"{name} {seconds:.0f} s" for name, seconds in times.items())
            + f"; together {sum(times.values()) / 60:.0f} min.",
            "",
            "| model | train set | labels | mAP50 | mAP50-95 | F1 @ conf | drop mAP50 [95 %] | drop mAP50-95 [95 %] |"
            " loss train / test (difference) |",
            "|---|---|---|---|---|---|---|---|---|",
            *[_row(model) for model in results["models"]],
            "",
        ]
    )


def _row(model: dict) -> str:
    labels = "truth" if model["labels"] == "truth" else f"soft > {model['threshold']:g}"
    losses = model["losses"]
    parts = [
        f"{name} {losses['train'][name]:.3f} / {losses['test'][name]:.3f} ({losses['difference_percent'][name]:+.0f} %)"
        for name in losses["train"]
    ]
    cells = [
        model["name"],
        f"{model['train_set']}: {model['train_tiles']} tiles, {model['train_boxes']} boxes",
        labels,
        f"{model['map50']:.4f}",
        f"{model['map50_95']:.4f}",
        f"{model['f1']:.3f} @ {model['f1_conf']:.2f}",
        _drop(model, "map50"),
        _drop(model, "map50_95"),
        ", ".join(parts),
    ]
    return "| " + " | ".join(cells) + " |"


def _drop(model: dict, metric: str) -> str:
    if not model["drop"]:
        return "-"
    drop = model["drop"][metric]
    verdict = "" if drop["distinguishable"] else ", not distinguishable"
    return (
        f"{drop['absolute']:+.4f} [{drop['low']:+.3f}, {drop['high']:+.3f}], {drop['relative_percent']:+.1f} % "
        f"[{drop['relative_low']:+.1f}, {drop['relative_high']:+.1f}]{verdict}"
    )


if __name__ == "__main__":
    sys.exit(main())
