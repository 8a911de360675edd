"""results.json to what a person reads: one self-contained HTML page, and a table for the terminal.

Every sentence with a number is made here from the numbers; page.html.j2 holds the layout and the words that never
change. What is null is shown as an en dash.

Everywhere a drop is soft minus truth, as softlabel.evaluation.quality measures it: negative is a loss. On the page it
is called the change.
"""

import base64
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from softlabel import store
from softlabel.report import figures
from softlabel.report.figures import Line, Overlay, Style

PAPER: dict[tuple[str, str, float | None], tuple[float, float]] = {
    ("train_1", "truth", None): (0.7625, 0.4507),
    ("train_2", "truth", None): (0.7747, 0.4609),
    ("train_1", "soft", 0.3): (0.7328, 0.4236),
    ("train_2", "soft", 0.3): (0.7293, 0.4201),
    ("train_1", "soft", 0.5): (0.7080, 0.4069),
    ("train_2", "soft", 0.5): (0.7168, 0.4158),
}
"""(mAP50, mAP50-95) by train set, labels and threshold, from Ciolino, Rosario and Noever."""

METRICS = (("map50", "mAP50"), ("map50_95", "mAP50-95"))
SETTINGS = (
    "model", "optimizer", "lr0", "epochs", "epochs_with_mosaic", "best_epoch",
    "seed", "world_size", "train_tiles", "train_boxes",
)  # fmt: skip
NULL, MINUS = "\N{EN DASH}", "\N{MINUS SIGN}"

_OVERLAY_BYTES = 3_000_000
_MAX_OVERLAY_BYTES = 375_000
_MAX_PANELS, _MAX_LINES = 12, 7


def write_report(path: Path, results: dict, curves: dict[str, dict], overlays: list[Overlay]) -> None:
    """Write the report as one HTML file that needs nothing beside it.

    Args:
        path: Where to; appears whole or not at all.
        results: What results.json holds: name, classes, models, label_quality, tiles, times_s, machine.
        curves: By model name, then by class name or ``all``: recall and precision at IoU 0.5, confidence and f1.
        overlays: Tiles to show; photographs lose colours, then size, where all together pass 3 MB.
    """
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(
        loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters.update(number=number, plain=plain, duration=duration)
    store.write_text(path, environment.get_template("page.html.j2").render(_view(results, curves, overlays)))


def format_table(results: dict) -> str:
    """The models as aligned plain text, one line each under a header, and how to read it below."""
    models = results["models"]
    losses = _loss_names(models)
    header = ["model", "train set", "labels", "at", "mAP50", "mAP50-95", "F1 @ conf"]
    header += [f"{label} change" for _, label in METRICS] + ["mAP50 and chance"]
    header += [f"{name} train/test" for name in losses]
    rows = [header] + [_terminal_row(model, losses) for model in models]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(_aligned(cell, width, i) for i, (cell, width) in enumerate(zip(row, widths))) for row in rows]  # noqa: B905
    note = "change: against the model trained on truth on the same train set; negative: soft labels did worse"
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:], note])


def headline(results: dict) -> str:
    """The answer in one sentence, for the students of the lowest threshold."""
    return answers(results)[0]


def answers(results: dict) -> list[str]:
    """One sentence per threshold, lowest first, so that no threshold is picked by its test numbers."""
    models = [model for model in _students(results["models"]) if _known(_drop(model, "map50").get("absolute"))]
    if not models:
        return ["No student could be compared with a model trained on truth"]
    by_threshold = itertools.groupby(sorted(models, key=_threshold), key=_threshold)
    return [_answer(threshold, list(students)) for threshold, students in by_threshold]


def paper_answers(results: dict) -> list[str]:
    """The paper's mean loss of mAP50 at each threshold that this run shares with it."""
    sentences = []
    for threshold in sorted({_threshold(model) for model in _students(results["models"])}):
        drops = [paper_drop(train_set, threshold)["map50"] for train_set in ("train_1", "train_2")]
        if all(drop["absolute"] is not None for drop in drops):
            absolute, relative = (
                _mean([drop[key] for drop in drops]) or 0.0 for key in ("absolute", "relative_percent")
            )
            sentences.append(f"{number(-absolute, 3)} mAP50 ({number(-relative, 1)} %) at {threshold:g}")
    return sentences


