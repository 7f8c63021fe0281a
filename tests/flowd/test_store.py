"""The head's state on disk."""

import os
import sqlite3
import stat
import subprocess
import sys
import time
from dataclasses import replace

import pytest

from flowd.leases import LeaseTable
from flowd.store import EVENTS_SLACK, FILE, ActorRow, EventRow, JobRow, Store, StoreError

JOB = JobRow(name="toy", state="running", config="[job]\n", created=1.5)
ACTOR = ActorRow(
    job="toy",
    name="trainer-0",
    kind="trainer",
    epoch=2,
    node="n0",
    state="ready",
    pid=123,
    start_time=1234.5,
    devices=("cpu:0", "cpu:1"),
    restarts=1,
    address="ipc://x",
)


@pytest.fixture
def store(tmp_path):
    with Store(tmp_path) as opened:
        yield opened


def test_rows_come_back_as_they_went_in(tmp_path):
    """Across processes: a second Store reads what the first wrote."""
    with Store(tmp_path) as first:
        first.put_job(JOB)
        first.put_job(replace(JOB, name="older", created=1.0))
        first.put_actor(ACTOR)
        first.put_actor(replace(ACTOR, name="env-0", pid=None, start_time=None, devices=()))
        assert first.add_event(7.0, "started", job="toy", actor="env-0", data={"pid": 5}) == 1
    with Store(tmp_path) as second:
        assert [job.name for job in second.jobs()] == ["older", "toy"]
        assert second.job("toy") == JOB
        assert second.job("none") is None
        assert second.actors("toy")[1] == ACTOR
        assert second.actors() == second.actors("toy")
        assert second.actors("older") == []
        assert second.events() == [
            EventRow(id=1, time=7.0, job="toy", actor="env-0", kind="started", data={"pid": 5})
        ]


def test_a_row_of_the_same_name_is_replaced(store):
    """State changes keep one row; an error is kept until the state changes again."""
    store.put_job(JOB)
    store.set_job("toy", state="failed", error="Traceback ...", attempt=3)
    assert store.job("toy") == replace(JOB, state="failed", error="Traceback ...", attempt=3)
    store.set_job("toy", state="running")
    assert store.job("toy") == replace(JOB, attempt=3)
    store.put_actor(ACTOR)
    store.put_actor(replace(ACTOR, epoch=3))
    assert [actor.epoch for actor in store.actors()] == [3]
    with pytest.raises(KeyError, match="no job 'other'"):
        store.set_job("other", state="running")


def test_removing_a_job_takes_its_actors(store):
    """Nothing of it is re-adopted later."""
    store.put_job(JOB)
    store.put_actor(ACTOR)
    store.put_actor(replace(ACTOR, job="b"))
    store.remove_actor("b", "trainer-0")
    store.remove_actor("b", "trainer-0")
    store.remove_job("toy")
    assert (store.jobs(), store.actors()) == ([], [])


def test_a_lease_table_survives(store):
    """Snapshots are documents: read and written whole."""
    leases = LeaseTable({"cpu:0": 100})
    leases.add("a", ["cpu:0"])
    leases.want("a", 0.0)
    assert store.document("leases") is None
    store.put_document("leases", leases.snapshot())
    assert LeaseTable.restore(store.document("leases"), 0.0).holder("cpu:0") == "a"
    store.remove_document("leases")
    assert store.document("leases") is None


def test_events_are_followed_by_id_and_bounded(tmp_path):
    """Old ones go, ids are never used again, and one job's can be told apart."""
    with Store(tmp_path, events_kept=100) as store:
        with store.transaction():
            for number in range(2 * EVENTS_SLACK):
                store.add_event(float(number), "tick", job="even" if number % 2 == 0 else None)
        kept = store.events()
        assert [event.id for event in kept] == list(
            range(2 * EVENTS_SLACK - 99, 2 * EVENTS_SLACK + 1)
        )
        assert store.events(after=kept[-3].id, limit=1) == [kept[-2]]
        assert len(store.events(job="even")) == 50
        assert store.last_events(2) == kept[-2:]
        assert store.last_events(1, job="even") == [kept[-2]]
        assert store.events(after=kept[-1].id) == []


