"""Results in words: the answers, the paper's numbers beside ours, how a number is written, the table for the terminal.

Every sentence with a number is made from the numbers. What is null is shown as an en dash.

A drop is soft minus truth everywhere, as softlabel.evaluation.quality measures it: negative is a loss. In what a person
reads it is called the change.
"""

import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Any

TEACHER, OWLVIT, FUSED = "teacher", "owlvit", "fused"
"""Where a student's labels come from: a trained teacher, an open-vocabulary model, or both."""
_LABELS_OF = {TEACHER: "soft labels", OWLVIT: "open-vocabulary labels", FUSED: "fused labels"}

Paper = dict[tuple[str, str, float | None], tuple[float, float | None]]
"""(mAP50, mAP50-95) by train set, source of labels and threshold."""

PAPER: Paper = {
    ("train_1", "truth", None): (0.7625, 0.4507),
    ("train_2", "truth", None): (0.7747, 0.4609),
    ("train_1", TEACHER, 0.3): (0.7328, 0.4236),
    ("train_2", TEACHER, 0.3): (0.7293, 0.4201),
    ("train_1", TEACHER, 0.5): (0.7080, 0.4069),
    ("train_2", TEACHER, 0.5): (0.7168, 0.4158),
}
"""From Ciolino, Rosario and Noever, on xView."""
_PAPER_COCO: Paper = {
    (train_set, source, threshold): (map50, None)
    for train_set in ("train_1", "train_2")
    for source, threshold, map50 in (("truth", None, 0.2225), (OWLVIT, 0.25, 0.1844), (OWLVIT, 0.1, 0.1534))
}
"""Theirs on COCO, where one student learned from truth, and one from OWL-ViT at each threshold."""

METRICS = (("map50", "mAP50"), ("map50_95", "mAP50-95"))
NULL, MINUS = "\N{EN DASH}", "\N{MINUS SIGN}"


_CHANCE = " ~"


def format_table(results: dict) -> str:
    """The models as aligned plain text, one line each under a header, and how to read it below.

    Narrow enough for a terminal: losses and intervals are in the report.
    """
    header = ["model", "train set", "labels", "mAP50", "mAP50-95", "F1 @ conf"]
    header += [f"{label} change" for _, label in METRICS]
    rows = [header] + [_terminal_row(model) for model in results["models"]]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(_aligned(cell, width, i) for i, (cell, width) in enumerate(zip(row, widths))) for row in rows]  # noqa: B905
    notes = [
        "change: against the model trained on the truth of the same train set; negative: soft labels did worse",
        f"{_CHANCE.strip()}: not distinguishable from chance on this test split",
        *rotated_note(results["models"]),
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:], *notes])


def rotated_note(models: Sequence[dict]) -> list[str]:
    """Which models are judged by rotated boxes, and that others cannot be compared with them; empty where none is."""
    turned = [model["name"] for model in models if model.get("rotated")]
    if not turned:
        return []
    if len(turned) == len(models):
        return ["mAP: by IoU of rotated boxes"]
    others = "that of the others is by IoU of upright boxes, which is easier to reach"
    return [f"mAP of {', '.join(turned)}: by IoU of rotated boxes; {others}"]


def format_calibration(rows: Sequence[dict]) -> str:
    """What was fitted, class by class, as aligned plain text, and the thresholds as a recipe takes them."""
    header = ["class", "boxes", "correct", "ECE", "ECE calibrated", "threshold"]
    cells = [header]
    for row in rows:
        numbers = [number(row[key], 3) for key in ("ece", "ece_calibrated")]
        threshold = number(row.get("threshold"), 3) if row.get("mapped", True) else "too few boxes to fit"
        cells.append([row["class"], plain(row["boxes"]), plain(row["right"]), *numbers, threshold])
    thresholds = {row["class"]: round(row["threshold"], 4) for row in rows if "threshold" in row}
    note = "ECE: mean gap between scores and the share of correct boxes, on tiles left out of the fit"
    wanted = ", ".join(f"{name}: {value:g}" for name, value in thresholds.items())
    best = f"thresholds of best F1, for train.threshold with train.calibration: {{{wanted}}}"
    return "\n".join([*aligned(cells), note, best])


def headline(results: dict) -> str:
    """The answer in one sentence, for the students of the lowest threshold."""
    return answers(results)[0]


