"""Programs that try to get out, take everything or never end: each is contained, and nothing of it is left."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from sim.text.sandbox import Limits, Outcome, Sandbox, SandboxError, Trial

LIMITS = Limits(timeout_s=1.0, processes=8, memory_mb=256)
ORDINARY = 12345  # a user without an entry, as containers have them
SYSTEM_PYTHON = shutil.which("python3", path="/usr/bin")


@pytest.fixture(scope="module")
def sandbox() -> Sandbox:
    try:
        return Sandbox(LIMITS)
    except SandboxError as error:
        pytest.skip(str(error))


@pytest.fixture(autouse=True)
def nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """After each test no process of a run and no folder of one."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    before = set(psutil.pids())
    yield
    assert not [p for p in psutil.process_iter(["uids"]) if p.pid not in before and belongs(p)]
    assert not list(tmp_path.glob("flowd-run-*"))


def belongs(process: psutil.Process) -> bool:
    """Whether it is ours or a descendant's, or of a user made for a run."""
    uids = process.info["uids"]
    if uids is not None and uids.real >= 0x70000000:
        return True
    return process.pid in {child.pid for child in psutil.Process().children(recursive=True)}


def run(sandbox: Sandbox, program: str, code: str = "") -> Outcome:
    (outcome,) = sandbox.run(program, [Trial(code=code)])
    return outcome


def test_tests_see_the_names_of_the_program(sandbox: Sandbox) -> None:
    """Each with the program run anew."""
    program = "print('here')\nnames = []\ndef add(x): names.append(x); return len(names)"
    outcomes = sandbox.run(
        program,
        [Trial(code="assert add(1) == 1"), Trial(code="assert add(1) == 2"), Trial(code="1/0")],
    )
    assert [o.reason for o in outcomes] == [
        "",
        "AssertionError: ",
        "ZeroDivisionError: division by zero",
    ]
    assert outcomes[0].output == "here\n"


def test_first_failure_can_stop_the_rest(sandbox: Sandbox) -> None:
    """Where all have to pass, no more needs to be known."""
    tests = [Trial(code="assert True"), Trial(code="assert False"), Trial(code="assert True")]
    assert len(sandbox.run("", tests, stop_at_first=True)) == 2


def test_input_and_output(sandbox: Sandbox) -> None:
    """Large input does not block; leaving by sys.exit(0) is an end too; threads are waited for."""
    program = (
        "import sys, threading\n"
        "text = sys.stdin.read()\n"
        "thread = threading.Thread(target=lambda: print(len(text)))\n"
        "thread.start()\n"
        "sys.exit(0) if text else sys.exit(3)"
    )
    long, empty = sandbox.run(program, [Trial(input="x" * 300_000), Trial(input="")])
    assert (long.reason, long.output) == ("", "300000\n")
    assert empty.reason == "SystemExit: 3"


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("while True: pass", "out of time"),
        ("import signal, os; os.kill(os.getpid(), signal.SIGSTOP)", "out of time"),
        ("import os; os.closerange(0, 64)\nwhile True: pass", "out of time"),
        ("import os\nwhile True:\n  try: os.fork()\n  except OSError: pass", "out of time"),
        ("x = bytearray(10 << 30)", "MemoryError"),
        ("import mmap; mmap.mmap(-1, 10 << 30)", "Cannot allocate memory"),
        ("while True: print('x' * 100_000)", "too much output"),
        ("f = open('a', 'wb')\nwhile True: f.write(bytes(1 << 20))", "File too large"),
        ("for i in range(9): open(f'{i}', 'wb').write(bytes(15 << 20))", "No space left"),
        ("for i in range(999): open(f'{i}', 'w').close()", "No space left"),
        ("open('/usr/lib/x', 'w')", "OSError|PermissionError"),
        ("import ctypes; ctypes.string_at(0)", "killed by SIGSEGV"),
        ("import os; os.killpg(0, 9)", "killed by SIGKILL"),
        ("import os; os.kill(-1, 9)", "ProcessLookupError"),
        ("import socket; socket.socket()", "Operation not permitted"),
        ("import os; os.listdir('/proc')", "No such file"),
        ("import os; os._exit(0)", "ended early with exit code 0"),
        ("raise SystemExit(0)", "SystemExit"),
        ("import os; os.write(3, bytes(16)); os._exit(0)", "ended early|\0"),
        (
            "import threading\nfor i in range(99): threading.Thread(target=threading.Event().wait).start()",
            "can't start new thread",
        ),
        ("import ctypes; assert ctypes.CDLL(None).unshare(0x10000000) == 0", "AssertionError"),
        (
            "import ctypes; assert ctypes.CDLL(None).shmget(0, 1 << 30, 0o1777) >= 0",
            "AssertionError",
        ),
    ],
)
def test_contained(sandbox: Sandbox, program: str, reason: str) -> None:
    """The program does not pass, and the run is over about when its time is."""
    began = time.monotonic()
    outcome = run(sandbox, program)
    assert outcome.reason
    assert re.search(reason, outcome.reason), outcome
    assert len(outcome.output) <= LIMITS.output_kb * 1024
    assert time.monotonic() - began < 30  # of a busy machine; an uncontained one never ends