def paper_drop(train_set: str, threshold: float | None) -> dict[str, dict[str, float | None]]:
    """The paper's drops (soft minus truth) for one student; nulls where it measured none."""
    soft, truth = paper_row(train_set, "soft", threshold), paper_row(train_set, "truth", None)
    drops: dict[str, dict[str, float | None]] = {}
    for i, (metric, _) in enumerate(METRICS):
        absolute = soft[i] - truth[i] if truth and soft else None
        relative = 100 * absolute / truth[i] if truth and absolute is not None else None
        drops[metric] = {"absolute": absolute, "relative_percent": relative}
    return drops


def paper_row(train_set: str, labels: str, threshold: float | None) -> tuple[float, float] | None:
    """The paper's (mAP50, mAP50-95) of a model, None where it has no such model."""
    rounded = None if threshold is None else round(threshold, 6)
    return PAPER.get((train_set, labels, rounded))


def number(value: float | None, digits: int = 4) -> str:
    """A number for the page: fixed digits, a real minus, an en dash for null."""
    if not _known(value):
        return NULL
    text = f"{value:.{digits}f}"
    return (text[1:] if text.strip("-0.") == "" and text.startswith("-") else text).replace("-", MINUS)


def plain(value: Any) -> str:
    """Any JSON value as words."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return NULL
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):
        return ", ".join(f"{key} {_bracketed(item)}" for key, item in value.items()) or NULL
    if isinstance(value, list | tuple):
        return ", ".join(map(plain, value)) or "none"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def duration(seconds: float | None) -> str:
    """Seconds in the unit a person would use."""
    if not _known(seconds) or seconds is None:
        return NULL
    if seconds < 99.5:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"


def distinguishable(drop: dict) -> bool | None:
    """Whether the drop's interval excludes zero, None without an interval."""
    if _known(drop.get("low")) and _known(drop.get("high")):
        return not drop["low"] <= 0 <= drop["high"]
    return None


def _answer(threshold: float, students: list[dict]) -> str:
    drops = [_drop(student, "map50") for student in students]
    absolute = _mean([drop["absolute"] for drop in drops]) or 0.0
    relative = _mean([drop.get("relative_percent") for drop in drops])
    several = len(students) > 1
    subject = "Students" if several else "The student"
    change = _change(absolute, relative, several)
    return f"{subject} trained on soft labels at {threshold:g} {change} against truth; {_chance(students)}"


def _change(absolute: float, relative: float | None, several: bool) -> str:
    average = " on average" if several else ""
    if abs(absolute) < 0.0005:
        return f"{'come' if several else 'comes'} within 0.001 mAP50{average}"
    verb = ("lose" if absolute < 0 else "gain") + ("" if several else "s")
    share = "" if relative is None else f" ({number(abs(relative), 1)} %)"
    return f"{verb} {number(abs(absolute), 3)} mAP50{share}{average}"


def _chance(students: list[dict]) -> str:
    """What the intervals allow to say of the students of one threshold, each against truth on its own train set."""
    by_verdict: dict[bool | None, list[dict]] = {True: [], False: [], None: []}
    for student in students:
        by_verdict[distinguishable(_drop(student, "map50"))].append(student)
    if len(by_verdict[None]) == len(students):
        return "no interval was computed, so it may be chance"
    words = {True: "distinguishable", False: "not distinguishable", None: "without an interval"}
    told = [(words[verdict], found) for verdict, found in by_verdict.items() if found]
    if len(told) > 1:
        parts = ", ".join(f"{phrase} for {_names(found, 'train_set')}" for phrase, found in told)
        return f"against chance on this test split the difference is {parts}"
    signs = {_drop(student, "map50")["absolute"] > 0 for student in by_verdict[True]}
    opposite = ", but they point in opposite directions" if len(signs) > 1 else ""
    subject = "the difference is" if len(students) == 1 else "the differences, one per training set, are"
    return f"{subject} {told[0][0]} from chance on this test split{opposite}"


def _check_signs(models: list[dict]) -> None:
    """Refuse drops that contradict the models' own mAP50: the page would say the opposite of what was measured."""
    truth = {model["train_set"]: model["map50"] for model in models if model["labels"] == "truth"}
    for model in _students(models):
        stated, reference = _drop(model, "map50").get("absolute"), truth.get(model["train_set"])
        if not (_known(stated) and _known(reference) and _known(model["map50"])):
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
        "answers": answers(results),
        "paper_answers": paper_answers(results),
        "rows": [_row(model, styles[model["name"]]) for model in models],
        "metrics": METRICS,
        "losses": _loss_names(models),
        "drops": _drop_view(results, styles),
        "curves": _curves_view(results, curves, styles),
        "f1_peaks": _f1_peaks(models),
        "quality": _quality_view(results),
        "overlays": _overlays_view(overlays),
        "settings": SETTINGS,
    }