def test_a_transaction_is_all_or_nothing(store):
    """An exception inside leaves no half of it."""

    def fail_halfway() -> None:
        with store.transaction():
            store.put_job(JOB)
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail_halfway()
    assert store.jobs() == []
    with store.transaction():
        store.put_job(JOB)
        store.put_actor(ACTOR)
    assert len(store.actors()) == 1


def test_only_the_owner_can_read_it(tmp_path):
    """0600 whatever the umask says, WAL and shared memory included."""
    before = os.umask(0)
    try:
        with Store(tmp_path / "state") as store:
            store.put_job(JOB)
            modes = {p.name: stat.S_IMODE(p.stat().st_mode) for p in (tmp_path / "state").iterdir()}
    finally:
        os.umask(before)
    assert set(modes.values()) == {0o600}
    assert FILE + "-wal" in modes
    assert stat.S_IMODE((tmp_path / "state").stat().st_mode) == 0o700


def test_what_was_written_survives_a_kill(tmp_path):
    """kill -9 of the writer right after a call loses nothing of it."""
    code = (
        "import os, pathlib, signal, sys; from flowd.store import *;"
        "s = Store(pathlib.Path(sys.argv[1]));"
        "s.put_job(JobRow(name='toy', state='running', config='', created=0.0));"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], timeout=60)
    assert done.returncode == -9
    with Store(tmp_path) as store:
        assert [job.name for job in store.jobs()] == ["toy"]


def test_a_locked_file_says_who_may_write(tmp_path, store):
    """Another writer is an error with a way out, not a hang."""
    other = sqlite3.connect(tmp_path / FILE, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(StoreError, match=r"is locked by another process: .* --state-dir"):
        store.put_job(JOB)
    other.execute("ROLLBACK")
    other.close()
    store.put_job(JOB)


def test_damaged_foreign_and_newer_files_are_refused(tmp_path):
    """Nothing is overwritten, and the message says what to do."""
    path = tmp_path / FILE
    path.write_bytes(b"this is not a database" * 100)
    with pytest.raises(StoreError, match=r"is damaged .* move it away"):
        Store(tmp_path)
    path.unlink()
    with sqlite3.connect(path) as other:
        other.execute("CREATE TABLE theirs (x)")
    other.close()
    with pytest.raises(StoreError, match="another program's database"):
        Store(tmp_path)
    path.unlink()
    Store(tmp_path).close()
    with sqlite3.connect(path) as other:
        other.execute("PRAGMA user_version = 99")
    other.close()
    with pytest.raises(StoreError, match="schema version 99, and this flowd reads version 1"):
        Store(tmp_path)


def test_damage_inside_the_file_is_found_at_opening(tmp_path):
    """Pages overwritten with garbage are not served as state."""
    with Store(tmp_path) as store:
        for number in range(300):
            store.put_job(replace(JOB, name=f"job-{number}", config="x" * 500))
    path = tmp_path / FILE
    content = bytearray(path.read_bytes())
    content[4096 * 6 : 4096 * 30] = os.urandom(4096 * 24)
    path.write_bytes(content)
    with pytest.raises(StoreError, match="is damaged"):
        Store(tmp_path)


def test_calls_are_short(store):
    """The median call stays well under a millisecond, for it runs on the daemon's loop."""
    store.put_job(JOB)
    calls = {
        "put_actor": lambda: store.put_actor(ACTOR),
        "add_event": lambda: store.add_event(0.0, "tick", job="toy", data={"step": 1}),
        "set_job": lambda: store.set_job("toy", state="running"),
        "actors": lambda: store.actors("toy"),
    }
    for name, call in calls.items():
        taken = []
        for _ in range(200):
            begun = time.perf_counter()
            call()
            taken.append(time.perf_counter() - begun)
        assert sorted(taken)[100] < 1e-3, name
