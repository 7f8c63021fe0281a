"""The work ledger: nothing lost, nothing twice. One SQLite file per run, written by the conductor.

A group is issued → completed → trained in a step, or discarded with a reason. What a crash took
back is rolled_back, stays as history, and is issued again as the next attempt of the same index.
The truth about what was trained is the newest manifest (see `manifest`): `reconcile` brings the
ledger in line with it, `audit` proves that both agree. Steps count from 0, and a manifest of step n
contains steps 0 to n - 1.

Progress is written with synchronous=NORMAL: it survives the conductor's death, and the last moments
may be lost with the machine, which `reconcile` repairs. Commits are written with FULL.
Torch-free, synchronous; one call at a time, from whichever thread.
"""

import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

from actors.conductor.group_set import NO_GROUPS
from actors.conductor.ledger_audit import Audit, audit, beginnings
from actors.conductor.ledger_schema import (
    FILE,
    LIVE,
    LOCK_WAIT_S,
    REASONS,
    SCHEMA,
    SCHEMA_VERSION,
    LedgerError,
    check_version,
    reporting,
)
from actors.conductor.manifest import Manifest

__all__ = ["FILE", "Audit", "Ledger", "LedgerError", "audit", "beginnings"]

_CURRENT = (
    "NOT EXISTS (SELECT 1 FROM groups AS later "
    "WHERE later.group_index = g.group_index AND later.attempt > g.attempt)"
)


