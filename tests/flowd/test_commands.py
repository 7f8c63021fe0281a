"""Commands from the command line to a (fake) flowd and back: what they ask, print and return."""

import json
import subprocess
import sys
from collections.abc import Iterator

import pytest
from fake_daemon import FakeDaemon, Server, job_status

from actors.conductor.ledger import Ledger
from actors.conductor.manifest import Manifest
from flowd.flowctl import main as flowctl

JOB = '[job]\nname = "toy"\nsteps = 4\n[env]\ntask = "arithmetic"\n'
TRACEBACK = 'Traceback (most recent call last):\n  File "task.py", line 3\nValueError: odd reward'


@pytest.fixture
def server(tmp_path, monkeypatch) -> Iterator[Server]:
    monkeypatch.setenv("FLOWD_HOME", str(tmp_path / "state"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "toy.toml").write_text(JOB)
    server = Server(tmp_path / "state", FakeDaemon())
    yield server
    server.close()


@pytest.fixture
def run_dir(server):
    folder = server.paths.run("toy").root
    (folder / "logs").mkdir(parents=True)
    return folder


def step(number: int) -> dict[str, object]:
    metrics = {
        "step": number,
        "policy_version": number + 1,
        "reward_mean": 0.25 * number,
        "staleness_max": 1,
        "tokens": 600,
        "seconds": 0.5,
        "rollout_work_s": 0.3,
        "rollout_wait_weights_s": 0.1,
    }
    return {"event": "step", "job": "toy", "metrics": metrics}


def test_submit_sends_the_resolved_job(server, capsys):
    """Overrides included; the name on stdout, talk on stderr."""
    assert flowctl(["submit", "toy.toml", "--set", "job.seed=7"]) == 0
    captured = capsys.readouterr()
    assert captured.out == "toy\n"
    assert "flowctl status toy --follow" in captured.err
    [(_, name, config, text)] = server.daemon.asked
    assert (name, config.job.seed) == ("toy", 7)
    assert "seed = 7" in text
    assert "max_grad_norm = 1.0" in text  # defaults are resolved too


def test_a_job_name_that_exists_is_refused(server, capsys):
    """By flowd; exit code 2."""
    server.daemon.statuses["other"] = job_status("other")
    assert flowctl(["submit", "toy.toml", "--set", "job.name=other"]) == 2
    assert 'job "other" exists already' in capsys.readouterr().err


def test_follow_prints_a_line_per_step(server, capsys):
    """Without a terminal: aligned pairs, what stages wait for, and a last word."""
    server.daemon.updates = [step(2), step(3), {"event": "job", "state": "done", "error": None}]
    server.daemon.end_status = job_status(state="done", step=4)
    assert flowctl(["submit", "toy.toml", "--follow"]) == 0
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("step=2/4  reward= 0.500  staleness=1  tokens_per_s=  1,200")
    assert "[rollout: work 75%, waits for weights 25%]" in lines[0]
    assert 'job "toy" done: 4 steps, reward 0.750' in captured.err


def test_follow_of_a_failed_job_shows_the_traceback_first(server, capsys):
    """Then one sentence; exit code 1."""
    failed = {
        "state": "failed",
        "reason": "env-0 raised ValueError: odd reward",
        "error": TRACEBACK,
    }
    server.daemon.updates = [step(2), {"event": "job", **failed}]
    server.daemon.end_status = job_status(step=3, **failed)
    assert flowctl(["submit", "toy.toml", "--follow"]) == 1
    err = capsys.readouterr().err
    assert err.index("Traceback") < err.index(
        'error: job "toy" failed at step 3 of 4: env-0 raised'
    )
    assert "flowctl logs toy" in err


def test_follow_as_json_passes_updates_on(server, capsys):
    """A document per line on stdout, the first and last with the status."""
    server.daemon.updates = [step(2), {"event": "job", "state": "cancelled", "error": None}]
    server.daemon.end_status = job_status(state="cancelled")
    assert flowctl(["status", "toy", "--follow", "--json"]) == 1
    events = [json.loads(line)["event"] for line in capsys.readouterr().out.splitlines()]
    assert events == ["status", "step", "job", "status"]


def test_ctrl_c_detaches(server, capsys, monkeypatch):
    """The job goes on; the hint says how to come back."""

    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    server.daemon.updates = [step(2)]
    monkeypatch.setattr("flowd.follow.LineView.show", interrupt)
    assert flowctl(["submit", "toy.toml", "--follow"]) == 0
    assert "flowctl status toy --follow" in capsys.readouterr().err


def test_status_of_a_failed_job_begins_with_the_traceback(server, capsys):
    """Exit code 0: the question was answered."""
    server.daemon.statuses["toy"] = job_status(state="failed", error=TRACEBACK)
    assert flowctl(["status", "toy"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("Traceback (most recent call last)")
    assert "ValueError: odd reward; `flowctl logs toy`" in out
    assert flowctl(["status", "toy", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["error"] == TRACEBACK


def test_status_without_a_name_is_the_newest_running_job(server, capsys):
    """Ended ones come second."""
    server.daemon.statuses["later"] = job_status("later", state="done")
    assert flowctl(["status", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["name"] == "toy"


def test_tables(server, capsys):
    """jobs, devices and nodes: a header and a line each."""
    assert flowctl(["jobs"]) == 0
    header, row = capsys.readouterr().out.splitlines()
    assert header.split() == [
        "name", "state", "step", "steps", "reward_mean", "staleness_max", "tokens_per_s"
    ]  # fmt: skip
    assert row.split() == ["toy", "running", "2", "4", "0.500", "1", "1,234"]
    server.daemon.statuses["toy"]["tokens_per_s"] = 948.6
    assert flowctl(["jobs"]) == 0
    assert capsys.readouterr().out.split()[-1] == "949"
    assert flowctl(["devices"]) == 0
    rows = capsys.readouterr().out.splitlines()
    assert rows[1].split() == ["cpu:0", "virtual", "1.0", "GiB", "other/trainer-0"]
    assert flowctl(["nodes", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["name"] == "here"


def test_channels_show_each_edge_and_who_waits(server, capsys):
    """A table with the reasons of the transports below, or the rows as they came."""
    edge = {
        "channel": "requests",
        "producer": "env-0",
        "consumer": "rollout-0",
        "transport": "ipc",
        "why": "same node",
        "depth": 3,
        "size_bytes": 4096,
        "in_flight": 2,
        "items_per_s": 12.5,
        "bytes_per_s": 2048.0,
        "producer_waits": "credit",
        "consumer_waits": "",
    }
    other = {**edge, "consumer": "rollout-1", "producer_waits": "", "consumer_waits": "items"}
    bound = {**edge, "channel": "tickets", "producer_waits": "bound"}
    server.daemon.edges = [edge, other, bound]
    assert flowctl(["channels"]) == 0
    head, first, second, third, _, why = capsys.readouterr().out.splitlines()
    assert head.split() == [
        *("channel", "producer", "consumer", "transport"),
        *("depth", "in_flight", "items/s", "bytes/s", "waiting"),
    ]
    assert first.split()[:5] == ["requests", "env-0", "rollout-0", "ipc", "3"]
    assert first.endswith("2     12.5  2.0 KiB  env-0 waits for credit")
    assert second.endswith("rollout-1 waits for items")
    assert third.endswith("env-0 may put no more")
    assert why == "ipc: same node"
    assert server.daemon.asked == [("channels", "toy")]
    assert flowctl(["channels", "toy", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == [edge, other, bound]


def test_scale_waits_and_tells_the_seconds(server, capsys):
    """The only running job is meant when none is named."""
    assert flowctl(["scale", "rollout=+1", "--wait", "--from", "trainer"]) == 0
    out = capsys.readouterr().out
    assert out == "rollout=+1 in 0.51 s (drain 0.10 s, ready 0.30 s); started rollout-2\n"
    assert server.daemon.asked == [("scale", "toy", "rollout", "+1", "trainer")]
    assert flowctl(["scale", "rollout=3", "--job", "toy", "--wait", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["seconds_total"] == 0.51


def test_scale_without_wait_leaves_flowd_at_work(server, capsys):
    """A refusal is still waited for, a change is not."""
    server.daemon.hold.clear()
    releasing = server.daemon.hold
    # The fake serves one request at a time: it goes on once the client asks whether it lives.
    from threading import Timer

    timer = Timer(1.2, releasing.set)
    timer.start()
    assert flowctl(["scale", "rollout=+1"]) == 0
    timer.join()
    assert "under way" in capsys.readouterr().err


def test_scale_needs_one_running_job_or_a_name(server, capsys):
    """With two, it says which."""
    server.daemon.statuses["second"] = job_status("second")
    assert flowctl(["scale", "rollout=+1"]) == 2
    assert "2 jobs are running (toy, second)" in capsys.readouterr().err


def test_plan_shows_replicas_on_the_idle_devices(server, capsys):
    """cpu:0 is held by another job."""
    assert flowctl(["plan", "toy.toml", "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    devices = [d for replica in planned["replicas"] for d in replica["devices"]]
    assert len(devices) == 3
    assert "cpu:0" not in devices
    assert flowctl(["plan", "toy.toml", "--devices", "cpu:2"]) == 2
    assert "cpu:2" not in capsys.readouterr().out
    assert flowctl(["plan", "toy.toml", "--devices", "cpus:2"]) == 2
    assert "'cpus:2'" in capsys.readouterr().err


def test_events_in_pages_and_followed(server, capsys):
    """All of them once, in order, with their data."""
    server.daemon.event_rows = [
        {"id": i, "time": 1.0, "job": "toy", "kind": "restart", "actor": f"env-{i}"}
        for i in range(1, 1003)
    ]
    assert flowctl(["events", "toy", "--json"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [json.loads(line)["id"] for line in lines] == list(range(1, 1003))
    assert flowctl(["events", "--follow"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1002
    assert lines[0].endswith("restart  job=toy  actor=env-1")


def test_an_event_is_one_line(server, capsys):
    """Tracebacks, and what is empty, are for --json."""
    server.daemon.event_rows = [
        {"id": 1, "time": 1.0, "job": "toy", "kind": "job", "state": "failed", "reason": "it raised",
         "error": TRACEBACK, "stopped": [], "how": ""}
    ]  # fmt: skip
    assert flowctl(["events"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert line.endswith("  job  job=toy  state=failed  reason=it raised")
    assert flowctl(["events", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["error"] == TRACEBACK


def test_cancel_and_resume(server, capsys):
    """One request each."""
    assert flowctl(["cancel", "toy", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["state"] == "cancelled"
    assert flowctl(["resume", "toy"]) == 0
    assert 'resumed job "toy"' in capsys.readouterr().err
    assert flowctl(["resume", "tog"]) == 2


def test_logs_of_all_actors_and_of_one(server, run_dir, capsys):
    """Prefixed with the actor unless one is named; an unfinished line is left for later."""
    (run_dir / "logs" / "env-0.log").write_text("one\ntwo\nunfin")
    (run_dir / "logs" / "trainer-0.log").write_text("three\n")
    assert flowctl(["logs", "toy"]) == 0
    assert capsys.readouterr().out == "env-0 | one\nenv-0 | two\ntrainer-0 | three\n"
    assert flowctl(["logs", "toy", "--actor", "env-0"]) == 0
    assert capsys.readouterr().out == "one\ntwo\n"
    assert flowctl(["logs", "toy", "--actor", "env-O"]) == 2
    assert "did you mean env-0?" in capsys.readouterr().err


def test_logs_of_a_failed_job_begin_with_its_traceback(server, run_dir, capsys):
    """The cause on stderr, before any log."""
    (run_dir / "logs" / "env-0.log").write_text("one\n")
    server.daemon.statuses["toy"] = job_status(state="failed", error=TRACEBACK)
    assert flowctl(["logs", "toy"]) == 0
    captured = capsys.readouterr()
    assert captured.err.startswith("Traceback")
    assert "flowctl logs" not in captured.err, "that is what was typed"
    assert captured.out == "env-0 | one\n"


def test_logs_follow_until_the_job_ends(server, run_dir, capsys):
    """What is written up to the end is shown."""
    (run_dir / "logs" / "env-0.log").write_text("one\n")
    server.daemon.updates = [{"event": "job", "state": "done", "error": None}]
    assert flowctl(["logs", "toy", "--follow"]) == 0
    assert capsys.readouterr().out == "env-0 | one\n"


def test_samples_of_the_last_step_and_of_one(server, run_dir, capsys):
    """Prompt, text, reward, versions and log-probs; half a line at the end is no error."""
    samples = [
        {
            "step": number,
            "attempt": 0,
            "group": number,
            "sample": 0,
            "prompt": "2+2=",
            "text": "4\n!",
            "reward": 1.0,
            "versions": [number, number + 1],
            "logprobs": [-0.5, -1.5],
            "tokens": [7, 8],
            "finish": "stop",
            "info": {"correct": 1.0},
        }
        for number in (1, 1, 2)
    ]
    text = "".join(json.dumps(sample) + "\n" for sample in samples)
    (run_dir / "samples.jsonl").write_text(text + '{"step": 3')
    assert flowctl(["samples", "toy"]) == 0
    out = capsys.readouterr().out
    assert out == (
        "step 2  group 2  sample 0  reward 1.000  version 2..3  tokens 2  finish stop\n"
        "  prompt    2+2=\n"
        "  text      4\n"
        "            !\n"
        "  logprobs  mean -1.000, least -1.500\n"
        "  info      correct=1.000\n\n"
    )
    assert flowctl(["samples", "toy", "--step", "1", "--json"]) == 0
    assert [json.loads(line)["step"] for line in capsys.readouterr().out.splitlines()] == [1, 1]
    assert flowctl(["samples", "toy", "--step", "9"]) == 2
    assert "steps 1 to 2" in capsys.readouterr().err


def test_samples_of_steps_that_were_rolled_back_are_hidden(server, run_dir, capsys):
    """A run attempt takes back all steps from where it begins, also those not taken again yet."""

    def shown(*options: str) -> list[tuple[int, int]]:
        assert flowctl(["samples", "toy", "--json", *options]) == 0
        lines = map(json.loads, capsys.readouterr().out.splitlines())
        return [(line["step"], line["attempt"]) for line in lines]

    taken = [(0, 0), (1, 0), (2, 0), (3, 0), (1, 1), (2, 1), (2, 2)]
    text = "".join(json.dumps({"step": s, "attempt": a}) + "\n" for s, a in taken)
    (run_dir / "samples.jsonl").write_text(text)
    with Ledger(run_dir / "ledger.sqlite") as ledger:
        for attempt, step in enumerate((0, 1, 2)):
            manifest = Manifest(step=step, policy_version=step, run_attempt=0)
            ledger.reconcile(manifest, attempt)
        assert shown() == [(2, 2)]
        assert shown("--step", "1") == [(1, 1)]
        assert shown("--step", "0") == [(0, 0)]
        assert shown("--step", "2", "--rolled-back") == [(2, 0), (2, 1), (2, 2)]
        assert flowctl(["samples", "toy", "--step", "3"]) == 1
        assert "step 3 was rolled back and not taken again yet" in capsys.readouterr().err
        assert shown("--step", "3", "--rolled-back") == [(3, 0)]
        ledger.reconcile(None, 3)
        assert flowctl(["samples", "toy"]) == 1
        assert "all steps with samples were rolled back" in capsys.readouterr().err
    (run_dir / "ledger.sqlite").write_bytes(b"not a database at all" * 100)
    assert flowctl(["samples", "toy"]) == 1
    assert "--rolled-back shows all samples" in capsys.readouterr().err
    assert shown("--step", "0", "--rolled-back") == [(0, 0)]


def test_reading_before_anything_was_written(server, run_dir, capsys):
    """The job exists, its files do not yet: exit code 1."""
    for command in (["samples", "toy"], ["trace", "toy"], ["audit", "toy"]):
        assert flowctl(command) == 1
        assert "yet" in capsys.readouterr().err


def test_a_damaged_line_is_named(server, run_dir, capsys):
    """With the file and the line."""
    (run_dir / "samples.jsonl").write_text('{"step": 1}\n{oops}\n')
    assert flowctl(["samples", "toy"]) == 1
    assert "samples.jsonl, line 2 is not JSON" in capsys.readouterr().err


def test_audit_of_a_sound_and_of_a_broken_ledger(server, run_dir, capsys):
    """Counts when sound; the problems on stdout and exit code 1 when not."""
    with Ledger(run_dir / "ledger.sqlite") as ledger:
        ledger.issue_many([(0, 7), (1, 8)], 0)
    assert flowctl(["audit", "toy"]) == 0
    captured = capsys.readouterr()
    assert "groups=2" in captured.out
    assert "pending=2" in captured.out
    assert captured.err == "the ledger is sound\n"
    with Ledger(run_dir / "ledger.sqlite") as ledger:
        ledger.issue(3, 9, 0)
    assert flowctl(["audit", "toy"]) == 1
    assert "never issued, though a later one was: group 2" in capsys.readouterr().out
    assert flowctl(["audit", "toy", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["ok"] is False
    (run_dir / "ledger.sqlite").write_bytes(b"not a database at all" * 100)
    assert flowctl(["audit", "toy"]) == 1
    assert "cannot be audited" in capsys.readouterr().err


def test_trace_writes_a_file(server, run_dir, tmp_path, capsys):
    """Whole, where it was asked."""
    span = {"actor": "env-0", "name": "step", "start": 5.0, "seconds": 1.0, "args": {}}
    (run_dir / "spans.jsonl").write_text(json.dumps(span) + "\n")
    assert flowctl(["trace", "toy", "-o", "out.json"]) == 0
    assert capsys.readouterr().out == "out.json\n"
    names = [
        event["name"] for event in json.loads((tmp_path / "out.json").read_text())["traceEvents"]
    ]
    assert names == ["process_name", "process_name", "step"]
    assert flowctl(["trace", "toy", "-o", "no/such/folder.json"]) == 2


def test_doctor_tells_what_it_finds(server, capsys):
    """One row per check; a running flowd is seen."""
    assert flowctl(["doctor", "--json"]) in (0, 1)
    rows = {row["check"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows["python"]["ok"]
    assert "running, pid" in rows["flowd"]["finding"]


def test_down_waits_for_the_end_of_the_process(tmp_path):
    """The request is answered first; then it is the process's own end that counts."""
    code = (
        "import sys, pathlib, os; sys.path.insert(0, sys.argv[2])\n"
        "from fake_daemon import FakeDaemon, Server\n"
        "daemon = FakeDaemon(); server = Server(pathlib.Path(sys.argv[1]), daemon)\n"
        "def stop(): daemon.stop_requested = True; os._exit(0)\n"
        "import threading; daemon.request_shutdown = lambda: threading.Timer(0.2, stop).start()\n"
        "print('up', flush=True); server._thread.join()\n"
    )
    here = __file__.rpartition("/")[0]
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path), here], stdout=subprocess.PIPE
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"up\n"
        from flowd.__main__ import main as flowd

        assert flowd(["down", "--state-dir", str(tmp_path)]) == 0
        assert child.wait(timeout=10) == 0
