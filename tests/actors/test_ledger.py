"""Nothing lost, nothing twice: the life of groups, crashes, and what an audit finds."""

import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from actors.conductor.group_set import GroupSet
from actors.conductor.ledger import FILE, Ledger, LedgerError, audit
from actors.conductor.manifest import Manifest, checkpoint_dir, write_manifest


class Run:
    """A run as the conductor and the trainer make it: ledger, weights' groups, manifests."""

    def __init__(self, run_dir: Path) -> None:
        self.dir = run_dir
        self.ledger = Ledger(run_dir / FILE, clock=lambda: 1.0)
        self.attempts: dict[int, int] = {}
        self.run_attempt = -1
        self.manifest: Manifest | None = None

    def begin(self) -> list[int]:
        self.run_attempt += 1
        return self.ledger.reconcile(self.manifest, self.run_attempt)

    def issue(self, *groups: int) -> None:
        pairs = [(group, group + 100) for group in groups]
        attempts = self.ledger.issue_many(pairs, self.run_attempt)
        self.attempts.update(zip(groups, attempts, strict=True))

    def complete(self, *groups: int) -> list[bool]:
        return [
            self.ledger.complete(
                group, self.attempts[group], min_version=0, max_version=0, reward=0.5, tokens=9
            )
            for group in groups
        ]

    def step(self, step: int, *groups: int) -> None:
        self.issue(*groups)
        self.complete(*groups)
        self.ledger.train(groups, step)

    def save(self, step: int, groups) -> None:
        """The trainer's half of a commit."""
        self.manifest = Manifest(
            step=step, policy_version=step, run_attempt=self.run_attempt, groups=GroupSet.of(groups)
        )
        write_manifest(self.dir, self.manifest)

    def commit(self, step: int, groups) -> None:
        self.save(step, groups)
        self.ledger.commit(step, step)


@pytest.fixture
def run(tmp_path):
    made = Run(tmp_path)
    made.begin()
    yield made
    made.ledger.close()


@pytest.fixture
def trained(run):
    """Two steps of two groups, committed; one more group filtered."""
    run.step(0, 0, 1)
    run.step(1, 2, 3)
    run.issue(4)
    run.ledger.discard(4, 0, "filtered")
    run.commit(2, range(4))
    assert audit(run.dir, finished=True).ok
    return run


def corrupt(run: Run, sql: str) -> None:
    """Change the file by hand, past everything that the schema refuses."""
    with sqlite3.connect(run.dir / FILE) as db:
        db.execute("PRAGMA ignore_check_constraints = ON")
        db.execute("DROP INDEX IF EXISTS one_live_attempt")
        db.execute(sql)
    db.close()


def problems(run: Run, *, finished: bool = False) -> str:
    found = audit(run.dir, finished=finished)
    assert found.ok == (not found.problems)
    return "; ".join(found.problems)


def test_a_group_is_issued_completed_trained(run):
    """Each state follows from the one before; the audit counts where groups stand."""
    run.issue(0, 1, 2)
    assert run.ledger.current(0) == (0, "issued")
    assert run.complete(0, 1) == [True, True]
    run.ledger.train([0], 0)
    run.commit(1, [0])
    assert run.ledger.current(0) == (0, "trained")
    assert (run.ledger.next_group(), run.ledger.open_groups()) == (3, [])
    found = audit(run.dir)
    assert found.ok
    assert found.counts == {
        "groups": 3,
        "trained": 1,
        "committed": 1,
        "discarded": 0,
        "pending": 2,
        "attempts": 3,
        "rolled_back": 0,
    }


def test_duplicates_and_old_attempts_do_not_complete(run):
    """What arrives twice, or belongs to an attempt that was given up, changes nothing."""
    run.issue(0)
    assert run.complete(0, 0) == [True, False]
    run.ledger.discard(0, 0, "stale")
    run.issue(0)
    assert run.attempts[0] == 1
    late = run.ledger.complete(0, 0, min_version=0, max_version=0, reward=1.0, tokens=1)
    assert (late, run.ledger.current(0)) == (False, (1, "issued"))
    assert run.complete(0) == [True]
    unknown = run.ledger.complete(7, 0, min_version=0, max_version=0, reward=1.0, tokens=1)
    assert not unknown


def test_a_reward_that_is_not_a_number_is_kept_as_none(run):
    """SQLite has no NaN; the group still completes, and the guards speak about the loss."""
    run.issue(0)
    assert run.ledger.complete(0, 0, min_version=0, max_version=0, reward=float("nan"), tokens=1)


