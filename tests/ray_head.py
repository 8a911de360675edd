"""A Ray that runs already, as on a cluster: `ray start --head`, in token mode."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import psutil

REPO = Path(__file__).parents[1]
_START_S, _JOB_S = 120, 400


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

    def __init__(self, folder, *flags, port=None, **env):
        self.temp_dir = Path(tempfile.mkdtemp(prefix="sl-", dir="/tmp"))  # short: socket paths end at 107 bytes
        token = folder / "token"
        token.write_text("0123456789abcdef" * 4)
        kept = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # a job's `python` is the first on PATH
        self.env = {**kept, "PATH": path, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token), **env}
        free, dashboard, client, agent = free_ports(4)
        self.port = port or free
        self.address = f"http://127.0.0.1:{dashboard}"
        self.log = folder / "ray-start.log"
        with open(self.log, "w") as log:
            self._process = subprocess.Popen(
                [
                    *("ray", "start", "--head", "--block", "--disable-usage-stats", *flags),
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

    def ray(self, *command, env=None):
        return subprocess.run(
            ["ray", *command], env=env or self.env, cwd=REPO, capture_output=True, text=True, timeout=_JOB_S
        )

    def submit(self, *command, env=None):
        return self.ray("job", "submit", "--address", self.address, *command, env=env)

    def start(self, *command):
        """A job that goes on while the test looks at it; its output is one pipe."""
        return subprocess.Popen(
            ["ray", "job", "submit", "--address", self.address, *command],
            env=self.env,
            cwd=REPO,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def nodes(self):
        """The nodes that live, by the State API."""
        token = Path(self.env["RAY_AUTH_TOKEN_PATH"]).read_text()
        asked = urllib.request.Request(f"{self.address}/api/v0/nodes", headers={"Authorization": f"Bearer {token}"})
        with urllib.request.urlopen(asked, timeout=30) as answer:
            found = json.load(answer)["data"]["result"]["result"]
        return [node for node in found if node["state"] == "ALIVE"]

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


@contextmanager
def started_head(folder, *flags, port=None, **env):
    """A head that answers; it is ended, and what it started, whatever happens."""
    head = Head(folder, *flags, port=port, **env)
    try:
        assert head.wait() == 401
        yield head
    finally:
        head.stop()