def test_neither_files_nor_environment_nor_descriptors_of_the_parent(
    sandbox: Sandbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even what everybody may read, or what was left open and inheritable."""
    secret = tmp_path / "secret"
    secret.write_text("secret")
    tmp_path.chmod(0o755)
    monkeypatch.setenv("SECRET", "secret")
    with secret.open() as file:
        os.set_inheritable(file.fileno(), True)
        program = (
            "import os\n"
            "assert 'SECRET' not in os.environ\n"
            "for number in range(4, 64):\n"
            "    try: os.fstat(number)\n"
            "    except OSError: continue\n"
            "    raise AssertionError(number)\n"
            f"open({str(secret)!r})"
        )
        assert run(sandbox, program).reason.startswith("FileNotFoundError")


def test_a_listener_of_this_machine_is_out_of_reach(sandbox: Sandbox) -> None:
    """By the filter; the network namespace behind it has no loopback that is up."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = server.getsockname()
        program = f"import socket; socket.create_connection({address!r}, timeout=1)"
        assert "Operation not permitted" in run(sandbox, program).reason


def test_what_a_program_leaves_running_ends_with_it(sandbox: Sandbox) -> None:
    """A daemon that left session and parent passes its test and is gone; the fixture looks."""
    program = (
        "import os, time\n"
        "if os.fork() == 0:\n"
        "    os.setsid()\n"
        "    if os.fork() == 0: time.sleep(600)\n"
        "    os._exit(0)"
    )
    assert run(sandbox, program).reason == ""


def test_tests_of_a_program_share_no_file_and_no_process(sandbox: Sandbox) -> None:
    """Each finds an empty folder, although the one before could not be asked to tidy up."""
    program = "import os; assert not os.listdir('.'); open('left', 'w').close()"
    assert [o.reason for o in sandbox.run(program, [Trial(), Trial()])] == ["", ""]


def test_runs_side_by_side_do_not_count_against_each_other(sandbox: Sandbox) -> None:
    """Four at a time, each with all its processes."""
    program = (
        "import os, signal\n"
        f"for _ in range({LIMITS.processes - 1}):\n"
        "    if os.fork() == 0: signal.pause()"
    )
    reasons: list[str] = []
    threads = [
        threading.Thread(target=lambda: reasons.append(run(sandbox, program).reason))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert reasons == [""] * 4


def test_killed_parent_takes_the_run_with_it() -> None:
    """An env actor that is killed leaves no program behind."""
    code = (
        "from sim.text.sandbox import *\n"
        "sandbox = Sandbox(Limits(timeout_s=600, total_s=600))\n"
        "print('made', flush=True)\n"
        "sandbox.run('while True: pass', [Trial()])"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        if not parent.stdout.readline():
            pytest.skip("needs namespaces")
        launcher = next(iter(wait_for_children(parent.pid, 2)))
        everyone = [launcher, *launcher.children(recursive=True)]
        for each in everyone:  # the kernel's first choice where memory runs out
            assert Path(f"/proc/{each.pid}/oom_score_adj").read_text() == "1000\n"
        parent.send_signal(signal.SIGKILL)
        _, alive = psutil.wait_procs(everyone, timeout=30)
        assert not alive


def wait_for_children(pid: int, depth: int) -> list[psutil.Process]:
    """The launcher, once the program runs below it."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        children = psutil.Process(pid).children()
        if children and len(children[0].children(recursive=True)) >= depth:
            return children
        os.sched_yield()
    raise AssertionError("the program did not start")


def test_installed_packages_when_asked() -> None:
    """Wherever the virtual environment lies."""
    outcomes = []
    for packages in (False, True):
        try:
            sandbox = Sandbox(Limits(memory_mb=2048, processes=64), packages=packages)
        except SandboxError as error:
            pytest.skip(str(error))
        outcomes.append(run(sandbox, "import numpy; print(numpy.arange(3).sum())"))
    assert outcomes[0].reason == "ModuleNotFoundError: No module named 'numpy'"
    assert outcomes[1] == Outcome(reason="", output="3\n")


def test_bad_limits_are_told() -> None:
    """The value and the rule."""
    with pytest.raises(ValueError, match="timeout_s = 0: it must be more than 0"):
        Limits(timeout_s=0)
    with pytest.raises(ValueError, match="memory_mb = 1: Python itself needs 64"):
        Limits(memory_mb=1)


as_root = pytest.mark.skipif(
    os.geteuid() != 0 or SYSTEM_PYTHON is None or shutil.which("setpriv") is None,
    reason="needs root, setpriv and a python in /usr/bin, which every user may run",
)
TRY = """
import json, sys
from sim.text.sandbox import *
try:
    sandbox = Sandbox(Limits(timeout_s=0.5, processes=8, memory_mb=256), allow_unprotected=sys.argv[1] == "allow")
except SandboxError as error:
    print(json.dumps(["refused", str(error)])); sys.exit()
programs = [
    "", "while True: pass", "x = bytearray(10 << 30)", "import os; os.kill(-1, 9)", "import socket; socket.socket()",
    "import os, time\\nif os.fork() == 0:\\n  os.setsid(); time.sleep(600)",
    "import os\\nwhile True:\\n  try: os.fork()\\n  except OSError: pass",
]
print(json.dumps([sandbox.missing, [sandbox.run(p, [Trial()])[0].reason for p in programs]]))
"""
ENDS = ["", "out of time", "MemoryError: ", "", "PermissionError", "", "out of time"]


def tried(words: list[str], mode: str) -> list[object]:
    """What a process with other rights says; the system's python, which needs nothing that we installed."""
    assert SYSTEM_PYTHON is not None
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [*words, SYSTEM_PYTHON, "-B", "-c", TRY, mode],
        env={"PYTHONPATH": str(root), "PATH": os.environ["PATH"], "TMPDIR": "/tmp"},
        cwd="/",
        capture_output=True,
        text=True,
        timeout=60,
    )
    if "No module named" in done.stderr or "Permission denied" in done.stderr:
        pytest.skip(f"an ordinary user cannot read {root}")
    assert done.returncode == 0, done.stderr
    answer: list[object] = json.loads(done.stdout)
    return answer


ORDINARY_USER = ["setpriv", f"--reuid={ORDINARY}", f"--regid={ORDINARY}", "--clear-groups"]
# A user namespace that grants no further ones, and without the right to the others: as in many containers.
NO_NAMESPACES = [
    *ORDINARY_USER,
    *("unshare", "--user", "--map-root-user", "sh", "-c"),
    "echo 0 > /proc/sys/user/max_user_namespaces && exec "
    'setpriv --bounding-set=-sys_admin --inh-caps=-sys_admin "$@"',
    "sh",
]


@as_root
@pytest.mark.parametrize("words", [ORDINARY_USER, ["setpriv", "--bounding-set=-sys_admin"]])
def test_ordinary_user_and_root_without_rights_have_the_whole_cage(words: list[str]) -> None:
    """Through a user namespace."""
    answer = tried(words, "refuse")
    if answer[0] == "refused":
        pytest.skip(str(answer[1]))
    missing, reasons = answer
    assert missing == ""
    check_ends(reasons)


@as_root
def test_missing_protection_refuses_unless_allowed() -> None:
    """One sentence says what programs can do and the way out; where allowed, what remains still holds."""
    refused, why = tried(NO_NAMESPACES, "refuse")
    assert refused == "refused"
    assert "programs can read this machine's files" in str(why)
    assert "allow_unprotected = true" in str(why)
    missing, reasons = tried(NO_NAMESPACES, "allow")
    assert "read this machine's files" in str(missing)
    check_ends(reasons)


def check_ends(reasons: object) -> None:
    assert isinstance(reasons, list)
    for number, (reason, expected) in enumerate(zip(reasons, ENDS, strict=True)):
        if number == 3:  # kills nobody: nobody is there, or it may not
            assert "Error" in reason
        elif expected:
            assert reason.startswith(expected), reasons
        else:
            assert reason == "", reasons
