"""The report says what the numbers say, whatever numbers are missing, and needs nothing beside itself."""

import copy
import math
import re
from pathlib import Path

import numpy as np
import pytest

from softlabel import rotated
from softlabel.records import Detections, Truth
from softlabel.report import figures, page, wording
from softlabel.report.figures import SOFT_RGB, TRUTH_RGB, Overlay

NASTY = "<b>&"


def drop_of(absolute, reference, half_width):
    low, high = absolute - half_width, absolute + half_width
    return {
        "absolute": absolute,
        "low": low,
        "high": high,
        "relative_percent": 100 * absolute / reference,
        "relative_low": 100 * low / reference,
        "relative_high": 100 * high / reference,
        "distinguishable": not low <= 0 <= high,
    }


def model(train_set, threshold, map50, *, reference=None, half_width=0.01, classes=("car", NASTY)):
    number = train_set[-1]
    soft = threshold is not None
    drop = None
    if soft:
        change = map50 - reference
        per_class = {name: {"absolute": change, "relative_percent": 100 * change / reference} for name in classes}
        drop = {
            "map50": drop_of(change, reference, half_width),
            "map50_95": drop_of(change / 2, reference / 2, half_width),
            "per_class": per_class,
        }
    rates = {"precision": 0.8123, "recall": 0.7123, "f1": 0.7123 + map50 / 1000}
    return {
        "name": f"soft_{number}_{threshold}" if soft else f"truth_{number}",
        "train_set": train_set,
        "labels": "soft" if soft else "truth",
        "teacher": f"truth_{3 - int(number)}" if soft else None,
        "threshold": threshold,
        "model": "yolov5n.yaml",
        "map50": map50,
        "map50_95": map50 / 2,
        **rates,
        "f1_conf": 0.37,
        "losses": {
            "train": {"box": map50 / 3, "obj": 0.02, "cls": 0.01},
            "test": {"box": map50 / 2, "obj": 0.03, "cls": None},
            "difference_percent": {"box": 40.0, "obj": 40.0, "cls": None},
        },
        "per_class": {
            name: {"ap50": map50, "ap50_95": map50 / 2, **rates, "truth": 100 + i, "detections": 5000}
            for i, name in enumerate(classes)
        },
        "drop": drop,
        "optimizer": "SGD",
        "lr0": 0.01,
        "epochs": 3,
        "epochs_with_mosaic": 0,
        "best_epoch": 2,
        "seed": 0,
        "world_size": 1,
        "train_tiles": 120,
        "train_boxes": 1301,
    }


def results_of(models, classes=("car", NASTY), label_quality=()):
    return {
        "name": "unit",
        "seed": 7,
        "classes": list(classes),
        "softlabel_version": "0.1.0",
        "date": "2026-08-25",
        "machine": {
            "cpu": "some",
            "cores": 2,
            "gpus": [],
            "python": "3.11",
            "torch": "2",
            "ray": "2",
            "ultralytics": "8",
        },
        "times_s": {"tiles": 1.5, "train teachers": 5000.0, "label": None},
        "tiles": {
            "format_version": 1,
            "classes": list(classes),
            "scenes": 1234,
            "scenes_rejected": 1,
            "tiles": 40,
            "background": 9,
            "splits": {"none": 16, "test": 8, "train_1": 16},
            "boxes": {name: 2503 for name in classes},
            "boxes_by_split": {
                "none": {},
                "test": {name: 3 for name in classes},
                "train_1": {name: 2500 for name in classes},
            },
            "ignored": 5,
            "truth_rejected": 2,
            "truth_dropped": 7,
            "mean_tile_px": [640.0, 511.6],
            "groups_in_two_splits": 0,
        },
        "models": models,
        "label_quality": list(label_quality),
    }


