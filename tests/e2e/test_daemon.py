"""flowd dies, stops or is told to end a job: what runs is taken over, resumed, or gone."""

import os
import shutil
import signal
import subprocess

from flowd_process import Flowd, environment, wait_for

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


def test_flowd_with_other_devices_takes_no_actors_over(flowd: Flowd) -> None:
    """Actors hold leases on devices that this flowd does not have: they are stopped, the job can be resumed.

    After `flowd down` nothing runs; the next flowd, with all devices again, resumes from the last commit.
    """
    flowd.submit("moved", "job.steps=100000")
    flowd.wait_step("moved", 3)
    pids = {actor["pid"] for actor in flowd.actors("moved")}
    flowd.kill()
    flowd.up(devices="cpu:6")
    assert not pids & flowd.processes().keys()
    status = flowd.status("moved")
    assert status["state"] == "interrupted"
    assert "with other devices" in status["error"]
    assert flowd.ctl("resume", "moved").returncode == 0
    flowd.wait_step("moved", status["step"] + 3)
    assert flowd.ctl("cancel", "moved").returncode == 0

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


def test_cancel_that_a_killed_flowd_had_begun_is_finished(flowd: Flowd) -> None:
    """The next flowd ends what is left of the job, whose state is cancelled; other jobs go on."""
    flowd.submit("kept", f"job.steps={STEPS}")
    flowd.submit("cut", "job.steps=100000")
    flowd.wait_step("cut", 3)
    actors = {actor["name"]: actor["pid"] for actor in flowd.actors("cut")}
    os.kill(actors["env-0"], signal.SIGSTOP)  # the cancel waits for it
    words = flowd.command_line("flowctl", "cancel", "cut")
    with subprocess.Popen(words, env=environment(), stderr=subprocess.DEVNULL) as cancel:
        wait_for(lambda: actors["rollout-0"] not in flowd.processes(), "the cancel to begin")
        flowd.kill()
        cancel.kill()
    assert actors["env-0"] in flowd.processes()
    flowd.up()
    assert not set(actors.values()) & flowd.processes().keys()
    assert flowd.status("cut")["state"] == "cancelled"
    assert not (flowd.paths.weights / "cut").exists()
    last = flowd.request("events", job="cut", after_id=0)["events"][-1]
    assert (last["kind"], last["state"]) == ("job", "cancelled")
    flowd.audit("cut")
    flowd.wait_done("kept")
    flowd.check_done("kept", steps=STEPS)


def test_job_is_resumed_from_its_run_directory_alone(flowd: Flowd, own_flowd: Flowd) -> None:
    """The run was copied from elsewhere, or the database was deleted: job.toml and the commits are enough."""
    flowd.submit("alone", f"job.steps={STEPS}")
    flowd.wait_step("alone", 10)
    assert flowd.ctl("cancel", "alone").returncode == 0
    shutil.copytree(flowd.run("alone").root, own_flowd.run("moved").root)
    own_flowd.up()
    refused = own_flowd.ctl("resume", "moved")
    assert refused.returncode == 2
    assert 'is of job "alone"' in refused.stderr
    own_flowd.run("moved").root.rename(own_flowd.run("alone").root)
    refused = own_flowd.ctl("resume", "along")
    assert refused.returncode == 2
    assert 'did you mean "alone"?' in refused.stderr
    assert own_flowd.ctl("resume", "alone").returncode == 0
    own_flowd.wait_done("alone")
    lines = own_flowd.check_done("alone", steps=STEPS)
    assert {line["attempt"] for line in lines} == {0, 1}
    own_flowd.down()
    for path in own_flowd.paths.root.glob("flowd.sqlite*"):
        path.unlink()
    own_flowd.up()
    refused = own_flowd.ctl("resume", "alone")
    assert refused.returncode == 2
    assert 'job "alone" is done' in refused.stderr
