"""Files on a disk and in a bucket, by the same paths; a bucket that fails; conditions that hold."""

import os
import pickle
import subprocess
import sys
import threading
import time
import uuid
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pyarrow as pa
import pytest
from buckets import PROTOCOLS, SECRETS, Faults, Forwarding, Proxy, environment, serve
from fsspec.asyn import AsyncFileSystem

from softlabel import storage
from softlabel.errors import SessionError, StorageError, StoreError
from softlabel.storage import (
    create,
    has_conditions,
    is_remote,
    location,
    modified,
    on_disk,
    ray_storage,
    read_tagged,
    remove_tree,
    replace,
)
from softlabel.store import commit, file_digest, opened, read_json, read_table, write_json, write_table


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("runs/x", Path("runs/x")),
        ("/r/a b", Path("/r/a b")),
        ("file:///r/a%20b", Path("/r/a b")),
        ("c:/r", Path("c:/r")),
    ],
)
def test_what_names_no_bucket_is_a_plain_path(text, path):
    assert location(text) == path and not is_remote(location(text)) and location(path) is path


@pytest.mark.parametrize(
    "text",
    ["s3:/bucket/x", "s3://", "http://host/x?key=PLANTED", "s3://key:PLANTED@bucket/x", "gs://b/x*", "s3://b/x[1]"],
)
def test_what_is_no_place_is_refused_and_no_secret_repeated(text):
    with pytest.raises(SessionError, match="give") as error:
        location(text)
    assert "PLANTED" not in str(error.value)


def test_a_path_in_a_bucket_is_the_same_elsewhere(in_bucket):
    path = in_bucket / "a" / "b.json"
    write_json(path, {"a": 1})
    again = pickle.loads(pickle.dumps(path))
    assert is_remote(path) and again == path and location(str(path)) == path and read_json(again) == {"a": 1}
    assert path.name == "b.json" and path.parent.parent == in_bucket and str(path) == f"{in_bucket}/a/b.json"


def test_a_table_is_read_whole_and_in_part(anywhere):
    path = anywhere / "deep" / "t.parquet"
    write_table(path, pa.table({"a": [1, 2], "b": ["x", "y"]}))
    assert read_table(path, ["b"]).to_pylist() == [{"b": "x"}, {"b": "y"}]
    with opened(path) as file:
        assert file.read_row_group(0)["a"].to_pylist() == [1, 2]


def test_what_is_missing_or_broken_is_named(anywhere):
    for read in (read_json, read_table):
        with pytest.raises(StoreError, match=f"{anywhere}/gone is missing"):
            read(anywhere / "gone")
    with pytest.raises(StoreError, match="gone is missing"), opened(anywhere / "gone"):
        pass
    commit(anywhere / "broken", lambda path: path.write_bytes(b"no parquet"))
    with pytest.raises(StoreError, match=f"{anywhere}/broken cannot be read"), opened(anywhere / "broken"):
        pass


def test_of_those_who_create_a_file_one_does(anywhere):
    assert create(anywhere / "lease", b"one") and not create(anywhere / "lease", b"two")
    assert read_tagged(anywhere / "lease")[0] == b"one"


def test_a_file_is_replaced_on_condition_that_it_is_the_one_that_was_read(in_bucket):
    path = in_bucket / "lease"
    create(path, b"one")
    _, tag = read_tagged(path)
    assert replace(path, b"two", tag) and not replace(path, b"three", tag)
    data, tag = read_tagged(path)
    path.unlink()
    assert data == b"two" and not replace(path, b"four", tag) and not path.is_file()
    with pytest.raises(FileNotFoundError):
        read_tagged(path)


def test_a_folder_goes_with_all_in_it(anywhere):
    for name in ("a/b", "a/c/d", "e"):
        commit(anywhere / "x" / name, lambda path: path.write_bytes(b"1"))
    commit(anywhere / "xy", lambda path: path.write_bytes(b"1"))
    remove_tree(anywhere / "x")
    remove_tree(anywhere / "x")
    assert not (anywhere / "x").exists() and (anywhere / "xy").exists()


