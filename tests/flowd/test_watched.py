"""What updates tell about a job."""

from typing import Any

from fake_daemon import job_status

from flowd.watched import Watched, stages_of, tokens_per_s


def step(number: int, **metrics: float) -> dict[str, Any]:
    return {"event": "step", "metrics": {"step": number, "seconds": 2.0, **metrics}}


def test_times_are_those_of_the_last_seconds():
    """A long job shows what it does now, not its average."""
    watched = Watched("toy")
    watched.apply({"event": "status", "status": job_status()})
    assert watched.recent_times() == {"rollout": "work 75%, waits for weights 25%"}
    for number in range(10):
        watched.apply(step(number, rollout_work_s=2.0, rollout_wait_lease_s=0.0))
    assert watched.recent_times() == {"rollout": "work 100%"}
    for number in range(10, 13):
        watched.apply(step(number, rollout_work_s=0.5, rollout_wait_lease_s=1.5))
    assert watched.recent_times() == {"rollout": "work 25%, waits for lease 75%"}


def test_a_step_longer_than_the_window_counts_alone():
    """The newest step always counts."""
    watched = Watched("toy")
    watched.apply(step(0, env_work_s=9.0, env_wait_rollout_s=1.0))
    watched.apply({"event": "step", "metrics": {"step": 1, "seconds": 60.0, "env_work_s": 1.0}})
    assert watched.recent_times() == {"env": "work 100%"}


def test_the_trainer_waits_for_what_its_step_did_not_take():
    """Unless it tells its own times."""
    assert stages_of({"seconds": 2.0, "seconds_step": 0.5}) == [
        {"kind": "trainer", "time": {"work": 0.5, "wait_groups": 1.5}}
    ]
    told = {"seconds": 2.0, "seconds_step": 0.5, "trainer_wait_lease_s": 1.0}
    assert stages_of(told) == [{"kind": "trainer", "time": {"wait_lease": 1.0}}]


def test_state_and_error_are_kept():
    """A last status without an error does not hide the one that was told."""
    watched = Watched("toy")
    watched.apply({"event": "status", "status": job_status()})
    watched.apply({"event": "job", "state": "failed", "reason": "odd", "error": "T\nE"})
    watched.apply({"event": "status", "status": job_status(state="failed", error=None)})
    assert (watched.state, watched.reason, watched.error) == ("failed", "odd", "T\nE")
    watched.apply({"event": "something-new"})


def test_unusual_actors_are_those_not_at_work():
    """Ready ones are not worth a line."""
    watched = Watched("toy")
    watched.apply({"event": "status", "status": job_status()})
    assert watched.unusual_actors() == {}
    watched.apply({"event": "actor", "name": "rollout-0", "kind": "rollout", "state": "gone"})
    assert watched.unusual_actors() == {"rollout-0": "gone"}


def test_the_rate_is_reported_or_computed():
    """Tokens over seconds where a step does not tell its rate."""
    assert tokens_per_s({"tokens_per_s": 5.0, "tokens": 1, "seconds": 1}) == 5.0
    assert tokens_per_s({"tokens": 10, "seconds": 4.0}) == 2.5
    assert tokens_per_s({"tokens": 10, "seconds": 0.0}) is None
