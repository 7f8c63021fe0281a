"""The ledger's file: its tables, states and errors. What is done with them is in `ledger`."""

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

FILE = "ledger.sqlite"
SCHEMA_VERSION = 1
STATES = ("issued", "completed", "trained", "discarded", "rolled_back")
LIVE = ("issued", "completed", "trained")
REASONS = ("filtered", "stale", "cancelled")
LOCK_WAIT_S = 5.0

# The index and the check make the database itself refuse what an audit would find.
SCHEMA = f"""
CREATE TABLE groups (
    group_index INTEGER NOT NULL, attempt INTEGER NOT NULL, state TEXT NOT NULL,
    run_attempt INTEGER NOT NULL, seed INTEGER, actor TEXT NOT NULL DEFAULT '',
    min_version INTEGER, max_version INTEGER, reward REAL, tokens INTEGER,
    step INTEGER, reason TEXT, issued_at REAL, completed_at REAL, ended_at REAL,
    PRIMARY KEY (group_index, attempt),
    CHECK (group_index >= 0 AND state IN {STATES}
        AND (state <> 'trained' OR step IS NOT NULL)
        AND (state <> 'discarded' OR (reason IS NOT NULL AND reason IN {REASONS})))
) STRICT, WITHOUT ROWID;
CREATE UNIQUE INDEX one_live_attempt ON groups (group_index) WHERE state IN {LIVE};
CREATE TABLE commits (
    step INTEGER NOT NULL, run_attempt INTEGER NOT NULL, policy_version INTEGER NOT NULL,
    time REAL NOT NULL, rolled_back INTEGER NOT NULL DEFAULT 0,
    PRIMARY KEY (step, run_attempt)
) STRICT;
CREATE TABLE runs (
    run_attempt INTEGER PRIMARY KEY, step INTEGER NOT NULL, rolled_back INTEGER NOT NULL,
    time REAL NOT NULL
) STRICT;
"""


class LedgerError(Exception):
    """Raised when a change would lose or repeat work, or the file is not a readable ledger."""


def check_version(path: Path, version: int) -> None:
    if version != SCHEMA_VERSION:
        raise LedgerError(
            f"{path} has schema version {version}, and this version reads {SCHEMA_VERSION}: "
            "use the version that wrote it"
        )


@contextmanager
def reporting(path: Path) -> Iterator[None]:
    """Say what a SQLite error means here, and what to do."""
    try:
        yield
    except (sqlite3.IntegrityError, sqlite3.ProgrammingError):
        raise  # ours to fix, not the user's
    except sqlite3.OperationalError as error:
        if error.sqlite_errorcode & 0xFF in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            raise LedgerError(
                f"{path} is locked by another process: a run has one conductor; stop the other"
            ) from error
        raise LedgerError(f"{path}: {error}; check the disk's space and permissions") from error
    except sqlite3.DatabaseError as error:
        raise LedgerError(
            f"{path} is not a readable ledger ({error}): move it away to go on from the newest "
            "checkpoint without the history"
        ) from error