@pytest.mark.parametrize(
    "pattern", ["*", "a*/b", "a*/*/[0-9]*.x", "a1/c/1.x", "a1", "none", "none/*", "**/*.x", "a1/**/*.x"]
)
def test_a_pattern_finds_what_it_finds_on_a_disk(tmp_path, in_bucket, pattern):
    for folder in (tmp_path, in_bucket):
        for name in ("a1/b", "a1/c/1.x", "a1/c/y.x", "a2/c/2.x", "a2/b", "z"):
            commit(folder / name, lambda path: path.write_bytes(b"1"))
    found = [{str(path)[len(str(folder)) :] for path in folder.glob(pattern)} for folder in (tmp_path, in_bucket)]
    assert found[0] == found[1]


def test_a_copy_on_disk_is_that_of_what_is_there_now(anywhere):
    path = anywhere / "weights.bin"
    for data in (b"one", b"two"):
        commit(path, lambda made: made.write_bytes(data))  # noqa: B023, runs at once
        assert on_disk(path).read_bytes() == on_disk(str(path)).read_bytes() == data
    assert on_disk(path) == on_disk(path) and on_disk(path).name == path.name


def test_when_files_were_written_is_known_of_all_at_once(anywhere):
    before = time.time()
    for name in ("a.txt", "deep/er/b.txt", "deep/c.txt"):
        commit(anywhere / "folder" / name, lambda made: made.write_bytes(b"1"))
    commit(anywhere / "folder-beside" / "d.txt", lambda made: made.write_bytes(b"1"))
    times = {path: when for path, when in modified(anywhere / "folder").items() if path.suffix}
    assert set(times) == {anywhere / "folder" / name for name in ("a.txt", "deep/er/b.txt", "deep/c.txt")}
    assert all(abs(when - before) < 60 for when in times.values())
    assert modified(anywhere / "nothing") == {}


def test_ray_writes_there_too(anywhere):
    from ray.train._internal.storage import StorageContext

    options = ray_storage(anywhere / "ray")
    context = StorageContext(options.pop("storage_path"), "x", **options)
    context._create_validation_file()
    with context.storage_filesystem.open_output_stream(f"{context.experiment_fs_path}/tuner.pkl") as file:
        file.write(pickle.dumps(1))
    assert pickle.loads((anywhere / "ray" / "x" / "tuner.pkl").read_bytes()) == 1
    assert list((anywhere / "ray" / "x").iterdir())


def test_a_bucket_is_asked_without_coroutines(in_bucket):
    """A process that ends right after one of obstore's is aborted in one of ten tries or so, too seldom for a test."""
    assert not isinstance(in_bucket.fs, AsyncFileSystem)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_bucket_that_fails_now_and_then_loses_nothing_and_writes_nothing_twice(protocol):
    with serve(protocol) as (url, bucket), Faults(url) as faults, faults.of(0, share=0.2) as struck:
        command = [sys.executable, "-c", WRITE, f"{protocol}://{bucket}/faults"]
        led = {**os.environ, **environment(protocol, faults.url)}
        done = subprocess.run(command, env=led, capture_output=True, text=True)
    assert done.stdout == "12 written\n", done.stderr
    assert set(struck) == set(Faults.KINDS)


WRITE = """
import sys
from softlabel.storage import create, location, patiently
from softlabel.store import read_json, write_json

folder = location(sys.argv[1])
for i in range(12):
    write_json(folder / f"{i}.json", {"i": i, "pad": "x" * 20000})
    assert read_json(folder / f"{i}.json")["i"] == i
    lease = folder / f"{i}.lease"
    patiently(lambda: create(lease, b"mine"))
    assert lease.read_bytes() == b"mine" and not patiently(lambda: create(lease, b"other"))
    lease.unlink()
assert len(list(folder.glob("*"))) == 12
print("12 written")
"""


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_bucket_that_is_not_there_is_said_without_a_secret(protocol, request):
    request.getfixturevalue(protocol)
    path, why = location(f"{protocol}://no-such-bucket/x"), {"az": "ContainerNotFound"}.get(protocol, "NoSuchBucket")
    for write in (partial(write_json, path), path.write_text, lambda text: create(path, text.encode())):
        with pytest.raises(StorageError, match=rf"{path} cannot be used \({why}: .* check the") as error:
            write("x")
        assert "PLANTED" not in str(error.value) and SECRETS[protocol] not in str(error.value)