def six(half_width=0.01, changes=(-0.02, -0.04)):
    models = []
    for train_set, reference in (("train_1", 0.7111), ("train_2", 0.7222)):
        models.append(model(train_set, None, reference))
        for threshold, change in zip((0.3, 0.5), changes, strict=True):
            models.append(model(train_set, threshold, reference + change, reference=reference, half_width=half_width))
    return results_of(models, label_quality=quality(("all", "car", NASTY)))


def quality(names):
    return [
        {
            "train_set": train_set, "teacher": teacher, "threshold": threshold, "class": name, "kept": 10, "truth": 12,
            "precision": None if threshold > 0.8 else threshold, "recall": 1 - threshold, "mean_iou": None,
        }
        for train_set, teacher in (("train_1", "truth_2"), ("train_2", "truth_1"))
        for threshold in (0.1, 0.3, 0.5, 0.9)
        for name in names
    ]  # fmt: skip


def curves_of(results):
    x = np.linspace(0, 1, 1000).tolist()
    falling = [None, *(1 - value for value in x[1:])]
    names = ["all", *results["classes"]]
    full = {"recall": x, "precision": falling, "confidence": x, "f1": falling}
    return {one["name"]: {name: full for name in names} for one in results["models"]}


def nulled(value):
    """The same structure with every float null."""
    if isinstance(value, dict):
        return {key: value[key] if key == "threshold" else nulled(value[key]) for key in value}
    if isinstance(value, list):
        return [nulled(item) for item in value]
    return None if isinstance(value, float) else value


@pytest.fixture
def overlay():
    truth = Truth(
        np.array([[100, 100, 200, 200], [300, 300, 340, 340]], np.float32),
        np.array([0, 1], np.int32),
        np.array([False, True]),
    )
    detections = Detections(np.array([[400, 120, 500, 220]], np.float32), np.array([[0.1, 0.87]], np.float32))
    image = np.full((640, 640, 3), 90, np.uint8)
    return Overlay(f"tile {NASTY}", image, truth, detections, ("car", NASTY))


def written(tmp_path: Path, results, curves=None, overlays=()) -> str:
    path = tmp_path / "report.html"
    page.write_report(path, results, curves_of(results) if curves is None else curves, list(overlays))
    return path.read_text()


def table_1(html: str) -> list[str]:
    return re.findall(r"<tr><th>.*?</tr>", html[html.index("Table 1.") : html.index("</table>")], re.DOTALL)[1:]


def test_every_row_shows_its_numbers_and_the_papers(tmp_path):
    results = six()
    rows = table_1(written(tmp_path, results))
    assert len(rows) == 6
    for one, row in zip(results["models"], rows, strict=True):
        assert one["name"] in row
        for value in (one["map50"], one["map50_95"]):
            assert f"{value:.4f}" in row
        assert f"{one['f1']:.3f}" in row and "0.37" in row
    assert "−0.0200" in rows[1] and "−2.8 %" in rows[1] and "−0.0300 to −0.0100" in rows[1]
    assert "0.7328" in rows[1] and "−0.0297" in rows[1] and "−3.9 %" in rows[1]
    assert "0.7747" in rows[3] and "0.4609" in rows[3] and "%" not in rows[3]


def test_a_threshold_that_the_paper_lacks_is_said_to_be_not_measured(tmp_path):
    models = [model("train_1", None, 0.7)] + [
        model("train_1", threshold, 0.69, reference=0.7) for threshold in (0.2, 0.3, 0.4, 0.6)
    ]
    rows = table_1(written(tmp_path, results_of(models)))
    assert ["not measured by the paper" in row for row in rows] == [False, True, False, True, True]


def test_an_interval_with_zero_is_not_distinguishable(tmp_path):
    wide, narrow = (written(tmp_path, six(half_width)) for half_width in (0.03, 0.005))
    assert "not distinguishable" in table_1(wide)[1]
    assert "not distinguishable" not in table_1(narrow)[1] and "distinguishable" in table_1(narrow)[1]


