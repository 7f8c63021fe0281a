"""Reads a ledger from outside: its audit, which proves that nothing was lost or trained twice, and its rollbacks."""

import sqlite3
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from urllib.parse import quote

from actors.conductor.group_set import NO_GROUPS
from actors.conductor.ledger_schema import (
    FILE,
    LIVE,
    LOCK_WAIT_S,
    REASONS,
    STATES,
    LedgerError,
    check_version,
    reporting,
)
from actors.conductor.manifest import Manifest, ManifestError, newest_manifest

EXAMPLES = 5  # groups named per problem of an audit


@dataclass(frozen=True, slots=True, kw_only=True)
class Audit:
    """What an audit found: problems in sentences, and how many groups stand where.

    counts: groups (indices issued), trained, committed (of them), discarded and per reason
    discarded_REASON, pending (issued, completed, or to be issued again), attempts, rolled_back
    """

    problems: list[str]
    counts: dict[str, int] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether every group is trained exactly once, discarded with a reason, or pending."""
        return not self.problems


def audit(run_dir: Path, *, finished: bool = False) -> Audit:
    """Check a run's ledger against itself and against its newest manifest. Writes nothing.

    finished: the job reached its end, so that nothing may be pending or trained but not committed.
    Without it both are allowed, and so is a commit that the ledger has not heard of yet.
    Raises LedgerError if there is no ledger, or none that this version reads.
    """
    path = run_dir / FILE
    if not path.is_file():
        raise LedgerError(f"{path} does not exist: the job never started, or this is no run of one")
    findings = _Findings()
    try:
        # Before the ledger: whatever the conductor knew of this commit is in what is read next.
        manifest = newest_manifest(run_dir)
    except ManifestError as error:
        findings.problems.append(str(error))
        manifest = None
    with _reading(path) as db:
        damage = db.execute("PRAGMA quick_check(1)").fetchone()[0]
        if damage != "ok":
            findings.problems.append(f"{path} is damaged: {damage}")
        db.execute("BEGIN")  # one state of the file for all that follows
        rows = db.execute("SELECT * FROM groups ORDER BY group_index, attempt")
        _audit_groups(rows, manifest, finished, findings)
        _audit_commits(db.execute("SELECT * FROM commits").fetchall(), manifest, findings)
    return findings.audit()


def beginnings(run_dir: Path) -> dict[int, int]:
    """Run attempt to the step that it began at: what earlier attempts did from there on was rolled back.

    Empty without a ledger. Raises LedgerError if there is one that this version cannot read.
    """
    path = run_dir / FILE
    if not path.is_file():
        return {}
    with _reading(path) as db:
        return {row["run_attempt"]: row["step"] for row in db.execute("SELECT * FROM runs")}


@contextmanager
def _reading(path: Path) -> Iterator[sqlite3.Connection]:
    db = sqlite3.connect(
        f"file:{quote(str(path.resolve()))}?mode=ro", uri=True, timeout=LOCK_WAIT_S
    )
    db.row_factory = sqlite3.Row
    try:
        with reporting(path):
            check_version(path, db.execute("PRAGMA user_version").fetchone()[0])
            yield db
    finally:
        db.close()


class _Findings:
    """Collects groups per problem, so that a thousand broken groups are one sentence."""

    def __init__(self) -> None:
        self.problems: list[str] = []
        self.counts: Counter[str] = Counter()
        self._groups: dict[str, list[int]] = {}

    def add(self, problem: str, group: int) -> None:
        self._groups.setdefault(problem, []).append(group)

    def audit(self) -> Audit:
        sentences = []
        for problem, groups in self._groups.items():
            named = ", ".join(str(group) for group in groups[:EXAMPLES])
            more = len(groups) - EXAMPLES
            tail = f" and {more} more" if more > 0 else ""
            sentences.append(f"{problem}: group{'s' * (len(groups) > 1)} {named}{tail}")
        names = ("groups", "trained", "committed", "discarded", "pending", "attempts")
        counts = {name: self.counts[name] for name in (*names, "rolled_back")} | self.counts
        return Audit(problems=self.problems + sentences, counts=counts)


def _audit_groups(
    rows: Iterable[sqlite3.Row], manifest: Manifest | None, finished: bool, findings: _Findings
) -> None:
    known: list[int] = []
    expected = 0
    for group, attempts in groupby(rows, key=lambda row: int(row["group_index"])):
        for missing in range(expected, group):
            findings.add("never issued, though a later one was", missing)
        expected = group + 1
        history = list(attempts)
        _audit_history(group, history, findings)
        _audit_end(group, history[-1], manifest, finished, findings)
        known.append(group)
    for group in (manifest.groups if manifest else NO_GROUPS).difference(known):
        findings.add("in the newest manifest, and unknown to the ledger", group)
    findings.counts["groups"] = expected


def _audit_history(group: int, history: Sequence[sqlite3.Row], findings: _Findings) -> None:
    findings.counts["attempts"] += len(history)
    for row in history:
        if row["state"] not in STATES:
            findings.add(f"in a state that does not exist, {row['state']!r}", group)
        elif row["state"] == "trained" and row["step"] is None:
            findings.add("trained in no step", group)
        elif row["state"] == "discarded" and row["reason"] not in REASONS:
            findings.add(f"discarded without a valid reason ({row['reason']!r})", group)
        elif row["state"] == "rolled_back":
            findings.counts["rolled_back"] += 1
    if sum(row["state"] == "trained" for row in history) > 1:
        findings.add("trained more than once", group)
    elif any(row["state"] in LIVE for row in history[:-1]):
        findings.add("issued again while an earlier attempt was open or trained", group)
    if [row["attempt"] for row in history] != list(range(len(history))):
        findings.add("attempts are not numbered 0, 1, 2, …", group)
    if len({row["seed"] for row in history if row["seed"] is not None}) > 1:
        findings.add("issued again with another seed", group)


def _audit_end(
    group: int, row: sqlite3.Row, manifest: Manifest | None, finished: bool, findings: _Findings
) -> None:
    """Check where a group stands against the commit, and count it."""
    state, step = row["state"], row["step"]
    done = manifest.step if manifest else 0
    in_manifest = manifest is not None and group in manifest.groups
    if state == "trained":
        findings.counts["trained"] += 1
        findings.counts["committed"] += in_manifest
        if step is None:
            return  # said already
        if in_manifest and step >= done:
            findings.add(
                f"trained in step {step}, and in the manifest that ends before step {done}", group
            )
        elif not in_manifest and step < done:
            findings.add(f"trained before step {done}, and not in the manifest of that step", group)
        elif not in_manifest and finished:
            findings.add(f"trained in a step beyond the last manifest, which ends at {done}", group)
        return
    if state == "discarded":
        findings.counts["discarded"] += 1
        findings.counts[f"discarded_{row['reason']}"] += 1
    elif state in STATES:
        findings.counts["pending"] += 1
        if finished:
            findings.add(f"{state} when the job was over: lost", group)
            return
    behind = state == "completed" and not finished  # the ledger hears of a step after its commit
    if in_manifest and not behind:
        findings.add(f"in the manifest of step {done}, and {state} in the ledger", group)


def _audit_commits(
    commits: Sequence[sqlite3.Row], manifest: Manifest | None, findings: _Findings
) -> None:
    done = manifest.step if manifest else -1
    for row in commits:
        if row["rolled_back"]:
            continue
        if row["step"] > done:
            newest = f"step {done}" if manifest else "none"
            findings.problems.append(
                f"the ledger says that step {row['step']} was committed, and the newest manifest "
                f"is {newest}"
            )
        elif manifest is not None and (row["step"], row["run_attempt"]) == (
            done,
            manifest.run_attempt,
        ):
            if row["policy_version"] != manifest.policy_version:
                findings.problems.append(
                    f"the commit of step {done} has policy version {row['policy_version']} in the "
                    f"ledger and {manifest.policy_version} in the manifest"
                )
