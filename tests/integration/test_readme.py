"""README's commands for an archive, run as printed on a toy one: labels, and a layer of them for a GIS."""

import contextlib
from pathlib import Path

import geopandas as gpd
import pytest
from pages import PAGES, blocks, lines, make_images

import softlabel.cli
from softlabel.cli import main
from softlabel.store import summary

pytestmark = pytest.mark.usefixtures("ray_session")


def printed(start):
    """The words of README's first command that begins so."""
    commands = (words for block in blocks(PAGES[0]) for words in lines(block) if not block.startswith("name:"))
    return next(words for words in commands if " ".join(words).startswith(start))[1:]


def test_an_archive_is_labelled_and_exported_as_printed(tmp_path, monkeypatch, weights, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(softlabel.cli, "ray_session", lambda run_dir, verbose: contextlib.nullcontext())
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
    export = [str(store) if "HASH" in word else word for word in printed("softlabel export")]
    assert main([*export[:-1], "0.01"]) == 0
    layers = [gpd.read_parquet(path) for path in (store.parent / f"export-geoparquet-{store.name}").glob("*.parquet")]
    assert len(layers) == 12 and sum(map(len, layers)) > 0
