"""Jobs on a Ray that runs already, as on a cluster: `ray start --head`, then `ray job submit`."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

import psutil
import pytest
import yaml

from softlabel.session import LOG
from softlabel.store import is_done, summary

REPO = Path(__file__).parents[2]
_START_S, _JOB_S = 120, 400
pytestmark = pytest.mark.long

TINY = [
    "--set=tiles.synthetic.num_scenes=12",
    "--set=tiles.synthetic.scene_size_px=192",
    "--set=execution.cpus_per_actor=1",
]


def free_ports(count):
    """Ports that nobody listens on, above the 10002-19999 that Ray gives to workers."""
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


class Head:
    """A Ray with one node, its address for jobs, and the environment that both sides share."""

    def __init__(self, folder):
        self.temp_dir = Path(tempfile.mkdtemp(prefix="sl-", dir="/tmp"))  # short: socket paths end at 107 bytes
        token = folder / "token"
        token.write_text("0123456789abcdef" * 4)
        kept = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # a job's `python` is the first on PATH
        self.env = {**kept, "PATH": path, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
        self.port, dashboard, client, agent = free_ports(4)
        self.address = f"http://127.0.0.1:{dashboard}"
        self.log = folder / "ray-start.log"
        with open(self.log, "w") as log:
            self._process = subprocess.Popen(
                [
                    *("ray", "start", "--head", "--block", "--num-cpus=2", "--disable-usage-stats"),
                    *(f"--port={self.port}", f"--temp-dir={self.temp_dir}"),
                    *("--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}"),
                    *(f"--ray-client-server-port={client}", f"--dashboard-agent-listen-port={agent}"),
                ],
                env=self.env,
                cwd=folder,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def wait(self):
        """Until the dashboard answers; without the token its answer is 401, which will do."""
        deadline = time.monotonic() + _START_S
        while True:
            assert self._process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            try:
                urllib.request.urlopen(f"{self.address}/api/version", timeout=5)
            except urllib.error.HTTPError as error:
                return error.code
            except OSError:
                time.sleep(0.5)

    def submit(self, *command, env=None):
        return subprocess.run(
            ["ray", "job", "submit", "--address", self.address, *command],
            env=env or self.env,
            cwd=REPO,
            capture_output=True,
            text=True,
            timeout=_JOB_S,
        )

    def stop(self):
        """End this Ray and nothing else: by the ids of the processes that it started."""
        leader = psutil.Process(self._process.pid)
        started = [leader, *leader.children(recursive=True)]
        self._process.send_signal(signal.SIGTERM)
        _, left = psutil.wait_procs(started, timeout=45)  # it drains for up to 30 s
        for process in left:
            process.kill()
        self._process.wait(10)
        shutil.rmtree(self.temp_dir, ignore_errors=True)


@pytest.fixture(scope="module")
def head(tmp_path_factory):
    head = Head(tmp_path_factory.mktemp("head"))
    try:
        assert head.wait() == 401
        yield head
    finally:
        head.stop()


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("runs") / "tiny"


def run(head, verb, run_dir, *flags):
    script = ["python", f"jobs/{verb}.py", "--config", "demo", "--run-dir", str(run_dir)]
    done = head.submit("--working-dir", ".", "--", *script, *TINY, *flags)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "succeeded" in done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def tiled(head, run_dir):
    run(head, "tile", run_dir)
    (folder,) = run_dir.glob("tiles-*")
    return folder


def test_tiles_are_made_by_a_job(tiled):
    assert is_done(tiled)
    assert yaml.safe_load((tiled / "recipe.yaml").read_text())["tiles"]["synthetic"]["num_scenes"] == 12


def test_the_upload_leaves_out_what_is_not_code(head, tiled):
    (copy,) = head.temp_dir.glob("session_2*/runtime_resources/working_dir_files/_ray_pkg_*/")
    names = {path.name for path in copy.iterdir()}
    assert {"jobs", "softlabel", "constraints.txt"} <= names
    assert not {".venv", ".git", "runs", ".mypy_cache", ".pytest_cache"} & names
    assert sum(path.stat().st_size for path in copy.rglob("*") if path.is_file()) < 20e6


def test_a_label_job_joins_the_cluster_that_it_was_submitted_to(head, tiled, run_dir, weights):
    said = run(head, "label", run_dir, f"--set=label.weights={weights}")
    assert f"log: {run_dir / LOG}" in said and "pid=" not in said
    log = (run_dir / LOG).read_text()
    assert re.search(rf"Connecting to existing Ray cluster at address: \S+:{head.port}\b", log)
    (store,) = run_dir.glob("label-labels-*")
    assert summary(store)["requested"] == summary(store)["labelled"] > 0
    assert [path.name for path in run_dir.glob("tiles-*")] == [tiled.name]


ASKS_ITS_WORKERS = """
import os, sys
from pathlib import Path
import ray
from softlabel.session import ray_session
with ray_session(Path(sys.argv[1]), verbose=False):
    told = ray.get(ray.remote(num_cpus=0)(lambda: [os.environ.get(key) for key in ("RAY_ADDRESS", "MINE")]).remote())
print("workers know", *told)
"""


def test_the_workers_of_a_job_know_the_address_of_their_ray(head, tmp_path):
    """With another Ray on their machine, such as the one of these tests, they would ask either."""
    (tmp_path / "ask.py").write_text(ASKS_ITS_WORKERS)
    its_own = ("--runtime-env-json", '{"env_vars": {"MINE": "kept"}}')
    done = head.submit("--working-dir", ".", *its_own, "--", "python", str(tmp_path / "ask.py"), str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(rf"workers know \S+:{head.port} kept\b", done.stdout)


def test_a_job_without_a_working_dir_runs_where_ray_was_started(head):
    """k8s/rayjob.yaml uploads nothing: its entrypoint names files of the image's own folder."""
    done = head.submit("--", "python", "-c", "import os; print('in', os.getcwd())")
    assert f"in {head.log.parent}" in done.stdout


def test_a_job_with_a_users_mistake_fails(head, run_dir):
    done = head.submit("--working-dir", ".", "--", "python", "jobs/tile.py", "--config", "none.yaml")
    assert done.returncode == 1
    assert "no recipe at none.yaml" in done.stdout


def test_without_the_token_nothing_is_submitted(head):
    env = {key: value for key, value in head.env.items() if not key.startswith("RAY_")}
    done = head.submit("--", "true", env={**env, "RAY_AUTH_MODE": "disabled"})
    assert done.returncode != 0
    assert "authentication" in (done.stdout + done.stderr).lower()
