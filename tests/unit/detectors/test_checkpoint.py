"""Original checkpoints are read without running them: known names get stand-ins, any other is refused by name."""

import os
import pickle
import sys
import types
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from softlabel.cli import main
from softlabel.detectors.checkpoint import read_checkpoint
from softlabel.detectors.describe import read_header
from softlabel.detectors.weights import build_model, import_weights, load_model
from softlabel.errors import WeightsError

CALLED = []


def marker(*args):
    """What an attacker would have called."""
    CALLED.append(args)


class Calls:
    """Calls a function of this module when it is unpickled."""

    def __init__(self, function, *args):
        self.function, self.args = function, args

    def __reduce__(self):
        return self.function, self.args


@pytest.fixture
def original_classes(monkeypatch):
    """The names under which YOLOv5's repository pickles its classes; bare modules, as it has them, are enough."""
    found = {}
    for name in ("Model", "Detect"):
        found[name] = type(name, (torch.nn.Module,), {"__module__": "models.yolo"})
    for name in ("Conv", "Bottleneck", "C3", "SPPF", "Concat"):
        found[name] = type(name, (torch.nn.Module,), {"__module__": "models.common"})
    for module in ("models", "models.yolo", "models.common"):
        monkeypatch.setitem(sys.modules, module, types.ModuleType(module))
    for name, kind in found.items():
        setattr(sys.modules[kind.__module__], name, kind)
    return found


@pytest.fixture
def content(original_classes):
    """What torch.save writes for a YOLOv5n of two classes: modules under the original names, in half precision."""
    torch.manual_seed(0)
    model = build_model("yolov5n-anchor.yaml", 2)
    for module in model.modules():
        kind = "Detect" if type(module).__name__ == "AnchorDetect" else type(module).__name__
        if type(module).__module__.startswith(("ultralytics", "softlabel")) and kind in original_classes:
            module.__class__ = original_classes[kind]
            module.__dict__.pop("default_act", None)
    whole = original_classes["Model"]()
    whole.model, whole.names = model.model, ["left", "right"]
    return {"epoch": -1, "model": whole.half(), "ema": None, "optimizer": None, "date": "2022-01-01"}


def save(path, content, **kwargs):
    torch.save(content, path, **kwargs)
    return path


def test_a_checkpoint_is_read_as_the_model_it_holds(tmp_path, content):
    found = read_checkpoint(save(tmp_path / "yolov5n.pt", content))
    assert (found.model, found.classes) == ("yolov5n-anchor.yaml", ("left", "right"))
    own = content["model"].state_dict()
    assert found.tensors.keys() == own.keys()
    for key, value in own.items():
        torch.testing.assert_close(found.tensors[key], value.float() if value.is_floating_point() else value)


def test_an_ema_is_preferred(tmp_path, content):
    import copy

    content["ema"] = copy.deepcopy(content["model"])
    with torch.no_grad():
        content["model"].model[0].conv.weight.zero_()
    found = read_checkpoint(save(tmp_path / "last.pt", content))
    assert found.tensors["model.0.conv.weight"].abs().sum() > 0


@pytest.mark.parametrize("where", ["beside", "inside"])
@pytest.mark.parametrize("protocol", [2, 4])
def test_a_function_is_refused_by_name_and_never_called(tmp_path, content, where, protocol):
    CALLED.clear()
    if where == "beside":
        content["extra"] = Calls(marker, 1)
    else:
        content["model"].model[3].extra = Calls(marker, 1)
    path = save(tmp_path / "yolov5n.pt", content, pickle_protocol=protocol)
    with pytest.raises(WeightsError, match=rf"asks to import {marker.__module__.replace('.', '[.]')}\.marker, which"):
        read_checkpoint(path)
    assert CALLED == []
    pickle.loads(pickle.dumps(Calls(marker, 2)))  # the trap does work
    assert CALLED == [(2,)]