def answers(results: dict) -> list[str]:
    """One sentence per source of labels and threshold, lowest first: none is picked by its test numbers."""
    models = [model for model in students_of(results["models"]) if is_known(drop_of(model, "map50").get("absolute"))]
    if not models:
        return ["No student could be compared with a model trained on truth"]
    return [_answer(list(students)) for _, students in itertools.groupby(sorted(models, key=kind_of), key=kind_of)]


def paper_answers(results: dict) -> list[str]:
    """The paper's mean loss of mAP50 for each source and threshold that this run shares with it."""
    sentences, paper = [], paper_of(results["models"])
    students = sorted(students_of(results["models"]), key=kind_of)
    for _, alike in itertools.groupby(students, key=kind_of):
        first = next(alike)
        drops = [paper_drop(paper, {**first, "train_set": name})["map50"] for name in ("train_1", "train_2")]
        if all(drop["absolute"] is not None for drop in drops):
            absolute, relative = (
                _mean([drop[key] for drop in drops]) or 0.0 for key in ("absolute", "relative_percent")
            )
            sentences.append(f"{number(-absolute, 3)} mAP50 ({number(-relative, 1)} %) at {threshold_of(first):g}")
    return sentences


def paper_of(models: Iterable[dict]) -> Paper:
    """The numbers of the paper's experiment that a run is like."""
    return _PAPER_COCO if any(source_of(model) == OWLVIT for model in models) else PAPER


def paper_drop(paper: Paper, model: dict) -> dict[str, dict[str, float | None]]:
    """The paper's drops (soft minus truth) for one student; nulls where it measured none."""
    soft, truth = paper_row(paper, model), paper.get((model["train_set"], "truth", None))
    drops: dict[str, dict[str, float | None]] = {}
    for i, (metric, _) in enumerate(METRICS):
        ours, theirs = (soft or (None, None))[i], (truth or (None, None))[i]
        is_student = source_of(model) != "truth" and ours is not None and theirs is not None
        absolute = ours - theirs if is_student else None  # type: ignore[operator]
        relative = 100 * absolute / theirs if absolute is not None and theirs else None
        drops[metric] = {"absolute": absolute, "relative_percent": relative}
    return drops


def paper_row(paper: Paper, model: dict) -> tuple[float, float | None] | None:
    """The paper's (mAP50, mAP50-95) of a model, None where it has no such model."""
    if is_soft(model):
        return None
    rounded = None if model["threshold"] is None else round(model["threshold"], 6)
    return paper.get((model["train_set"], source_of(model), rounded))


def number(value: float | None, digits: int = 4) -> str:
    """A number for the page: fixed digits, a real minus, an en dash for null."""
    if not is_known(value):
        return NULL
    text = f"{value:.{digits}f}"
    return (text[1:] if text.strip("-0.") == "" and text.startswith("-") else text).replace("-", MINUS)


def change(value: float | None, digits: int = 4) -> str:
    """A change for the page: like `number`, with a plus where it is a gain."""
    text = number(value, digits)
    return f"+{text}" if text[0].isdigit() and text.strip("0.") else text


def percent(share: float) -> str:
    """A share as whole percent."""
    return f"{number(100 * share, 0)} %"


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


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """A line per row, the cells of a column below each other."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def duration(seconds: float | None) -> str:
    """Seconds in the unit a person would use."""
    if not is_known(seconds) or seconds is None:
        return NULL
    if seconds < 99.5:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"


def interval(low: float | None, high: float | None, digits: int) -> str | None:
    """An interval of changes for the page, None where there is none."""
    return f"{change(low, digits)} to {change(high, digits)}" if is_known(low) and is_known(high) else None


def distinguishable(drop: dict) -> bool | None:
    """Whether the drop's interval excludes zero, None without an interval."""
    if is_known(drop.get("low")) and is_known(drop.get("high")):
        return not drop["low"] <= 0 <= drop["high"]
    return None


def labels_of(model: dict) -> str:
    """What a model learned from."""
    if model["labels"] == "truth":
        return "truth"
    return f"soft by {model['teacher']}" if model["teacher"] else "soft"


def student_words(model: dict) -> str:
    """Which student a model is."""
    softly = ", with train.soft" if is_soft(model) else ""
    return f"{model['train_set']}, {_LABELS_OF[source_of(model)]} at {threshold_of(model):g}{softly}"


def students_of(models: Iterable[dict]) -> list[dict]:
    """The models that learned from soft labels."""
    return [model for model in models if model["labels"] == "soft" and model["threshold"] is not None]


def threshold_of(model: dict) -> float:
    """The threshold of a student."""
    return float(model["threshold"])