def test_an_index_is_issued_again_only_after_it_ended(run):
    """One open attempt at a time, none after training, and the seed stays."""
    run.issue(0)
    with pytest.raises(LedgerError, match=r"group 0 is issued \(attempt 0\)"):
        run.issue(1, 0)
    assert run.ledger.current(1) is None
    run.complete(0)
    run.ledger.train([0], 0)
    with pytest.raises(LedgerError, match="group 0 is trained"):
        run.issue(0)
    run.issue(1)
    run.ledger.discard(1, 0, "cancelled")
    with pytest.raises(LedgerError, match="with seed 5, and was 101 before"):
        run.ledger.issue(1, 5, 0)
    assert run.ledger.issue(1, 101, 0) == 1


def test_seeds_may_use_all_64_bits(run):
    """Keys of actors.randomness are unsigned, SQLite's integers are not."""
    seed = 2**64 - 3
    assert run.ledger.issue(0, seed, 0) == 0
    run.ledger.discard(0, 0, "stale")
    assert run.ledger.issue(0, seed, 0) == 1
    run.ledger.discard(0, 1, "stale")
    with pytest.raises(LedgerError, match=f"and was {seed} before"):
        run.ledger.issue(0, 2, 0)
    with pytest.raises(LedgerError, match="more than 64 bits"):
        run.ledger.issue(1, 2**64, 0)


def test_a_step_trains_completed_groups_once_or_nothing(run):
    """A group trained before, not delivered or unknown fails the whole step."""
    run.step(0, 0)
    run.issue(1, 2)
    run.complete(1)
    for bad, state in [(0, "trained"), (2, "issued"), (9, "never issued")]:
        with pytest.raises(LedgerError, match=f"step 1 trained group {bad}, which is {state}"):
            run.ledger.train([1, bad], 1)
        assert run.ledger.current(1) == (0, "completed")
    with pytest.raises(LedgerError, match="group 1, which is trained"):
        run.ledger.train([1, 1], 1)
    assert run.ledger.current(1) == (0, "completed")


def test_discarding_needs_a_reason_and_an_open_attempt(run):
    """Trained groups are in the weights; old attempts are history."""
    run.step(0, 0)
    run.issue(1)
    with pytest.raises(LedgerError, match="group 0 was trained in step 0"):
        run.ledger.discard(0, 0, "filtered")
    with pytest.raises(LedgerError, match="'bored': use one of filtered, stale, cancelled"):
        run.ledger.discard(1, 0, "bored")
    assert not run.ledger.discard(1, 5, "stale")
    assert run.ledger.discard(1, 0, "stale")
    assert not run.ledger.discard(1, 0, "stale")
    assert not run.ledger.discard_current(9, "stale")


def test_a_crash_takes_the_job_back_to_the_manifest(run):
    """Later steps and everything in flight are rolled back and issued again, history kept."""
    run.step(0, 0, 1)
    run.commit(1, [0, 1])
    run.step(1, 2, 3)
    run.issue(4, 5)
    run.complete(4)
    assert run.begin() == [2, 3, 4, 5]
    assert run.ledger.open_groups() == [2, 3, 4, 5]
    assert run.ledger.next_group() == 6
    late = run.ledger.complete(5, 0, min_version=0, max_version=0, reward=0.0, tokens=1)
    assert not late
    run.step(1, 2, 3, 4, 5)
    assert run.attempts == {0: 0, 1: 0, 2: 1, 3: 1, 4: 1, 5: 1}
    run.commit(2, range(6))
    found = audit(run.dir, finished=True)
    assert found.ok, found.problems
    assert (found.counts["rolled_back"], found.counts["attempts"]) == (4, 10)


def test_the_manifest_is_believed_where_the_ledger_missed_the_step(run):
    """The conductor died between the trainer's rename and its own note of it."""
    run.step(0, 0)
    run.issue(1, 2)
    run.complete(1, 2)
    run.save(2, [0, 1])
    assert audit(run.dir).ok, "a commit that the ledger has not heard of is no problem"
    assert run.begin() == [2]
    assert run.ledger.current(1) == (0, "trained")
    assert audit(run.dir).ok