@pytest.mark.parametrize(
    ("results", "expected"),
    [
        (six(0.01), ["lose 0.020 mAP50 (2.8 %) on average", "are distinguishable from chance"]),
        (six(0.03), ["lose 0.020 mAP50 (2.8 %) on average", "are not distinguishable from chance"]),
        (six(0.01, (0.02, 0.0)), ["gain 0.020 mAP50 (2.8 %) on average", "are distinguishable from chance"]),
        (
            six(0.01, (0.0, -0.1)),
            ["come within 0.001 mAP50 of truth on average", "are not distinguishable from chance"],
        ),
        (
            results_of([model("train_1", None, 0.7), model("train_1", 0.3, 0.65, reference=0.7)]),
            ["The student trained on soft labels at 0.3 loses 0.050 mAP50 (7.1 %) against truth", "difference is dist"],
        ),
        (results_of([model("train_1", None, 0.7)]), ["No student could be compared"]),
        (results_of([]), ["No student could be compared"]),
    ],
)
def test_the_headline_follows_the_numbers(results, expected):
    assert all(part in wording.headline(results) for part in expected), wording.headline(results)


def test_the_headline_names_the_sets_that_differ():
    results = six(0.01)
    results["models"][1]["drop"]["map50"].update(low=-0.05, high=0.01)
    assert wording.headline(results).endswith(
        "distinguishable from chance for train_2, not distinguishable from chance for train_1"
    )
    results["models"][1] = model("train_1", 0.3, 0.7511, reference=0.7111)
    assert wording.headline(results).endswith("opposite directions")
    for i in (1, 4):
        results["models"][i]["drop"]["map50"].update(low=None, high=None, distinguishable=False)
    assert wording.headline(results).endswith("no interval was computed, so it may be chance")


def test_each_threshold_gets_a_sentence_and_the_lowest_comes_first():
    answers = wording.answers(six())
    assert [re.search(r"at (0\.\d)", answer)[1] for answer in answers] == ["0.3", "0.5"]
    assert wording.paper_answers(six()) == ["0.038 mAP50 (4.9 %) at 0.3", "0.056 mAP50 (7.3 %) at 0.5"]


def test_a_drop_of_the_wrong_sign_is_refused(tmp_path):
    results = six()
    results["models"][1]["drop"]["map50"]["absolute"] *= -1
    with pytest.raises(ValueError, match=r"soft_1_0.3: drop \+0.0200, but soft - truth is -0.0200"):
        written(tmp_path, results)


def test_names_are_escaped_and_nothing_is_fetched(tmp_path, overlay):
    html = written(tmp_path, six(), overlays=[overlay])
    assert NASTY not in html and "&lt;b&gt;&amp;" in html
    assert not re.search(r"""(src|href)\s*=\s*["'](?!data:image/png;base64,|#)""", html)
    assert not re.search(r"@import|url\((?!#)|<script|<link", html)


def test_ids_are_unique_and_references_resolve(tmp_path):
    html = written(tmp_path, six())
    ids = re.findall(r'\bid="([^"]+)"', html)
    assert ids and len(ids) == len(set(ids))
    assert set(re.findall(r'(?:href="#|url\(#)([^")]+)', html)) <= set(ids)
    assert "#fe01" not in html and "#fe00" not in html


def test_the_same_input_gives_the_same_bytes(tmp_path, overlay):
    first = written(tmp_path / "a", six(), overlays=[overlay])
    assert first == written(tmp_path / "b", copy.deepcopy(six()), overlays=[overlay])


def test_nulls_become_dashes(tmp_path):
    results = nulled(six())
    for one in results["models"][:3]:
        one.update(drop=None, losses=None, per_class=None)
    html = written(tmp_path, results)
    assert "None" not in html and "nan" not in re.sub(r"<style.*?</style>", "", html, flags=re.DOTALL).split()
    assert all("–" in row for row in table_1(html))
    assert "None" not in wording.format_table(results)


