"""One driver per store: a living one is respected, a dead one is succeeded, by one newcomer only."""

import errno
import json
import os
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from softlabel import lease as lease_module
from softlabel.errors import StoreError
from softlabel.lease import LEASE, Lease

FAST = {"beat_s": 0.05, "dead_after_s": 0.5}


def write_lease(folder, **changes):
    lease = {"id": "other", "host": "elsewhere", "pid": 1, "beat": 3, **changes}
    (folder / LEASE).write_text(json.dumps(lease))


def left(folder):
    """What is in a folder; a bucket has none that is empty."""
    return list(folder.iterdir()) if folder.exists() else []


def test_a_lease_is_there_while_it_is_held(anywhere):
    with Lease(anywhere / "store", **FAST) as lease:
        found = json.loads((anywhere / "store" / LEASE).read_text())
        assert (found["host"], found["pid"]) == (socket.gethostname(), os.getpid())
        lease.check()
    assert left(anywhere / "store") == []


def test_it_goes_when_the_run_fails(anywhere):
    with pytest.raises(RuntimeError), Lease(anywhere, **FAST):
        raise RuntimeError
    assert left(anywhere) == []


def test_a_living_holder_is_named_and_not_disturbed(anywhere):
    with Lease(anywhere, **FAST) as first:
        message = rf"is being written by process {os.getpid()} on {socket.gethostname()}: wait for it or stop it"
        with pytest.raises(StoreError, match=message), Lease(anywhere, **FAST):
            pytest.fail("two drivers on one store")
        first.check()
        assert (anywhere / LEASE).exists()


def test_a_lease_that_stands_still_is_taken_over(anywhere):
    write_lease(anywhere)
    with Lease(anywhere, **FAST):
        assert json.loads((anywhere / LEASE).read_text())["pid"] == os.getpid()


def test_a_share_that_is_away_for_a_moment_costs_no_lease(anywhere, monkeypatch):
    failed, tagged, read = threading.Event(), lease_module._tagged, lease_module._read

    def failing(path):
        if not failed.is_set():
            failed.set()
            raise OSError(errno.ESTALE, "stale file handle")
        return tagged(path)

    with Lease(anywhere, **FAST) as lease:
        monkeypatch.setattr(lease_module, "_tagged", failing)
        assert failed.wait(30)
        beat = read(anywhere / LEASE)["beat"]
        for _ in range(600):
            if read(anywhere / LEASE)["beat"] > beat:
                break
            threading.Event().wait(0.05)
        assert read(anywhere / LEASE)["beat"] > beat
        lease.check()


def test_an_answer_that_is_long_on_its_way_is_no_death(tmp_path, monkeypatch):
    """As where a bucket is away for both: the holder could not write either."""
    write_lease(tmp_path)
    asked, tagged = [], lease_module._tagged

    def slow(path):
        asked.append(path)
        if len(asked) == 3:
            threading.Event().wait(3 * FAST["dead_after_s"])
        if len(asked) == 5:
            write_lease(tmp_path, beat=4)
        return tagged(path)

    monkeypatch.setattr(lease_module, "_tagged", slow)
    with pytest.raises(StoreError, match="is being written by process 1 on elsewhere"), Lease(tmp_path, **FAST):
        pass


def test_a_lost_lease_is_not_removed_before_anybody_noticed(anywhere):
    with Lease(anywhere, beat_s=600):
        write_lease(anywhere)
    assert json.loads((anywhere / LEASE).read_text())["id"] == "other"


def test_process_numbers_of_another_container_say_nothing(anywhere):
    """No process has that number here, and the host has the same name."""
    write_lease(anywhere, host=socket.gethostname(), pid=2**22 + 1, space="pid:[1]")
    lease = Lease(anywhere)
    assert not lease._died_here(lease_module._read(anywhere / LEASE))
    write_lease(anywhere, **{**lease._owner, "pid": 2**22 + 1})
    assert lease._died_here(lease_module._read(anywhere / LEASE))


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"id": 1}'])
def test_what_is_no_lease_stands_still(anywhere, text):
    (anywhere / LEASE).write_text(text)
    with Lease(anywhere, **FAST):
        pass
    assert left(anywhere) == []


HOLD_FOR_EVER = """
import signal, sys
from softlabel.lease import Lease
from softlabel.storage import location

with Lease(location(sys.argv[1]), beat_s=0.05):
    print("held", flush=True)
    signal.pause()
"""


def test_a_holder_killed_on_this_machine_is_succeeded_at_once(anywhere):
    command = [sys.executable, "-c", HOLD_FOR_EVER, str(anywhere)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        try:
            assert holder.stdout.readline() == "held\n"
            with pytest.raises(StoreError, match=f"process {holder.pid} "), Lease(anywhere, **FAST):
                pass
        finally:
            holder.kill()
    with Lease(anywhere, beat_s=0.05, dead_after_s=600):  # does not wait for that
        pass


def test_of_many_newcomers_one_succeeds_a_dead_holder(anywhere):
    write_lease(anywhere)
    together, all_answered = threading.Barrier(8), threading.Barrier(8)

    def come(_):
        together.wait()
        try:
            with Lease(anywhere, beat_s=0.05, dead_after_s=0.5) as lease:
                all_answered.wait(60)
                lease.check()
                return "held"
        except StoreError:
            all_answered.wait(60)
            return "refused"

    with ThreadPoolExecutor(8) as pool:
        assert sorted(pool.map(come, range(8))) == ["held"] + ["refused"] * 7


def test_a_holder_that_was_taken_for_dead_stops(anywhere):
    with Lease(anywhere, **FAST) as lease:
        write_lease(anywhere, pid=77)
        lease._thread.join(30)
        with pytest.raises(StoreError, match="taken over by process 77 on elsewhere"):
            lease.check()
    assert json.loads((anywhere / LEASE).read_text())["pid"] == 77  # it is not ours to remove
