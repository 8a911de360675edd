import json
from pathlib import Path

import numpy as np
import pytest
import rasterio
from PIL import Image

from softlabel import store
from softlabel.config import Recipe
from softlabel.errors import RecipeError, SceneError, TruthError
from softlabel.imagery import run
from softlabel.imagery.scenes import TileReader
from softlabel.records import Truth
from softlabel.tile_table import SHARD_TILES, read_tiles, shard_counts

pytestmark = pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
ONE_SPLIT = {"train_1": 1, "train_2": 0, "test": 0, "validation": 0}


@pytest.fixture
def world(tmp_path):
    return World(tmp_path)


class World:
    """A folder of noise scenes, a COCO truth, and recipes over them."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.images, self.annotations = folder, [], []
        (folder / "scenes").mkdir()

    def scene(self, name, boxes=(), width=64, height=48, listed=True, **facts):
        pixels = np.random.default_rng(len(name)).integers(1, 255, (3, height, width), np.uint8)
        driver = "GTiff" if name.endswith("tif") else "JPEG"
        size = {"width": width, "height": height, "count": 3, "dtype": "uint8"}
        with rasterio.open(self.folder / "scenes" / name, "w", driver=driver, **size) as file:
            file.write(pixels)
        if listed:
            self.images.append({"id": name, "file_name": name, **facts})
        for x0, y0, x1, y1 in boxes:
            box = {"image_id": name, "category_id": 1, "bbox": [x0, y0, x1 - x0, y1 - y0]}
            self.annotations.append({"id": 100 + len(self.annotations), **box})
        return self.folder / "scenes" / name

    def recipe(self, **settings):
        path = self.folder / "truth.json"
        categories = [{"id": 1, "name": "car"}]
        path.write_text(json.dumps({"images": self.images, "annotations": self.annotations, "categories": categories}))
        truth = {"format": "coco", "path": str(path)}
        settings = {
            "scenes": str(self.folder / "scenes"),
            "truth": truth,
            "size_px": 32,
            "split": ONE_SPLIT,
            **settings,
        }
        return Recipe(name="test", classes=("car",), tiles=settings)

    def tile(self, **settings):
        step = run.tile(self.recipe(**settings), self.folder / "runs")
        rows = read_tiles(step)
        rejected = [json.loads(line) for line in (step / run.REJECTED_FILE).read_text().splitlines()]
        return rows, rejected, store.summary(step)


def test_tiles_hold_windows_and_clipped_truth(world):
    world.scene("a.tif", [(30, 4, 40, 10)], group="g", labelled_categories=["car"])
    rows, rejected, summary = world.tile()
    assert [row["tile_id"] for row in rows] == [f"a.tif#{c}_{r}_32x32" for r in (0, 16) for c in (0, 32)]
    left, right, *below = (Truth.from_row(row["truth"]) for row in rows)
    np.testing.assert_allclose(left.boxes, [[30, 4, 32, 10]])
    np.testing.assert_allclose(right.boxes, [[0, 4, 8, 10]])
    assert (left.ignore.tolist(), right.ignore.tolist(), [len(t.boxes) for t in below]) == ([True], [False], [0, 0])
    assert rows[0]["truth"][0]["visible"] == pytest.approx(0.2)
    assert (rows[0]["group"], rows[0]["split"], rows[0]["labelled_classes"]) == ("g", "train_1", [0])
    assert rows[3]["truth"] == [] and rows[0]["crs"] is None and rows[0]["transform"] is None
    assert not rejected
    assert (summary["tiles"], summary["background"], summary["boxes"], summary["ignored"]) == (4, 3, {"car": 1}, 1)
    assert summary["mean_tile_px"] == [32, 32] and summary["splits"] == {"train_1": 4}


def test_tiles_can_be_read(world):
    path = world.scene("a.tif")
    rows, _, _ = world.tile(bands=[3, 1, 2])
    with rasterio.open(path) as file:
        pixels = file.read([3, 1, 2])
    np.testing.assert_array_equal(TileReader().read(rows[3]), pixels[:, 16:, 32:].transpose(1, 2, 0))


def test_shards_are_in_order(world):
    for index in range(3):
        world.scene(f"{index}.tif", width=32 * 8, height=32 * 5)
    step = run.tile(world.recipe(), world.folder / "runs")
    assert shard_counts(step, None).tolist() == [SHARD_TILES, 56]
    rows = read_tiles(step)
    order = [(row["scene_id"], row["window"][1], row["window"][0]) for row in rows]
    assert order == sorted(order)


def test_bad_scenes_and_boxes_cost_nothing_else(world):
    world.scene("good.tif", [(1, 1, 9, 9), (100, 1, 109, 9), (60, 40, 70, 50)])
    world.scene("missing.tif", [(1, 1, 9, 9)]).unlink()
    cut = world.scene("cut.tif", [(1, 1, 9, 9), (2, 1, 9, 9)])
    cut.write_bytes(cut.read_bytes()[:5000])
    photo = world.scene("cut.jpg")
    photo.write_bytes(photo.read_bytes()[:1500])
    world.scene("empty.jpg").write_bytes(b"")
    world.scene("resized.tif", [(1, 1, 9, 9)], width=64, height=48, **{})
    world.images[-1] |= {"width": 128, "height": 96}
    rows, rejected, summary = world.tile(max_rejected_fraction=1)
    assert {row["scene_id"] for row in rows if row["truth"] is not None} == {"good.tif"}
    assert {row["scene_id"] for row in rows if row["truth"] is None} == {"resized.tif"}
    by_file = {(row["kind"], Path(row["file"]).name, row["row"]): row["reason"] for row in rejected}
    assert set(by_file) == {
        ("truth", "truth.json", 101),
        ("truth", "truth.json", None),
        *(("scene", name, None) for name in ("cut.tif", "cut.jpg", "empty.jpg")),
    }
    assert "outside its image of 64x48" in by_file["truth", "truth.json", 101]
    assert "2 truth boxes left out" in by_file["scene", "cut.tif", None]
    assert any("scene not found" in row["reason"] and "missing.tif" in row["reason"] for row in rejected)
    assert any("drawn on (128, 96)" in row["reason"] for row in rejected)
    assert (summary["scenes"], summary["scenes_rejected"], summary["truth_rejected"]) == (2, 3, 3)
    assert summary["boxes"] == {"car": 2}


def unusable(world, name, box, category_id=7):
    """A row whose class the truth does not have."""
    x0, y0, x1, y1 = box
    bbox = [x0, y0, x1 - x0, y1 - y0]
    world.annotations.append(
        {"id": 900 + len(world.annotations), "image_id": name, "category_id": category_id, "bbox": bbox}
    )


def test_more_refused_rows_than_allowed_end_the_step_after_all_is_written(world):
    world.scene("a.tif", [(i, 1, i + 5, 9) for i in range(18)])
    unusable(world, "a.tif", (40, 30, 50, 40))
    unusable(world, "a.tif", (20, 30, 30, 40))
    with pytest.raises(TruthError) as error:
        world.tile()
    said = "2 of 20 truth rows cannot be used (10%; tiles.max_rejected_fraction is 5%), the first: unknown class 7 (2"
    assert str(error.value).startswith(said) and str(error.value).endswith("rejected.jsonl")
    (step,) = (world.folder / "runs").glob("tiles-*")
    assert store.is_done(step) and len((step / run.REJECTED_FILE).read_text().splitlines()) == 2
    rows, _, summary = world.tile(max_rejected_fraction=0.1)  # the same step: nothing is cut again
    assert len(list((world.folder / "runs").glob("tiles-*"))) == 1
    assert (summary["truth_rows"], summary["boxes"], summary["truth_rejected"]) == (20, {"car": 18}, 2)
    unknown = [box for row in rows for box in row["truth"] if box["class_id"] == -1]
    assert unknown and all(box["ignore"] for box in unknown)


@pytest.mark.parametrize("split", [{}, ONE_SPLIT])
def test_where_all_truth_is_refused_that_is_said_and_written(world, split):
    world.scene("a.tif")
    unusable(world, "a.tif", (1, 1, 9, 9))
    with pytest.raises(TruthError, match=r"1 of 1 truth rows cannot be used .*unknown class 7"):
        world.tile(split=split)
    (step,) = (world.folder / "runs").glob("tiles-*")
    assert "unknown class 7" in (step / run.REJECTED_FILE).read_text()


def test_what_was_rejected_is_written_before_any_error(world):
    world.scene("a.tif", [(100, 1, 109, 9)])
    world.scene("b.tif").write_bytes(b"")
    with pytest.raises(RecipeError, match="empty split"):
        world.tile(split={}, max_rejected_fraction=1)
    (step,) = (world.folder / "runs").glob("tiles-*")
    reasons = (step / run.REJECTED_FILE).read_text()
    assert "outside its image" in reasons and "b.tif" in reasons and not store.is_done(step)


def test_an_image_whose_truth_lies_on_its_side_is_refused(world):
    world.scene("a.tif", [(1, 1, 9, 9)])
    path = world.scene("turned.jpg", [(1, 1, 9, 9)], width=48, height=64)
    exif = Image.Exif()
    exif[274] = 6
    with Image.open(path) as image:
        image.save(path, exif=exif)
    world.images[-1] |= {"width": 48, "height": 64}
    rows, rejected, summary = world.tile()
    assert {row["scene_id"] for row in rows} == {"a.tif"} and summary["scenes_rejected"] == 1
    assert "64x48 px after EXIF orientation 6" in rejected[0]["reason"]
    world.images[-1] |= {"width": 64, "height": 48}  # drawn on what is seen
    rows, rejected, _ = world.tile()
    assert {row["scene_id"] for row in rows} == {"a.tif", "turned.jpg"} and not rejected


def test_grey_scenes_among_coloured_ones_are_tiles_of_one_band(world):
    world.scene("a.tif", [(1, 1, 9, 9)])
    Image.new("L", (32, 32), 7).save(world.folder / "scenes" / "grey.png")
    assert {row["scene_id"]: row["bands"] for row in world.tile()[0]} == {"a.tif": [1, 2, 3], "grey.png": [1, 1, 1]}


def test_scenes_without_the_place_that_they_claim_are_said(world, capsys):
    with rasterio.open(world.scene("a.tif"), "r+") as file:
        file.crs = "EPSG:32631"
    rows, _, summary = world.tile()
    assert rows[0]["crs"] is None and summary["unplaced"] == 1
    assert "warning: 1 scenes have no place on a map" in capsys.readouterr().out


def test_a_name_that_only_looks_like_a_scene_s_is_shown_with_the_difference(world):
    world.scene("a.tif", [(1, 1, 9, 9)])
    world.scene("b.tif", [(1, 1, 9, 9)], listed=False)
    world.images.append({"id": "b.tif", "file_name": "\u0412.tif".lower()})  # a Cyrillic letter
    world.images.append({"id": "c", "file_name": "B.tif"})
    rejected = world.tile()[1]
    assert (
        "no scene, or more than one, is named B.tif ('B.tif' in the truth and 'b.tif' on disk" in rejected[-1]["reason"]
    )
    world.images[:] = [{"id": "a.tif", "file_name": "A .tif"}]
    with pytest.raises(TruthError, match=r"none of the scenes: .* \('A \.tif' in the truth and 'a\.tif' on disk"):
        world.tile()


def test_done_once_and_again_when_something_changes(world, monkeypatch):
    world.scene("a.tif", [(1, 1, 9, 9)])
    recipe, runs = world.recipe(), world.folder / "runs"
    first = run.tile(recipe, runs)
    with monkeypatch.context() as patch:
        patch.setattr(run, "read_truth", lambda *_: pytest.fail("did it again"))
        assert run.tile(recipe, runs) == first
        assert run.tile(recipe.model_copy(update={"name": "other"}), runs) == first
    assert run.tile(recipe.model_copy(update={"seed": 1}), runs) != first
    world.scene("b.tif")
    more = run.tile(world.recipe(), runs)
    world.annotations.pop()
    assert len({first, more, run.tile(world.recipe(), runs)}) == 3
    assert (first / "recipe.yaml").exists() and not list(first.glob(".*"))


def test_half_a_step_is_done_again(world, monkeypatch):
    world.scene("a.tif", [(1, 1, 9, 9)])
    with monkeypatch.context() as patch:
        patch.setattr(run.store, "finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            world.tile()
    assert world.tile()[2]["tiles"] == 4


def test_an_archive_without_truth_has_no_splits(world):
    world.scene("a.tif", listed=False)
    rows, _, summary = world.tile(truth=None, split={})
    assert {(row["truth"], row["split"], row["group"]) for row in rows} == {(None, None, "a.tif")}
    assert summary["splits"] == {"none": 4} and summary["background"] == 0


def test_scenes_that_the_truth_does_not_mention(world):
    world.scene("a.tif", [(1, 1, 9, 9)])
    world.scene("b.tif", listed=False)
    rows, _, _ = world.tile()
    assert {(row["scene_id"], row["truth"] is None, row["split"]) for row in rows} == {
        ("a.tif", False, "train_1"),
        ("b.tif", True, None),
    }
    path = world.folder / "xview.geojson"
    properties = {"bounds_imcoords": "1,1,9,9", "type_id": 18, "image_id": "a.tif"}
    path.write_text(json.dumps({"features": [{"properties": properties}]}))
    truth = {"format": "xview", "path": str(path), "mapping": {18: "car"}}
    rows, _, _ = world.tile(truth=truth)  # looked at, and empty
    assert [row["truth"] for row in rows if row["scene_id"] == "b.tif"] == [[]] * 4
    assert {row["split"] for row in rows} == {"train_1"}


def test_splits_from_the_truth(world):
    for name, split in {"a.tif": "train_1", "b.tif": "test", "c.tif": None}.items():
        world.scene(name, [(1, 1, 9, 9)], split=split, group="same")
    rows, _, summary = world.tile(split="truth")
    assert {row["scene_id"]: row["split"] for row in rows} == {"a.tif": "train_1", "b.tif": "test", "c.tif": None}
    assert summary["groups_in_two_splits"] == 1


def test_splits_go_by_group(world):
    for index in range(30):
        world.scene(f"{index}.tif", [(1, 1, 9, 9)], group=f"g{index // 3}")
    rows, _, summary = world.tile(split={})
    assert set(summary["splits"]) == {"train_1", "val_1", "train_2", "val_2", "test"}
    assert len({(row["group"], row["split"]) for row in rows}) == 10
    assert summary["groups_in_two_splits"] == 0


@pytest.mark.parametrize("share", [0.0, 1 / 3, 0.5])
def test_background_is_the_share_asked_for(world, share):
    for index in range(24):
        world.scene(f"{index}.tif", [(x, 1, x + 9, 9) for x in range(0, 10 * 32, 32)], width=640, height=64)
    split = {"train_1": 0.5, "train_2": 0, "test": 0.5, "validation": 0}
    rows, _, _ = world.tile(background=share, split=split)
    for name in ("train_1", "test"):
        empty = [not row["truth"] for row in rows if row["split"] == name]
        assert len(empty) - sum(empty) == 120
        assert np.mean(empty) == pytest.approx(share, abs=0.05)


def test_background_never_thins_what_nobody_looked_at(world):
    world.scene("a.tif", [(1, 1, 9, 9)])
    world.scene("b.tif", listed=False)
    rows, _, _ = world.tile(background=0.0)
    assert [row["tile_id"] for row in rows] == [
        "a.tif#0_0_32x32",
        *(f"b.tif#{c}_{r}_32x32" for r in (0, 16) for c in (0, 32)),
    ]


def test_errors_name_what_to_do(world):
    with pytest.raises(SceneError, match=r"no scenes.*tiles\.scenes"):
        world.tile()
    world.scene("bad.tif").write_bytes(b"")
    with pytest.raises(SceneError, match=r"none of 1 scenes can be read.*bad\.tif"):
        world.tile()
    world.scene("a.tif")
    with pytest.raises(RecipeError, match="empty split"):
        world.tile(split={})
    with pytest.raises(RecipeError, match=r"empty split train_1.*background"):
        world.tile(background=0.0)
    with pytest.raises(RecipeError, match=r"tiles\.split"):
        world.tile(split="truth")
    with pytest.raises(RecipeError, match=r"tiles\.stretch"):
        world.tile(stretch=(9, 3))
    world.images = [{"id": 1, "file_name": "other.tif"}]
    with pytest.raises(TruthError, match=r"none of the scenes.*other\.tif.*a\.tif"):
        world.tile()


def test_synthetic_scenes(tmp_path, capsys):
    settings = {"synthetic": {"num_scenes": 6, "scene_size_px": 256}, "size_px": 128}
    recipe = Recipe(name="test", classes=("plane", "car"), tiles=settings)
    summary = store.summary(run.tile(recipe, tmp_path))
    assert capsys.readouterr().out.count("\n") == 1
    assert (summary["scenes"], summary["tiles"], summary["truth_rejected"]) == (6, 24, 0)
    assert summary["truth_dropped"] > 0  # ships are not among the classes
    assert sum(summary["boxes"].values()) > 0
    truth = {"format": "xview", "path": "", "mapping": {40: "boat"}, "other_classes": "drop"}
    boats = Recipe(name="test", classes=("boat",), tiles={**settings, "truth": truth})
    assert store.summary(run.tile(boats, tmp_path))["boxes"]["boat"] > 0
    assert len(list(tmp_path.glob("scenes-*"))) == 1


def test_real_overhead_images(shared, tmp_path):
    folder = shared / "data" / "overhead"
    truth = {"format": "coco", "path": str(folder / "instances.json")}
    settings = {"scenes": str(folder), "truth": truth, "split": "truth"}
    recipe = Recipe(name="real", classes=("plane", "ship", "car"), tiles=settings)
    summary = store.summary(run.tile(recipe, tmp_path))
    assert (summary["scenes"], summary["scenes_rejected"], summary["truth_rejected"]) == (1077, 0, 0)
    assert summary["boxes"]["plane"] == 2996 and summary["groups_in_two_splits"] == 0


def test_real_16_bit_scenes(shared, tmp_path):
    recipe = Recipe(name="real", classes=("vessel",), tiles={"scenes": str(shared / "data" / "scenes"), "size_px": 256})
    rows = read_tiles(run.tile(recipe, tmp_path))
    reader = TileReader()
    for row in rows:
        pixels = reader.read(row)
        assert row["crs"] and (row["stretch"] is None) == row["scene_id"].startswith("rasterio")
        assert pixels.shape == (256, 256, 3)
    assert np.ptp(reader.read(rows[-1])) > 100


def test_truth_of_dota_is_kept_as_it_was_drawn_beside_its_hull(tmp_path):
    """In pixels of each tile, though it leaves it."""
    scenes = tmp_path / "scenes"
    scenes.mkdir()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 128, 3), np.uint8)).save(scenes / "P1.png")
    (tmp_path / "labelTxt").mkdir()
    (tmp_path / "labelTxt" / "P1.txt").write_text("64 16 80 32 64 48 48 32 plane 0\n")
    truth = {"format": "dota", "path": str(tmp_path / "labelTxt")}
    tiles_of = {"scenes": str(scenes), "truth": truth, "size_px": 64, "overlap_px": 0, "split": ONE_SPLIT}
    recipe = Recipe.model_validate({"name": "x", "classes": ["plane"], "tiles": tiles_of})
    step = run.tile(recipe, tmp_path / "run")
    left, right = (row["truth"] for row in read_tiles(step))
    assert (left[0]["box"], right[0]["box"]) == ([48, 16, 64, 48], [0, 16, 16, 48])
    for (box,), x in ((left, 64), (right, 0)):
        np.testing.assert_allclose(box["xywhr"], [x, 32, 512**0.5, 512**0.5, np.pi / 4], atol=1e-4)