def test_how_it_was_run_tells_data_and_machine_in_words(tmp_path):
    html = written(tmp_path, six())
    folded = html[html.index("How it was run") :]
    for fact in ("<dd>1,234</dd>", "<dd>640 x 512 px</dd>", "<dt>gpus</dt><dd>no GPU</dd>"):
        assert fact in folded
    assert re.search(
        r"cannot be read</dt><dd>1</dd>.*cannot be used</dt><dd>2</dd>.*left out on purpose</dt><dd>7<", folded
    )
    table = folded[folded.index(">no split<") : folded.index("Time per step")]
    cells = [re.findall(r"<t[hd][^>]*>(.*?)</t", row) for row in table.split("<tr>")]
    assert cells[1:3] == [["tiles", "16", "8", "16", "40"], ["boxes of car", "–", "3", "2,500", "2,503"]]
    assert "format_version" not in folded and "{" not in table


def test_parts_without_data_are_left_out(tmp_path):
    results = results_of(six()["models"])
    html = written(tmp_path, results, curves={})
    assert "Table 1." in html and "Figure 1." in html
    assert not any(f"<b>Figure {i}." in html for i in (2, 3, 4, 5))


def test_one_class_and_four_thresholds(tmp_path, overlay):
    models = [model("train_1", None, 0.7, classes=("car",))] + [
        model("train_1", threshold, 0.69, reference=0.7, classes=("car",)) for threshold in (0.2, 0.3, 0.4, 0.6)
    ]
    html = written(tmp_path, results_of(models, classes=("car",)), overlays=[overlay])
    assert len(table_1(html)) == 5 and html.count("Students trained") == 0 and html.count("The student trained") == 4


def test_the_table_for_the_terminal_aligns():
    results = six()
    results["models"][2].update(map50=None, f1=None, drop=None, name="a_rather_long_name")
    head, rule, *rows, note, chance = wording.format_table(results).splitlines()
    assert len(rows) == 6 and {len(line) for line in (head, rule, *rows)} == {len(head)}
    assert "0.6911" in rows[1] and "−0.020 ( −2.8 %)" in rows[1]
    assert len(head) <= 124 and "not distinguishable" in chance
    assert all(row[head.index("train set") :].startswith("train_") for row in rows)
    assert "negative: soft labels did worse" in note


def test_models_judged_by_rotated_boxes_are_named(tmp_path, overlay):
    results = six()
    assert "rotated" not in wording.format_table(results)
    results["models"][0]["rotated"] = True
    note = f"mAP of {results['models'][0]['name']}: by IoU of rotated boxes; that of the others"
    assert note in wording.format_table(results) and note in written(tmp_path, results, overlays=[overlay])
    for one in results["models"]:
        one["rotated"] = True
    assert "mAP: by IoU of rotated boxes" in wording.format_table(results)


def test_rotated_truth_is_drawn_as_it_lies():
    image, box = np.full((640, 640, 3), 90, np.uint8), np.array([[320, 320, 200, 200, math.pi / 4]], np.float32)
    truth = Truth(rotated.hulls(box), np.array([0], np.int32), np.array([False]), box)
    nothing = Detections(box[:0, :4], np.zeros((0, 1), np.float32))
    drawn = (figures.draw_overlay(Overlay("t", image, truth, nothing, ("car",))) == TRUTH_RGB).all(axis=2)
    for x, y in rotated.corners(box)[0].round().astype(int):
        assert drawn[y - 2 : y + 3, x - 2 : x + 3].any()
    x0, y0, *_ = rotated.hulls(box)[0].round().astype(int)
    assert not drawn[y0 : y0 + 20, x0 : x0 + 20].any()


def test_truth_is_green_and_soft_labels_red(overlay):
    drawn = figures.draw_overlay(overlay)
    assert drawn.shape == (640, 640, 3)
    for row, column in ((150, 100), (150, 98), (150, 199), (100, 150), (199, 150), (320, 300)):
        assert tuple(drawn[row, column]) == TRUTH_RGB
    for row, column in ((180, 400), (180, 401), (180, 499), (219, 450)):
        assert tuple(drawn[row, column]) == SOFT_RGB
    assert tuple(drawn[320, 301]) == tuple(drawn[150, 150]) == tuple(drawn[180, 450]) == (90, 90, 90)


