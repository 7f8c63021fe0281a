"""flowd dies, stops or is told to end a job: what runs is taken over, resumed, or gone."""

from flowd_process import Flowd, wait_for

STEPS = 80


def test_restarted_flowd_takes_running_actors_over(flowd: Flowd) -> None:
    """Actors work on while flowd is gone; the next one finds the same processes, and nothing is taken back."""
    flowd.submit("adopted", f"job.steps={STEPS}")
    flowd.wait_step("adopted", 10)
    before = {actor["name"]: actor["pid"] for actor in flowd.actors("adopted")}
    flowd.kill()
    seen = len(flowd.metrics("adopted"))
    wait_for(lambda: len(flowd.metrics("adopted")) > seen + 3, "steps without flowd")
    flowd.up()
    assert {actor["name"]: actor["pid"] for actor in flowd.actors("adopted")} == before
    assert flowd.status("adopted")["step"] > seen
    flowd.wait_done("adopted")
    flowd.check_done("adopted", steps=STEPS)
    assert {line["attempt"] for line in flowd.metrics("adopted")} == {0}

    # A job that ends while no flowd is there is found to be done.
    flowd.submit("unseen", "job.steps=30")
    flowd.wait_step("unseen", 5)
    flowd.kill()
    wait_for(lambda: len(flowd.metrics("unseen")) == 30, "the job to end without flowd")
    flowd.up()
    flowd.wait_done("unseen")
    flowd.check_done("unseen", steps=30)


def test_killed_flowd_that_nobody_follows_leaves_nothing(own_flowd: Flowd) -> None:
    """The fork server ends the actors after the grace, and frees the shared memory of their weights."""
    own_flowd.up("--orphan-grace-s", "1")
    own_flowd.submit("left", "job.steps=100000")
    own_flowd.wait_step("left", 3)
    assert list(own_flowd.paths.weights.rglob("*.safetensors"))
    own_flowd.kill()
    own_flowd.wait_gone()
    assert own_flowd.left_behind() == []
    assert not list(own_flowd.paths.weights.parent.glob(f"{own_flowd.paths.weights.name}*"))


def test_flowd_with_other_devices_takes_no_actors_over(own_flowd: Flowd) -> None:
    """Actors hold leases on devices that this flowd does not have: they are stopped, the job can be resumed."""
    own_flowd.up()
    own_flowd.submit("moved", "job.steps=100000")
    own_flowd.wait_step("moved", 3)
    pids = {actor["pid"] for actor in own_flowd.actors("moved")}
    own_flowd.kill()
    own_flowd.up(devices="cpu:6")
    assert not pids & own_flowd.processes().keys()
    status = own_flowd.status("moved")
    assert status["state"] == "interrupted"
    assert "with other devices" in status["error"]
    assert own_flowd.ctl("resume", "moved").returncode == 0
    own_flowd.wait_step("moved", status["step"] + 3)
    assert own_flowd.ctl("cancel", "moved").returncode == 0


def test_down_interrupts_a_job_and_resume_goes_on(flowd: Flowd) -> None:
    """After `flowd down` nothing runs; the next flowd resumes from the last commit."""
    flowd.submit("stopped", f"job.steps={STEPS}")
    flowd.wait_step("stopped", 10)
    flowd.down()
    assert flowd.left_behind() == []
    flowd.up()
    assert flowd.status("stopped")["state"] == "interrupted"
    step = flowd.status("stopped")["step"]
    assert step >= 10
    done = flowd.ctl("resume", "stopped", "--follow")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("step="), "a line for each step"
    lines = flowd.check_done("stopped", steps=STEPS)
    assert {line["attempt"] for line in lines} == {0, 1}


def test_cancelled_job_stops_and_can_be_resumed(flowd: Flowd) -> None:
    """`flowctl cancel` returns once the actors are gone; the ledger stays sound."""
    flowd.submit("cancelled", "job.steps=40")
    flowd.wait_step("cancelled", 7)
    pids = {actor["pid"] for actor in flowd.actors("cancelled")}
    done = flowd.ctl("cancel", "cancelled")
    assert done.returncode == 0, done.stderr
    assert not pids & flowd.processes().keys()
    assert flowd.status("cancelled")["state"] == "cancelled"
    flowd.audit("cancelled")
    again = flowd.ctl("cancel", "cancelled")
    assert again.returncode == 2
    assert "is cancelled" in again.stderr
    flowd.request("resume", job="cancelled")
    flowd.wait_done("cancelled")
    flowd.check_done("cancelled", steps=40)
