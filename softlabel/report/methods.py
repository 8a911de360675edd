"""From compare.json to words for the terminal and one self-contained HTML page."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from softlabel import store
from softlabel.report import plots, wording
from softlabel.report.page import render

_ALL = "all"


def format_methods(results: dict) -> str:
    """A table as aligned plain text, one line per method and training set, and sentences on what it says."""
    header = ["method", "train set", "mAP50", "gain over plain", "gap closed", "mAP50-95"]
    lines = wording.aligned([header, *(_cells(row) for row in results["rows"])])
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:], "", *sentences(results)])


def sentences(results: dict) -> list[str]:
    """What helped, what did not, and how sure that is."""
    rows = [row for row in _widest(results) if row["method"] not in ("plain", "truth")]
    truth = next(row for row in _widest(results) if row["method"] == "truth")
    has_gap = truth["gain"]["distinguishable"] and truth["gain"]["value"] > 0
    better = [row for row in rows if row["gain"]["distinguishable"] and row["gain"]["value"] > 0]
    worse = [row for row in rows if row["gain"]["distinguishable"] and row["gain"]["value"] < 0]
    neither = [row for row in rows if not row["gain"]["distinguishable"]]
    lines = []
    for row in sorted(better, key=lambda one: -one["gain"]["value"]):
        share = row["gap_closed"]["value"]
        closes = "" if share is None or not has_gap else f" and closes {wording.percent(share)} of the gap to truth"
        lines.append(f"{row['method']} helps: it gains {_range(row['gain'], signed=True)} mAP50{closes}.")
    if worse:
        lines.append(f"Worse than plain: {', '.join(_named(row) for row in worse)}.")
    if neither:
        told = ", ".join(_named(row) for row in neither)
        lines.append(f"Not distinguishable from plain with these seeds and images: {told}.")
    unsure = "" if has_gap else ": no gap to close that is distinguishable from chance"
    lines.append(f"Training on truth gains {_range(truth['gain'], signed=True)} mAP50 over plain soft labels{unsure}.")
    if results["drop"]:
        lines.append(f"{wording.percent(results['drop'])} of the labelled objects were removed at random first.")
    lines += [f"{name} failed: {reason}" for name, reason in sorted(results["failed"].items())]
    return lines


def write_methods_report(path: Path, results: dict) -> None:
    """Write compare.html."""
    sets = list(dict.fromkeys(row["train_set"] for row in results["rows"]))
    panels = [
        {"title": "all training sets" if name == _ALL else name, "svg": Markup(_panel(results, name, i))}
        for i, name in enumerate(sets)
    ]
    view = {
        "name": results["name"],
        "sentences": sentences(results),
        "panels": panels,
        "rows": [_view(row, results) for row in results["rows"]],
        "classes": results["classes"],
        "methods": {name: values for name, values in results["methods"].items() if values},
        "seeds": results["seeds"],
        "times_s": results["times_s"],
    }
    store.write_text(path, render("methods.html.j2", view))


def _widest(results: dict) -> list[dict]:
    """The rows of all training sets together, or of the only one."""
    sets = {row["train_set"] for row in results["rows"]}
    return [row for row in results["rows"] if row["train_set"] == _ALL or len(sets) == 1]


def _panel(results: dict, train_set: str, number: int) -> str:
    rows = [row for row in results["rows"] if row["train_set"] == train_set]
    of = {row["method"]: row["map50"]["value"] for row in rows}
    return plots.interval_panel(
        [row["method"] for row in rows],
        [(row["map50"]["value"], row["map50"]["low"], row["map50"]["high"]) for row in rows],
        [list(row["seeds"].values()) for row in rows],
        marks=(of["plain"], of["truth"]),
        x_label="mAP50 on the test split",
        key=f"methods{number}",
    )


def _view(row: dict, results: dict) -> dict[str, Any]:
    return {
        "cells": _cells(row),
        "students": row["students"],
        "boxes": results["train_boxes"].get(row["method"], {}).get(row["train_set"]),
        "per_class": [row["per_class"][name] for name in results["classes"]],
        "is_plain": row["method"] == "plain",
    }


def _cells(row: dict) -> list[str]:
    is_goal = row["method"] in ("plain", "truth")
    mark = "" if row["method"] == "plain" or row["gain"]["distinguishable"] else " ~"
    return [
        row["method"],
        row["train_set"],
        _range(row["map50"]),
        wording.NULL if row["method"] == "plain" else _range(row["gain"], signed=True) + mark,
        wording.NULL if is_goal else _share(row["gap_closed"]),
        _range(row["map50_95"]),
    ]


def _named(row: dict) -> str:
    return f"{row['method']} {_range(row['gain'], signed=True)}"


def _range(found: dict, *, signed: bool = False) -> str:
    form = "+.3f" if signed else ".3f"
    numbers: Sequence[str] = [
        wording.NULL if found[key] is None else f"{found[key]:{form}}".replace("-", wording.MINUS)
        for key in ("value", "low", "high")
    ]
    value, low, high = numbers
    return value if low == wording.NULL else f"{value} ({low} to {high})"


def _share(found: dict) -> str:
    value, low, high = (
        wording.NULL if found[key] is None else wording.percent(found[key]) for key in ("value", "low", "high")
    )
    return value if low == wording.NULL else f"{value} ({low} to {high})"