@pytest.mark.parametrize(("function", "name"), [(os.system, "posix.system"), (eval, "__builtin__.eval")])
def test_well_known_tricks_are_refused(tmp_path, content, function, name):
    content["opt"] = Calls(function, "touch called")
    with pytest.raises(WeightsError, match=f"asks to import {name}, "):
        read_checkpoint(save(tmp_path / "x.pt", content))


def test_a_bare_pickle_is_refused_by_name_too(tmp_path):
    """The form of torch.save before 1.6, and of anybody's pickle."""
    CALLED.clear()
    path = tmp_path / "x.pt"
    path.write_bytes(pickle.dumps(Calls(marker, 1)))
    with pytest.raises(WeightsError, match=r"asks to import .*\.marker, "):
        read_checkpoint(path)
    with pytest.raises(WeightsError, match=r"asks to import .*\.marker, "):
        read_checkpoint(save(path, {"model": Calls(marker, 1)}, _use_new_zipfile_serialization=False))
    assert CALLED == []


def test_names_that_other_tools_write_are_refused(tmp_path, content):
    content["best_fitness"] = np.float64(0.5)  # as a training that was not finished leaves it
    with pytest.raises(WeightsError, match=r"asks to import numpy\.\S+, "):
        read_checkpoint(save(tmp_path / "last.pt", content))


@pytest.mark.parametrize("damage", ["empty", "text", "cut", "no pickle"])
def test_a_damaged_file_is_named(tmp_path, content, damage):
    path = save(tmp_path / "yolov5n.pt", content)
    whole = path.read_bytes()
    path.write_bytes(
        {"empty": b"", "text": b"<html>not found</html>", "cut": whole[: len(whole) // 2]}.get(damage, whole)
    )
    if damage == "no pickle":
        with zipfile.ZipFile(path, "w") as file:
            file.writestr("readme.txt", "hello")
    with pytest.raises(WeightsError, match=r"yolov5n\.pt (cannot be read|is not an original)"):
        read_checkpoint(path)


@pytest.mark.parametrize("content", [{}, {"model": None}, {"model": {"weight": torch.ones(1)}}, [1, 2], torch.ones(3)])
def test_another_content_is_named(tmp_path, content):
    with pytest.raises(WeightsError, match="is not an original YOLOv5 detection checkpoint"):
        read_checkpoint(save(tmp_path / "x.pt", content))


def test_a_model_of_another_structure_is_named(tmp_path, content):
    del content["model"].model[24].m[2]
    with pytest.raises(WeightsError, match="does not fit its own model"):
        read_header(save(tmp_path / "x.pt", content))


def test_import_makes_weights_that_label_and_train(tmp_path, content):
    content["model"].model[24].anchors *= 0.5
    path = save(tmp_path / "mine.pt", content)
    header = import_weights(path, tmp_path / "mine.safetensors")
    assert header.yaml["anchors"][0] == [5, 6.5, 8, 15, 16.5, 11.5]
    imported, read = load_model(tmp_path / "mine.safetensors")
    direct, _ = load_model(path)
    assert read == header == read_header(path)
    assert load_file(tmp_path / "mine.safetensors").keys() == direct.state_dict().keys()
    for key, value in direct.state_dict().items():
        torch.testing.assert_close(imported.state_dict()[key], value)


def test_the_verb_says_what_it_wrote_and_never_overwrites(tmp_path, content, capsys):
    path = save(tmp_path / "mine.pt", content)
    assert main(["import-weights", str(path)]) == 0
    assert "yolov5n-anchor.yaml with 2 classes (left, right)" in capsys.readouterr().out
    assert main(["import-weights", str(path)]) == 2
    assert "mine.safetensors exists: remove it" in capsys.readouterr().err
    assert main(["import-weights", str(path), "--output", str(tmp_path / "b.safetensors")]) == 0
    assert (tmp_path / "b.safetensors").read_bytes() == (tmp_path / "mine.safetensors").read_bytes()


def test_a_missing_checkpoint_is_named(tmp_path, capsys):
    assert main(["import-weights", str(tmp_path / "gone.pt")]) == 2
    error = capsys.readouterr().err
    assert "no weights at" in error and error.count("\n") == 1