class Ledger:
    """The ledger of one run, open for writing. clock: seconds since the epoch, for the records."""

    def __init__(self, path: Path, *, clock: Callable[[], float] = time.time) -> None:
        self._path = path
        self._clock = clock
        self._db = sqlite3.connect(
            path, timeout=LOCK_WAIT_S, isolation_level=None, check_same_thread=False
        )
        try:
            with reporting(path):
                self._prepare()
        except BaseException:
            self._db.close()
            raise

    def close(self) -> None:
        """Close the file. What was not trained stays as it is, for the next run to reconcile."""
        self._db.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # What happens to groups.

    def issue(self, group: int, seed: int, run_attempt: int, actor: str = "") -> int:
        """Issue one group; see `issue_many`."""
        return self.issue_many([(group, seed)], run_attempt, actor)[0]

    def issue_many(
        self, groups: Iterable[tuple[int, int]], run_attempt: int, actor: str = ""
    ) -> list[int]:
        """Issue (group, seed) pairs in one transaction and return their attempts, 0 at first.

        Raises LedgerError, with nothing issued, for an index whose earlier attempt was neither
        discarded nor rolled back, or had another seed. seed: 64 bits, unsigned or signed.
        """
        attempts = []
        with self._transaction():
            for group, seed in groups:
                row = self._current(group)
                if row is not None and row["state"] in LIVE:
                    raise LedgerError(
                        f"group {group} is {row['state']} (attempt {row['attempt']}): it is issued "
                        "again only once that attempt was discarded or rolled back"
                    )
                signed = _signed(seed)
                if row is not None and row["seed"] not in (None, signed):
                    raise LedgerError(
                        f"group {group} is issued again with seed {seed}, and was "
                        f"{row['seed'] % 2**64} before: an index keeps its seed"
                    )
                attempts.append(0 if row is None else row["attempt"] + 1)
                self._db.execute(
                    "INSERT INTO groups (group_index, attempt, state, run_attempt, seed, actor, "
                    "issued_at) VALUES (?, ?, 'issued', ?, ?, ?, ?)",
                    (group, attempts[-1], run_attempt, signed, actor, self._clock()),
                )
        return attempts

    def complete(
        self,
        group: int,
        attempt: int,
        *,
        min_version: int,
        max_version: int,
        reward: float,
        tokens: int,
        actor: str = "",
    ) -> bool:
        """The group came back. False, and nothing changed, for a duplicate or an old attempt.

        min_version, max_version: policy versions that sampled it    reward: mean over its episodes
        """
        done = self._run(
            "UPDATE groups SET state = 'completed', min_version = ?, max_version = ?, reward = ?, "
            "tokens = ?, actor = CASE ?5 WHEN '' THEN actor ELSE ?5 END, completed_at = ? "
            "WHERE group_index = ? AND attempt = ? AND state = 'issued'",
            (min_version, max_version, reward, tokens, actor, self._clock(), group, attempt),
        )
        return done.rowcount == 1

    def train(self, groups: Iterable[int], step: int) -> None:
        """A step trained the current attempts of these groups; all in one transaction.

        Raises LedgerError, with nothing changed, for a group that is not completed: trained
        already, never delivered, discarded.
        """
        with self._transaction():
            for group in groups:
                done = self._db.execute(
                    "UPDATE groups SET state = 'trained', step = ?, ended_at = ? "
                    "WHERE group_index = ? AND state = 'completed'",
                    (step, self._clock(), group),
                )
                if done.rowcount != 1:
                    row = self._current(group)
                    state = "never issued" if row is None else row["state"]
                    raise LedgerError(
                        f"step {step} trained group {group}, which is {state}: a step takes groups "
                        "that are completed, each once"
                    )

    def discard(self, group: int, attempt: int, reason: str, *, step: int | None = None) -> bool:
        """This attempt will not be trained: "filtered", "stale" or "cancelled".

        step: the one that it was filtered out of, and is rolled back with
        False, and nothing changed, if it is not the current one or has ended. Raises LedgerError
        for a group that was trained, and for another reason.
        """
        row = self._current(group)
        if row is None or row["attempt"] != attempt:
            return False
        return self.discard_current(group, reason, step=step)

    def discard_current(self, group: int, reason: str, *, step: int | None = None) -> bool:
        """As `discard`, for whichever attempt is the current one; also for one rolled back."""
        if reason not in REASONS:
            raise LedgerError(f"discard reason {reason!r}: use one of {', '.join(REASONS)}")
        row = self._current(group)
        if row is None or row["state"] == "discarded":
            return False
        if row["state"] == "trained":
            raise LedgerError(
                f"group {group} was trained in step {row['step']}: what is in the weights can not "
                "be discarded"
            )
        self._run(
            "UPDATE groups SET state = 'discarded', reason = ?, step = ?, ended_at = ? "
            "WHERE group_index = ? AND attempt = ?",
            (reason, step, self._clock(), group, row["attempt"]),
        )
        return True

    def cancel_open(self) -> int:
        """The job is over: discard as cancelled whatever is not trained. Returns how many."""
        with self._transaction():
            open_ones = self._db.execute(
                f"SELECT group_index, attempt FROM groups AS g WHERE {_CURRENT} "
                "AND state IN ('issued', 'completed', 'rolled_back')"
            ).fetchall()
            self._db.executemany(
                "UPDATE groups SET state = 'discarded', reason = 'cancelled', ended_at = ? "
                "WHERE group_index = ? AND attempt = ?",
                [(self._clock(), row["group_index"], row["attempt"]) for row in open_ones],
            )
        return len(open_ones)

    def commit(self, step: int, policy_version: int) -> None:
        """The manifest of this step is visible. On disk, with all before it, when this returns."""
        with self._on_disk(), self._transaction():
            self._commit(step, policy_version, self.last_run_attempt())

    # Where the job stands.

    def current(self, group: int) -> tuple[int, str] | None:
        """Attempt and state of a group, or None if it was never issued."""
        row = self._current(group)
        return None if row is None else (row["attempt"], row["state"])

    def next_group(self) -> int:
        """The lowest index that was never issued."""
        row = self._run("SELECT max(group_index) + 1 FROM groups").fetchone()
        return int(row[0] or 0)

    def open_groups(self) -> list[int]:
        """After `reconcile`: indices to issue again, ascending; rolled back or once cancelled."""
        rows = self._run(
            f"SELECT group_index FROM groups AS g WHERE {_CURRENT} AND (state = 'rolled_back' "
            "OR (state = 'discarded' AND reason = 'cancelled')) ORDER BY group_index"
        )
        return [row[0] for row in rows.fetchall()]

    def last_run_attempt(self) -> int:
        """The run attempt that was reconciled last; -1 before the first."""
        row = self._run("SELECT coalesce(max(run_attempt), -1) FROM runs").fetchone()
        return int(row[0])

    def reconcile(self, manifest: Manifest | None, run_attempt: int) -> list[int]:
        """Begin a run attempt at a commit, or at the beginning: the ledger says what that says.

        Groups in the manifest are trained, even where the ledger missed it; everything else that
        was issued, completed or trained is rolled back, and what was filtered out of the steps that
        the manifest does not contain: other weights may find it worth training on. Returns the
        groups rolled back, ascending.
        Raises LedgerError for a run attempt that is not above all earlier ones.
        """
        last = self.last_run_attempt()
        if run_attempt <= last:
            raise LedgerError(
                f"run attempt {run_attempt} after {last}: every run of a job has a higher number"
            )
        step = manifest.step if manifest else 0
        with self._on_disk(), self._transaction():
            rolled_back = self._reconcile_groups(manifest, run_attempt)
            self._db.execute("UPDATE commits SET rolled_back = 1 WHERE step > ?", (step,))
            if manifest is not None:
                self._commit(step, manifest.policy_version, manifest.run_attempt)
            self._db.execute(
                "INSERT INTO runs (run_attempt, step, rolled_back, time) VALUES (?, ?, ?, ?)",
                (run_attempt, step, len(rolled_back), self._clock()),
            )
        return rolled_back

    def _reconcile_groups(self, manifest: Manifest | None, run_attempt: int) -> list[int]:
        committed = manifest.groups if manifest else NO_GROUPS
        last_step = manifest.step - 1 if manifest else -1
        rolled_back = []
        seen = set()
        rows = self._db.execute(
            f"SELECT group_index, attempt, state, reason, step FROM groups AS g WHERE {_CURRENT} "
            "ORDER BY group_index"
        ).fetchall()
        for row in rows:
            group, key = row["group_index"], (row["group_index"], row["attempt"])
            seen.add(group)
            filtered = row["state"] == "discarded" and row["reason"] == "filtered"
            if group in committed:
                if row["state"] != "trained" or row["step"] > last_step:
                    # The ledger missed the step; the last one it can have been is the commit's.
                    self._db.execute(
                        "UPDATE groups SET state = 'trained', step = ?, reason = 'manifest', "
                        "ended_at = ? WHERE group_index = ? AND attempt = ?",
                        (last_step, self._clock(), *key),
                    )
            elif row["state"] in LIVE or (filtered and (row["step"] or 0) > last_step):
                rolled_back.append(group)
                self._db.execute(
                    "UPDATE groups SET state = 'rolled_back', ended_at = ? "
                    "WHERE group_index = ? AND attempt = ?",
                    (self._clock(), *key),
                )
        # Rows that the machine's death took: those committed were trained, the rest is issued anew.
        for group in range(max(max(seen, default=-1) + 1, committed.end)):
            if group not in seen:
                trained = group in committed
                if not trained:
                    rolled_back.append(group)
                self._db.execute(
                    "INSERT INTO groups (group_index, attempt, state, run_attempt, step, reason, "
                    "ended_at) VALUES (?, 0, ?, ?, ?, 'manifest', ?)",
                    (
                        group,
                        "trained" if trained else "rolled_back",
                        run_attempt,
                        last_step if trained else None,
                        self._clock(),
                    ),
                )
        return sorted(rolled_back)

    def _commit(self, step: int, policy_version: int, run_attempt: int) -> None:
        self._db.execute(
            "INSERT OR REPLACE INTO commits (step, run_attempt, policy_version, time) "
            "VALUES (?, ?, ?, ?)",
            (step, run_attempt, policy_version, self._clock()),
        )

    def _prepare(self) -> None:
        db = self._db
        db.row_factory = sqlite3.Row
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = NORMAL")
        version = db.execute("PRAGMA user_version").fetchone()[0]
        if version == 0 and not db.execute("SELECT 1 FROM sqlite_master").fetchone():
            db.executescript(f"BEGIN; {SCHEMA} PRAGMA user_version = {SCHEMA_VERSION}; COMMIT;")
        else:
            check_version(self._path, version)

    def _current(self, group: int) -> Any:
        return self._run(
            "SELECT * FROM groups WHERE group_index = ? ORDER BY attempt DESC LIMIT 1", (group,)
        ).fetchone()

    def _run(self, sql: str, arguments: tuple[Any, ...] = ()) -> sqlite3.Cursor:
        with reporting(self._path):
            return self._db.execute(sql, arguments)

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        with reporting(self._path):
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
            except BaseException:
                self._db.execute("ROLLBACK")
                raise
            self._db.execute("COMMIT")

    @contextmanager
    def _on_disk(self) -> Iterator[None]:
        """Fsync the WAL when the transaction inside commits."""
        self._run("PRAGMA synchronous = FULL")
        try:
            yield
        finally:
            self._run("PRAGMA synchronous = NORMAL")


def _signed(seed: int) -> int:
    """SQLite's integers are signed; a 64-bit key keeps its bits."""
    if not -(2**63) <= seed < 2**64:
        raise LedgerError(f"seed {seed} has more than 64 bits: use a key of actors.randomness")
    return seed - 2**64 if seed >= 2**63 else seed
