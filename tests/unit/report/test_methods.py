"""compare.json in words, as a table and as a page."""

import re

import pytest

from softlabel.report.methods import format_methods, write_methods_report


def interval(value, half=0.01):
    return {"value": value, "low": value - half, "high": value + half}


def row(method, map50, *, train_set="train_1", half=0.01):
    gain = map50 - 0.5
    return {
        "method": method,
        "train_set": train_set,
        "students": 2,
        "map50": interval(map50),
        "map50_95": interval(map50 / 2),
        "gain": {**interval(gain, half), "distinguishable": abs(gain) > half},
        "gain_50_95": {**interval(gain / 2, half), "distinguishable": False},
        "gap_closed": interval(gain / 0.2),
        "seeds": {"0": map50 - 0.02, "1": map50 + 0.02},
        "per_class": {"car": map50, "plane": None},
    }


@pytest.fixture
def results():
    rows = [row("plain", 0.5), row("band", 0.6), row("far", 0.505), row("worse", 0.4), row("truth", 0.7)]
    return {
        "name": "methods",
        "classes": ["car", "plane"],
        "methods": {"plain": {}, "band": {"train.soft.ignore_above": 0.1}, "far": {}, "worse": {}, "truth": {}},
        "drop": 0.3,
        "seeds": [0, 1],
        "rows": rows,
        "failed": {"odd_train_1_seed0": "the loss is nan"},
        "train_boxes": {"band": {"train_1": 1234}},
        "times_s": {"tiles": 3.0},
    }


def test_what_did_not_help_is_said_as_plainly_as_what_did(results):
    text = format_methods(results)
    assert "band helps: it gains +0.100 (+0.090 to +0.110) mAP50 and closes 50 % of the gap to truth." in text
    assert "Worse than plain: worse \N{MINUS SIGN}0.100 (\N{MINUS SIGN}0.110 to \N{MINUS SIGN}0.090)." in text
    assert "Not distinguishable from plain with these seeds and images: far +0.005" in text
    assert "Training on truth gains +0.200 (+0.190 to +0.210) mAP50 over plain soft labels." in text
    assert "30 % of the labelled objects were removed at random first." in text
    assert "odd_train_1_seed0 failed: the loss is nan" in text
    lines = text.splitlines()
    assert re.match(r"far +train_1 +0\.505 \(0\.495 to 0\.515\) +\+0\.005 .* ~ +3 % ", lines[4])


def test_where_truth_is_no_better_there_is_no_gap_to_close(results):
    results["rows"][-1] = row("truth", 0.505)
    text = format_methods(results)
    assert "band helps: it gains +0.100 (+0.090 to +0.110) mAP50." in text
    assert "over plain soft labels: no gap to close that is distinguishable from chance." in text


def test_of_several_sets_their_mean_is_talked_of(results):
    results["rows"] += [row(name, 0.5, train_set="train_2") for name in ("plain", "band", "truth")]
    results["rows"] += [row("plain", 0.5, train_set="all"), row("band", 0.55, train_set="all")]
    results["rows"] += [row("truth", 0.6, train_set="all")]
    assert "band helps: it gains +0.050" in format_methods(results)


def test_the_page_stands_alone(results, tmp_path):
    write_methods_report(tmp_path / "compare.html", results)
    page = (tmp_path / "compare.html").read_text()
    assert page.count("<svg") >= 1 and "http" not in re.sub(r"http://www.w3.org/\S+", "", page)
    for words in ("train.soft.ignore_above: 0.1", "1,234", "helps: it gains", "0.600"):
        assert words in page, words
