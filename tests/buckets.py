"""Object stores that run here, and the environment that leads to each.

S3 is moto's server, Azure is Azurite where it is installed (`npm install --global azurite`). Of Google's there is none:
a stand-in lets moto's server speak what Google's XML API has of its own.
"""

import base64
import hashlib
import hmac
import http.client
import os
import random
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Self

import pytest

SILENT_S = 3.0  # and a client waits for 2 s
SECRETS = {
    "s3": "PLANTED-secret-access-key",
    "gs": "PLANTED-bearer-token",
    "az": base64.b64encode(b"PLANTED-account-key").decode(),
}
AZURITE = shutil.which("azurite-blob")
NO_AZURITE = "needs Azurite (npm install --global azurite)"
PROTOCOLS = ("s3", "gs", pytest.param("az", marks=pytest.mark.skipif(not AZURITE, reason=NO_AZURITE)))
"""Of which tests are parametrized."""
_MOTO = [sys.executable, "-c", "import sys; from moto.server import main; main(['-H', '127.0.0.1', '-p', sys.argv[1]])"]
_AZURITE = [AZURITE or "", "--inMemoryPersistence", "--silent", "--disableTelemetry", "--blobPort"]
_ACCOUNT = "softlabel"
_AZURITE_ACCOUNTS = f"{_ACCOUNT}:{SECRETS['az']}"


@contextmanager
def serve(protocol: str) -> Iterator[tuple[str, str]]:
    """The address of a server, and an empty bucket that it has. No two have one of the same name: a process remembers
    where a bucket was."""
    bucket = f"archive-{uuid.uuid4().hex[:8]}"
    command, made = (_AZURITE, _make_container) if protocol == "az" else (_MOTO, _make_bucket)
    deadline = time.monotonic() + 60
    url, server = _start(command)
    try:
        while not made(url, bucket) or server.poll() is not None:
            assert time.monotonic() < deadline, f"{command[0]} did not start"
            if server.poll() is not None:  # another process has taken the port
                url, server = _start(command)
            time.sleep(0.1)
        if protocol == "gs":
            with _Google(url) as google:
                yield google.url, bucket
        else:
            yield url, bucket
    finally:
        server.kill()
        server.wait()


def _start(command: list[str]) -> tuple[str, subprocess.Popen]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    env = {**os.environ, "AZURITE_ACCOUNTS": _AZURITE_ACCOUNTS}
    return f"http://127.0.0.1:{port}", subprocess.Popen([*command, str(port)], env=env, **quiet)


def _make_bucket(url: str, bucket: str) -> bool:
    return _put(urllib.request.Request(f"{url}/{bucket}", method="PUT"))


def _make_container(url: str, bucket: str) -> bool:
    """Signed, as Azure asks: https://learn.microsoft.com/rest/api/storageservices/authorize-with-shared-key."""
    headers = {"x-ms-date": formatdate(usegmt=True), "x-ms-version": "2021-08-06"}
    told = "".join(f"{key}:{value}\n" for key, value in headers.items())
    text = "PUT" + 12 * "\n" + told + f"/{_ACCOUNT}/{_ACCOUNT}/{bucket}\nrestype:container"
    signature = hmac.digest(base64.b64decode(SECRETS["az"]), text.encode(), hashlib.sha256)
    headers["Authorization"] = f"SharedKey {_ACCOUNT}:{base64.b64encode(signature).decode()}"
    where = f"{url}/{_ACCOUNT}/{bucket}?restype=container"
    return _put(urllib.request.Request(where, method="PUT", headers=headers))


def _put(request: urllib.request.Request) -> bool:
    try:
        urllib.request.urlopen(request, timeout=10)
    except urllib.error.URLError:
        return False
    return True


def environment(protocol: str, url: str) -> dict[str, str]:
    """What leads a process to the server at that address."""
    return {
        "s3": {
            "AWS_ACCESS_KEY_ID": "softlabel",
            "AWS_SECRET_ACCESS_KEY": SECRETS["s3"],
            "AWS_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": url,
            "AWS_ALLOW_HTTP": "true",
            "AWS_TIMEOUT": "2s",
        },
        "gs": {
            "GOOGLE_BASE_URL": url,
            "GOOGLE_BEARER_TOKEN": SECRETS["gs"],
            "GOOGLE_ALLOW_HTTP": "true",
            "GOOGLE_TIMEOUT": "2s",
        },
        "az": {
            "AZURE_STORAGE_ACCOUNT_NAME": _ACCOUNT,
            "AZURE_STORAGE_ACCOUNT_KEY": SECRETS["az"],
            "AZURE_STORAGE_ENDPOINT": f"{url}/{_ACCOUNT}",
            "AZURE_ALLOW_HTTP": "true",
            "AZURE_TIMEOUT": "2s",
        },
    }[protocol]


