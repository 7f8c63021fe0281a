"""The head's state on disk, so that a daemon that was killed finds its jobs and actors again.

One SQLite file in the state directory, readable by its owner only, in WAL mode with
synchronous=NORMAL: what was written survives the daemon's death, and the last moments may be lost
with the machine's (the actors would be gone too). One process writes; the daemon's lock sees to
that. Small rows and short calls, made from the daemon's loop. What a job has trained is not
here but in its run directory's ledger.
"""

import json
import logging
import os
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

from flowd.errors import FlowdError

log = logging.getLogger(__name__)

FILE = "flowd.sqlite"
SCHEMA_VERSION = 1
APPLICATION_ID = 0x666C6F77  # "flow": tells our file from any other SQLite database
EVENTS_KEPT = 20_000
EVENTS_SLACK = 500  # pruned in one go, so that most inserts are one row
LOCK_WAIT_S = 0.2  # a reader's checkpoint may hold the file for a moment, never long

SCHEMA = """
CREATE TABLE jobs (
    name TEXT PRIMARY KEY, state TEXT NOT NULL, config TEXT NOT NULL, created REAL NOT NULL,
    attempt INTEGER NOT NULL, error TEXT
) STRICT;
CREATE TABLE actors (
    job TEXT NOT NULL, name TEXT NOT NULL, kind TEXT NOT NULL, epoch INTEGER NOT NULL,
    pid INTEGER, start_time REAL, node TEXT NOT NULL, devices TEXT NOT NULL, state TEXT NOT NULL,
    restarts INTEGER NOT NULL, address TEXT NOT NULL,
    PRIMARY KEY (job, name)
) STRICT;
CREATE TABLE events (
    id INTEGER PRIMARY KEY AUTOINCREMENT, time REAL NOT NULL, job TEXT, actor TEXT,
    kind TEXT NOT NULL, data TEXT NOT NULL
) STRICT;
CREATE INDEX events_of_job ON events (job, id);
CREATE TABLE documents (name TEXT PRIMARY KEY, data TEXT NOT NULL) STRICT;
"""


