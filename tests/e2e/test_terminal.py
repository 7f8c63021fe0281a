"""Commands on a real terminal: the live table, Ctrl-C, and the debugger inside an inline job."""

from flowd_process import FAST, HERE, Flowd
from terminal import CONTROL_C, Terminal


def test_follow_draws_a_table_and_ctrl_c_leaves_the_job_running(flowd: Flowd) -> None:
    """The newest step and what each stage waits for, drawn over itself; the cursor comes back."""
    name = "watched"
    command = ["submit", str(FAST), "--follow", "--set", f"job.name={name}"]
    with Terminal(*flowd.module_line("flowctl", *command, "--set", "job.steps=100000")) as terminal:
        terminal.wait_for(f"{name}: running")
        terminal.wait_for("waits for")
        shown = terminal.text
        for header in ("step", "reward", "staleness", "tokens/s", "seconds"):
            assert header in shown
        assert "/100000" in shown
        terminal.type(CONTROL_C)
        terminal.wait_for(f'detached: job "{name}" goes on')
        assert terminal.wait_end() == 0
        assert terminal.raw.rfind("\x1b[?25h") > terminal.raw.rfind("\x1b[?25l"), "no cursor"
        assert "Traceback" not in terminal.text
    flowd.wait_step(name, flowd.status(name)["step"] + 2)

    with Terminal(*flowd.module_line("flowctl", "status", name, "--follow")) as terminal:
        terminal.wait_for(f"{name}: running")
        assert flowd.ctl("cancel", name).returncode == 0
        assert terminal.wait_end() == 1
        assert terminal.text.rstrip().splitlines()[-1].startswith(f'error: job "{name}" cancelled')
    flowd.audit(name)


def test_breakpoint_of_a_task_opens_the_debugger_inline(own_flowd: Flowd) -> None:
    """`flowctl run --inline` needs no daemon, and a task's breakpoint() talks to this terminal."""
    command = ["run", "--inline", str(FAST), "--set", "job.name=debugged", "--set", "job.steps=1"]
    command += ["--set", "env.task=e2e_tasks:Stops"]
    done = 'job "debugged" done'
    with Terminal(*own_flowd.module_line("flowctl", *command)) as terminal:
        terminal.wait_for("(Pdb) ")
        terminal.type("p 'left over', len(slots) % 4\n")
        terminal.wait_for("('left over', 0)")  # whole groups of four are answered at a time
        terminal.type("where\n")
        terminal.wait_for(str(HERE / "tasks" / "e2e_tasks.py"))
        while terminal.wait_for("(Pdb) ", otherwise=done):
            terminal.type("continue\n")
        assert terminal.wait_end() == 0
    own_flowd.audit("debugged")


def test_quitting_the_debugger_ends_the_inline_job(own_flowd: Flowd) -> None:
    """`quit` raises in the task; the job is cancelled rather than the actor started again."""
    command = ["run", "--inline", str(FAST), "--set", "job.name=quit"]
    command += ["--set", "env.task=e2e_tasks:Stops"]
    with Terminal(*own_flowd.module_line("flowctl", *command)) as terminal:
        said = 'error: job "quit" cancelled at step 0 of 30: the debugger was quit'
        quits = 0
        while terminal.wait_for("(Pdb) ", otherwise=said):
            terminal.type("quit\n")
            quits += 1
        assert terminal.wait_end() == 1
        assert 1 <= quits <= 2, "each of the two env actors is asked once at most"
        assert terminal.text.rstrip().splitlines()[-1].startswith(said)
        assert "Traceback" not in terminal.text