class Proxy:
    """Between clients and a server."""

    def __init__(self, url: str, handler: type["Forwarding"]) -> None:
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self._server.target = url.removeprefix("http://")
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Google(Proxy):
    """What Google's XML API has of its own, said to a server in S3's words: an object's generation is its tag as a
    number. What it cannot show: two objects with the same bytes have the same generation."""

    def __init__(self, url: str) -> None:
        super().__init__(url, _OfGoogle)


class Faults(Proxy):
    """A connection that fails now and then: 503, no answer, a connection cut while an object comes in, and one cut
    before the answer to what was done goes out. Seeded, of requests in their order."""

    KINDS = ("busy", "silent", "cut", "unanswered")

    def __init__(self, url: str) -> None:
        super().__init__(url, _Failing)
        self._server.share, self._server.lock = 0.0, threading.Lock()
        self._server.requests = self.requests = Counter()

    @contextmanager
    def of(self, seed: int, share: float) -> Iterator[Counter[str]]:
        """That share of requests fails, until the end; which is counted."""
        self._server.chance, self._server.struck, self._server.share = random.Random(seed), Counter(), share
        try:
            yield self._server.struck
        finally:
            self._server.share = 0.0


class Forwarding(BaseHTTPRequestHandler):
    """Hands requests on, and answers back."""

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
        server.request(self.command, self._where(), body, self._asked(dict(self.headers)))
        answer = server.getresponse()
        data = answer.read()
        server.close()
        if kind == "unanswered":
            self.close_connection = True
            return
        self._answer(answer.status, self._answered(answer.getheaders()), data)

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _forward

    def _fault(self) -> str:
        return ""

    def _where(self) -> str:
        return self.path

    def _asked(self, headers: dict[str, str]) -> dict[str, str]:
        return headers

    def _answered(self, headers: list[tuple[str, str]]) -> list[tuple[str, str]]:
        return headers

    def _answer(self, status: int, headers: list[tuple[str, str]], data: bytes) -> None:
        self.send_response(status)
        for key, value in headers:
            if key.lower() not in ("connection", "transfer-encoding", "content-length", "date", "server"):
                self.send_header(key, value)
        told = {key.lower(): value for key, value in headers}
        length = told.get("content-length") if self.command == "HEAD" else None
        self.send_header("Content-Length", length or str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        """Nothing."""


class _Failing(Forwarding):
    def _fault(self) -> str:
        with self.server.lock:
            self.server.requests["LIST" if "list-type" in self.path else self.command] += 1
            if not self.server.share or self.server.chance.random() >= self.server.share:
                return ""
            kind = self.server.chance.choice(Faults.KINDS)
            self.server.struck[kind] += 1
            return kind


_SOMEBODY = "AWS4-HMAC-SHA256 Credential=softlabel/20261130/us-east-1/s3/aws4_request, SignedHeaders=host, Signature=0"
"""Of requests that moto takes for signed ones: it looks no closer."""


class _OfGoogle(Forwarding):
    def _where(self) -> str:
        path, mark, query = self.path.partition("?")
        return urllib.parse.quote(urllib.parse.unquote(path)) + mark + query  # Google is asked for a%2Fb and a%2Db

    def _asked(self, headers: dict[str, str]) -> dict[str, str]:
        headers = {key.lower(): value for key, value in headers.items()} | {"authorization": _SOMEBODY}
        generation = headers.pop("x-goog-if-generation-match", "")
        if source := headers.pop("x-goog-copy-source", ""):
            headers["x-amz-copy-source"] = source
        if generation:
            headers |= {"if-none-match": "*"} if generation == "0" else {"if-match": f'"{int(generation):032x}"'}
        return headers

    def _answered(self, headers: list[tuple[str, str]]) -> list[tuple[str, str]]:
        tag = {key.lower(): value for key, value in headers}.get("etag", "").strip('"').partition("-")[0]
        return [*headers, ("x-goog-generation", str(int(tag, 16)))] if tag else headers
