"""What the search says, in the terminal and on its page, from a made-up search."""

import re

import numpy as np
import pytest
from conftest import CLASSES

from softlabel.config import Search
from softlabel.report.search import format_answer, sentences, write_search_report
from softlabel.search.answer import answer
from softlabel.search.trials import Trial

KEY = "train.threshold"
SPACE = {KEY: {"min": 0.05, "max": 0.95}, "train.student.args.imgsz": {"choices": [64, 96]}}


def student(number, threshold, map50, *, seed=0, imgsz=64, status="finished", reason=""):
    epochs = {"finished": 4, "stopped": 2, "failed": 0}[status]
    history = [{"epoch": e, "map50": map50 * e / 4, "seconds": 10.0} for e in range(1, epochs + 1)]
    values = {KEY: threshold, "train.student.args.imgsz": imgsz}
    return Trial(number, values, seed, 1.0, "explore", 4, "f", status, reason, history, 10.0 * epochs)


def made(curve, noise=0.005):
    rng = np.random.default_rng(0)
    thresholds = [0.3, 0.5, 0.1, 0.2, 0.4, 0.6, 0.7, 0.8, 0.9, 0.3, 0.5, 0.2, 0.2]
    trials = [
        student(i, t, curve(t) + rng.normal(0, noise), seed=thresholds[:i].count(t)) for i, t in enumerate(thresholds)
    ]
    trials += [student(13, 0.35, 0.3, status="stopped"), student(14, 0.94, 0, status="failed", reason="no <label>")]
    search = Search.model_validate({"space": SPACE})
    references = [trials[0].values, trials[1].values]
    rows = [trial.to_dict() for trial in trials]
    rows[0]["test_map50"] = 0.4321
    return {
        "name": "made up",
        "answer": answer(search, trials, references),
        "trials": rows,
        "space": {key: one.model_dump(mode="json") for key, one in search.space.items()},
        "classes": list(CLASSES),
        "references": references,
        "seconds": 900.0,
        "epochs": 54,
        "start_up_share": 0.125,
        "cpu_hours": 0.5,
        "gpu_hours": 0.0,
        "test": [{"values": trials[3].values, "students": 3, "map50": 0.5111, "sd": 0.01}],
        "label_quality": [
            {"class": name, "threshold": t, "precision": t, "recall": 1 - t}
            for name in ("all", *CLASSES)
            for t in (0.2, 0.4, 0.6)
        ],
        "labels_kept": {
            "0.2": {"car": 5, "plane": 3, "ship": 1, "all": 9},
            "0.4": {"car": 2, "plane": 0, "ship": 0, "all": 2},
        },
        "times_s": {"tiles": 3.0, "search": 900.0},
    }


@pytest.fixture(scope="module")
def peaked():
    return made(lambda t: 0.6 - 0.6 * (t - 0.2) ** 2)


def test_the_answer_names_value_interval_gain_and_cost(peaked):
    said = format_answer(peaked)
    assert said.startswith("Use threshold 0.2, imgsz 64: a student reaches mAP50 0.5")
    assert "3 students trained in full" in said
    low, high = map(float, re.search(r"best threshold lies between ([\d.]+) and ([\d.]+) \(90 %\)", said).groups())
    assert low <= 0.2 <= high < 0.5
    beats = dict(re.findall(r"It beats threshold ([\d.]+), imgsz 64 with probability (\d+) %", said))
    assert set(beats) == {"0.3", "0.5"} and int(beats["0.5"]) > 95
    assert "On the test split, threshold 0.2, imgsz 64 (the choice): mAP50 0.511 (standard deviation 0.010)" in said
    assert "15 students and 54 epochs in 15 min, 0.5 CPU-hours, 12 % of it start-up and waiting" in said
    assert "flat" not in said
    assert "Classes without a label: plane above 0.4, ship above 0.4; students there never see one." in said


def test_a_flat_curve_is_said_to_be_flat():
    assert any("flat within noise" in sentence for sentence in sentences(made(lambda t: 0.5, noise=0.02)))


def test_without_truth_in_the_test_split_it_says_so(peaked):
    said = format_answer({**peaked, "test": []})
    assert "There is no truth in a test split" in said and "On the test split" not in said


def test_one_value_says_nothing_of_others(peaked):
    alone = {**peaked, "answer": {**peaked["answer"], "compared": 1}}
    assert "whether one is better is not known" in format_answer(alone)
    assert "not known" not in format_answer(peaked)


def test_the_page_has_curve_choices_labels_and_every_student(peaked, tmp_path):
    write_search_report(tmp_path / "search.html", peaked)
    page = (tmp_path / "search.html").read_text()
    assert page.count("<svg") == 3 + 2 * 4  # a curve, precision, recall; and a swatch per line of the latter two
    assert "no &lt;label&gt;" in page and "<label>" not in page
    students = page[page.index("<h2>Students</h2>") :]
    assert len(re.findall(r"<tr[ >]", students)) == 1 + len(peaked["trials"])
    assert students.count("class=best") == 3 and "0.4321" in students and "2 of 4" in students
    assert "http" not in re.sub(r"http://www\.w3\.org/\S+", "", page)