def test_rows_that_a_power_cut_took_are_made_again(run):
    """The manifest is on disk, the ledger's tail is not: trained groups stay so, holes come back."""
    run.step(0, 0)
    run.save(3, [0, 2, 3])
    assert run.begin() == [1]
    assert run.ledger.open_groups() == [1]
    assert run.ledger.current(3) == (0, "trained")
    run.issue(1)
    assert run.attempts[1] == 1
    assert audit(run.dir).ok


def test_going_back_without_any_manifest_starts_from_nothing(run):
    """Before the first commit everything is issued again."""
    run.step(0, 0, 1)
    assert run.begin() == [0, 1]
    assert run.ledger.open_groups() == [0, 1]
    with pytest.raises(LedgerError, match="run attempt 1 after 1"):
        run.ledger.reconcile(None, 1)
    assert run.ledger.last_run_attempt() == 1


def test_going_back_to_an_older_checkpoint_takes_its_commits_back(run):
    """The newest checkpoint was removed by hand: the ledger follows."""
    run.step(0, 0)
    run.commit(1, [0])
    older = run.manifest
    run.step(1, 1)
    run.commit(2, [0, 1])
    newest = checkpoint_dir(run.dir, 2)
    (newest / "manifest.json").unlink()
    assert "step 2 was committed, and the newest manifest is step 1" in problems(run)
    run.manifest = older
    assert run.begin() == [1]
    assert problems(run) == ""


def test_what_was_filtered_is_rolled_back_with_its_step(run):
    """Out of a step that the manifest contains it stays out; out of a later one it is issued again."""
    run.issue(0, 1, 2, 3)
    for group in range(4):
        run.complete(group)
    assert run.ledger.discard(0, 0, "filtered", step=0)
    run.ledger.train([1], 0)
    run.commit(1, [1])
    assert run.ledger.discard(2, 0, "filtered", step=1)
    assert run.begin() == [2, 3]
    assert run.begin() == [], "history is not rolled back twice"
    assert run.ledger.open_groups() == [2, 3]
    assert run.ledger.current(0) == (0, "discarded")
    run.issue(2, 3)
    assert run.attempts[2] == 1
    assert audit(run.dir).ok


def test_cancelled_groups_are_open_again_when_the_job_is_resumed(run):
    """The end of a job discards what is left; a resume plays it before new indices."""
    run.step(0, 0)
    run.commit(1, [0])
    run.issue(1, 2)
    run.complete(1)
    run.begin()
    run.issue(1)
    assert "lost: groups 1, 2" not in problems(run)
    assert "rolled_back when the job was over: lost: group 2" in problems(run, finished=True)
    assert run.ledger.cancel_open() == 2
    assert run.ledger.cancel_open() == 0
    found = audit(run.dir, finished=True)
    assert found.ok
    assert found.counts["discarded_cancelled"] == 2
    run.begin()
    assert run.ledger.open_groups() == [1, 2]


@pytest.mark.parametrize(
    ("sql", "says"),
    [
        (
            "INSERT INTO groups (group_index, attempt, state, run_attempt, step) "
            "VALUES (1, 1, 'trained', 0, 1)",
            "trained more than once: group 1",
        ),
        ("DELETE FROM groups WHERE group_index = 4", None),
        (
            "DELETE FROM groups WHERE group_index = 2",
            "never issued, though a later one was: group 2; in the newest manifest, "
            "and unknown to the ledger: group 2",
        ),
        (
            "INSERT INTO groups (group_index, attempt, state, run_attempt) "
            "VALUES (7, 0, 'issued', 0)",
            "never issued, though a later one was: groups 5, 6",
        ),
        (
            "UPDATE groups SET state = 'trained', step = 2 WHERE group_index = 4",
            "trained in a step beyond the last manifest, which ends at 2: group 4",
        ),
        (
            "UPDATE groups SET state = 'trained', step = 1 WHERE group_index = 4",
            "trained before step 2, and not in the manifest of that step: group 4",
        ),
        (
            "UPDATE groups SET step = 5 WHERE group_index = 3",
            "trained in step 5, and in the manifest that ends before step 2: group 3",
        ),
        (
            "UPDATE groups SET state = 'lost' WHERE group_index = 3",
            "in a state that does not exist, 'lost': group 3; "
            "in the manifest of step 2, and lost in the ledger: group 3",
        ),
        (
            "UPDATE groups SET state = 'discarded', reason = 'stale' WHERE group_index = 3",
            "in the manifest of step 2, and discarded in the ledger: group 3",
        ),
        (
            "UPDATE groups SET reason = NULL WHERE group_index = 4",
            r"discarded without a valid reason \(None\): group 4",
        ),
        ("UPDATE groups SET step = NULL WHERE group_index = 3", "trained in no step: group 3"),
        (
            "UPDATE groups SET attempt = 3 WHERE group_index = 3",
            "attempts are not numbered 0, 1, 2, …: group 3",
        ),
        (
            "INSERT INTO groups (group_index, attempt, state, run_attempt, reason) "
            "VALUES (0, 1, 'discarded', 0, 'stale')",
            "issued again while an earlier attempt was open or trained: group 0; in the manifest",
        ),
        (
            "INSERT INTO groups (group_index, attempt, state, run_attempt, seed, reason) "
            "VALUES (4, 1, 'discarded', 0, 1, 'stale')",
            "issued again with another seed: group 4",
        ),
        (
            "UPDATE groups SET state = 'completed' WHERE group_index = 3",
            "completed when the job was over: lost: group 3",
        ),
        (
            "INSERT INTO commits VALUES (9, 0, 9, 1.0, 0)",
            "step 9 was committed, and the newest manifest is step 2",
        ),
        (
            "UPDATE commits SET policy_version = 7 WHERE step = 2",
            "policy version 7 in the ledger and 2 in the manifest",
        ),
    ],
)
def test_an_audit_finds_what_was_changed_by_hand(trained, sql, says):
    """Every kind of damage is one sentence with the groups; only an unneeded tail is not seen."""
    corrupt(trained, sql)
    found = problems(trained, finished=True)
    if says is None:
        assert found == ""
    else:
        with pytest.raises(AssertionError, match=says):
            assert not found, found


