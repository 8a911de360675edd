"""The command line: one line for a user's mistake, a plan that writes nothing."""

import subprocess
import sys

import pytest

from softlabel.cli import main

DEMO = "demo"


def run(capsys, *words):
    code = main(list(words))
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.fixture(autouse=True)
def in_the_checkout(monkeypatch, request):
    monkeypatch.chdir(request.config.rootpath)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["tile", "--config", "gone.yaml"], "no recipe at gone.yaml"),
        (["tile", "--config", DEMO, "--set", "tiles.sizepx=1"], "tiles.sizepx: unknown key"),
        (["tile", "--config", "overhead", "--set", "tiles.scenes=gone"], "no scenes at gone"),
        (["label", "--config", DEMO], "label.weights is not set"),
        (["label", "--config", DEMO, "--set", "label.weights=gone.safetensors"], "no weights at"),
        (
            ["train", "--config", DEMO, "--set", "train.labels=truth", "--set", "train.student.weights=gone.pt"],
            "no weigh",
        ),
        (["train", "--config", DEMO], "label.weights is not set"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(capsys, tmp_path, words, message):
    small = ["--set", "tiles.synthetic.num_scenes=20", "--set", "tiles.synthetic.scene_size_px=192"]
    extra = small if DEMO in words else []
    code, _, error = run(capsys, *words, "--run-dir", str(tmp_path), *extra)
    assert code == 2
    assert message in error and error.startswith(f"softlabel {words[0]}: ")
    assert error.count("\n") == 1 and "Traceback" not in error


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("s3://no-such-bucket/run", "s3://no-such-bucket/run"),
        (
            "s3:/archive/run",
            "s3: give s3://BUCKET/FOLDER, without characters such as",
        ),
        ("nothing://archive/run", "nothing://archive/run is no place for files"),
        ("http://127.0.0.1:9/run", "http://127.0.0.1:9/run is no place for files"),
    ],
)
@pytest.mark.parametrize(
    "words",
    [
        ["tile", "--config", DEMO, "--run-dir"],
        ["label", "--config", DEMO, "--run-dir"],
        ["show"],
        ["export"],
        ["status"],
    ],
    ids=lambda words: words[0],
)
def test_a_place_that_cannot_be_used_is_named_in_one_line(capsys, tmp_path, monkeypatch, s3, words, where, message):
    monkeypatch.chdir(tmp_path)
    code, out, error = run(capsys, *words, where)
    assert (code, out) == (2, "") and list(tmp_path.iterdir()) == []
    assert message in error and error.count("\n") == 1 and len(error) < 800


@pytest.mark.parametrize("text", ["much", "nan", "-1", "2"])
def test_a_threshold_is_a_number_from_0_to_1(capsys, text):
    with pytest.raises(SystemExit, match="2"):
        main(["export", "store", f"--threshold={text}"])
    assert f"--threshold: {text} is not a number from 0 to 1" in capsys.readouterr().err


def test_a_reader_that_has_seen_enough_ends_it_quietly():
    command = (
        f"{sys.executable} -c 'import sys; from softlabel.cli import main; sys.exit(main())' demo --dry-run | true"
    )
    assert subprocess.run(command, shell=True, capture_output=True, text=True).stderr == ""


@pytest.mark.parametrize("name", ["s3://b/x", "../escaped", "a/b", ".."])
def test_a_name_is_no_path(capsys, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    code, _, error = run(capsys, "tile", "--config", DEMO, "--set", f"name={name}")
    assert code == 2 and "name: it names a folder below runs/" in error and list(tmp_path.iterdir()) == []


def test_a_dry_run_says_what_would_happen_and_writes_nothing(capsys, tmp_path):
    code, out, _ = run(capsys, "experiment", "--config", DEMO, "--run-dir", str(tmp_path), "--dry-run")
    assert code == 0
    assert "scenes: 60 made up" in out and "tiles: about 240" in out and "difficulty" in out
    assert list(tmp_path.iterdir()) == []


def test_tile_prints_its_folder(capsys, tmp_path):
    words = ["tile", "--config", DEMO, "--set", "tiles.synthetic.num_scenes=20", "--run-dir", str(tmp_path)]
    code, out, _ = run(capsys, *words)
    assert code == 0
    assert out.splitlines()[-1].startswith(str(tmp_path / "tiles-"))
