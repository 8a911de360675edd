"""What several tests need: the shared data, a Ray, a tiny tile set, a teacher that answers."""

import os
import sys
import uuid
from functools import partial
from pathlib import Path

import pytest
from buckets import PROTOCOLS, environment, serve
from drivers import by_tile

from softlabel.config import Recipe, Synthetic
from softlabel.storage import location
from softlabel.store import summary

CLASSES = ("car", "plane", "ship")


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with real images, weights and schemas, which the project does not ship."""
    folder = os.environ.get("SOFTLABEL_SHARED")
    if not folder:
        pytest.skip("set SOFTLABEL_SHARED to the folder with data/, weights/ and schemas/ to run this")
    return Path(folder)


def _bucket(protocol):
    """An empty bucket; this process and those that it starts from now on are led to it."""
    with serve(protocol) as (url, bucket), pytest.MonkeyPatch.context() as patch:
        for key, value in environment(protocol, url).items():
            patch.setenv(key, value)
        yield location(f"{protocol}://{bucket}")


@pytest.fixture(scope="session")
def s3():
    """A bucket of S3's."""
    yield from _bucket("s3")


@pytest.fixture(scope="session")
def gs():
    """One of Google's, or what answers like it."""
    yield from _bucket("gs")


@pytest.fixture(scope="session")
def az():
    """A container of Azure's."""
    yield from _bucket("az")


@pytest.fixture(params=PROTOCOLS)
def in_bucket(request):
    """A folder of a bucket, a test's own."""
    return request.getfixturevalue(request.param) / uuid.uuid4().hex


@pytest.fixture(params=["disk", *PROTOCOLS])
def anywhere(request, tmp_path):
    """A folder on a disk, and one in each kind of bucket."""
    return tmp_path if request.param == "disk" else request.getfixturevalue(request.param) / uuid.uuid4().hex


@pytest.fixture(autouse=True)
def _threads():
    """ultralytics' predict and export set how many PyTorch uses, and so how the next test's sums are rounded."""
    torch = sys.modules.get("torch")
    before = torch.get_num_threads() if torch else None
    yield
    if torch:
        torch.set_num_threads(before)


@pytest.fixture(scope="session", params=[False, pytest.param(True, marks=pytest.mark.long)], ids=["few", "many"])
def is_long(request) -> bool:
    """Whether what `make test` does a few times is done often, as a test of its own in `make test-long`."""
    return request.param


@pytest.fixture(scope="session")
def ray_session():
    """One local Ray for the whole test run, since starting it takes 10 s."""
    import ray

    import softlabel.labelling.run  # noqa: F401  sets what a Ray is started with

    # Ray Train asks the State API, which comes with the dashboard. A spare CPU lets a reader run beside two workers.
    # The GPUs are numbers that Ray hands out, no devices.
    ray.init(address="local", num_cpus=3, num_gpus=2, include_dashboard=True, log_to_driver=False)
    yield
    ray.shutdown()


def tiny_recipe(**changes) -> Recipe:
    """Made-up scenes small enough to label and train in seconds."""
    model = {
        "model": "yolov5n.yaml",
        "args": {"epochs": 3, "imgsz": 64, "batch": 8, "nbs": 8, "close_mosaic": 1, "optimizer": "SGD", "cache": "ram"},
    }
    values = {
        "name": "tiny",
        "classes": list(CLASSES),
        "tiles": {"synthetic": {"num_scenes": 20, "scene_size_px": 256, "difficulty": 0.1}, "size_px": 128},
        "train": {"teacher": model, "student": model},
        "evaluate": {"bootstrap": 20},
    }
    return Recipe.model_validate({**values, **changes})


def scenes_on_disk(folder: Path) -> dict:
    """``tiles`` of a recipe: the tiny recipe's scenes and truth, on a disk. What stands in for Google's buckets is
    unknown to GDAL, which would ask Google itself."""
    from softlabel.imagery.synthetic import TYPE_IDS, write_scenes

    tiles = tiny_recipe().tiles
    scenes, truth = write_scenes(folder, tiles.synthetic, 0)
    mapping = {TYPE_IDS[name]: name for name in CLASSES}
    source = {"format": "xview", "path": str(truth), "mapping": mapping}
    return {"scenes": str(scenes), "truth": source, "size_px": tiles.size_px}


