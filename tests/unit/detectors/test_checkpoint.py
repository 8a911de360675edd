"""Original checkpoints are read without running them: known names get stand-ins, any other is refused by name."""

import copy
import os
import pickle
import sys
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from ultralytics import YOLO
from ultralytics.cfg import get_cfg
from ultralytics.nn.tasks import DetectionModel, yaml_model_load

from softlabel.cli import main
from softlabel.detectors.checkpoint import read_checkpoint
from softlabel.detectors.describe import read_header
from softlabel.detectors.weights import (
    build_model,
    default_train_args,
    import_tensors,
    import_weights,
    load_matching,
    load_model,
    read_weights,
)
from softlabel.detectors.yolov5 import anchor_yaml
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
    for name in ("Conv", "Bottleneck", "BottleneckCSP", "C3", "Focus", "SPP", "SPPF", "Concat"):
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
    return pickled_by_yolov5(build_model("yolov5n-anchor.yaml", 2), original_yaml("n", 2), original_classes)


def pickled_by_yolov5(model, yaml, original_classes):
    for module in model.modules():
        kind = "Detect" if type(module).__name__ == "AnchorDetect" else type(module).__name__
        if type(module).__module__.startswith(("ultralytics", "softlabel")) and kind in original_classes:
            module.__class__ = original_classes[kind]
            module.__dict__.pop("default_act", None)
    whole = original_classes["Model"]()
    whole.model, whole.names, whole.yaml, whole.stride = model.model, ["left", "right"], yaml, model.stride
    return {"epoch": -1, "model": whole.half(), "ema": None, "optimizer": None, "date": "2022-01-01"}


def original_yaml(size, num_classes):
    """As models/yolov5n.yaml of YOLOv5's repository is when a checkpoint holds it: each size with its own numbers."""
    yaml = anchor_yaml(f"yolov5{size}-anchor.yaml")
    depth, width, _ = yaml["scales"][size]
    *layers, (source, repeats, name, _) = yaml["head"]
    return {
        "nc": num_classes,
        "depth_multiple": depth,
        "width_multiple": width,
        "anchors": yaml["anchors"],
        "backbone": yaml["backbone"],
        "head": [*layers, [source, repeats, name, ["nc", "anchors"]]],
        "ch": 3,
    }


def save(path, content, **kwargs):
    torch.save(content, path, **kwargs)
    return path


def test_a_checkpoint_is_read_as_the_model_it_holds(tmp_path, content):
    header, tensors = read_checkpoint(save(tmp_path / "yolov5n.pt", content))
    assert (header.yaml, header.classes) == (anchor_yaml("yolov5n-anchor.yaml") | {"nc": 2}, ("left", "right"))
    own = content["model"].state_dict()
    assert tensors.keys() == own.keys()
    for key, value in own.items():
        torch.testing.assert_close(tensors[key], value.float() if value.is_floating_point() else value)


def test_an_ema_is_preferred(tmp_path, content):
    content["ema"] = copy.deepcopy(content["model"])
    with torch.no_grad():
        content["model"].model[0].conv.weight.zero_()
    _, tensors = read_checkpoint(save(tmp_path / "last.pt", content))
    assert tensors["model.0.conv.weight"].abs().sum() > 0


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


@pytest.mark.parametrize(("function", "name"), [(os.system, "posix.system"), (eval, "builtins.eval")])
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


def test_what_an_unfinished_training_leaves_is_passed_over(tmp_path, content):
    content["best_fitness"] = np.float64(0.5)
    content["opt"] = {"save_dir": tmp_path, "imgsz": 512, "device": torch.device("cpu")}
    content["optimizer"] = torch.optim.SGD(content["model"].parameters(), lr=0.1).state_dict()
    header, _ = read_checkpoint(save(tmp_path / "last.pt", content))
    assert header.imgsz == 512


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
    with pytest.raises(WeightsError, match=r"yolov5n\.pt (cannot be read|holds no detection model)"):
        read_checkpoint(path)


@pytest.mark.parametrize("content", [{}, {"model": None}, {"model": {"epoch": 1}}, [1, 2], torch.ones(3)])
def test_another_content_is_named(tmp_path, content):
    with pytest.raises(WeightsError, match="holds no detection model of ultralytics or YOLOv5"):
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


