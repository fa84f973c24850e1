"""One writer: living holders refuse, dead ones give way, and nobody else's lock is removed."""

from __future__ import annotations

import json
import os
import time

import pytest

from moetrain.checkpoint import lock
from moetrain.checkpoint.lock import NAME, RunLock

pytestmark = pytest.mark.unit


def _in_child(action):
    """Run `action` in a forked process; return its pid and exit code (3: ValueError)."""
    child = os.fork()
    if child == 0:
        try:
            action()
        except ValueError:
            os._exit(3)
        except BaseException:
            os._exit(4)
        os._exit(0)
    return child, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _foreign(path, age_s, **changes):
    """A lock of another host whose last heartbeat is `age_s` ago."""
    holder = {**lock._whoami(), "host": "far-away", "pid": 4321, **changes}
    (path / NAME).write_text(json.dumps(holder))
    os.utime(path / NAME, (time.time() - age_s,) * 2)


def test_a_living_holder_is_named_and_the_lock_is_released(tmp_path):
    run = tmp_path / "run"
    with RunLock(run) as held:
        assert held.held()
        with pytest.raises(ValueError, match=rf"in use by pid {os.getpid()} on host {lock._whoami()['host']}"):
            RunLock(run).__enter__()
        assert _in_child(RunLock(run).__enter__)[1] == 3
        assert held.held()
    assert not held.held()
    assert list(run.iterdir()) == []
    held.release()  # harmless
    assert _in_child(RunLock(run).__enter__)[1] == 0


def test_a_killed_holder_on_this_host_gives_way_at_once(tmp_path):
    pid, code = _in_child(RunLock(tmp_path).__enter__)  # os._exit: no release
    assert code == 0
    assert json.loads((tmp_path / NAME).read_text())["pid"] == pid
    with RunLock(tmp_path) as held:
        assert held.held()


def test_a_zombie_and_a_reused_pid_are_dead(tmp_path):
    child = os.fork()
    if child == 0:
        RunLock(tmp_path).__enter__()
        os._exit(0)
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)  # dead, not reaped
    with RunLock(tmp_path) as held:
        assert held.held()
    os.waitpid(child, 0)
    (tmp_path / NAME).write_text(json.dumps({**lock._whoami(), "created": 1.0}))  # our pid, another process
    with RunLock(tmp_path) as held:
        assert held.held()


def test_another_host_is_judged_by_its_heartbeat(tmp_path):
    _foreign(tmp_path, age_s=5)
    with pytest.raises(ValueError, match="in use by pid 4321 on host far-away"):
        RunLock(tmp_path).__enter__()
    _foreign(tmp_path, age_s=61)
    with RunLock(tmp_path) as held:
        assert held.held()
    _foreign(tmp_path, age_s=5, host=lock._whoami()["host"], pids="another container")  # its pids mean nothing here
    with pytest.raises(ValueError, match="in use"):
        RunLock(tmp_path).__enter__()
    (tmp_path / NAME).write_text("{broken")
    with pytest.raises(ValueError, match="pid 0 on host unknown"):
        RunLock(tmp_path).__enter__()


def test_the_heartbeat_beats_and_stops_when_the_lock_is_lost(tmp_path):
    with RunLock(tmp_path, expiry_s=0.2) as held:
        os.utime(tmp_path / NAME, (1, 1))
        deadline = time.time() + 5
        while (tmp_path / NAME).stat().st_mtime < 2 and time.time() < deadline:
            time.sleep(0.02)
        assert (tmp_path / NAME).stat().st_mtime > 2
        _foreign(tmp_path, age_s=1000)
        assert not held.held()
        time.sleep(0.3)
        assert (tmp_path / NAME).stat().st_mtime < time.time() - 900  # not kept alive for somebody else
    assert (tmp_path / NAME).exists()  # nor removed


def test_of_many_that_find_a_dead_holder_one_wins(tmp_path):
    for _ in range(10):
        _foreign(tmp_path, age_s=1000)
        ready, go = os.pipe()
        children = []
        for _ in range(4):
            child = os.fork()
            if child == 0:
                os.close(go)
                os.read(ready, 1)  # until the parent lets go
                try:
                    RunLock(tmp_path).__enter__()
                except ValueError:
                    os._exit(3)
                time.sleep(0.15)  # alive while the others look
                os._exit(0)
            children.append(child)
        os.close(ready)
        os.close(go)
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        assert codes.count(0) == 1, codes
        (tmp_path / NAME).unlink()
