"""An S3 that runs here: moto's server, in a process of its own; and the environment that leads to it."""

import http.client
import random
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
import uuid
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

SILENT_S = 3.0  # and a client waits for 2 s
SECRET = "PLANTED-secret-access-key"
_SERVER = "import sys; from moto.server import main; main(['-H', '127.0.0.1', '-p', sys.argv[1]])"


@contextmanager
def serve_s3() -> Iterator[tuple[str, str]]:
    """The address of a server, and an empty bucket that it has. No two have one of the same name: a process remembers
    where a bucket was."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url, bucket = f"http://127.0.0.1:{port}", f"archive-{uuid.uuid4().hex[:8]}"
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    server = subprocess.Popen([sys.executable, "-c", _SERVER, str(port)], **quiet)
    try:
        deadline = time.monotonic() + 60
        while not _made(f"{url}/{bucket}"):
            assert server.poll() is None and time.monotonic() < deadline, "moto's server did not start"
            time.sleep(0.1)
        yield url, bucket
    finally:
        server.kill()
        server.wait()


def _made(bucket: str) -> bool:
    try:
        urllib.request.urlopen(urllib.request.Request(bucket, method="PUT"), timeout=10)
    except urllib.error.URLError:
        return False
    return True


def environment(url: str) -> dict[str, str]:
    """What leads a process to the server at that address."""
    return {
        "AWS_ACCESS_KEY_ID": "softlabel",
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": url,
        "AWS_ALLOW_HTTP": "true",
        "AWS_TIMEOUT": "2s",
    }


class Faults:
    """Between clients and a server, a connection that fails now and then: 503, no answer, a connection cut while an
    object comes in, and one cut before the answer to what was done goes out. Seeded, of requests in their order."""

    KINDS = ("busy", "silent", "cut", "unanswered")

    def __init__(self, url: str) -> None:
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _Forwarding)
        self._server.daemon_threads = True
        self._server.target = url.removeprefix("http://")
        self._server.share, self._server.lock = 0.0, threading.Lock()
        self._server.requests = self.requests = Counter()
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    @contextmanager
    def of(self, seed: int, share: float) -> Iterator[Counter[str]]:
        """That share of requests fails, until the end; which is counted."""
        self._server.chance, self._server.struck, self._server.share = random.Random(seed), Counter(), share
        try:
            yield self._server.struck
        finally:
            self._server.share = 0.0

    def __enter__(self) -> "Faults":
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Forwarding(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def _forward(self) -> None:
        kind = self._fault()
        if kind == "cut":
            self.rfile.read(int(self.headers.get("Content-Length", 0)) // 2)
            self.close_connection = True
            return
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if kind == "silent":
            time.sleep(SILENT_S)
            self.close_connection = True
            return
        if kind == "busy":
            self._answer(503, [], b"<Error><Code>SlowDown</Code><Message>Reduce your request rate.</Message></Error>")
            return
        server = http.client.HTTPConnection(self.server.target, timeout=60)
        server.request(self.command, self.path, body, dict(self.headers))
        answer = server.getresponse()
        data = answer.read()
        server.close()
        if kind == "unanswered":
            self.close_connection = True
            return
        self._answer(answer.status, answer.getheaders(), data)

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _forward

    def _fault(self) -> str:
        with self.server.lock:
            self.server.requests["LIST" if "list-type" in self.path else self.command] += 1
            if not self.server.share or self.server.chance.random() >= self.server.share:
                return ""
            kind = self.server.chance.choice(Faults.KINDS)
            self.server.struck[kind] += 1
            return kind

    def _answer(self, status: int, headers: list[tuple[str, str]], data: bytes) -> None:
        self.send_response(status)
        for key, value in headers:
            if key.lower() not in ("connection", "transfer-encoding", "content-length", "date", "server"):
                self.send_header(key, value)
        length = dict(headers).get("Content-Length") if self.command == "HEAD" else None
        self.send_header("Content-Length", length or str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        """Nothing."""
