"""Who may import whom: read from the sources, so that no import is missed."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import softlabel

ROOT = Path(softlabel.__file__).parent
GROUND = {
    "softlabel",
    "softlabel.errors",
    "softlabel.autoscaling",
    "softlabel.config",
    "softlabel.recipe_file",
    "softlabel.records",
    "softlabel.boxes",
    "softlabel.rotated",
    "softlabel.clusters",
    "softlabel.fusion",
    "softlabel.lease",
    "softlabel.terminal",
    "softlabel.calibration",
    "softlabel.packing",
    "softlabel.buckets",
    "softlabel.shards",
    "softlabel.storage",
    "softlabel.store",
    "softlabel.tile_table",
}
TOP = {
    "softlabel.cli",
    "softlabel.devices",
    "softlabel.dry_run",
    "softlabel.flags",
    "softlabel.session",
    "softlabel.status",
    "softlabel.without_recipe",
}
RAY = {
    "autoscaling.py",
    "packing.py",
    "session.py",
    "labelling/run.py",
    "results/run.py",
    "search/worker_groups.py",
    "search/run.py",
    "search/trainable.py",
    "search/tuning.py",
    "training/ranks.py",
    "training/run.py",
    "training/trainer.py",
}
TRAINING_LOOPS = {"training/trainer.py", "training/validation.py", "search/worker_groups.py"}
"""What runs in the workers of Ray Train: they read tiles and judge what they train."""
TRANSFORMERS = {
    "detectors/crop_networks.py",
    "detectors/detr.py",
    "detectors/grounding_dino.py",
    "detectors/omdet_turbo.py",
    "detectors/owlvit.py",
    "detectors/pretrained.py",
}
ULTRALYTICS = {
    "detectors/batch_nms.py",
    "detectors/rotated_nms.py",
    "detectors/rtdetr.py",
    "detectors/soft_loss.py",
    "detectors/unpickling.py",
    "detectors/weights.py",
    "detectors/yolo.py",
    "detectors/yolov5.py",
    "detectors/yolov5_loss.py",
    "training/arguments.py",
    "training/dataset.py",
    "training/state.py",
    "training/trainer.py",
}


def files():
    return {path.relative_to(ROOT).as_posix(): path for path in sorted(ROOT.rglob("*.py"))}


def imports(path):
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    modules = {".".join(("softlabel", *Path(name).with_suffix("").parts)).removesuffix(".__init__") for name in files()}
    return {name for name in names if not name.startswith("softlabel") or name in modules}


def uses(name, package):
    return any(used == package or used.startswith(package + ".") for used in imports(files()[name]))


@pytest.mark.parametrize("name", files())
def test_libraries_stay_in_their_rooms(name):
    assert not uses(name, "ray") or name in RAY
    assert not uses(name, "ultralytics") or name in ULTRALYTICS
    assert not uses(name, "transformers") or name in TRANSFORMERS
    assert not uses(name, "rasterio") or name.startswith("imagery/")
    buckets = ("fsspec", "obstore", "upath")
    assert not any(uses(name, package) for package in buckets) or name in ("buckets.py", "storage.py")


@pytest.mark.parametrize("name", files())
def test_imports_go_down(name):
    own = {used for used in imports(files()[name]) if used.startswith("softlabel")}
    folder = f"softlabel.{name.split('/')[0]}"
    if "/" not in name:
        allowed = GROUND if f"softlabel.{name.removesuffix('.py')}" not in TOP else None
        assert allowed is None or own <= allowed
        return
    assert not own & TOP
    above = {used for used in own if used.startswith("softlabel.workflows")}
    if name.startswith("workflows/"):
        return
    assert not above
    if name.endswith("run.py"):
        assert not {used for used in own if used.endswith(".run")}
    elif name not in TRAINING_LOOPS:
        detectors = () if name.startswith("detectors/") else ("softlabel.detectors",)
        assert all(used in GROUND or used.startswith((folder, *detectors)) for used in own), own


def test_no_two_files_import_each_other():
    """Nor by a detour, nor inside functions: a circle has no first file to read."""
    graph = {name: _dependencies(path) for name, path in files().items()}
    while free := [name for name, used in graph.items() if not used]:
        graph = {name: used - set(free) for name, used in graph.items() if name not in free}
    assert not graph


def _dependencies(path):
    names = {name.removeprefix("softlabel.").replace(".", "/") + ".py" for name in imports(path)}
    return names & files().keys() - {path.relative_to(ROOT).as_posix()}


def test_the_rooms_above_exist():
    assert files().keys() >= RAY | ULTRALYTICS | TRANSFORMERS | TRAINING_LOOPS


@pytest.mark.parametrize(
    "modules",
    ["softlabel.labelling.reading, softlabel.imagery.scenes", "softlabel.labelling.run, softlabel.labelling.job"],
)
def test_reading_tasks_and_drivers_start_without_torch(modules):
    """They would pay seconds and half a gigabyte each for a model that they never see."""
    code = f"import sys, {modules}; print(sorted({{'torch', 'ultralytics', 'transformers'}} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