def source_of(model: dict) -> str:
    """Where a model's labels come from: truth, or one of those above."""
    return "truth" if model["labels"] == "truth" else model.get("source") or TEACHER


def is_soft(model: dict) -> bool:
    """Whether a student learned with ``train.soft``; the paper's did not."""
    return bool(model.get("soft"))


def kind_of(student: dict) -> tuple[int, float, bool]:
    """What students that differ only in their training set have in common; sorts by source, threshold, loss."""
    return list(_LABELS_OF).index(source_of(student)), threshold_of(student), is_soft(student)


def drop_of(model: dict, metric: str) -> dict:
    """A model's drop in a metric; empty where there is none."""
    return (model.get("drop") or {}).get(metric) or {}


def loss_names(models: list[dict]) -> list[str]:
    """All losses that any model has, in the order in which they come."""
    sides = [(model.get("losses") or {}).get(side) or {} for model in models for side in ("train", "test")]
    return list(dict.fromkeys(name for side in sides for name in side))


def is_known(value: Any) -> bool:
    """Whether there is a number: neither null nor infinite."""
    return value is not None and math.isfinite(value)


def _answer(students: list[dict]) -> str:
    drops = [drop_of(student, "map50") for student in students]
    absolute = _mean([drop["absolute"] for drop in drops]) or 0.0
    relative = _mean([drop.get("relative_percent") for drop in drops])
    several = len(students) > 1
    subject = "Students" if several else "The student"
    change = _change(absolute, relative, several)
    softly = f" with train.soft ({plain(students[0]['soft'])})" if is_soft(students[0]) else ""
    labels = f"{_LABELS_OF[source_of(students[0])]} at {threshold_of(students[0]):g}"
    return f"{subject} trained{softly} on {labels} {change}; {_chance(students)}"


def _change(absolute: float, relative: float | None, several: bool) -> str:
    average = " on average" if several else ""
    if abs(absolute) < 0.0005:
        return f"{'come' if several else 'comes'} within 0.001 mAP50 of truth{average}"
    verb = ("lose" if absolute < 0 else "gain") + ("" if several else "s")
    share = "" if relative is None else f" ({number(abs(relative), 1)} %)"
    return f"{verb} {number(abs(absolute), 3)} mAP50{share}{average} against truth"


def _chance(students: list[dict]) -> str:
    """What the intervals allow us to say of the students of one threshold, each against truth on its own train set."""
    by_verdict: dict[bool | None, list[dict]] = {True: [], False: [], None: []}
    for student in students:
        by_verdict[distinguishable(drop_of(student, "map50"))].append(student)
    if len(by_verdict[None]) == len(students):
        return "no interval was computed, so it may be chance"
    words = {
        True: "distinguishable from chance",
        False: "not distinguishable from chance",
        None: "without an interval",
    }
    told = [(words[verdict], found) for verdict, found in by_verdict.items() if found]
    if len(told) > 1:
        parts = ", ".join(f"{phrase} for {_names(found, 'train_set')}" for phrase, found in told)
        return f"on this test split the difference is {parts}"
    signs = {drop_of(student, "map50")["absolute"] > 0 for student in by_verdict[True]}
    opposite = ", but they point in opposite directions" if len(signs) > 1 else ""
    subject = "the difference is" if len(students) == 1 else "the differences, one per training set, are"
    return f"{subject} {told[0][0]} on this test split{opposite}"


def _terminal_row(model: dict) -> list[str]:
    threshold = "" if model["threshold"] is None else f" > {model['threshold']:g}"
    cells = [model["name"], model["train_set"], labels_of(model) + threshold]
    cells += [number(model["map50"]), number(model["map50_95"])]
    cells.append(f"{number(model['f1'], 3)} @ {number(model['f1_conf'], 2)}")
    for metric, _ in METRICS:
        absolute, relative = (drop_of(model, metric).get(key) for key in ("absolute", "relative_percent"))
        chance = _CHANCE if distinguishable(drop_of(model, metric)) is False else " " * len(_CHANCE)
        cells.append(f"{change(absolute, 3)} ({change(relative, 1):>5} %){chance}" if is_known(absolute) else NULL)
    return cells


def _aligned(cell: str, width: int, column: int) -> str:
    return cell.ljust(width) if column < 3 else cell.rjust(width)


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None and math.isfinite(value)]
    return sum(known) / len(known) if known else None


def _names(models: list[dict], key: str) -> str:
    return " and ".join(str(model[key]) for model in models)


def _bracketed(value: Any) -> str:
    return f"({plain(value)})" if isinstance(value, dict) else plain(value)