OF_V3_1 = {  # models/yolov5s.yaml of YOLOv5 v3.1, narrower
    "nc": 2,
    "depth_multiple": 0.33,
    "width_multiple": 0.125,
    "anchors": [[10, 13, 16, 30, 33, 23], [30, 61, 62, 45, 59, 119], [116, 90, 156, 198, 373, 326]],
    "backbone": [
        [-1, 1, "Focus", [64, 3]],
        [-1, 1, "Conv", [128, 3, 2]],
        [-1, 3, "BottleneckCSP", [128]],
        [-1, 1, "Conv", [256, 3, 2]],
        [-1, 9, "BottleneckCSP", [256]],
        [-1, 1, "Conv", [512, 3, 2]],
        [-1, 9, "BottleneckCSP", [512]],
        [-1, 1, "Conv", [1024, 3, 2]],
        [-1, 1, "SPP", [1024, [5, 9, 13]]],
        [-1, 3, "BottleneckCSP", [1024, False]],
    ],
    "head": [
        [-1, 1, "Conv", [512, 1, 1]],
        [-1, 1, "nn.Upsample", ["None", 2, "nearest"]],
        [[-1, 6], 1, "Concat", [1]],
        [-1, 3, "BottleneckCSP", [512, False]],
        [-1, 1, "Conv", [256, 1, 1]],
        [-1, 1, "nn.Upsample", ["None", 2, "nearest"]],
        [[-1, 4], 1, "Concat", [1]],
        [-1, 3, "BottleneckCSP", [256, False]],
        [-1, 1, "Conv", [256, 3, 2]],
        [[-1, 14], 1, "Concat", [1]],
        [-1, 3, "BottleneckCSP", [512, False]],
        [-1, 1, "Conv", [512, 3, 2]],
        [[-1, 10], 1, "Concat", [1]],
        [-1, 3, "BottleneckCSP", [1024, False]],
        [[17, 20, 23], 1, "Detect", ["nc", "anchors"]],
    ],
    "ch": 3,
}


def test_a_model_of_before_v4_keeps_its_activations(tmp_path, original_classes):
    """Hard swish after convolutions and leaky ReLU in BottleneckCSP: in the modules, and nowhere in the yaml."""
    torch.manual_seed(0)
    head = [*OF_V3_1["head"][:-1], [*OF_V3_1["head"][-1][:3], ["nc"]]]
    model = build_model({**copy.deepcopy(OF_V3_1), "head": head}, 2)
    for module in model.modules():
        if type(module).__name__ == "Conv":
            module.act = torch.nn.Hardswish()
        if type(module).__name__ == "BottleneckCSP":
            module.act = torch.nn.LeakyReLU(0.1)
    images = torch.rand(1, 3, 128, 128)
    expected = model.half().float().eval()(images)[0]
    path = save(tmp_path / "yolov5s.pt", pickled_by_yolov5(copy.deepcopy(model), OF_V3_1, original_classes))
    import_weights(path, tmp_path / "yolov5s.safetensors")
    for weights in (path, tmp_path / "yolov5s.safetensors"):
        read, header = load_model(weights)
        torch.testing.assert_close(read.eval()(images)[0], expected)
        assert (header.yaml["activation"], header.yaml["csp_activation"]) == ("nn.Hardswish()", "nn.LeakyReLU(0.1)")


@pytest.mark.parametrize(("size", "depth", "width"), [("n", 0.33, 0.25), ("custom", 0.5, 0.375)])
def test_a_p6_model_is_read_with_its_four_levels(tmp_path, original_classes, size, depth, width):
    yaml = yaml_model_load("yolov5n-p6.yaml")
    yaml = {**{k: v for k, v in yaml.items() if k not in ("scales", "scale")}, "nc": 2}
    yaml |= {"depth_multiple": depth, "width_multiple": width, "anchors": [[8, 9, 16, 17, 32, 33]] * 4}
    model = build_model(yaml, 2)
    path = save(tmp_path / "yolov5n6.pt", pickled_by_yolov5(copy.deepcopy(model), yaml, original_classes))
    read, header = load_model(path)
    assert (header.imgsz, read.stride.tolist(), len(header.yaml["anchors"])) == (1280, [8, 16, 32, 64], 4)
    read.args = get_cfg(overrides=default_train_args(header.yaml))
    batch = {"batch_idx": torch.zeros(1), "cls": torch.zeros(1, 1), "bboxes": torch.full((1, 4), 0.4)}
    loss, _ = read.init_criterion()(read.train()(torch.rand(1, 3, 128, 128)), batch)
    assert (loss > 0).all()


