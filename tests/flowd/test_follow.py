"""The live table of a terminal."""

import io

import pytest
from fake_daemon import job_status
from rich.console import Console

from flowd.errors import DaemonLost, JobFailed
from flowd.follow import conclude, live_table, make_view, news_line, step_line
from flowd.watched import Watched


def rendered(watched: Watched) -> str:
    console = Console(file=io.StringIO(), width=90)
    console.print(live_table(watched))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_the_table_shows_step_reward_staleness_and_waits():
    """One row of numbers, a line per stage, and who is not at work."""
    watched = Watched("toy")
    watched.apply({"event": "status", "status": job_status()})
    watched.apply({"event": "actor", "name": "env-1", "kind": "env", "state": "gone"})
    text = rendered(watched)
    for part in ("toy: running", "2/4", "0.500", "1,234", "rollout    work 75%", "env-1      gone"):
        assert part in text


def test_numbers_that_are_none_are_shown_as_such():
    """A step whose loss or reward was NaN has null there; the last such step is the one to look at."""
    watched = Watched("toy", state="failed", steps=4)
    keys = ("reward_mean", "tokens_per_s", "seconds", "loss", "rollout_work_s")
    step = {"step": 2, "policy_version": 3, "staleness_max": 0, **dict.fromkeys(keys)}
    watched.apply({"event": "step", "metrics": {**step, "rollout_wait_weights_s": 1.0}})
    assert step_line(watched) == (
        "step=2/4  reward=     -  staleness=0  tokens_per_s=      -  seconds=     -"
        "  [rollout: work 0%, waits for weights 100%]"
    )
    assert "3/4" in rendered(watched)


def test_the_actors_of_an_ended_job_are_not_missed():
    """They are gone, as they should be."""
    watched = Watched("toy")
    watched.apply({"event": "status", "status": job_status(state="done")})
    watched.apply({"event": "actor", "name": "env-1", "kind": "env", "state": "gone"})
    assert "gone" not in rendered(watched)


def test_a_job_that_told_nothing_yet_can_be_shown():
    """Before the first update."""
    assert "0/0" in rendered(Watched("toy"))


def test_the_live_view_gives_the_terminal_back(capsys):
    """It starts and stops around updates of every kind."""
    with make_view("toy", as_json=False, live=True) as view:
        view.show({"event": "status", "status": job_status()})
        view.show({"event": "restart", "actor": "env-0", "how": "killed by signal [9]"})
        view.show({"event": "step", "metrics": {"step": 2, "reward_mean": 0.5}})
    out = capsys.readouterr().out
    assert "restart: actor=env-0  how=killed by signal [9]" in out


def test_news_leave_tracebacks_to_the_end():
    """A line is a line."""
    line = news_line({"event": "restart", "job": "toy", "actor": "env-0", "traceback": "a\nb"})
    assert line == "restart: actor=env-0"


def test_conclusions():
    """Done is 0; what ended otherwise raises; a job that still runs means that flowd went."""
    watched = Watched("toy", state="done", step=4, metrics={"reward_mean": 0.9})
    assert conclude(watched) == 0
    with pytest.raises(DaemonLost, match="flowctl resume toy"):
        conclude(Watched("toy", state="running"))
    with pytest.raises(JobFailed, match=r"interrupted at step 3.*flowctl resume toy"):
        conclude(Watched("toy", state="interrupted", step=3))
    with pytest.raises(JobFailed) as raised:
        conclude(Watched("toy", state="failed", error="Traceback\nValueError: x"))
    assert raised.value.traceback == "Traceback\nValueError: x"
    with pytest.raises(JobFailed) as raised:
        conclude(Watched("toy", state="failed", error="loss is NaN at step 3"))
    assert raised.value.traceback == ""
