"""The command line itself: help that costs nothing, errors that suggest, exit codes."""

import json
import resource
import subprocess
import sys

import pytest

from flowd.__main__ import main as flowd
from flowd.command_line import CTL_COMMANDS, DAEMON_COMMANDS, command_module
from flowd.flowctl import main as flowctl

HEAVY = ("torch", "numpy", "zmq", "msgspec", "rich", "transformers", "actors", "sim")


@pytest.mark.parametrize("command", [[], *([name] for name in CTL_COMMANDS)])
def test_help_is_light(command):
    """No torch, numpy or sockets; under 0.3 s of CPU time, interpreter start included."""
    code = (
        "import sys; from flowd.flowctl import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit as stop: assert stop.code == 0\n"
        "print(sorted(sys.modules), file=sys.stderr)"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-c", code, *command, "--help"], capture_output=True, text=True, timeout=60
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0
    assert "exit codes: 0 done" in done.stdout
    loaded = eval(done.stderr)
    assert not {name.partition(".")[0] for name in loaded} & set(HEAVY)
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert cpu_s < 0.3


def test_checking_a_job_loads_neither_torch_nor_a_simulator(tmp_path):
    """`flowctl plan` on a wrong file, say, answers at once."""
    job = tmp_path / "toy.toml"
    job.write_text('[job]\nname = "toy"\nsteps = 1\n[env]\ntask = "arithmetic"\n')
    code = (
        "import sys; from flowd.job import load_job; load_job(sys.argv[1]);"
        "print([name for name in sys.modules if name.partition('.')[0] in ('torch', 'numpy', 'zmq')])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(job)], capture_output=True, text=True, timeout=60
    )
    assert done.stdout == "[]\n", done.stderr


@pytest.mark.parametrize("name", CTL_COMMANDS + DAEMON_COMMANDS)
def test_every_command_module_keeps_the_form(name):
    """NAME, HELP, add_arguments and run; daemon halves have one of two names."""
    module = command_module(name)
    assert name == module.NAME
    assert module.HELP
    assert callable(module.add_arguments)
    assert callable(module.run)


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["submti", "x.toml"], ["submti is not a command", "`flowctl submit`"]),
        (["up"], ["it is `flowd up`"]),
        (["job.toml"], ["`flowctl submit job.toml`"]),
        (["frobnicate"], ["commands are submit, run"]),
        (["submit", "x.toml", "--folow"], ["--folow", "did you mean --follow?"]),
        (["submit", "x.toml", "y.toml"], ["y.toml is not an argument"]),
        (["submit"], ["required: JOB.toml", "flowctl submit --help"]),
        (["samples", "toy", "--step", "two"], ["--step", "'two'"]),
        (["scale", "rollout+2"], ["'rollout+2' is not a change", "rollout=+2"]),
        (["scale", "rollout=two"], ["is not a change"]),
        (["run", "x.toml"], ["needs --inline", "flowctl submit x.toml --follow"]),
        (["submit", "no-such.toml"], ["job file no-such.toml does not exist"]),
        (["jobs"], ["no flowd is running", "`flowd up"]),
        (["status", "toy"], ["no flowd is running"]),
        (["cancel", "toy"], ["no flowd is running"]),
        (["samples", "toy"], ['no job "toy"', "flowctl submit"]),
        (["audit", "toy"], ['no job "toy"']),
    ],
)
def test_wrong_requests_are_one_sentence_and_exit_code_2(
    argv, parts, tmp_path, monkeypatch, capsys
):
    """On stderr; stdout stays empty and the state directory stays as it was."""
    monkeypatch.setenv("FLOWD_HOME", str(tmp_path / "state"))
    monkeypatch.chdir(tmp_path)
    assert flowctl(argv) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    for part in parts:
        assert part in captured.err
    assert not (tmp_path / "state").exists()


def test_flowd_knows_its_own_commands(capsys, tmp_path, monkeypatch):
    """Also a wrong device list, which starts nothing."""
    monkeypatch.setenv("FLOWD_HOME", str(tmp_path / "state"))
    assert flowd(["submit"]) == 2
    assert "it is `flowctl submit`" in capsys.readouterr().err
    assert flowd(["down"]) == 2
    assert "no flowd is running" in capsys.readouterr().err
    assert flowd(["up", "--devices", "cpu:0"]) == 2
    assert "cpu:0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("program", "argv"),
    [
        (flowd, ["up"]),
        (flowd, ["up", "--detach"]),
        (flowd, ["down"]),
        (flowctl, ["jobs"]),
        (flowctl, ["logs", "toy"]),
        (flowctl, ["run", "--inline", "toy.toml"]),
    ],
)
def test_a_state_directory_that_cannot_be(program, argv, tmp_path, monkeypatch, capsys):
    """A file stands in its place: one sentence with the way out."""
    (tmp_path / "toy.toml").write_text(
        '[job]\nname = "toy"\nsteps = 1\n[env]\ntask = "arithmetic"\n'
    )
    (tmp_path / "file").touch()
    monkeypatch.chdir(tmp_path)
    assert program([*argv, "--state-dir", "file"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert str(tmp_path / "file") in captured.err


def test_no_command_shows_the_help(capsys):
    """On stderr, with exit code 2."""
    assert flowctl([]) == 2
    assert "usage: flowctl" in capsys.readouterr().err


def test_a_reader_that_leaves_is_no_error(tmp_path):
    """`flowctl samples JOB | head -1` says nothing about pipes."""
    run = tmp_path / "runs" / "toy"
    run.mkdir(parents=True)
    sample = {"step": 1, "prompt": "x" * 1000, "text": "y", "reward": 1.0}
    (run / "samples.jsonl").write_text((json.dumps(sample) + "\n") * 2000)
    command = [
        sys.executable,
        "-m",
        "flowd.flowctl",
        "samples",
        "toy",
        "--state-dir",
        str(tmp_path),
    ]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        assert child.stderr is not None
        child.stdout.readline()
        child.stdout.close()
        assert child.stderr.read() == ""
        assert child.wait(timeout=30) == 1
