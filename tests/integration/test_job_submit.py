"""Jobs on a Ray that runs already, as on a cluster: `ray start --head`, then `ray job submit`."""

import re
import shutil
import time

import pytest
import yaml
from ray_head import started_head

from softlabel.recipe_file import dump_recipe
from softlabel.session import LOG
from softlabel.store import is_done, summary

pytestmark = pytest.mark.long

TINY = [
    "--set=tiles.synthetic.num_scenes=12",
    "--set=tiles.synthetic.scene_size_px=192",
    "--set=execution.cpus_per_actor=1",
]


@pytest.fixture(scope="module")
def head(tmp_path_factory):
    with started_head(tmp_path_factory.mktemp("head"), "--num-cpus=2") as head:
        yield head


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
    """The jobs of k8s/ upload nothing: their entrypoints name files of the image's own folder."""
    done = head.submit("--", "python", "-c", "import os; print('in', os.getcwd())")
    assert f"in {head.log.parent}" in done.stdout


def test_a_job_with_a_users_mistake_fails(head, run_dir):
    done = head.submit("--working-dir", ".", "--", "python", "jobs/tile.py", "--config", "none.yaml")
    assert done.returncode == 1
    assert "no recipe at none.yaml" in done.stdout


def test_a_job_that_is_stopped_goes_on_when_it_is_submitted_again(head, many_tiles, small_tiles, tmp_path):
    config, run_dir = tmp_path / "run.yaml", tmp_path / "run"
    config.write_text(dump_recipe(many_tiles()))
    shutil.copytree(small_tiles, run_dir / small_tiles.name)
    command = ("python", "jobs/label.py", "--config", str(config), "--run-dir", str(run_dir))
    job = head.start("--submission-id=stopped", "--working-dir", ".", "--", *command)
    deadline = time.monotonic() + 300
    while not (there := list(run_dir.glob("label-*/shards/*/*.parquet"))):
        assert job.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    stopped = head.ray("job", "stop", "--address", head.address, "stopped")
    assert stopped.returncode == 0, stopped.stderr
    job.wait(60)  # 0: Ray has done what it was told
    (folder,) = run_dir.glob("label-*")
    assert not is_done(folder)
    there = list(folder.glob("shards/*/*.parquet"))
    again = head.submit("--working-dir", ".", "--", *command)
    assert again.returncode == 0, again.stdout + again.stderr
    assert f"in {10 - len(there)} shards" in again.stdout
    assert summary(folder)["requested"] == summary(folder)["labelled"] == 640


def test_another_token_is_refused(head, tmp_path):
    (tmp_path / "token").write_text("fedcba9876543210" * 4)
    env = {**head.env, "RAY_AUTH_TOKEN_PATH": str(tmp_path / "token")}
    done = head.submit("--", "true", env=env)
    assert done.returncode != 0
    assert "token" in (done.stdout + done.stderr).lower()


def test_without_the_token_nothing_is_submitted(head):
    env = {key: value for key, value in head.env.items() if not key.startswith("RAY_")}
    done = head.submit("--", "true", env={**env, "RAY_AUTH_MODE": "disabled"})
    assert done.returncode != 0
    assert "authentication" in (done.stdout + done.stderr).lower()