# ---- checkpoints of ultralytics


@pytest.fixture(scope="module")
def yolo():
    """A model as ultralytics' trainer hands it to torch.save."""
    torch.manual_seed(0)
    model = DetectionModel("yolo11n.yaml", nc=2, verbose=False)
    model.names, model.args = {0: "left", 1: "right"}, {"imgsz": 320, "model": "yolo11n.pt", "data": "x.yaml"}
    return model


def assert_read(path, model):
    header, tensors = read_weights(path)
    assert (header.classes, header.imgsz, header.yaml["yaml_file"]) == (("left", "right"), 320, "yolo11n.yaml")
    own = model.state_dict()
    assert tensors.keys() == own.keys()
    for key, value in own.items():
        assert torch.equal(tensors[key], value)


@pytest.mark.parametrize("form", ["whole", "alone", "ema", "criterion", "parallel", "before 1.6"])
def test_a_model_of_ultralytics_is_read_in_every_form_it_comes_in(tmp_path, yolo, form):
    path, whole = tmp_path / "best.pt", copy.deepcopy(yolo)
    if form == "criterion":  # as a notebook leaves it that saved the model it had trained
        whole.args = get_cfg(overrides={"imgsz": 320})
        whole.criterion = whole.init_criterion()
    content = {
        "whole": {"epoch": 3, "model": whole, "ema": None, "train_metrics": {"map": np.float64(0.5)}, "at": tmp_path},
        "alone": whole,
        "ema": {"model": None, "ema": whole, "updates": 3},
        "criterion": {"model": whole},
        "parallel": {"model": torch.nn.DataParallel(whole)},
        "before 1.6": {"model": whole},
    }[form]
    torch.save(content, path, _use_new_zipfile_serialization=form != "before 1.6")
    assert_read(path, yolo)


@pytest.mark.parametrize(
    ("now", "then"),
    [
        ("ultralytics.nn.modules.block", "ultralytics.nn.modules"),  # before 8.0.93
        ("ultralytics.utils", "ultralytics.yolo.utils"),  # before 8.0.136
    ],
)
def test_modules_may_lie_where_ultralytics_had_them(tmp_path, yolo, now, then):
    path, older, whole = tmp_path / "new.pt", tmp_path / "old.pt", copy.deepcopy(yolo)
    whole.args = get_cfg(overrides={"imgsz": 320})
    save(path, {"model": whole})
    with zipfile.ZipFile(path) as new, zipfile.ZipFile(older, "w") as old:
        for item in new.infolist():
            data = new.read(item)
            if item.filename.endswith("data.pkl"):
                assert f"c{now}\n".encode() in data
                data = data.replace(f"c{now}\n".encode(), f"c{then}\n".encode())
            old.writestr(item, data)
    assert_read(older, yolo)


@pytest.mark.parametrize("wrapper", ["", "model.", "module.model."])
@pytest.mark.parametrize("kind", [".pt", ".safetensors"])
def test_tensors_alone_become_weights_of_a_named_model(tmp_path, yolo, capsys, wrapper, kind):
    path = tmp_path / f"mine{kind}"
    tensors = {wrapper + key: value for key, value in yolo.state_dict().items()}
    torch.save({"state_dict": tensors}, path) if kind == ".pt" else save_file(tensors, path)
    target = tmp_path / "out.safetensors"
    words = ["import-weights", str(path), "--output", str(target)]
    assert main(words) == 2
    assert "--model yolo11n.yaml --classes" in one_line(capsys)
    assert main([*words, "--model", "yolo11n.yaml"]) == 2
    assert "--model and --classes belong together" in one_line(capsys)
    assert main([*words, "--model", "yolov8n.yaml", "--classes", "left,right"]) == 2
    assert "does not fit its own model: tensor model." in one_line(capsys)
    assert main([*words, "--model", "yolo11n.yaml", "--classes", "left,right", "--imgsz", "320"]) == 0
    assert_read(target, yolo)