def test_many_broken_groups_are_one_sentence(run):
    """A thousand of the same are named by example."""
    run.step(0, *range(1000))
    run.commit(1, range(990))
    assert problems(run) == (
        "trained before step 1, and not in the manifest of that step: "
        "groups 990, 991, 992, 993, 994 and 5 more"
    )


def test_a_bad_manifest_is_a_problem_of_the_audit(trained):
    """It is reported beside what else is found."""
    (checkpoint_dir(trained.dir, 2) / "manifest.json").write_text("{}")
    assert "is not a sound manifest" in problems(trained)


def test_the_database_itself_refuses_a_second_live_attempt(trained):
    """Exactly once is a constraint of the schema, not only of the code."""
    with pytest.raises(sqlite3.IntegrityError):
        trained.ledger._run(
            "INSERT INTO groups (group_index, attempt, state, run_attempt) "
            "VALUES (0, 1, 'issued', 0)"
        )
    with pytest.raises(sqlite3.IntegrityError):
        trained.ledger._run("UPDATE groups SET state = 'lost' WHERE group_index = 0")


def test_files_that_are_no_ledger_are_refused(tmp_path):
    """No file, garbage, another version: a sentence each."""
    with pytest.raises(LedgerError, match="does not exist: the job never started"):
        audit(tmp_path)
    path = tmp_path / FILE
    path.write_bytes(b"no database at all" * 100)
    with pytest.raises(LedgerError, match="is not a readable ledger"):
        audit(tmp_path)
    with pytest.raises(LedgerError, match="is not a readable ledger"):
        Ledger(path)
    path.unlink()
    Ledger(path).close()
    with sqlite3.connect(path) as db:
        db.execute("PRAGMA user_version = 9")
    db.close()
    with pytest.raises(LedgerError, match="schema version 9, and this version reads 1"):
        Ledger(path)


def test_an_audit_reads_beside_the_conductor(run):
    """While the ledger is open for writing, and without changing a byte of the directory."""
    run.step(0, 0)
    run.commit(1, [0])
    before = sorted(p.name for p in run.dir.iterdir())
    assert audit(run.dir).ok
    assert sorted(p.name for p in run.dir.iterdir()) == before


