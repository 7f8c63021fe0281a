"""Jobs from submit to the end, in both modes, at every staleness; and requests that are refused."""

import json
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from flowd_process import FAST, Flowd, lines_of

STEPS = 30
DOCUMENTED = {
    "step",
    "policy_version",
    "attempt",
    "time",
    "reward_mean",
    "reward_std",
    "staleness_max",
    "staleness_mean",
    "groups",
    "group_ids",
    "samples",
    "tokens",
    "tokens_per_s",
    "seconds",
    "loss",
    "grad_norm",
    "learning_rate",
    "entropy",
    "kl_sampler",
    "seconds_train",
    "seconds_step",
    "seconds_publish",
    "weights_variant",
    "weights_bytes",
}
STAGE_TIMES = {"rollout_work_s", "env_work_s"}  # told by actors as they go, so not at once


def check_metrics(lines: list[dict[str, Any]], bound: int) -> None:
    """Every step says what the documentation promises, and nothing lags more than the job allows."""
    for line in lines:
        assert line.keys() >= DOCUMENTED, DOCUMENTED - line.keys()
        assert line["policy_version"] == line["step"] + 1
        assert line["groups"] == 8
        assert line["samples"] == 32
        assert line["attempt"] == 0
    assert lines[-1].keys() >= STAGE_TIMES
    reached = max(line["staleness_max"] for line in lines)
    assert reached == bound, f"staleness reached {reached} under a bound of {bound}"


@pytest.mark.parametrize("bound", [0, 1, 2])
def test_disaggregated_job_trains_every_group_once_within_its_staleness(
    flowd: Flowd, bound: int
) -> None:
    """Groups lag at most max_staleness versions, and do lag that much: generation does not wait."""
    name = f"disaggregated-{bound}"
    flowd.submit(name, f"job.max_staleness={bound}")
    flowd.wait_done(name)
    lines = flowd.check_done(name, steps=STEPS)
    assert len(flowd.metrics(name)) == STEPS
    check_metrics(lines, bound)


@pytest.mark.parametrize("bound", [0, 1])
def test_collocated_stages_never_hold_a_device_at_the_same_time(flowd: Flowd, bound: int) -> None:
    """Rollout and trainer take turns: their spans on the device they share do not overlap."""
    name = f"collocated-{bound}"
    flowd.submit(
        name,
        "job.mode=collocated",
        f"job.max_staleness={bound}",
        "rollout.devices=2",
        "job.steps=20",
    )
    flowd.wait_done(name)
    check_metrics(flowd.check_done(name, steps=20), bound)
    trainer = next(a for a in flowd.actors(name) if a["kind"] == "trainer")
    (shared,) = trainer["devices"]
    spans = [s for s in lines_of(flowd.run(name).spans) if s.get("device") == shared]
    holders = {span["name"].partition("-")[0] for span in spans}
    assert holders == {"rollout", "trainer"}
    spans.sort(key=lambda span: float(span["start"]))
    for earlier, later in pairwise(spans):
        assert earlier["start"] + earlier["seconds"] <= later["start"] + 2e-6, (earlier, later)
    # Both fit the device, so they stay on it: only hand-overs before they knew what they need offload.
    onloads = [s for s in lines_of(flowd.run(name).spans) if s["name"] == "onload"]
    assert len(spans) > 12
    assert len(onloads) < 8