@pytest.mark.parametrize("kind", [".pt", ".safetensors"])
def test_training_starts_from_tensors_alone(tmp_path, yolo, kind):
    """Beside `model: yolo11n.yaml` they need no import; what does not fit is left."""
    path = tmp_path / f"mine{kind}"
    tensors = {f"module.{key}": value for key, value in yolo.state_dict().items()}
    torch.save(tensors, path) if kind == ".pt" else save_file(tensors, path)
    student = build_model("yolo11n.yaml", 5)
    fitting, total = load_matching(student, path)
    assert total > fitting > 0.95 * total
    torch.testing.assert_close(student.state_dict()["model.0.conv.weight"], yolo.state_dict()["model.0.conv.weight"])
    whole = save(tmp_path / "whole.pt", {"model": yolo})
    assert load_matching(build_model("yolo11n.yaml", 5), whole) == (fitting, total)
    with pytest.raises(WeightsError, match="is not a bare state_dict: give it without --model"):
        import_tensors(whole, tmp_path / "x.safetensors", "yolo11n.yaml", ["a", "b"], 640)


def one_line(capsys):
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


class Subclass(torch.Tensor):
    """A tensor whose unpickling calls what rebuilds it."""


def _subclass(whole):
    tensor = torch.ones(2).as_subclass(Subclass)
    tensor.extra = Calls(marker, 1)
    whole.stride = tensor


def _state(whole):
    class State:
        def __reduce__(self):
            return Calls, (None,), {"function": Calls(marker, 1)}

    whole.model[0].conv.extra = State()


def _list_item(whole):
    whole.names = {0: ["left", Calls(marker, 1)]}


@pytest.mark.parametrize(
    ("put", "name"),
    [
        (_subclass, r"torch\._tensor\._rebuild_from_type_v2"),
        (_state, r"test_checkpoint\.Calls"),
        (_list_item, "marker"),
    ],
)
@pytest.mark.parametrize("zipped", [True, False])
def test_a_call_hidden_deep_in_a_model_is_refused_by_name(tmp_path, yolo, put, name, zipped):
    CALLED.clear()
    whole = copy.deepcopy(yolo)
    put(whole)
    path = save(tmp_path / "best.pt", {"model": whole}, _use_new_zipfile_serialization=zipped)
    with pytest.raises(WeightsError, match=rf"asks to import \S*{name}, which"):
        read_weights(path)
    assert CALLED == []


@pytest.mark.parametrize(
    "name", ["ultralytics.utils.downloads.safe_download", "ultralytics.nn.tasks.eval", "os.system"]
)
def test_names_of_ultralytics_that_are_no_classes_are_refused(tmp_path, yolo, name):
    module, function = name.rsplit(".", 1)
    path = tmp_path / "best.pt"
    path.write_bytes(f"c{module}\n{function}\n(S'x'\ntR.".encode())
    with pytest.raises(WeightsError, match=f"asks to import {name}, which"):
        read_weights(path)


def test_torchscript_is_refused_before_it_is_read(tmp_path):
    path = tmp_path / "best.torchscript.pt"
    torch.jit.save(torch.jit.trace(torch.nn.Conv2d(3, 1, 1), torch.ones(1, 3, 4, 4)), path)
    with pytest.raises(WeightsError, match=r"is TorchScript.*export the model it was made from with format=onnx"):
        read_weights(path)


def test_a_pickle_cannot_change_what_reads_the_next_one(tmp_path, yolo):
    """BUILD sets attributes of whatever it is given: of a function they would stay."""
    for known in ("ctorch.nn.modules.conv\nConv2d\n", "ctorch._utils\n_rebuild_tensor_v2\n", "c__builtin__\nset\n"):
        path = tmp_path / "bad.pt"
        path.write_bytes(f"{known}(N(S'__init__'\nI1\ndtb.".encode())
        with pytest.raises(WeightsError, match="cannot be read as a checkpoint"):
            read_weights(path)
    assert_read(save(tmp_path / "good.pt", {"model": yolo}), yolo)


