"""The Ray of a command: its address in the environment, and one line where it does not start."""

import os
import subprocess
import sys
import tempfile
from unittest import mock

import pytest
import ray
from made_stores import made_store, made_tile, write_store

from softlabel.cli import main
from softlabel.errors import SessionError
from softlabel.session import LOG, Cluster, Terminated, _pass_on, cluster, ray_session

TIMED_OUT = (
    "The current node timed out during startup. This could happen because some of the raylet failed to startup or the "
    "GCS has become overloaded."
)


@pytest.mark.parametrize(
    ("error", "remedy"),
    [
        (Exception(TIMED_OUT), "this machine was too busy: try again, or set RAY_raylet_start_wait_time_s=300"),
        (OSError("AF_UNIX path length cannot exceed 107 bytes: /a"), "set RAY_TMPDIR to a shorter one, such as /tmp"),
        (ConnectionError("no Ray at\n127.0.0.1:9"), "run it again with --verbose"),
    ],
    ids=lambda value: type(value).__name__,
)
@pytest.mark.parametrize("verbose", [True, False])
def test_a_ray_that_does_not_start_is_one_line(tmp_path, error, remedy, verbose):
    with (
        mock.patch.object(ray, "init", side_effect=error),
        pytest.raises(SessionError) as found,
        ray_session(tmp_path, verbose=verbose),
    ):
        pytest.fail("it started")
    assert str(found.value).startswith("Ray did not start (") and str(found.value).endswith(remedy)
    assert "\n" not in str(found.value)


def test_too_long_a_folder_for_sockets_is_one_line(tmp_path):
    """Ray's own check, for real."""
    folder = tmp_path / ("long" * 25)
    folder.mkdir()
    code = "import sys; from softlabel.cli import main; sys.exit(main(sys.argv[1:]))"
    words = ["experiment", "--config", "demo", "--run-dir", str(tmp_path / "run")]
    environment = {**os.environ, "TMPDIR": str(folder)}
    found = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, env=environment)
    assert found.returncode == 2, found.stderr
    (line,) = found.stderr.splitlines()
    assert line.startswith("softlabel experiment: Ray did not start") and "RAY_TMPDIR" in line
    assert found.stdout == f"log: {tmp_path / 'run' / LOG}\n"


@pytest.mark.parametrize(
    ("address", "asked", "seen"),
    [("", "local", "127.0.0.1:"), ("http://head:8265", "local", "127.0.0.1:"), ("head:6379", "head:6379", "head:6379")],
)
def test_every_process_is_told_the_address_of_its_ray(tmp_path, monkeypatch, address, asked, seen):
    """They inherit the environment that Ray is started with; and it is as before afterwards."""
    monkeypatch.setenv("RAY_ADDRESS", address)
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://elsewhere:8265")
    started = []
    environment = ("RAY_ADDRESS", "RAY_GCS_SERVER_PORT", "RAY_API_SERVER_ADDRESS")
    joined = []

    def note(address, include_dashboard=None, runtime_env=None):
        started.append((address, {name: os.environ.get(name) for name in environment}))
        joined.extend([runtime_env] if runtime_env else [])

    with mock.patch.object(ray, "init", note), mock.patch.object(ray, "shutdown"), ray_session(tmp_path, verbose=True):
        pass
    ((found, inherited),) = started
    assert joined == ([] if asked == "local" else [{"env_vars": {"RAY_ADDRESS": address}}])
    assert found == asked and inherited["RAY_ADDRESS"].startswith(seen)
    if asked == "local":
        assert inherited["RAY_ADDRESS"] == f"127.0.0.1:{inherited['RAY_GCS_SERVER_PORT']}"
        assert inherited["RAY_API_SERVER_ADDRESS"] is None
    assert os.environ["RAY_ADDRESS"] == address and os.environ["RAY_API_SERVER_ADDRESS"] == "http://elsewhere:8265"
    assert "RAY_GCS_SERVER_PORT" not in os.environ


def test_a_worker_s_line_for_the_user_is_said_without_its_mark(capsys):
    _pass_on({"lines": ["softlabel: truth_1: epoch 1/3\r", "Setting up process group", " softlabel: no"], "pid": 1})
    assert capsys.readouterr().out == "truth_1: epoch 1/3\n"


