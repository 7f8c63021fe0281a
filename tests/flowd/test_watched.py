"""What updates tell about a job."""

from fake_daemon import job_status

from flowd.watched import Watched, tokens_per_s


def actor(work: float, wait: float, **changes: object) -> dict[str, object]:
    times = {"work": work, "wait_groups": wait, "wait_credit": 0.1}
    return {"event": "actor", "name": "trainer-0", "kind": "trainer", "time": times, **changes}


def test_times_are_those_between_the_last_two_reports():
    """A long job shows what it does now, not its average."""
    watched = Watched("toy")
    watched.apply(actor(100.0, 0.0))
    assert watched.recent_times()["trainer"].startswith("work 100%")
    watched.apply(actor(101.0, 3.0))
    assert watched.recent_times() == {"trainer": "work 25%, waits for groups 75%"}
    watched.apply(actor(101.0, 3.0))
    assert watched.recent_times() == {"trainer": "work 25%, waits for groups 75%"}


def test_a_restarted_actor_counts_from_zero():
    """Its clocks began anew."""
    watched = Watched("toy")
    watched.apply(actor(100.0, 100.0))
    watched.apply(actor(2.0, 2.0))
    assert watched.recent_times()["trainer"].startswith("work 49%")


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