def test_a_file_of_before_pytorch_1_6_cannot_have_a_patch_written(tmp_path, yolo, monkeypatch):
    """Such a file has the sources of its classes, and torch.load writes patches where they differ, if a class asks."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.nn.Module, "dump_patches", True)
    torch.save({"model": yolo}, "best.pt", _use_new_zipfile_serialization=False)
    data = Path("best.pt").read_bytes()
    assert b"class Detect(nn.Module)" in data
    Path("best.pt").write_bytes(data.replace(b"class Detect(nn.Module)", b"class Detect(nn.Modulo)"))
    assert_read(tmp_path / "best.pt", yolo)
    assert [path.name for path in tmp_path.iterdir()] == ["best.pt"]


def test_nor_can_one_that_calls_itself_a_class(tmp_path, monkeypatch):
    """With the source of a class that is real, and a name that says where the patch would go."""
    monkeypatch.chdir(tmp_path)
    state = (
        b"(S'__wrapped__'\nccollections\nOrderedDict\nS'dump_patches'\nI01\nS'__name__'\nS'written'\nS'_modules'\n}u"
    )
    container = b"ctorch.nn.modules.conv\nConv2d\n)\x81}" + state + b"b"
    head = [0x1950A86A20F9469CFC6C, 1001, {"protocol_version": 1001, "little_endian": True, "type_sizes": {}}]
    body = b"\x80\x02(S'module'\n" + container + b"S'a.py'\nS'class OrderedDict: pass'\ntQ."
    Path("best.pt").write_bytes(b"".join(pickle.dumps(one, 2) for one in head) + body + pickle.dumps([], 2))
    with pytest.raises(WeightsError, match="holds no detection model"):
        read_weights("best.pt")
    assert [path.name for path in tmp_path.iterdir()] == ["best.pt"]


def test_a_memo_cannot_ask_for_all_memory(tmp_path):
    path = tmp_path / "best.pt"
    path.write_bytes(b"\x80\x02}r\xff\xff\xff\x7f.")
    with pytest.raises(WeightsError, match="a memo of 2147483647 objects"):
        read_weights(path)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("yolo11n-cls.yaml", "is a classification model, which finds no boxes"),
        ("yolo26n-sem.yaml", "is a semantic segmentation model"),
    ],
)
def test_a_model_that_finds_no_boxes_is_named(tmp_path, capsys, name, says):
    YOLO(name).save(tmp_path / "best.pt")
    assert main(["import-weights", str(tmp_path / "best.pt")]) == 2
    assert says in one_line(capsys)


def test_a_layer_that_is_not_installed_is_named(tmp_path, yolo):
    whole = copy.deepcopy(yolo)
    whole.yaml["backbone"][0][2] = "StemBlock"
    with pytest.raises(WeightsError, match="StemBlock is none that the installed ultralytics has"):
        read_weights(save(tmp_path / "best.pt", {"model": whole}))


def test_a_model_that_takes_more_than_rgb_is_named(tmp_path):
    whole = DetectionModel("yolo11n.yaml", ch=4, nc=2, verbose=False)
    whole.names = {0: "left", 1: "right"}
    with pytest.raises(WeightsError, match="it takes images of 4 channels, and tiles are RGB"):
        read_weights(save(tmp_path / "best.pt", {"model": whole}))


@pytest.mark.parametrize(("key", "value"), [("width_multiple", 1000.0), ("depth_multiple", 1e9), ("nc", 10**9)])
def test_a_yaml_that_asks_for_all_memory_is_refused(tmp_path, yolo, key, value):
    whole = copy.deepcopy(yolo)
    whole.yaml = {**{k: v for k, v in whole.yaml.items() if k != "scales"}, key: value}
    with pytest.raises(WeightsError):
        read_weights(save(tmp_path / "best.pt", {"model": whole}))