def _row(model: dict, style: Style) -> dict[str, Any]:
    paper = paper_row(model["train_set"], model["labels"], model["threshold"])
    paper_drops = paper_drop(model["train_set"], model["threshold"])
    return {
        "model": model,
        "swatch": Markup(figures.line_swatch(style)),
        "labels": _labels(model),
        "drops": {metric: _drop_cell(_drop(model, metric)) for metric, _ in METRICS},
        "paper": dict(zip(("map50", "map50_95"), paper, strict=True)) if paper else None,
        "paper_drops": paper_drops,
    }


def _drop_cell(drop: dict) -> dict[str, str | None]:
    if not _known(drop.get("absolute")):
        return {"absolute": None}
    verdict = {True: "distinguishable", False: "not distinguishable", None: "no interval"}[distinguishable(drop)]
    return {
        "absolute": number(drop["absolute"]),
        "relative": number(drop.get("relative_percent"), 1),
        "interval": _interval(drop.get("low"), drop.get("high"), 4),
        "relative_interval": _interval(drop.get("relative_low"), drop.get("relative_high"), 1),
        "verdict": verdict,
    }


def _drop_view(results: dict, styles: dict[str, Style]) -> dict[str, Any] | None:
    """The per-class drop figure: absolute and relative bars, and the largest drop in words."""
    students = [model for model in _students(results["models"]) if (model["drop"] or {}).get("per_class")]
    classes = results["classes"]
    if not students:
        return None
    bars = [_bar_style(styles[model["name"]], model, students) for model in students]
    panels = []
    for key, title, form in (("absolute", "change of AP50", "+.3f"), ("relative_percent", "change of AP50, %", "+.1f")):
        values = [[_class_drop(model, name).get(key) for model in students] for name in classes]
        svg = figures.bar_panel(classes, values, bars, form=form, key=f"drop-{key}")
        panels.append({"title": title, "svg": Markup(svg)})
    legend = [{"swatch": Markup(figures.bar_swatch(bar)), "text": _student(m)} for bar, m in zip(bars, students)]  # noqa: B905
    return {"panels": panels, "legend": legend, "largest": _largest_drop(students, classes)}


def _largest_drop(students: list[dict], classes: Sequence[str]) -> dict[str, str] | None:
    drops = [(_class_drop(model, name).get("absolute"), name, model) for model in students for name in classes]
    losses = [drop for drop in drops if _below_zero(drop[0])]
    if not losses:
        return None
    absolute, name, model = min(losses, key=lambda drop: float(drop[0] or 0))
    relative = _class_drop(model, name).get("relative_percent")
    return {"class": name, "absolute": number(absolute, 3), "relative": number(relative, 1), "student": _student(model)}


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
            dots = (marks[model],) if name == "all" and _known(marks.get(model)) else ()
            if curve.get(axes[0]) and curve.get(axes[1]):
                lines.append(Line(curve[axes[0]], curve[axes[1]], style, dots))
        if lines:
            svg = figures.line_panel(lines, x_label=labels[axes[0]], y_label=labels[axes[1]], key=f"{axes[1]}-{i}")
            panels.append({"title": "all classes" if name == "all" else name, "svg": Markup(svg)})
    return panels


def _f1_peaks(models: list[dict]) -> dict[str, str]:
    """The confidences of the best F1 in words, truth and soft apart."""
    peaks = {}
    for labels in ("truth", "soft"):
        found = sorted(m["f1_conf"] for m in models if m["labels"] == labels and _known(m["f1_conf"]))
        same = found and number(found[0], 2) == number(found[-1], 2)
        peaks[labels] = "" if not found else number(found[0], 2) + ("" if same else f" to {number(found[-1], 2)}")
    return peaks


def _quality_view(results: dict) -> dict[str, Any] | None:
    """Precision and recall of the soft labels over the threshold, a panel per measure and labelling."""
    quality = results.get("label_quality") or []
    if not quality:
        return None
    used = sorted({_threshold(model) for model in _students(results["models"])})
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
            {"swatch": Markup(figures.line_swatch(style)), "text": "all classes" if name == "all" else name}
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
    return figures.line_panel(lines, x_label="threshold of the soft labels", y_label=measure, key=key)


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


