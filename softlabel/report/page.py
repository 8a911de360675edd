"""From results.json to one self-contained HTML page.

The views are here: what each part of the page shows. wording.py makes every sentence with a number from the numbers;
page.html.j2 holds the layout and the words that never change.
"""

import base64
import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from softlabel import store
from softlabel.report import figures, plots, wording
from softlabel.report.figures import Overlay
from softlabel.report.plots import Line, Style

SETTINGS = (
    "model", "optimizer", "lr0", "epochs", "epochs_with_mosaic", "best_epoch",
    "seed", "world_size", "train_tiles", "train_boxes",
)  # fmt: skip
_TILE_FACTS = {
    "scenes": "scenes",
    "scenes_rejected": "scenes that cannot be read",
    "tiles": "tiles",
    "background": "background tiles: no objects in their truth",
    "mean_tile_px": "mean size of a tile",
    "ignored": "boxes ignored: too little of each is in its tile, or a crowd",
    "truth_rejected": "truth rows that cannot be used",
    "truth_dropped": "boxes of other classes, left out on purpose",
    "groups_in_two_splits": "groups that lie in two splits",
}
_OVERLAY_BYTES = 3_000_000
_MAX_OVERLAY_BYTES = 375_000
_MAX_PANELS, _MAX_LINES = 12, 7


def write_report(path: Path, results: dict, curves: dict[str, dict], overlays: list[Overlay]) -> None:
    """Write the report as one HTML file that needs nothing beside it.

    Args:
        path: Where to; appears whole or not at all.
        results: What results.json holds: name, classes, models, label_quality, tiles, times_s, machine.
        curves: By model name, then by class name or ``all``: recall and precision at IoU 0.5, confidence and f1.
        overlays: Tiles to show; photographs lose colours, then size, to fit 375 kB each and 3 MB together.
    """
    store.write_text(path, render("page.html.j2", _view(results, curves, overlays)))