class StoreError(FlowdError):
    """Raised when the state file is locked, damaged, from another version or not ours."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JobRow:
    """A job that was submitted. attempt: how often it was rolled back; created: seconds (epoch)."""

    name: str
    state: str
    config: str  # the resolved job.toml
    created: float
    attempt: int = 0
    error: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ActorRow:
    """An actor process. pid and start_time together name a process; both None before it starts.

    epoch: counts the starts of this actor name    address: where it listens, "" before it does
    """

    job: str
    name: str
    kind: str
    epoch: int
    node: str
    state: str
    pid: int | None = None
    start_time: float | None = None
    devices: tuple[str, ...] = ()
    restarts: int = 0
    address: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class EventRow:
    """Something that happened. id grows without gaps being filled; time: seconds (epoch)."""

    id: int
    time: float
    job: str | None
    actor: str | None
    kind: str
    data: dict[str, Any] = field(default_factory=dict)


@contextmanager
def noting() -> Iterator[None]:
    """Log what the store raises: a full disk must not keep flowd from ending and stopping what it runs."""
    try:
        yield
    except StoreError as error:
        log.error("state was not saved: %s", error)


class Store:
    """Typed access to the state file. Synchronous; raises StoreError for whatever SQLite reports.

    events_kept: how many events stay; older ones go
    """

    def __init__(self, state_dir: Path, *, events_kept: int = EVENTS_KEPT) -> None:
        self.path = state_dir / FILE
        self._events_kept = events_kept
        state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        # Made here, because SQLite would give it the umask's mode; -wal and -shm copy this one.
        os.close(os.open(self.path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600))
        os.chmod(self.path, 0o600)
        self._db = sqlite3.connect(self.path, timeout=LOCK_WAIT_S, isolation_level=None)
        try:
            with self._reporting():
                self._prepare()
        except BaseException:
            self._db.close()
            raise

    def close(self) -> None:
        """Close the file; the next process finds it without a WAL."""
        self._db.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Everything written inside becomes visible at once, or nothing of it does."""
        with self._reporting():
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
            except BaseException:
                self._db.execute("ROLLBACK")
                raise
            self._db.execute("COMMIT")

    # Jobs.

    def put_job(self, job: JobRow) -> None:
        """Insert a job, or replace the row of that name."""
        self._put("jobs", asdict(job))

    def set_job(
        self, name: str, *, state: str, error: str | None = None, attempt: int | None = None
    ) -> None:
        """Change a job's state. error replaces what was there; attempt stays unless given."""
        done = self._run(
            "UPDATE jobs SET state = ?, error = ?, attempt = coalesce(?, attempt) WHERE name = ?",
            (state, error, attempt, name),
        )
        if not done.rowcount:
            raise KeyError(f"no job {name!r} in {self.path}: put_job comes first")

    def job(self, name: str) -> JobRow | None:
        """One job, or None."""
        return next(iter(self._jobs("WHERE name = ?", (name,))), None)

    def jobs(self) -> list[JobRow]:
        """All jobs, oldest first."""
        return self._jobs("", ())

    def remove_job(self, name: str) -> None:
        """Forget a job and its actors; its events stay until they are pruned."""
        with self.transaction():
            self._db.execute("DELETE FROM jobs WHERE name = ?", (name,))
            self._db.execute("DELETE FROM actors WHERE job = ?", (name,))

    # Actors.

    def put_actor(self, actor: ActorRow) -> None:
        """Insert an actor, or replace the row of that job and name."""
        self._put("actors", {**asdict(actor), "devices": json.dumps(actor.devices)})

    def actors(self, job: str | None = None) -> list[ActorRow]:
        """The actors of one job, or of all, by name."""
        where, arguments = ("", ()) if job is None else ("WHERE job = ?", (job,))
        rows = self._rows(f"SELECT * FROM actors {where} ORDER BY job, name", arguments)
        return [
            ActorRow(**{**dict(row), "devices": tuple(json.loads(row["devices"]))}) for row in rows
        ]

    def remove_actor(self, job: str, name: str) -> None:
        """Forget an actor; an unknown one is no error."""
        self._run("DELETE FROM actors WHERE job = ? AND name = ?", (job, name))

    # Documents: the lease table and the plans, which are read and written whole.

    def put_document(self, name: str, data: Mapping[str, Any]) -> None:
        """Save plain data under a name ("leases", "plan/JOB")."""
        self._put("documents", {"name": name, "data": json.dumps(data)})

    def document(self, name: str) -> dict[str, Any] | None:
        """What was saved under a name, or None."""
        rows = self._rows("SELECT data FROM documents WHERE name = ?", (name,))
        return dict(json.loads(rows[0]["data"])) if rows else None

    def remove_document(self, name: str) -> None:
        """Forget what was saved under a name; an unknown one is no error."""
        self._run("DELETE FROM documents WHERE name = ?", (name,))

    # Events.

    def add_event(
        self,
        time: float,
        kind: str,
        *,
        job: str | None = None,
        actor: str | None = None,
        data: Mapping[str, Any] | None = None,
    ) -> int:
        """Write an event and return its id. The oldest beyond the bound go."""
        event_id = self._run(
            "INSERT INTO events (time, job, actor, kind, data) VALUES (?, ?, ?, ?, ?)",
            (time, job, actor, kind, json.dumps(data or {})),
        ).lastrowid
        assert event_id is not None
        if event_id % EVENTS_SLACK == 0:
            self._run("DELETE FROM events WHERE id <= ?", (event_id - self._events_kept,))
        return event_id

    def events(
        self, *, after: int = 0, job: str | None = None, limit: int = 1000
    ) -> list[EventRow]:
        """Events with an id above `after`, oldest first; for following, pass the last id seen."""
        where = "id > ?" if job is None else "id > ? AND job = ?"
        arguments = (after, limit) if job is None else (after, job, limit)
        return self._events(f"WHERE {where} ORDER BY id LIMIT ?", arguments)

    def last_events(self, count: int, job: str | None = None) -> list[EventRow]:
        """The newest events, oldest of them first."""
        where = "" if job is None else "WHERE job = ?"
        arguments = (count,) if job is None else (job, count)
        return self._events(f"{where} ORDER BY id DESC LIMIT ?", arguments)[::-1]

    def _prepare(self) -> None:
        db = self._db
        db.row_factory = sqlite3.Row
        version = db.execute("PRAGMA user_version").fetchone()[0]
        ours = db.execute("PRAGMA application_id").fetchone()[0]
        if not version and not db.execute("SELECT 1 FROM sqlite_master").fetchone():
            db.execute("PRAGMA journal_mode = WAL")
            db.executescript(
                f"BEGIN; {SCHEMA} PRAGMA user_version = {SCHEMA_VERSION};"
                f"PRAGMA application_id = {APPLICATION_ID}; COMMIT;"
            )
        elif ours != APPLICATION_ID:
            raise StoreError(f"{self.path} is another program's database: move it away")
        elif version != SCHEMA_VERSION:
            raise StoreError(
                f"{self.path} has schema version {version}, and this flowd reads version "
                f"{SCHEMA_VERSION}: use the flowd that wrote it, or move the file away "
                "(run directories stay, and jobs can be submitted again)"
            )
        elif (found := db.execute("PRAGMA quick_check(1)").fetchone()[0]) != "ok":
            raise StoreError(self._damaged(found))
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = NORMAL")

    def _jobs(self, where: str, arguments: tuple[str, ...]) -> list[JobRow]:
        rows = self._rows(f"SELECT * FROM jobs {where} ORDER BY created, name", arguments)
        return [JobRow(**dict(row)) for row in rows]

    def _events(self, rest: str, arguments: tuple[Any, ...]) -> list[EventRow]:
        rows = self._rows(f"SELECT * FROM events {rest}", arguments)
        return [EventRow(**{**dict(row), "data": json.loads(row["data"])}) for row in rows]

    def _put(self, table: str, row: Mapping[str, Any]) -> None:
        columns = ", ".join(row)
        places = ", ".join("?" * len(row))
        self._run(
            f"INSERT OR REPLACE INTO {table} ({columns}) VALUES ({places})", tuple(row.values())
        )

    def _run(self, sql: str, arguments: tuple[Any, ...]) -> sqlite3.Cursor:
        with self._reporting():
            return self._db.execute(sql, arguments)

    def _rows(self, sql: str, arguments: tuple[Any, ...]) -> list[sqlite3.Row]:
        with self._reporting():
            return self._db.execute(sql, arguments).fetchall()

    @contextmanager
    def _reporting(self) -> Iterator[None]:
        """Say what a SQLite error means here, and what to do."""
        try:
            yield
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
                raise StoreError(
                    f"{self.path} is locked by another process: a state directory belongs to one "
                    "flowd; stop the other, or use another --state-dir"
                ) from error
            raise StoreError(
                f"{self.path}: {error}; check the disk's space and the directory's permissions"
            ) from error
        except sqlite3.DatabaseError as error:
            if isinstance(error, sqlite3.IntegrityError | sqlite3.ProgrammingError):
                raise  # ours to fix, not the user's
            raise StoreError(self._damaged(str(error))) from error

    def _damaged(self, what: str) -> str:
        return (
            f"{self.path} is damaged ({what}): move it away and start again; run directories "
            "keep their checkpoints and ledgers, and their jobs can be submitted again"
        )
