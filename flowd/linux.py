"""What Linux says about processes and the few controls that the standard library lacks.

No policy and no event loop: each function is one question or one order to the kernel. Where a
sandboxed kernel lacks a call, the function says so in its result, and the caller chooses what to do
without it.
"""

import contextlib
import ctypes
import os
import select
import signal
import time

PR_SET_PDEATHSIG = 1
PR_SET_NAME = 15
PR_SET_CHILD_SUBREAPER = 36
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
LARGEST_ON_HEAP = 32 << 20  # bytes; the most that glibc takes
KEPT_WHEN_FREED = 256 << 20
CUDA_ERROR_NOT_INITIALIZED = 3

_libc = ctypes.CDLL(None, use_errno=True)


def _prctl(option: int, argument: int) -> bool:
    zero = ctypes.c_ulong(0)
    return bool(_libc.prctl(option, ctypes.c_ulong(argument), zero, zero, zero) == 0)


def set_parent_death_signal(signum: int) -> bool:
    """Have the kernel send `signum` to this process when its parent dies; survives exec, not fork.

    Returns whether the kernel took it. A parent that died before the call is not noticed: compare
    `os.getppid()` afterwards.
    """
    return _prctl(PR_SET_PDEATHSIG, signum)


def set_child_subreaper() -> bool:
    """Become the parent of orphaned descendants; survives exec, not fork.

    Returns whether the kernel took it.
    """
    return _prctl(PR_SET_CHILD_SUBREAPER, 1)


def set_process_name(name: str) -> None:
    """Name this process for `ps` and `top`; the kernel keeps 15 bytes."""
    buffer = ctypes.create_string_buffer(name.encode()[:15])
    _prctl(PR_SET_NAME, ctypes.addressof(buffer))


def keep_freed_memory() -> None:
    """Have the allocator use freed blocks of a few megabytes again instead of giving them back to the kernel.

    Activations and batches come and go with every micro-batch; fresh pages for each are a fault per 4 KiB. Where the C
    library has no `mallopt` nothing changes.
    """
    mallopt = getattr(_libc, "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, LARGEST_ON_HEAP)
        mallopt(M_TRIM_THRESHOLD, KEPT_WHEN_FREED)


def _stat(pid: int) -> list[bytes]:
    """The fields of /proc/PID/stat from `state` (field 3) on; empty when there is no process."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            line = file.read()
    except (FileNotFoundError, ProcessLookupError):
        return []
    return line[line.rindex(b")") + 2 :].split()  # the name in front may hold spaces and brackets


def process_start_time(pid: int) -> int | None:
    """When process `pid` started, in clock ticks since boot; None when there is none.

    (pid, start time) names a process for good; a pid alone is given to another one later.
    """
    fields = _stat(pid)
    return int(fields[19]) if fields else None


def alive(pid: int, start_time: int) -> bool:
    """Whether the process that got `pid` at `start_time` still runs (a zombie does not)."""
    fields = _stat(pid)
    return bool(fields) and int(fields[19]) == start_time and fields[0] not in (b"Z", b"X")


def child_pids() -> list[int]:
    """The children of this (single-threaded) process, zombies included."""
    own_pid = os.getpid()
    try:
        with open(f"/proc/self/task/{own_pid}/children", "rb") as file:
            return [int(pid) for pid in file.read().split()]
    except FileNotFoundError:  # a kernel without CONFIG_PROC_CHILDREN
        stats = ((int(name), _stat(int(name))) for name in os.listdir("/proc") if name.isdigit())
        return [pid for pid, fields in stats if fields and int(fields[1]) == own_pid]


def open_pidfd(pid: int, start_time: int | None = None) -> int | None:
    """A descriptor that becomes readable when the process ends; the caller closes it.

    None when the process is gone (or `pid` is another process by now).
    Raises OSError (ENOSYS, EPERM) where the kernel or its sandbox has no pidfds.
    """
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return None
    if start_time is not None and process_start_time(pid) != start_time:
        os.close(pidfd)
        return None
    return pidfd


def kill_tagged(variable: str, value: str, deadline_s: float = 5.0) -> set[int]:
    """Kill (SIGKILL) every process started with `variable=value` in its environment; blocks.

    A tag reaches what neither process groups nor parents do: descendants that moved to a session of
    their own and whose parents are dead. Repeats until none is left, so that a process born
    meanwhile is found too. Returns the killed pids; raises TimeoutError when some outlive
    `deadline_s`.
    """
    tag = f"{variable}={value}".encode()
    give_up_at = time.monotonic() + deadline_s
    killed: set[int] = set()
    while survivors := [pid for pid in _own_pids() if tag in _environment(pid)]:
        left_s = give_up_at - time.monotonic()
        if left_s <= 0:
            raise TimeoutError(
                f"processes {survivors} outlived SIGKILL by {deadline_s} s, probably inside a "
                "device driver; they hold their devices until the driver lets them go or the node restarts"
            )
        for pid in survivors:
            if _kill_tagged_pid(pid, tag, left_s):
                killed.add(pid)
    return killed


def _own_pids() -> list[int]:
    """Pids of this user's processes, without this one."""
    uid, own_pid = os.getuid(), os.getpid()
    pids = []
    for name in os.listdir("/proc"):
        with contextlib.suppress(ValueError, OSError):
            if os.stat(f"/proc/{name}").st_uid == uid and int(name) != own_pid:
                pids.append(int(name))
    return pids


def _environment(pid: int) -> list[bytes]:
    """The environment `pid` was started with; empty for the dead and for what may not be read."""
    try:
        with open(f"/proc/{pid}/environ", "rb") as file:
            return file.read().split(b"\0")
    except OSError:
        return []


def _kill_tagged_pid(pid: int, tag: bytes, wait_s: float) -> bool:
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return False
    except (
        OSError
    ):  # no pidfds here: a small risk of a re-used pid, and no way to wait but to look again
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.001)
        return True
    try:
        if tag not in _environment(pid):  # read again: now the descriptor pins the process
            return False
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        poller = select.poll()
        poller.register(pidfd, select.POLLIN)
        poller.poll(wait_s * 1000)
    finally:
        os.close(pidfd)
    return True


def peer_hung_up(descriptor: int) -> bool:
    """Whether the other end of a socket is closed, even while bytes it sent wait to be read."""
    poller = select.poll()
    poller.register(descriptor, select.POLLRDHUP)
    return bool(poller.poll(0))


def cuda_initialised() -> bool:
    """Whether CUDA was initialised in this process, whoever did it: such a process must not fork.

    torch's own flag misses libraries that call the driver themselves, so the driver is asked.
    """
    try:
        driver = ctypes.CDLL("libcuda.so.1", mode=os.RTLD_NOLOAD | os.RTLD_LAZY)
    except OSError:  # not even loaded
        return False
    count = ctypes.c_int()
    return bool(driver.cuDeviceGetCount(ctypes.byref(count)) != CUDA_ERROR_NOT_INITIALIZED)