def test_where_truth_and_label_agree_both_are_seen(overlay):
    same = Detections(overlay.truth.boxes[:1], np.array([[0.9, 0.1]], np.float32))
    drawn = figures.draw_overlay(Overlay("", overlay.image, overlay.truth, same, overlay.classes))
    assert tuple(drawn[150, 99]) == TRUTH_RGB and tuple(drawn[150, 100]) == SOFT_RGB


@pytest.mark.parametrize(("side", "expected"), [(96, 480), (640, 640), (1600, 800)])
def test_overlays_are_shown_at_a_readable_size(side, expected):
    nothing = Truth.from_row(None), Detections(np.zeros((0, 4), np.float32), np.zeros((0, 1), np.float32))
    drawn = figures.draw_overlay(Overlay("", np.zeros((side, side, 3), np.uint8), *nothing, ("car",)))
    assert drawn.shape == (expected, expected, 3)


def test_even_noise_fits_eight_times_into_five_megabytes(tmp_path, overlay):
    noise = np.random.default_rng(0).integers(0, 256, (640, 640, 3)).astype(np.uint8)
    noisy = Overlay("noise", noise, overlay.truth, overlay.detections, overlay.classes)
    one, none = (len(written(tmp_path, six(), overlays=overlays)) for overlays in ([noisy], []))
    assert none < 1_000_000 and none + 8 * (one - none) < 5_000_000


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "–"), (float("nan"), "–"), (0.12345, "0.1235"), (-0.02, "−0.0200"), (-1e-9, "0.0000"), (0.0, "0.0000")],
)
def test_numbers(value, text):
    assert wording.number(value) == text


@pytest.mark.parametrize(
    ("value", "text"), [(0.0223, "+0.022"), (-0.1076, "−0.108"), (0, "0.000"), (-0.0001, "0.000"), (None, "–")]
)
def test_a_change_has_its_sign(value, text):
    assert wording.change(value, 3) == text
    assert wording.interval(value, 1.5, 3) == (None if value is None else f"{text} to +1.500")


@pytest.mark.parametrize(
    ("seconds", "text"), [(None, "–"), (1.52, "1.5 s"), (42, "42 s"), (300, "5 min"), (9345, "2 h 36 min")]
)
def test_durations(seconds, text):
    assert wording.duration(seconds) == text


def test_students_of_train_soft_stand_beside_the_plain_ones(tmp_path):
    results = six()
    for number, reference in ((1, 0.7111), (2, 0.7222)):
        soft = model(f"train_{number}", 0.3, reference - 0.01, reference=reference, half_width=0.01)
        soft |= {"name": f"soft_{number}_at_0.3_softly", "soft": {"class_targets": "vector", "ignore_above": 0.1}}
        results["models"].append(soft)
    plain, softly, higher = wording.answers(results)
    assert plain.startswith("Students trained on soft labels at 0.3 lose 0.020 mAP50")
    assert softly.startswith(
        "Students trained with train.soft (class_targets vector, ignore_above 0.1) on soft labels at 0.3 "
        "lose 0.010 mAP50"
    )
    assert higher.startswith("Students trained on soft labels at 0.5")
    assert wording.student_words(results["models"][-1]) == "train_2, soft labels at 0.3, with train.soft"
    assert wording.paper_row(wording.PAPER, results["models"][-1]) is None  # the paper has no such student
    assert wording.paper_row(wording.PAPER, results["models"][1]) is not None
    styles = page._model_styles(results["models"])
    assert len({(style.colour, style.dash) for style in styles.values()}) == len(results["models"])
    page.write_report(tmp_path / "report.html", results, {}, [])
    assert "soft_2_at_0.3_softly" in (tmp_path / "report.html").read_text()
