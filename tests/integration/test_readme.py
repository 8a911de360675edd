"""README's commands for an archive, run as printed on a toy one: labels, and a layer of them for a GIS."""

import contextlib
import copy
from pathlib import Path

import geopandas as gpd
import pandas as pd
import pytest
import torch
from pages import PAGES, blocks, lines, make_images

import softlabel.cli
import softlabel.without_recipe
from softlabel.cli import main
from softlabel.store import read_json, summary

pytestmark = pytest.mark.usefixtures("ray_session")


def printed(start):
    """The words of README's first command that begins so."""
    commands = (words for block in blocks(PAGES[0]) for words in lines(block) if not block.startswith("name:"))
    return next(words for words in commands if " ".join(words).startswith(start))[1:]


def stay_in_this_ray(monkeypatch):
    for verbs in (softlabel.cli, softlabel.without_recipe):
        monkeypatch.setattr(verbs, "ray_session", lambda run_dir, verbose: contextlib.nullcontext())


def test_an_archive_is_labelled_and_exported_as_printed(tmp_path, monkeypatch, weights, capsys):
    monkeypatch.chdir(tmp_path)
    stay_in_this_ray(monkeypatch)
    make_images(tmp_path)
    (tmp_path / "mine.yaml").write_text(next(block for block in blocks(PAGES[0]) if block.startswith("name: mine")))
    trained = Path("runs/mine/train-truth_1-HASH/weights.safetensors")  # by the experiment
    trained.parent.mkdir(parents=True)
    trained.write_bytes(weights.read_bytes())
    # The teacher that a test has knows three classes, and is not sure of any.
    mine = ["--set", "classes=[car, plane, ship]", "--set", "execution.cpus_per_actor=0.5"]
    assert main([*printed("softlabel label --config mine.yaml"), *mine]) == 0
    store = Path(capsys.readouterr().out.splitlines()[-1])
    assert summary(store)["labelled"] == 12 and store.name.startswith("label-labels-")
    printed_words = printed("softlabel export runs/archive/label-labels-HASH --format geoparquet")
    export = [str(store) if "HASH" in word else word for word in printed_words]
    assert main([*export[:-1], "0.01"]) == 0
    layers = [gpd.read_parquet(path) for path in (store.parent / f"export-geoparquet-{store.name}").glob("*.parquet")]
    assert len(layers) == 12 and sum(map(len, layers)) > 0


def test_a_trained_model_labels_as_printed(tmp_path, monkeypatch, talkative_model, capsys):
    """The first case: a best.pt of plain ultralytics, whose classes have other names."""
    monkeypatch.chdir(tmp_path)
    stay_in_this_ray(monkeypatch)
    make_images(tmp_path)
    (tmp_path / "archive.yaml").write_text(next(b for b in blocks(PAGES[0]) if b.startswith("name: archive")))
    model = copy.deepcopy(talkative_model)
    model.names = {0: "car", 1: "plane", 2: "boat"}
    torch.save({"model": model, "train_args": {"imgsz": 128, "task": "detect"}}, tmp_path / "best.pt")
    assert main(printed("softlabel describe")) == 0
    assert "3: car, plane, boat" in capsys.readouterr().out
    mine = ["--set", "execution.cpus_per_actor=0.5", "--set", "tiles.truth=null"]
    assert main([*printed("softlabel label --config archive.yaml"), *mine]) == 0
    store = Path(capsys.readouterr().out.splitlines()[-1])
    assert summary(store)["labelled"] == 12
    teacher = read_json(store / "store.json")["teacher"]
    assert teacher["classes"] == ["plane", "ship"]
    assert teacher["class_map"] == {"car": None, "plane": "plane", "boat": "ship"}
    for command in ("softlabel show", "softlabel export runs/archive/label-labels-HASH --format geojson"):
        words = [str(store) if "HASH" in word else word for word in printed(command)]
        assert main([*words[:-1], "0.01"] if "--threshold" in words else words) == 0
    layers = [gpd.read_file(path) for path in (store.parent / f"export-geojson-{store.name}").glob("*.geojson")]
    assert len(layers) == 12 and {*pd.concat(layers)["class"]} <= {"plane", "ship"} and sum(map(len, layers)) > 0