@pytest.mark.parametrize("mode", ["disaggregated", "collocated"])
def test_two_trainer_ranks_train_as_one_does(flowd: Flowd, mode: str) -> None:
    """Data parallelism changes no result but the order of sums: losses agree to 1e-5."""
    losses = []
    for ranks in (1, 2):
        name = f"{mode}-ranks-{ranks}"
        flowd.submit(
            name,
            f"job.mode={mode}",
            "job.deterministic=true",
            "job.steps=10",
            "env.task=e2e_tasks:Parity",
            f"trainer.devices={ranks}",
        )
        flowd.wait_done(name)
        losses.append([line["loss"] for line in flowd.check_done(name, steps=10)])
    assert any(losses[0])
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["job.name=taken"], "exists already and is done: give this one another name"),
        (["env.args.max_digit=2"], 'did you mean "max_digits"?'),
        (["job.name=big", "rollout.devices=40"], "12 present"),
        (["job.name=no/name"], "not a job name"),
        (["job.name=no-model", "model.path=/nowhere/model"], "/nowhere/model"),
    ],
)
def test_wrong_job_is_refused_in_one_sentence(flowd: Flowd, changes: list[str], said: str) -> None:
    """Exit code 2, what is wrong on one line of stderr, and no trace of the job."""
    if not flowd.run("taken").root.exists():
        flowd.submit("taken", "job.steps=1")
        flowd.wait_done("taken")
    before = (
        sorted(flowd.paths.runs.iterdir()),
        [job["name"] for job in flowd.request("jobs")["jobs"]],
    )
    options = [word for change in changes for word in ("--set", change)]
    done = flowd.ctl("submit", str(FAST), *options)
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert said in done.stderr
    after = (
        sorted(flowd.paths.runs.iterdir()),
        [job["name"] for job in flowd.request("jobs")["jobs"]],
    )
    assert after == before


def test_what_a_job_wrote_can_be_read_back(flowd: Flowd, tmp_path: Path) -> None:
    """`samples --step` agrees with that step's metrics; `trace` has every actor's work and every lease."""
    name = "read"
    flowd.submit(name, "job.steps=8", "metrics.samples_per_step=3")
    flowd.wait_done(name)
    lines = flowd.check_done(name, steps=8)
    done = flowd.ctl("samples", name, "--step", "5", "--json")
    assert done.returncode == 0, done.stderr
    samples = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(samples) == 3
    for sample in samples:
        assert sample["step"] == 5
        assert sample["group"] in lines[5]["group_ids"]
        assert 5 - lines[5]["staleness_max"] <= min(sample["versions"]) <= max(sample["versions"])
        assert max(sample["versions"]) <= 5
        assert len(sample["tokens"]) == len(sample["logprobs"]) == len(sample["versions"])
        assert max(sample["logprobs"]) <= 0.0
        assert sample["prompt"].endswith("=")
        assert sample["reward"] in (0.0, 1.0)
    shown = flowd.ctl("samples", name, "--step", "5").stdout
    for sample in samples:
        assert f"step 5  group {sample['group']}  " in shown
    refused = flowd.ctl("samples", name, "--step", "8")
    assert refused.returncode == 2
    assert "it has steps 0 to 7" in refused.stderr

    output = tmp_path / "trace.json"
    assert flowd.ctl("trace", name, "-o", str(output)).returncode == 0
    events = json.loads(output.read_text())["traceEvents"]
    names = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
    spans = [e for e in events if e["ph"] == "X"]
    assert all(span["ts"] >= 0 and span["dur"] >= 0 for span in spans)
    did = {(names[span["pid"]], span["name"]) for span in spans}
    assert did >= {("trainer-0", "update"), ("rollout-0", "generate"), ("rollout-1", "generate")}
    assert did >= {("devices", replica) for replica in ("trainer-0", "rollout-0", "rollout-1")}
    updates = [s for s in spans if (names[s["pid"]], s["name"]) == ("trainer-0", "update")]
    assert len(updates) == 8


def test_job_whose_run_directory_is_gone_is_not_begun_anew(flowd: Flowd) -> None:
    """There is no commit to go on from: said in a sentence, and nothing is started or made."""
    name = "vanished"
    flowd.submit(name, "job.steps=100000")
    flowd.wait_step(name, 2)
    assert flowd.ctl("cancel", name).returncode == 0
    shutil.rmtree(flowd.run(name).root)
    refused = flowd.ctl("resume", name)
    assert refused.returncode == 2
    assert len(refused.stderr.splitlines()) == 1
    assert f"{flowd.run(name).root}, with its commits, is gone" in refused.stderr
    assert flowd.status(name)["state"] == "cancelled"
    assert not flowd.run(name).root.exists()
