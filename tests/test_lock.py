"""Claims about the lock of a run directory on a file system. (Leases: test_object_store.py.)"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
from commands import Holder, classified, classifier, snapshot

import raycurv
from raycurv.files import lock
from raycurv.files.lock import NAME, hold
from raycurv.files.store import Store

ROWS = classified(7)
FIT: dict[str, Any] = {"objective": "classification", "address": "none", "quiet": True}


def refused(store: Store) -> str:
    with pytest.raises(raycurv.UserError) as caught, hold(store, "another job"):
        pass
    return str(caught.value)


def test_a_second_process_is_refused_and_the_first_unharmed(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "run"))
    with Holder(tmp_path / "run") as holder:
        text = refused(store)
        assert f"--out {store.root}: expected a directory that no other job works on" in text
        assert f"fit.py in process {holder.pid} on {os.uname().nodename}, since 20" in text
        assert holder.tell("write") == "written"
        assert holder.pid == json.loads((tmp_path / "run" / NAME).read_text())["pid"]
        assert holder.tell("end") == "ended"
        with hold(store, "another job"):
            assert (tmp_path / "run" / "written").exists()
    assert os.listdir(tmp_path / "run") == ["written"]


def test_a_killed_process_holds_nothing_and_neither_do_its_children(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    with Holder(tmp_path) as holder:
        children = [int(pid) for pid in holder.tell("spawn").split()]
        try:
            assert str(holder.pid) in refused(store)
            holder.signal(signal.SIGKILL)
            assert (tmp_path / NAME).exists()
            for pid in children:
                os.kill(pid, 0)
            with hold(store, "another job"):
                pass
        finally:
            for pid in children:
                os.kill(pid, signal.SIGKILL)
    assert not os.listdir(tmp_path)


def test_a_process_cannot_hold_a_directory_twice(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "run")
    for again in (str(tmp_path / "run"), (tmp_path / "run").as_uri(), str(tmp_path / "link")):
        with hold(Store(str(tmp_path / "run")), "fit.py"):
            assert f"fit.py in process {os.getpid()}" in refused(Store(again))
            with hold(Store(str(tmp_path / "other")), "fit.py"):
                pass
    assert os.listdir(tmp_path) == ["link"]


def test_what_was_left_behind_locks_nothing(tmp_path: Path) -> None:
    for text in ("", "{", "[1]", '{"pid": 1}'):
        (tmp_path / NAME).write_text(text)
        with hold(Store(str(tmp_path)), "fit.py"):
            assert json.loads((tmp_path / NAME).read_text())["pid"] == os.getpid()
            (tmp_path / NAME).write_text(text)
            assert "got one that another job has just taken" in refused(Store(str(tmp_path)))
        assert not (tmp_path / NAME).exists()


@pytest.mark.parametrize("sees_through", [True, False])
def test_a_file_that_was_deleted_meanwhile_is_not_the_lock(
    sees_through: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(str(tmp_path))
    flock, calls = fcntl.flock, []

    def late(file: int, how: int) -> None:
        calls.append(file)
        if len(calls) == 1:  # another job comes and goes between opening and locking
            (tmp_path / NAME).unlink()
        flock(file, how)

    monkeypatch.setattr(fcntl, "flock", late)
    if not sees_through:
        monkeypatch.setattr(lock, "_same", lambda file, path: True)
    with hold(store, "fit.py"):
        if sees_through:
            assert str(os.getpid()) in refused(store)
        else:
            with hold(store, "fit.py"):
                pass


def test_one_of_many_at_a_time(tmp_path: Path) -> None:
    inside, most, turns = 0, 0, 0
    mutex = threading.Lock()

    def work() -> None:
        nonlocal inside, most, turns
        for _ in range(200):
            try:
                with hold(Store(str(tmp_path / "run")), "fit.py"):
                    with mutex:
                        inside += 1
                        turns += 1
                        most = max(most, inside)
                    with mutex:
                        inside -= 1
            except raycurv.UserError:
                pass

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1 and turns > 20
    assert not (tmp_path / "run" / NAME).exists()


def test_where_no_file_can_be_made_the_job_says_so_itself(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with hold(Store(str(tmp_path / "file" / "run")), "fit.py"):
        pass
    assert (tmp_path / "file").read_text() == ""


def test_a_file_system_without_locks_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(file: int, how: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    with (
        pytest.warns(RuntimeWarning, match="cannot be locked .*no other job writes"),
        hold(Store(str(tmp_path)), "fit.py"),
    ):
        pass


# Jobs


def test_jobs_are_refused_on_a_directory_that_is_held(tmp_path: Path) -> None:
    run, scores = tmp_path / "run", tmp_path / "scores"
    fitted = raycurv.fit(classifier, ROWS, run, **FIT)
    assert not (run / NAME).exists()
    settings: dict[str, Any] = {"address": "none", "quiet": True}
    with hold(Store(str(run)), "fit.py"), hold(Store(str(scores)), "influence.py"):
        before = snapshot(tmp_path)
        with pytest.raises(raycurv.UserError, match=rf"fit\.py in process {os.getpid()}"):
            raycurv.fit(classifier, ROWS, run, **FIT)
        with pytest.raises(raycurv.UserError, match=r"influence\.py in process"):
            fitted.influence(ROWS[:2], ROWS, scores, **settings)
        assert snapshot(tmp_path) == before
        # Reading needs no lock; making a part of the run again does.
        assert raycurv.open(run).blocks().num_rows == 3
        assert len(fitted.influence(ROWS[:2], ROWS, tmp_path / "more", **settings).table()) == 14
        (run / "data" / "corpus.json").unlink()
        with pytest.raises(raycurv.UserError, match=rf"--run {run}: .*fit\.py in process"):
            fitted.influence(ROWS[:2], ROWS, tmp_path / "yet more", **settings)
    fitted.influence(ROWS[:2], ROWS, scores, **settings)
    assert (run / "data" / "corpus.json").exists()
    assert not list(tmp_path.rglob(NAME))


def test_a_mistake_leaves_no_directory(tmp_path: Path) -> None:
    with pytest.raises(raycurv.UserError):
        raycurv.fit(str(tmp_path / "no model"), ROWS, tmp_path / "run", **FIT)
    assert not os.listdir(tmp_path)