def test_progress_survives_a_kill(tmp_path):
    """kill -9 of the conductor loses nothing that a call has returned from."""
    code = (
        "import os, pathlib, signal, sys; from actors.conductor.ledger import Ledger;"
        "l = Ledger(pathlib.Path(sys.argv[1])); l.reconcile(None, 0);"
        "l.issue_many([(g, g) for g in range(5)], 0);"
        "[l.complete(g, 0, min_version=0, max_version=0, reward=0., tokens=1) for g in range(5)];"
        "l.train(range(3), 0); os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / FILE)], timeout=60)
    assert done.returncode == -9
    with Ledger(tmp_path / FILE) as ledger:
        assert [ledger.current(g) for g in (2, 4)] == [(0, "trained"), (0, "completed")]
        assert ledger.reconcile(None, 1) == [0, 1, 2, 3, 4]
    assert audit(tmp_path).ok


def test_flowd_can_audit_without_torch():
    """`flowctl audit` imports the ledger; it must stay light."""
    code = "import sys, actors.conductor.ledger; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


class Job(RuleBasedStateMachine):
    """A job whose conductor and trainer crash at any moment; weights know what they contain."""

    def __init__(self) -> None:
        super().__init__()
        import tempfile

        self.folder = tempfile.TemporaryDirectory()
        self.run = Run(Path(self.folder.name))
        self.weights: list[int] = []  # every group that the weights were trained on, in order
        self.saved: tuple[int, list[int]] = (0, [])
        self.steps = 0
        self.run.begin()
        self.reissue: list[int] = []

    @rule(count=st.integers(1, 3))
    def issue(self, count):
        groups, self.reissue = self.reissue[:count], self.reissue[count:]
        first = self.run.ledger.next_group()
        self.run.issue(*groups, *range(first, first + count - len(groups)))

    @rule(data=st.data())
    def deliver(self, data):
        """Any issued group arrives, in any order, possibly again."""
        if self.run.attempts:
            group = data.draw(st.sampled_from(sorted(self.run.attempts)))
            attempt = data.draw(st.integers(0, self.run.attempts[group]))
            current = self.run.ledger.current(group)
            done = self.run.ledger.complete(
                group, attempt, min_version=0, max_version=0, reward=0.0, tokens=1
            )
            assert done == (current == (attempt, "issued"))

    def completed(self):
        return [g for g in self.run.attempts if self.run.ledger.current(g)[1] == "completed"]

    @rule(told=st.booleans())
    def step(self, told):
        """The trainer takes a step; the conductor hears of it, or dies first."""
        groups = self.completed()[:2]
        if groups:
            self.weights += groups
            self.steps += 1
            if told:
                self.run.ledger.train(groups, self.steps - 1)
            else:
                self.crash(commit=False)

    @rule(told=st.booleans())
    def commit(self, told):
        self.run.save(self.steps, self.weights)
        self.saved = (self.steps, list(self.weights))
        if told:
            self.run.ledger.commit(self.steps, self.steps)

    @rule(data=st.data(), reason=st.sampled_from(["filtered", "stale", "cancelled"]))
    def discard(self, data, reason):
        open_ones = [
            g for g in self.run.attempts if self.run.ledger.current(g)[1] in ("issued", "completed")
        ]
        if open_ones:
            group = data.draw(st.sampled_from(sorted(open_ones)))
            assert self.run.ledger.discard(group, self.run.attempts[group], reason)

    @rule(commit=st.booleans())
    def crash(self, commit):
        """The manifest may have been renamed in the last moment, without the ledger knowing."""
        if commit:
            self.commit(told=False)
        self.run.ledger.close()
        self.run.ledger = Ledger(self.run.dir / FILE, clock=lambda: 1.0)
        self.run.begin()
        self.steps, self.weights = self.saved[0], list(self.saved[1])
        self.reissue = self.run.ledger.open_groups()

    @invariant()
    def weights_hold_no_group_twice(self):
        assert len(set(self.weights)) == len(self.weights)

    @invariant()
    def the_audit_is_clean(self):
        found = audit(self.run.dir)
        assert found.ok, found.problems
        assert found.counts["committed"] <= len(self.saved[1])

    def teardown(self):
        """Played to its end, the job has lost nothing."""
        self.crash(commit=False)
        while self.reissue:
            self.issue(3)
        for group, attempt in self.run.attempts.items():
            self.run.ledger.complete(
                group, attempt, min_version=0, max_version=0, reward=0.0, tokens=1
            )
        while self.completed():
            self.step(told=True)
        self.commit(told=True)
        self.run.ledger.cancel_open()
        found = audit(self.run.dir, finished=True)
        assert found.ok, found.problems
        total = found.counts["trained"] + found.counts["discarded"]
        assert total == found.counts["groups"] == self.run.ledger.next_group()
        assert found.counts["trained"] == len(self.weights)
        self.run.ledger.close()
        self.folder.cleanup()


Job.TestCase.settings = settings(max_examples=15, stateful_step_count=25, deadline=None)
TestJob = Job.TestCase