@pytest.mark.parametrize("verb", ["tile", "label", "train", "evaluate", "calibrate", "experiment", "search", "demo"])
@pytest.mark.parametrize(
    ("folder", "reason"), [("file", "it is a file"), ("file/run", "Not a directory"), ("/proc/run", "")]
)
def test_a_run_directory_that_cannot_be_written_is_one_line(tmp_path, capsys, verb, folder, reason):
    (tmp_path / "file").touch()
    recipe = [] if verb == "demo" else ["--config", "demo"]
    assert main([verb, *recipe, "--run-dir", str(tmp_path / folder)]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(f"softlabel {verb}: cannot write to {tmp_path / folder} ({reason}")
    assert captured.err.count("\n") == 1 and "give another folder" in captured.err


@pytest.mark.parametrize("verb", ["show", "export", "fuse", "import-weights"])
def test_neither_can_what_comes_of_a_store(tmp_path, capsys, verb):
    (tmp_path / "file").touch()
    (tmp_path / "old.pt").touch()
    made = [made_tile("a", (0, 0, 64, 64))]
    store = made_store(tmp_path / "run", made)
    words = [str(tmp_path / "old.pt")] if verb == "import-weights" else [str(store)]
    if verb == "fuse":
        words.append(str(write_store(tmp_path / "run", made, weights="w2")))
        with mock.patch.object(tempfile, "TemporaryFile", side_effect=PermissionError(13, "Permission denied")):
            assert main([verb, *words]) == 2
    else:
        assert main([verb, *words, "--output", str(tmp_path / "file" / "x" / "y")]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"softlabel {verb}: cannot write to ") and error.count("\n") == 1


def test_a_log_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / LOG).mkdir()
    with pytest.raises(SessionError, match=r"cannot write the log .*softlabel\.log \(Is a directory\)"):
        ray_session(tmp_path, verbose=False).__enter__()


def test_a_cluster_that_cannot_be_joined_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    with (
        mock.patch.object(ray, "init", side_effect=ConnectionError("InvalidAuthToken")),
        pytest.raises(SessionError, match=r"cannot join the Ray at head:6379 \(InvalidAuthToken\)"),
    ):
        ray_session(tmp_path, verbose=True).__enter__()


@pytest.mark.parametrize(("cause", "becomes"), [(Terminated(), Terminated), (ValueError(), SystemError)])
def test_sigterm_in_the_c_code_of_ray_is_no_other_end(tmp_path, cause, becomes):
    """CPython raises SystemError where C code returned a result while an exception was set."""
    with (
        mock.patch.object(ray, "init"),
        mock.patch.object(ray, "shutdown") as shutdown,
        pytest.raises(becomes),
        ray_session(tmp_path, verbose=True),
    ):
        raise SystemError("returned a result with an exception set") from cause
    shutdown.assert_called_once()


def test_sigterm_while_ray_starts_is_no_other_end(tmp_path):
    """Ray's own handler, which it sets on the way, exits with 15."""
    with mock.patch.object(ray, "init", side_effect=SystemExit(15)), pytest.raises(Terminated):
        ray_session(tmp_path, verbose=True).__enter__()


@pytest.mark.parametrize(("joined", "usable", "gpus"), [(True, 0, 3), (False, 0, 0), (False, 2, 2), (False, 4, 3)])
def test_of_this_machine_only_gpus_that_pytorch_can_use_count(capsys, joined, usable, gpus):
    nodes = [{"Alive": True, "Resources": {"CPU": 4.0, "GPU": 3.0}}, {"Alive": True, "Resources": {}}, {"Alive": False}]
    with (
        mock.patch.object(ray, "nodes", return_value=nodes),
        mock.patch.object(ray, "cluster_resources", return_value={"CPU": 4.0, "GPU": 3.0}),
        mock.patch("torch.cuda.device_count", return_value=usable),
    ):
        assert cluster(joined=joined) == Cluster((4.0, 0.0), gpus)
    assert ("can use" in capsys.readouterr().out) == (not joined and usable < 3)