@pytest.fixture
def refusing():
    """A server that answers all with that status and, as S3 does, why; it counts nothing and keeps nothing."""

    class Handler(BaseHTTPRequestHandler):
        status = 403
        head = None

        def do_HEAD(self):
            self.send_response(self.head or self.status)
            self.send_header("Content-Length", "1000")
            self.send_header("ETag", '"1"')
            self.send_header("Last-Modified", "Mon, 30 Nov 2026 00:00:00 GMT")
            self.end_headers()

        def do_GET(self):
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            data = b"<Error><Code>AccessDenied</Code><Message>no</Message></Error>" if self.status == 403 else b""
            if self.command == "POST":  # to delete several
                data = data or b"<DeleteResult><Deleted><Key>x</Key></Deleted></DeleteResult>"
            self.send_response(self.status)
            self.send_header("Content-Length", str(len(data)))
            self.send_header("ETag", '"1"')
            self.end_headers()
            self.wfile.write(data)

        do_PUT = do_POST = do_DELETE = do_GET

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with pytest.MonkeyPatch.context() as patch:
        for key, value in environment("s3", f"http://127.0.0.1:{server.server_port}").items():
            patch.setenv(key, value)
        yield Handler
    server.shutdown()
    server.server_close()


def test_what_is_refused_is_never_taken_for_missing_or_broken(refusing):
    path = location(f"s3://refused-{uuid.uuid4().hex}/x")
    ways = (read_json, read_table, on_disk, Path.is_file, lambda path: path.write_text("x"), remove_tree)
    for way in (path.is_file if way is Path.is_file else partial(way, path) for way in ways):
        with pytest.raises(StorageError, match=r"cannot be used .*check the bucket's name, the credentials"):
            way()
    with pytest.raises(StorageError, match="cannot be used"), opened(path):
        pass


def test_nor_is_what_fails_once_it_is_open(refusing):
    path = location(f"s3://refused-{uuid.uuid4().hex}/x")
    refusing.head = 200
    for read in (file_digest, read_table, lambda path: opened(path).__enter__()):
        with pytest.raises(StorageError, match="cannot be used"):
            read(path)


def test_a_server_that_keeps_to_no_condition_is_found_out(refusing, s3):
    refusing.status = 200
    assert not has_conditions(location(f"s3://any-{uuid.uuid4().hex}"))


class Careless(Forwarding):
    """A server that ignores If-Match."""

    def _asked(self, headers):
        return {key: value for key, value in headers.items() if key.lower() != "if-match"}


def test_a_server_that_replaces_what_has_changed_is_found_out(monkeypatch):
    with serve("s3") as (url, bucket), Proxy(url, Careless) as careless:
        for key, value in environment("s3", careless.url).items():
            monkeypatch.setenv(key, value)
        assert not has_conditions(location(f"s3://{bucket}"))


def test_a_bucket_that_is_away_for_a_moment_at_the_start_ends_no_run(in_bucket, monkeypatch):
    answers = [StorageError("not there just now"), StorageError("nor now")]

    def creating(*asked):
        if answers:
            raise answers.pop()
        return create(*asked)

    monkeypatch.setattr(storage, "create", creating)
    assert has_conditions(in_bucket) and not answers


def test_a_server_that_keeps_to_conditions_is_trusted(in_bucket):
    assert has_conditions(in_bucket) and not in_bucket.exists()
