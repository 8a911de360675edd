"""One driver per store: a living one is respected, a dead one is succeeded, by one newcomer only."""

import errno
import json
import multiprocessing
import os
import signal
import socket
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


def test_a_lease_is_there_while_it_is_held(tmp_path):
    with Lease(tmp_path / "store", **FAST) as lease:
        found = json.loads((tmp_path / "store" / LEASE).read_text())
        assert (found["host"], found["pid"]) == (socket.gethostname(), os.getpid())
        lease.check()
    assert list((tmp_path / "store").iterdir()) == []


def test_it_goes_when_the_run_fails(tmp_path):
    with pytest.raises(RuntimeError), Lease(tmp_path, **FAST):
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_a_living_holder_is_named_and_not_disturbed(tmp_path):
    with Lease(tmp_path, **FAST) as first:
        message = rf"is being written by process {os.getpid()} on {socket.gethostname()}: wait for it or stop it"
        with pytest.raises(StoreError, match=message), Lease(tmp_path, **FAST):
            pytest.fail("two drivers on one store")
        first.check()
        assert (tmp_path / LEASE).exists()


def test_a_lease_that_stands_still_is_taken_over(tmp_path):
    write_lease(tmp_path)
    with Lease(tmp_path, **FAST):
        assert json.loads((tmp_path / LEASE).read_text())["pid"] == os.getpid()


def test_a_share_that_is_away_for_a_moment_costs_no_lease(tmp_path, monkeypatch):
    failed, read = threading.Event(), lease_module._read

    def failing(path):
        if not failed.is_set():
            failed.set()
            raise OSError(errno.ESTALE, "stale file handle")
        return read(path)

    with Lease(tmp_path, **FAST) as lease:
        monkeypatch.setattr(lease_module, "_read", failing)
        assert failed.wait(30)
        beat = read(tmp_path / LEASE)["beat"]
        for _ in range(600):
            if read(tmp_path / LEASE)["beat"] > beat:
                break
            threading.Event().wait(0.05)
        assert read(tmp_path / LEASE)["beat"] > beat
        lease.check()


def test_a_lost_lease_is_not_removed_before_anybody_noticed(tmp_path):
    with Lease(tmp_path, beat_s=600):
        write_lease(tmp_path)
    assert json.loads((tmp_path / LEASE).read_text())["id"] == "other"


def test_process_numbers_of_another_container_say_nothing(tmp_path):
    """No process has that number here, and the host has the same name."""
    write_lease(tmp_path, host=socket.gethostname(), pid=2**22 + 1, space="pid:[1]")
    lease = Lease(tmp_path)
    assert not lease._died_here(lease_module._read(tmp_path / LEASE))
    write_lease(tmp_path, **{**lease._owner, "pid": 2**22 + 1})
    assert lease._died_here(lease_module._read(tmp_path / LEASE))


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"id": 1}'])
def test_what_is_no_lease_stands_still(tmp_path, text):
    (tmp_path / LEASE).write_text(text)
    with Lease(tmp_path, **FAST):
        pass
    assert list(tmp_path.iterdir()) == []


def _hold_for_ever(folder, held):
    with Lease(folder, **FAST):
        held.set()
        signal.pause()


def test_a_holder_killed_on_this_machine_is_succeeded_at_once(tmp_path):
    context = multiprocessing.get_context("fork")
    held = context.Event()
    holder = context.Process(target=_hold_for_ever, args=(tmp_path, held))
    holder.start()
    assert held.wait(30)
    with pytest.raises(StoreError, match=f"process {holder.pid} "), Lease(tmp_path, **FAST):
        pass
    holder.kill()
    holder.join()
    with Lease(tmp_path, beat_s=0.05, dead_after_s=600):  # does not wait for that
        pass


def test_of_many_newcomers_one_succeeds_a_dead_holder(tmp_path):
    write_lease(tmp_path)
    together, all_answered = threading.Barrier(8), threading.Barrier(8)

    def come(_):
        together.wait()
        try:
            with Lease(tmp_path, beat_s=0.05, dead_after_s=0.5) as lease:
                all_answered.wait(60)
                lease.check()
                return "held"
        except StoreError:
            all_answered.wait(60)
            return "refused"

    with ThreadPoolExecutor(8) as pool:
        assert sorted(pool.map(come, range(8))) == ["held"] + ["refused"] * 7


def test_a_holder_that_was_taken_for_dead_stops(tmp_path):
    with Lease(tmp_path, **FAST) as lease:
        write_lease(tmp_path, pid=77)
        lease._thread.join(30)
        with pytest.raises(StoreError, match="taken over by process 77 on elsewhere"):
            lease.check()
    assert json.loads((tmp_path / LEASE).read_text())["pid"] == 77  # it is not ours to remove
