"""One writer: living holders refuse, dead ones give way, and nobody else's lock is removed."""

from __future__ import annotations

import errno
import json
import os
import threading
import time

import pytest

from moetrain.checkpoint import lock
from moetrain.checkpoint.lock import NAME, TURN, RunLock

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
    """A lock of another host whose last heartbeat is `age_s` ago, put in place as a whole."""
    holder = {**lock._whoami(), "host": "far-away", "pid": 4321, **changes}
    draft = path / "draft"
    draft.write_text(json.dumps(holder))
    os.utime(draft, (time.time() - age_s,) * 2)
    os.replace(draft, path / NAME)


def test_a_living_holder_is_named_and_the_lock_is_released(tmp_path):
    run = tmp_path / "run"
    with RunLock(run) as held:
        assert held.held()
        with pytest.raises(ValueError, match=rf"in use by pid {os.getpid()} on host {lock._whoami()['host']}"):
            RunLock(run).__enter__()
        assert _in_child(RunLock(run).__enter__)[1] == 3
        assert held.held()
    assert not held.held()
    assert [path.name for path in run.iterdir()] == [TURN]
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
        deadline = time.monotonic() + 60
        while (tmp_path / NAME).stat().st_mtime < 2 and time.monotonic() < deadline:
            time.sleep(0.02)
        assert (tmp_path / NAME).stat().st_mtime > 2
        _foreign(tmp_path, age_s=1000)
        assert not held.held()
        time.sleep(0.3)
        assert (tmp_path / NAME).stat().st_mtime < time.time() - 900  # not kept alive for somebody else
    assert (tmp_path / NAME).exists()  # nor removed


def test_a_beat_that_comes_late_keeps_no_other_lock_alive(tmp_path, monkeypatch):
    touch = os.utime

    def taken_over_before(target):
        monkeypatch.setattr(os, "utime", touch)
        _foreign(tmp_path, age_s=1000)
        touch(target)

    with RunLock(tmp_path) as held:
        monkeypatch.setattr(os, "utime", taken_over_before)
        held._touch()
        assert (tmp_path / NAME).stat().st_mtime < time.time() - 900
        assert not held._touch()


def _race(run_dir, contenders):
    """The number of winners among processes that all find a dead holder; a winner lives until everybody has looked."""
    (ready, go), (wait, over), (result, say) = os.pipe(), os.pipe(), os.pipe()
    children = []
    for _ in range(contenders):
        child = os.fork()
        if child == 0:
            os.close(go)
            os.close(over)
            os.read(ready, 1)  # until the parent lets go
            try:
                RunLock(run_dir).__enter__()
            except ValueError:
                os.write(say, b"L")
                os._exit(0)
            except BaseException:
                os.write(say, b"E")
                os._exit(0)
            os.write(say, b"W")
            os.read(wait, 1)
            os._exit(0)
        children.append(child)
    for end in (ready, wait, say, go):
        os.close(end)
    said = b""
    while len(said) < contenders:
        said += os.read(result, contenders)
    os.close(over)
    os.close(result)
    for child in children:
        os.waitpid(child, 0)
    assert b"E" not in said
    return said.count(b"W")


def _no_locks(*args):
    raise OSError("this file system has no locks")


@pytest.mark.parametrize("turns", [True, False])
def test_of_many_that_find_a_dead_holder_one_wins(tmp_path, turns, monkeypatch):
    if not turns:
        monkeypatch.setattr(lock.fcntl, "flock", _no_locks)
        monkeypatch.setattr(lock, "SETTLE_S", 0.1)
    for _ in range(10 if turns else 5):
        _foreign(tmp_path, age_s=1000)
        assert _race(tmp_path, 4) == 1
        (tmp_path / NAME).unlink()


def test_a_late_evictor_never_replaces_a_third_ones_lock(tmp_path, monkeypatch):
    """Without turns: B judged the dead holder before A took over, C comes while B holds A's file aside."""
    monkeypatch.setattr(lock.fcntl, "flock", _no_locks)
    monkeypatch.setattr(lock, "SETTLE_S", 0.0)
    a, b, c = RunLock(tmp_path), RunLock(tmp_path), RunLock(tmp_path)
    _foreign(tmp_path, age_s=1000)
    plain_lives, plain_rename = lock.RunLock._lives, os.rename

    def judged_then_a_takes_over(self, holder):
        monkeypatch.setattr(lock.RunLock, "_lives", plain_lives)
        (tmp_path / NAME).unlink()
        a.__enter__()
        return False

    def c_comes_in_between(source, target):
        monkeypatch.setattr(os, "rename", plain_rename)
        plain_rename(source, target)
        c.__enter__()

    monkeypatch.setattr(lock.RunLock, "_lives", judged_then_a_takes_over)
    monkeypatch.setattr(os, "rename", c_comes_in_between)
    with pytest.raises(ValueError, match="in use"):
        b.__enter__()
    assert [x.held() for x in (a, b, c)] == [False, False, True]  # A finds out when it has settled, or by its heartbeat
    for x in (a, b, c):
        x.release()


def test_who_loses_the_lock_is_told(tmp_path):
    lost = threading.Event()
    with RunLock(tmp_path, expiry_s=0.2, on_lost=lost.set):
        _foreign(tmp_path, age_s=0)
        assert lost.wait(60)


def test_a_restarted_run_waits_for_its_predecessor_on_another_host(tmp_path):
    _foreign(tmp_path, age_s=0)
    with pytest.raises(ValueError, match="in use by pid 4321 on host far-away"):
        RunLock(tmp_path).__enter__()
    with RunLock(tmp_path, expiry_s=1.0, wait_s=120) as held:
        assert held.held()


def test_drafts_of_killed_processes_are_swept(tmp_path):
    draft = tmp_path / f".{NAME}.0123abcd"
    draft.write_text("")
    os.utime(draft, (time.time() - 1000,) * 2)
    with RunLock(tmp_path):
        assert not draft.exists()


@pytest.mark.parametrize("folder", ["file", "file/below"])
def test_a_directory_that_cannot_be_written_is_the_users_to_change(folder, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=f"{folder} cannot be written to .*choose another directory"):
        RunLock(tmp_path / folder).__enter__()


def test_without_hard_links_there_still_is_one_writer(tmp_path, monkeypatch):
    def refused(*_):
        raise OSError(errno.EPERM, "no hard links here")

    monkeypatch.setattr(os, "link", refused)
    with RunLock(tmp_path) as held:
        assert held.held()
        with pytest.raises(ValueError, match="in use by pid"):
            RunLock(tmp_path).__enter__()
    _foreign(tmp_path, 100)
    with RunLock(tmp_path) as held:
        assert held.held()