def _model_styles(models: list[dict]) -> dict[str, Style]:
    """Colour by train set, solid for truth, a dash per threshold."""
    train_sets = list(dict.fromkeys(model["train_set"] for model in models))
    thresholds = sorted({_threshold(model) for model in _students(models)})
    dashes = {None: 0} | {threshold: 1 + i for i, threshold in enumerate(thresholds)}
    return {model["name"]: Style(train_sets.index(model["train_set"]), dashes[model["threshold"]]) for model in models}


def _bar_style(style: Style, model: dict, students: list[dict]) -> Style:
    """The model's colour, paler for each higher threshold."""
    thresholds = sorted({_threshold(student) for student in students})
    rank = thresholds.index(_threshold(model)) / max(len(thresholds) - 1, 1)
    return Style(style.colour, opacity=round(1 - 0.6 * rank, 2))


def _class_style(i: int) -> Style:
    """Ink for all classes, then colours that no train set of the paper has; a dash where they come round again."""
    return Style(width=2.4) if i == 0 else Style(2 + (i - 1) % 4, dash=(i - 1) // 4 + (i - 1) % 2)


def _largest_classes(results: dict, limit: int) -> list[str]:
    """The classes with the most truth in the test split, in the order of ``results['classes']``."""
    classes = results["classes"]
    per_class = (results["models"][0].get("per_class") or {}) if results["models"] else {}
    size: Callable[[str], float] = lambda name: -((per_class.get(name) or {}).get("truth") or 0)  # noqa: E731
    largest = set(sorted(classes, key=size)[:limit])
    return [name for name in classes if name in largest]


def _loss_names(models: list[dict]) -> list[str]:
    sides = [(model.get("losses") or {}).get(side) or {} for model in models for side in ("train", "test")]
    return list(dict.fromkeys(name for side in sides for name in side))


def _terminal_row(model: dict, losses: list[str]) -> list[str]:
    verdicts = {True: "distinguishable", False: "not distinguishable", None: NULL}
    threshold = NULL if model["threshold"] is None else f"{model['threshold']:g}"
    cells = [model["name"], model["train_set"], _labels(model), threshold]
    cells += [number(model["map50"]), number(model["map50_95"])]
    cells.append(f"{number(model['f1'], 3)} @ {number(model['f1_conf'], 2)}")
    for metric, _ in METRICS:
        absolute, relative = (_drop(model, metric).get(key) for key in ("absolute", "relative_percent"))
        cells.append(f"{number(absolute)} ({number(relative, 1):>5} %)" if _known(absolute) else NULL)
    cells.append(verdicts[distinguishable(_drop(model, "map50"))])
    sides = [(model.get("losses") or {}).get(side) or {} for side in ("train", "test")]
    return cells + ["/".join(number(side.get(name), 3) for side in sides) for name in losses]


def _aligned(cell: str, width: int, column: int) -> str:
    return cell.ljust(width) if column < 3 else cell.rjust(width)


def _labels(model: dict) -> str:
    if model["labels"] == "truth":
        return "truth"
    return f"soft by {model['teacher']}" if model["teacher"] else "soft"


def _student(model: dict) -> str:
    return f"{model['train_set']}, soft labels at {_threshold(model):g}"


def _students(models: Iterable[dict]) -> list[dict]:
    return [model for model in models if model["labels"] == "soft" and model["threshold"] is not None]


def _threshold(model: dict) -> float:
    return float(model["threshold"])


def _drop(model: dict, metric: str) -> dict:
    return (model.get("drop") or {}).get(metric) or {}


def _class_drop(model: dict, name: str) -> dict:
    return model["drop"]["per_class"].get(name) or {}


def _interval(low: float | None, high: float | None, digits: int) -> str | None:
    return f"{number(low, digits)} to {number(high, digits)}" if _known(low) and _known(high) else None


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None and math.isfinite(value)]
    return sum(known) / len(known) if known else None


def _names(models: list[dict], key: str) -> str:
    return " and ".join(str(model[key]) for model in models)


def _bracketed(value: Any) -> str:
    return f"({plain(value)})" if isinstance(value, dict) else plain(value)


def _below_zero(value: float | None) -> bool:
    return value is not None and value < 0


def _known(value: Any) -> bool:
    return value is not None and math.isfinite(value)