def render(template: str, view: dict[str, Any]) -> str:
    """Fill one of the templates beside this file."""
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(
        loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    words = (wording.number, wording.change, wording.plain, wording.duration)
    environment.filters.update((word.__name__, word) for word in words)
    return environment.get_template(template).render(view)


def _check_signs(models: list[dict]) -> None:
    """Refuse drops that contradict the models' own mAP50: the page would say the opposite of what was measured."""
    truth = {model["train_set"]: model["map50"] for model in models if model["labels"] == "truth"}
    for model in wording.students_of(models):
        stated, reference = wording.drop_of(model, "map50").get("absolute"), truth.get(model["train_set"])
        if not (wording.is_known(stated) and wording.is_known(reference) and wording.is_known(model["map50"])):
            continue
        measured = model["map50"] - reference
        if stated * measured < 0 and abs(measured) > 0.001:
            raise ValueError(f"{model['name']}: drop {stated:+.4f}, but soft - truth is {measured:+.4f} mAP50")


def _view(results: dict, curves: dict[str, dict], overlays: list[Overlay]) -> dict[str, Any]:
    """All that the template needs."""
    models = results["models"]
    styles = _model_styles(models)
    _check_signs(models)
    return {
        "results": results,
        "models": models,
        "answers": wording.answers(results),
        "paper_answers": wording.paper_answers(results),
        "has_open_vocabulary": any(wording.source_of(model) == wording.OWLVIT for model in models),
        "rows": [_row(model, styles[model["name"]], wording.paper_of(models)) for model in models],
        "rotated_note": wording.rotated_note(models),
        "metrics": wording.METRICS,
        "losses": wording.loss_names(models),
        "drops": _drop_view(results, styles),
        "curves": _curves_view(results, curves, styles),
        "f1_peaks": _f1_peaks(models),
        "quality": _quality_view(results),
        "overlays": _overlays_view(overlays),
        "settings": SETTINGS,
        "tiles": _tiles_view(results.get("tiles") or {}),
        "machine": _machine_view(results.get("machine") or {}),
    }


def _row(model: dict, style: Style, paper_numbers: wording.Paper) -> dict[str, Any]:
    paper, paper_drops = wording.paper_row(paper_numbers, model), wording.paper_drop(paper_numbers, model)
    return {
        "model": model,
        "swatch": Markup(plots.line_swatch(style)),
        "labels": wording.labels_of(model),
        "drops": {metric: _drop_cell(wording.drop_of(model, metric)) for metric, _ in wording.METRICS},
        "paper": dict(zip(("map50", "map50_95"), paper, strict=True)) if paper else None,
        "paper_drops": paper_drops,
    }


def _drop_cell(drop: dict) -> dict[str, str | None]:
    if not wording.is_known(drop.get("absolute")):
        return {"absolute": None}
    verdict = {True: "distinguishable", False: "not distinguishable", None: "no interval"}[
        wording.distinguishable(drop)
    ]
    return {
        "absolute": wording.change(drop["absolute"]),
        "relative": wording.change(drop.get("relative_percent"), 1),
        "interval": wording.interval(drop.get("low"), drop.get("high"), 4),
        "relative_interval": wording.interval(drop.get("relative_low"), drop.get("relative_high"), 1),
        "verdict": verdict,
    }


def _drop_view(results: dict, styles: dict[str, Style]) -> dict[str, Any] | None:
    """The per-class drop figure: absolute and relative bars, and the largest drop in words."""
    students = [model for model in wording.students_of(results["models"]) if (model["drop"] or {}).get("per_class")]
    classes = results["classes"]
    if not students:
        return None
    bars = [_bar_style(styles[model["name"]], model, students) for model in students]
    panels = []
    for key, title, form in (("absolute", "change in AP50", "+.3f"), ("relative_percent", "change in AP50, %", "+.1f")):
        values = [[_class_drop(model, name).get(key) for model in students] for name in classes]
        svg = plots.bar_panel(classes, values, bars, form=form, key=f"drop-{key}")
        panels.append({"title": title, "svg": Markup(svg)})
    pairs = zip(bars, students, strict=True)
    legend = [{"swatch": Markup(plots.bar_swatch(bar)), "text": wording.student_words(model)} for bar, model in pairs]
    return {"panels": panels, "legend": legend, "largest": _largest_drop(students, classes)}


def _largest_drop(students: list[dict], classes: Sequence[str]) -> dict[str, str] | None:
    drops = [(_class_drop(model, name).get("absolute"), name, model) for model in students for name in classes]
    losses = [drop for drop in drops if _below_zero(drop[0])]
    if not losses:
        return None
    absolute, name, model = min(losses, key=lambda drop: float(drop[0] or 0))
    relative = _class_drop(model, name).get("relative_percent")
    return {
        "class": name,
        "absolute": wording.number(absolute, 3),
        "relative": wording.number(relative, 1),
        "student": wording.student_words(model),
    }


def _curves_view(results: dict, curves: dict[str, dict], styles: dict[str, Style]) -> dict[str, Any]:
    """Precision-recall and F1 panels, one per class (the 12 with the most truth), a line per model."""
    shown = _largest_classes(results, _MAX_PANELS)
    f1_peak = {model["name"]: model["f1_conf"] for model in results["models"]}
    return {
        "pr": _panels(curves, styles, shown, ("recall", "precision"), {}),
        "f1": _panels(curves, styles, ["all", *shown], ("confidence", "f1"), f1_peak),
        "left_out": len(results["classes"]) - len(shown),
    }


def _panels(
    curves: dict[str, dict], styles: dict[str, Style], names: list[str], axes: tuple[str, str], marks: dict[str, Any]
) -> list[dict[str, Any]]:
    """One panel per name that has a curve; ``marks`` sets a dot per model in the ``all`` panel."""
    labels = {"recall": "recall", "precision": "precision", "confidence": "confidence threshold", "f1": "F1"}
    panels: list[dict[str, Any]] = []
    for i, name in enumerate(names):
        lines = []
        for model, style in styles.items():
            curve = curves.get(model, {}).get(name) or {}
            dots = (marks[model],) if name == "all" and wording.is_known(marks.get(model)) else ()
            if curve.get(axes[0]) and curve.get(axes[1]):
                lines.append(Line(curve[axes[0]], curve[axes[1]], style, dots))
        if lines:
            svg = plots.line_panel(lines, x_label=labels[axes[0]], y_label=labels[axes[1]], key=f"{axes[1]}-{i}")
            panels.append({"title": "all classes" if name == "all" else name, "svg": Markup(svg)})
    return panels


def _f1_peaks(models: list[dict]) -> dict[str, str]:
    """The confidences of the best F1 in words, truth and soft apart."""
    peaks = {}
    for labels in ("truth", "soft"):
        found = sorted(m["f1_conf"] for m in models if m["labels"] == labels and wording.is_known(m["f1_conf"]))
        ends = [wording.number(value, 2) for value in found[:1] + found[-1:]]
        peaks[labels] = " to ".join(dict.fromkeys(ends))
    return peaks


def _quality_view(results: dict) -> dict[str, Any] | None:
    """Precision and recall of the soft labels against the threshold, a panel per measure and labelling."""
    quality = results.get("label_quality") or []
    if not quality:
        return None
    used = sorted({wording.threshold_of(model) for model in wording.students_of(results["models"])})
    names = ["all", *_largest_classes(results, _MAX_LINES - 1)]
    styles = {name: _class_style(i) for i, name in enumerate(names)}
    labellings = list(dict.fromkeys((row["teacher"], row["train_set"]) for row in quality))
    panels: list[dict[str, Any]] = []
    for measure, labelling in itertools.product(("precision", "recall"), labellings):
        svg = _quality_panel(quality, labelling, measure, styles, tuple(used), f"{measure}-{len(panels)}-labels")
        teacher, train_set = labelling
        panels.append({"title": f"{measure}: {teacher} on {train_set}", "svg": Markup(svg)})
    chosen = [row for row in quality if row["class"] == "all" and any(math.isclose(row["threshold"], t) for t in used)]
    return {
        "panels": panels,
        "legend": [
            {"swatch": Markup(plots.line_swatch(style)), "text": "all classes" if name == "all" else name}
            for name, style in styles.items()
        ],
        "used": ", ".join(f"{threshold:g}" for threshold in used),
        "rows": chosen,
        "left_out": len(results["classes"]) - len(names) + 1,
    }


def _quality_panel(
    quality: list[dict],
    labelling: tuple[str, str],
    measure: str,
    styles: dict[str, Style],
    used: tuple[float, ...],
    key: str,
) -> str:
    lines = []
    for name, style in styles.items():
        rows = [r for r in quality if (r["teacher"], r["train_set"], r["class"]) == (*labelling, name)]
        rows.sort(key=lambda row: row["threshold"])
        if rows:
            lines.append(Line([row["threshold"] for row in rows], [row[measure] for row in rows], style, used))
    return plots.line_panel(lines, x_label="threshold of the soft labels", y_label=measure, key=key)


def _overlays_view(overlays: list[Overlay]) -> list[dict[str, Any]]:
    budget = min(_MAX_OVERLAY_BYTES, _OVERLAY_BYTES // max(len(overlays), 1))
    return [
        {
            "title": overlay.title,
            "png": base64.b64encode(figures.overlay_png(overlay, budget)).decode(),
            "truth": int((~overlay.truth.ignore).sum()),
            "ignored": int(overlay.truth.ignore.sum()),
            "soft": len(overlay.detections.boxes),
        }
        for overlay in overlays
    ]


def _tiles_view(tiles: dict) -> dict[str, Any]:
    """What the tile step counted: facts, and a table of tiles and boxes per split."""
    facts = {text: tiles[key] for key, text in _TILE_FACTS.items() if key in tiles}
    if size := tiles.get("mean_tile_px"):
        facts[_TILE_FACTS["mean_tile_px"]] = " x ".join(wording.number(side, 0) for side in size) + " px"
    splits, boxes = tiles.get("splits") or {}, tiles.get("boxes_by_split") or {}
    rows = [("tiles", [*splits.values(), tiles.get("tiles")])]
    for name, total in (tiles.get("boxes") or {}).items():
        rows.append((f"boxes of {name}", [*((boxes.get(split) or {}).get(name) for split in splits), total]))
    columns = ["no split" if split == "none" else split for split in splits]
    return {"facts": facts, "columns": [*columns, "all"] if splits else [], "rows": rows}


def _machine_view(machine: dict) -> dict[str, Any]:
    return {key: "no GPU" if key == "gpus" and not value else value for key, value in machine.items()}


def _model_styles(models: list[dict]) -> dict[str, Style]:
    """Colour by train set, solid for truth, a dash per source of labels and threshold."""
    train_sets = list(dict.fromkeys(model["train_set"] for model in models))
    students = wording.students_of(models)
    kinds = sorted({wording.kind_of(student) for student in students})
    dashes = {student["name"]: 1 + kinds.index(wording.kind_of(student)) for student in students}
    return {
        model["name"]: Style(train_sets.index(model["train_set"]), dashes.get(model["name"], 0)) for model in models
    }


def _bar_style(style: Style, model: dict, students: list[dict]) -> Style:
    """The model's colour, paler for each further source of labels and higher threshold."""
    kinds = sorted({wording.kind_of(student) for student in students})
    rank = kinds.index(wording.kind_of(model)) / max(len(kinds) - 1, 1)
    return Style(style.colour, opacity=round(1 - 0.6 * rank, 2))


def _class_style(i: int) -> Style:
    """Ink for all classes, then colours that no train set of the paper has; a dash where they repeat."""
    return Style(width=2.4) if i == 0 else Style(2 + (i - 1) % 4, dash=(i - 1) // 4 + (i - 1) % 2)


def _largest_classes(results: dict, limit: int) -> list[str]:
    """The classes with the most truth in the test split, in the order of ``results['classes']``."""
    classes = results["classes"]
    per_class = (results["models"][0].get("per_class") or {}) if results["models"] else {}
    size: Callable[[str], float] = lambda name: -((per_class.get(name) or {}).get("truth") or 0)  # noqa: E731
    largest = set(sorted(classes, key=size)[:limit])
    return [name for name in classes if name in largest]


def _class_drop(model: dict, name: str) -> dict:
    return model["drop"]["per_class"].get(name) or {}


def _below_zero(value: float | None) -> bool:
    return value is not None and value < 0