@pytest.fixture(scope="session")
def recipe() -> Recipe:
    """The tiny recipe as it is."""
    return tiny_recipe()


@pytest.fixture(scope="session")
def tiles(recipe, tmp_path_factory) -> Path:
    """The tiny recipe's tiles."""
    from softlabel.imagery.run import tile

    return tile(recipe, tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def many_tiles(weights, tmp_path_factory):
    """A recipe of ten shards of small tiles, with other values for ``execution``."""
    from softlabel.imagery.synthetic import write_scenes

    settings = Synthetic(num_scenes=40, scene_size_px=256, difficulty=0.1)
    scenes = write_scenes(tmp_path_factory.mktemp("scenes"), settings, 0)[0]
    return partial(_many_tiles, scenes, weights)


def _many_tiles(scenes, weights, **execution):
    return tiny_recipe(
        tiles={"scenes": str(scenes), "size_px": 64},
        label={"weights": str(weights), "engine": "pytorch"},
        execution={"batch_size": 16, "cpus_per_actor": 0.5, "reader_cpus_per_actor": 0.25, **execution},
    )


@pytest.fixture(scope="session")
def small_tiles(many_tiles, tmp_path_factory):
    """Its tiles."""
    from softlabel.imagery.run import tile

    return tile(many_tiles(), tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="session")
def undisturbed(weights, many_tiles, small_tiles, ray_session, tmp_path_factory):
    """Its rows by tile, of a run on a disk to which nothing happened."""
    from softlabel.labelling.job import label_job
    from softlabel.labelling.run import label

    recipe = many_tiles()
    (folder,) = label(recipe, [label_job(recipe, "labels", weights, small_tiles, None)], tmp_path_factory.mktemp("un"))
    rows = by_tile(folder)
    assert len(rows) == 640 and summary(folder)["boxes"] > 640
    return rows


@pytest.fixture(scope="session")
def talkative_model():
    """An untrained YOLO that answers different pixels differently: a fresh one gives every pixel the same score."""
    return _talkative("yolov5n.yaml", lambda head: [sequence[-1] for sequence in head.cv3], std=0.3, bias=-3.0)


@pytest.fixture(scope="session")
def talkative_anchor_model():
    """An anchor-based one."""
    return _talkative("yolov5n-anchor.yaml", lambda head: head.m, std=0.03, bias=-1.0)


def _talkative(name, last_convs, std, bias):
    import torch
    from ultralytics.cfg import get_cfg

    from softlabel.detectors.weights import build_model, default_train_args

    torch.manual_seed(0)
    model = build_model(name, len(CLASSES))
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0
    for conv in last_convs(model.model[-1]):
        torch.nn.init.normal_(conv.weight, std=std)
        torch.nn.init.constant_(conv.bias, bias)
    with torch.no_grad():
        model.train()(torch.rand(8, 3, 96, 96))
    model.args = get_cfg(overrides={**default_train_args(name), "imgsz": 96})
    return model.eval()


@pytest.fixture(scope="session")
def weights(talkative_model, tmp_path_factory) -> Path:
    """That model as a weights file for 128 px."""
    return _saved(talkative_model, tmp_path_factory.mktemp("weights") / "teacher.safetensors")


@pytest.fixture(scope="session")
def anchor_weights(talkative_anchor_model, tmp_path_factory) -> Path:
    """The anchor-based one as a weights file for 128 px."""
    return _saved(talkative_anchor_model, tmp_path_factory.mktemp("weights") / "anchor_teacher.safetensors")


def _saved(model, path):
    from softlabel.detectors.header import Header
    from softlabel.detectors.weights import save_weights

    save_weights(path, model, Header(model.yaml, CLASSES, 128, {}))
    return path
