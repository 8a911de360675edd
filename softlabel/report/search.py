"""From search.json to words for the terminal and one self-contained HTML page."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from softlabel import store
from softlabel.report import plots, wording
from softlabel.report.page import render
from softlabel.report.plots import Line, Style

_THRESHOLD = "train.threshold"


def format_answer(results: dict) -> str:
    """The answer in a few sentences, as the terminal shows it."""
    return "\n".join(sentences(results))


def sentences(results: dict) -> list[str]:
    """What to use, how sure that is, and what it is worth."""
    found = results["answer"]
    lines = [_best(found)]
    if found["flat"]:
        lines.append(
            f"The curve is flat within noise (probability {wording.percent(found['flat_probability'])}): students "
            f"differ by {found['noise']:.3f} mAP50 from one seed to another, and by no more from one value to another."
        )
    if found["compared"] == 1:
        lines.append("No student of another value got far enough to be compared: whether one is better is not known.")
    lines += [_peak(key, line) for key, line in found["lines"].items() if "peak_low" in line]
    lines += [_against(row) for row in found["against"]]
    lines += [_test(row, found["values"]) for row in results["test"]]
    if not results["test"]:
        lines.append("There is no truth in a test split: the choice was judged on the validation split alone.")
    lines += _without_labels(results["labels_kept"], results["classes"])
    lines.append(_cost(results))
    return lines


def values_words(values: Mapping[str, Any]) -> str:
    """Values as people say them: ``threshold 0.3``, ``imgsz 192``."""
    return ", ".join(f"{_short(key)} {wording.plain(value)}" for key, value in values.items())


def write_search_report(path: Path, results: dict) -> None:
    """Write search.html: the answer, mAP against each varied key, labels against the threshold, every student."""
    store.write_text(path, render("search.html.j2", _view(results)))


def _short(key: str) -> str:
    if key.startswith(f"{_THRESHOLD}."):
        return f"threshold for {key.removeprefix(_THRESHOLD + '.')}"
    return key.split(".")[-1]


def _best(found: dict) -> str:
    spread = found["map50"]
    return (
        f"Use {values_words(found['values'])}: a student reaches mAP50 {spread['mean']:.3f} "
        f"({spread['low']:.3f} to {spread['high']:.3f}) on the validation split; {_students(found['students'])}."
    )


def _peak(key: str, line: dict) -> str:
    return f"The best {_short(key)} lies between {line['peak_low']:.3g} and {line['peak_high']:.3g} (90 %)."


def _against(row: dict) -> str:
    gain = row["gain"]
    return (
        f"It beats {values_words(row['values'])} with probability {wording.percent(row['probability'])}, by "
        f"{gain['mean']:+.3f} mAP50 ({gain['low']:+.3f} to {gain['high']:+.3f}); {_students(row['students'])} there."
    )


def _test(row: dict, best: dict) -> str:
    spread = "" if row["sd"] is None else f" (standard deviation {row['sd']:.3f})"
    mark = " (the choice)" if row["values"] == best else ""
    students = _students(row["students"])
    return f"On the test split, {values_words(row['values'])}{mark}: mAP50 {row['map50']:.3f}{spread}, {students}."


def _without_labels(kept: dict[str, dict[str, int]], classes: Sequence[str]) -> list[str]:
    """The thresholds from which on no label of a class is left, so that students never see one."""
    ends = {name: next((at for at, counts in kept.items() if not counts[name]), None) for name in classes}
    parts = [f"{name} above {at}" for name, at in ends.items() if at is not None]
    return [f"Classes without a label: {', '.join(parts)}; students there never see one."] if parts else []


def _students(count: int) -> str:
    return f"{count} student{'s' if count != 1 else ''} trained in full"


def _cost(results: dict) -> str:
    hours = f"{results['gpu_hours']:.2g} GPU-hours" if results["gpu_hours"] else f"{results['cpu_hours']:.2g} CPU-hours"
    return (
        f"{len(results['trials'])} students and {results['epochs']} epochs in {wording.duration(results['seconds'])}, "
        f"{hours}, {wording.percent(results['start_up_share'])} of it start-up and waiting."
    )


def _view(results: dict) -> dict[str, Any]:
    return {
        "name": results["name"],
        "sentences": sentences(results),
        "panels": [_panel(results, key, i) for i, key in enumerate(results["space"])],
        "quality": _quality_panels(results),
        "labels": _labels_table(results),
        "keys": [_short(key) for key in results["space"]],
        "trials": [_row(trial, results) for trial in results["trials"]],
        "times_s": results["times_s"],
    }


def _panel(results: dict, key: str, number: int) -> dict[str, Any]:
    line, best = results["answer"]["lines"][key], results["answer"]["values"]
    if "peak_low" not in line:
        rows = zip(line["at"], line["mean"], line["low"], line["high"], strict=True)
        return {"title": _short(key), "choices": [(wording.plain(at), *rest) for at, *rest in rows]}
    points = [
        (trial["values"][key], _reached(trial), trial["status"] == "finished" and trial["subset"] == 1)
        for trial in results["trials"]
        if trial["history"]
    ]
    svg = plots.curve_panel(
        line["at"],
        line["mean"],
        (line["low"], line["high"]),
        points,
        peak=(line["peak_low"], line["peak_high"]),
        best=best[key],
        x_label=_short(key),
        y_label="mAP50 on the validation split",
        key=f"curve{number}",
    )
    return {"title": _short(key), "svg": Markup(svg)}


def _reached(trial: dict) -> float:
    return max(row["map50"] for row in trial["history"])


def _quality_panels(results: dict) -> list[dict[str, Any]]:
    """Precision and recall of the labels against the threshold, per class."""
    rows = results["label_quality"]
    if not rows:
        return []
    names = [*results["classes"], "all"][-7:]
    panels = []
    for measure in ("precision", "recall"):
        lines, legend = [], []
        for i, name in enumerate(names):
            style = Style(None, 0, 2.2) if name == "all" else Style(i)
            of_class = [row for row in rows if row["class"] == name]
            lines.append(Line([row["threshold"] for row in of_class], [row[measure] for row in of_class], style))
            legend.append({"swatch": Markup(plots.line_swatch(style)), "text": name})
        svg = plots.line_panel(lines, x_label="threshold of the soft labels", y_label=measure, key=measure)
        panels.append({"svg": Markup(svg), "legend": legend})
    return panels


def _labels_table(results: dict) -> list[list[str]]:
    """Labels kept per class, by threshold."""
    counts: dict[str, dict[str, int]] = results["labels_kept"]
    names = [*results["classes"], "all"]
    return [["threshold", *names], *([at, *(wording.plain(row[name]) for name in names)] for at, row in counts.items())]


def _row(trial: dict, results: dict) -> dict[str, Any]:
    status = trial["status"] + (f": {trial['reason']}" if trial["reason"] else "")
    return {
        "number": trial["number"],
        "values": [wording.plain(trial["values"][key]) for key in results["space"]],
        "seed": trial["seed"],
        "role": trial["role"],
        "epochs": f"{len(trial['history'])} of {trial['epochs']}",
        "map50": wording.number(_reached(trial) if trial["history"] else None),
        "test": wording.number(trial.get("test_map50")),
        "seconds": wording.duration(trial["seconds"]),
        "status": status,
        "is_best": trial["values"] == results["answer"]["values"],
    }
