"""`softlabel describe` says what a file is and what can be done with it, or in one line why nothing can."""

import pytest
from ultralytics import RTDETR, YOLO

from softlabel.cli import main


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("yolo11n.yaml", ["family:     yolo (yolo11n.yaml)", "finds:      boxes\n", "to start training"]),
        ("yolov8n-seg.yaml", ["yolov8n-seg.yaml", "boxes; its masks are left out", "to start training"]),
        ("yolo26n-pose.yaml", ["boxes; its keypoints are left out"]),
        ("yolo11n-obb.yaml", ["finds:      rotated boxes\n", "to start training"]),
        ("yolov8n-rtdetr.yaml", ["rtdetr_ultralytics (yolov8n-rtdetr.yaml)"]),
    ],
)
def test_a_checkpoint_is_described_as_what_it_is(tmp_path, capsys, name, says):
    path = tmp_path / "best.pt"
    model = (RTDETR if "rtdetr" in name else YOLO)(name)
    model.save(path)
    assert main(["describe", str(path)]) == 0
    said = capsys.readouterr().out
    parameters = int(said.split("parameters: ")[1].split("\n")[0].replace(",", ""))
    whole = sum(parameter.numel() for parameter in model.model.parameters())
    assert parameters == whole if "masks" not in said and "keypoints" not in said else 0 < parameters < whole
    assert "classes:    80: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, ... (80)" in said and "imgsz:      640 px" in said
    assert f"as a teacher: label.weights={path}" in said and ("to start training" in said) == ("rtdetr" not in name)
    for line in says:
        assert line in said


def test_weights_of_this_project_are_described(weights, capsys):
    assert main(["describe", str(weights)]) == 0
    said = capsys.readouterr().out
    assert "teacher.safetensors, safetensors" in said and "3: car, plane, ship" in said and "imgsz:      128 px" in said


def test_so_is_a_folder_of_transformers(capsys):
    assert main(["describe", "tests/assets/tiny-owlvit"]) == 0
    said = capsys.readouterr().out
    assert int(said.split("parameters: ")[1].split("\n")[0].replace(",", "")) > 10_000
    assert "owlvit of transformers" in said and "label.open_vocabulary.model=tests/assets/tiny-owlvit" in said


def test_what_is_of_no_use_is_said_in_one_line(tmp_path, capsys):
    YOLO("yolo11n-cls.yaml").save(tmp_path / "best.pt")
    assert main(["describe", str(tmp_path / "best.pt")]) == 2
    error = capsys.readouterr().err
    assert "is a classification model, which finds no boxes" in error and error.count("\n") == 1
