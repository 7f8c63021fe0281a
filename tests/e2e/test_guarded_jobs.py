"""Guards through the whole system: a job that learns nothing ends with a sentence that says why."""

import pytest
from flowd_process import FAST, Flowd

PARITY = "env.task=e2e_tasks:Parity"  # rewards that differ, so that gradients are not zero


@pytest.mark.parametrize(
    ("guard", "changes", "reason"),
    [
        ("nan", [PARITY, "trainer.learning_rate=1e30"], "grad_norm is nan: the update was not"),
        ("kl", [PARITY, "trainer.learning_rate=1e-2", "guards.max_kl=1e-9"], "is above guards.max_kl"),
        ("constant", ["guards.constant_reward_steps=5"], "the last 5 steps had the reward 0"),
        ("still", ["env.task=e2e_tasks:Hangs", "guards.no_progress_s=1"], "no trainer step for 1 s"),
    ],
)  # fmt: skip
def test_guard_stops_the_job_with_its_reason(
    flowd: Flowd, guard: str, changes: list[str], reason: str
) -> None:
    """Exit code 1 and the reason on the last line of stderr; all actors leave, also one that hangs."""
    name = f"guard-{guard}"
    options = [word for change in changes for word in ("--set", change)]
    done = flowd.ctl("submit", str(FAST), "--follow", "--set", f"job.name={name}", *options)
    assert done.returncode == 1, done.stderr
    assert done.stderr.splitlines()[-1].startswith(f'error: job "{name}" failed at step ')
    assert reason in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    status = flowd.status(name)
    assert status["state"] == "failed"
    assert reason in status["reason"]
    pids = {actor["pid"] for actor in status["actors"]}
    assert len(pids) == 6, status
    assert not pids & flowd.processes().keys()
    counts = flowd.audit(name)
    assert counts["committed"] <= status["step"] * 8
