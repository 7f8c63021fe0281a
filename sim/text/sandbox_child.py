"""Runs a program that nobody trusts, from inside its cage. Started by `sim.text.sandbox` as a script of its own.

Standard input has the request, standard output gets the answer, both one JSON object. Three processes: the launcher
enters new namespaces; the keeper is the first process in them, builds the file system, runs one test after the other
and ends whatever a test left; the program itself has given up all rights. The launcher ends when the keeper is
reaped, and by then the kernel has ended everything in the namespaces.

Standard library only, and no import of ours: the interpreter runs without site packages.
"""

import contextlib
import ctypes
import errno
import fcntl
import json
import os
import platform
import resource
import select
import shutil
import signal
import struct
import sys
import time
import traceback
import types
from typing import Any

libc = ctypes.CDLL(None, use_errno=True)

CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC = 0x20000, 0x4000000, 0x8000000
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000
NAMESPACES = CLONE_NEWNS | CLONE_NEWUTS | CLONE_NEWIPC | CLONE_NEWPID | CLONE_NEWNET
ANY_NAMESPACE = NAMESPACES | CLONE_NEWUSER | 0x2000000  # and cgroups

MS_RDONLY, MS_NOSUID, MS_NODEV, MS_REMOUNT = 1, 2, 4, 32
MS_NOEXEC, MS_BIND, MS_REC, MS_PRIVATE = 8, 4096, 16384, 1 << 18
LOCKED = {  # flags that a user namespace may not take off: statvfs's and mount's
    os.ST_NOSUID: MS_NOSUID,
    os.ST_NODEV: MS_NODEV,
    os.ST_NOEXEC: MS_NOEXEC,
    os.ST_NOATIME: 1024,
    os.ST_NODIRATIME: 2048,
    os.ST_RELATIME: 1 << 21,
}
MNT_DETACH = 2

PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP = 1, 4, 22
PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 36, 38

FOLDER = "/flowd-program"  # where a program is at home; no interpreter lies there
INNER_ID = 1000  # the program's user where a user namespace maps ours
FIRST_OWN_ID = 0x70000000  # plus a process id: a user of its own for each run, so that its processes are counted alone
NOBODY = 65534
DONE = 3  # descriptor on which the program's side says that it came to the end

# System calls by machine: (x86_64, aarch64). What a program of a test has no use for, and what would get it out,
# memory that no limit counts, or a network.
REFUSED = {
    "socket": (41, 198),
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "unshare": (272, 97),
    "setns": (308, 268),
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "mount_setattr": (442, 442),
    "shmget": (29, 194),
    "msgget": (68, 186),
    "semget": (64, 190),
    "mq_open": (240, 180),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
}
SIGNALS = {  # without a namespace of its own a program could end all that its user runs
    "kill": (62, 129),
    "tkill": (200, 130),
    "tgkill": (234, 131),
    "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240),
    "pidfd_send_signal": (424, 424),
}
MACHINES = {
    "x86_64": (0, 0xC000003E),
    "aarch64": (1, 0xC00000B7),
}  # column above, audit architecture
CLONE, CLONE3, PIVOT_ROOT = (56, 220), (435, 435), (155, 41)


class Refused(Exception):
    """Raised when the kernel does not grant a step of the way in."""


def main() -> None:
    """Read the request, run its tests in a cage, write the answer."""
    _die_with(int(sys.argv[1]))
    request = json.loads(_read_all(0))
    os.umask(0o022)
    # The sum of memory has no limit of its own: where the machine runs out, the kernel is to take the program first.
    with open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")
    user = _own_id()
    caged, why = _enter_namespaces() if request["namespaces"] else (False, "not asked for")
    if os.geteuid() != 0:
        user = None
    keeper = os.fork()
    if keeper == 0:
        code = 1
        try:
            _die_with(0 if caged else os.getppid())
            _prctl(PR_SET_DUMPABLE, 0)
            if caged:
                _build_root(request["root"], request["visible"])
            else:
                _prctl(PR_SET_CHILD_SUBREAPER, 1)
            answer = {"why": why, "results": _run_all(request, caged, user)}
            _write_all(1, json.dumps(answer).encode())
            code = 0
        except Refused as error:
            _write_all(1, json.dumps({"why": str(error), "results": None}).encode())
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    _, status = os.waitpid(keeper, 0)
    os._exit(os.waitstatus_to_exitcode(status) & 0xFF)


# The way in


def _die_with(parent: int) -> None:
    """Be killed when the parent ends; the launcher's parent is the thread that waits for it."""
    _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if parent and os.getppid() != parent:
        os._exit(1)  # it ended before we could ask


def _own_id() -> int | None:
    """For root, a user that nobody else is; where the user namespace we are in has so many."""
    if os.geteuid() != 0:
        return None
    with open("/proc/self/uid_map") as file:
        ranges = [tuple(map(int, line.split())) for line in file]
    for user in (FIRST_OWN_ID + os.getpid(), NOBODY):
        if any(first <= user < first + count for first, _, count in ranges):
            return user
    return None  # root of a namespace that has no one else, and an ordinary user outside


def _enter_namespaces() -> tuple[bool, str]:
    """(whether we did, why not). Root needs no user namespace; anybody else gets the rights for the rest in one."""
    if os.geteuid() != 0:
        return _enter_user_namespace()
    if libc.unshare(NAMESPACES) == 0:
        return True, ""
    # Root of a container may lack that right, and have what everybody has. Tried in a child, because the way there
    # gives up being root, and without namespaces that is worth keeping.
    if (child := os.fork()) == 0:
        try:
            _become(NOBODY)
            os._exit(libc.unshare(NAMESPACES | CLONE_NEWUSER) != 0)
        finally:
            os._exit(1)
    if os.waitpid(child, 0)[1] != 0:
        return False, "unshare: Operation not permitted"
    parent = os.getppid()
    _become(NOBODY)
    _die_with(parent)  # the kernel forgets it with a change of user
    _prctl(PR_SET_DUMPABLE, 1)
    return _enter_user_namespace()


def _enter_user_namespace() -> tuple[bool, str]:
    user, group = os.geteuid(), os.getegid()
    try:
        _call("unshare", NAMESPACES | CLONE_NEWUSER)
        for file, text in (
            ("setgroups", "deny"),
            ("uid_map", f"{INNER_ID} {user} 1"),
            ("gid_map", f"{INNER_ID} {group} 1"),
        ):
            with open(f"/proc/self/{file}", "w") as handle:
                handle.write(text)
    except OSError as error:
        return False, str(error)
    return True, ""


def _build_root(root: str, visible: list[str]) -> None:
    """A file system of its own: the interpreter and the system's libraries, read-only, and a folder in memory.

    root: any folder to put it on; the mount is seen in this namespace only
    """
    try:
        _mount(None, "/", None, MS_REC | MS_PRIVATE)
        _mount("tmpfs", root, "tmpfs", MS_NOSUID | MS_NODEV, "size=1m,nr_inodes=4096,mode=755")
        for path in visible:
            inside = root + path
            if os.path.islink(path):
                os.makedirs(os.path.dirname(inside), exist_ok=True)
                os.symlink(os.readlink(path), inside)
            elif os.path.isdir(path):
                os.makedirs(inside, exist_ok=True)
                _bind(path, inside, MS_NODEV)
            elif os.path.exists(path):
                os.makedirs(os.path.dirname(inside), exist_ok=True)
                os.close(os.open(inside, os.O_CREAT))
                _bind(path, inside, 0 if path.startswith("/dev/") else MS_NODEV)
        os.mkdir(root + FOLDER)
        with contextlib.suppress(FileExistsError):  # the interpreter lies there
            os.symlink(FOLDER[1:], f"{root}/tmp")
        os.chdir(root)
        machine = MACHINES.get(platform.machine())
        if machine is None:
            raise OSError(errno.ENOSYS, f"this machine ({platform.machine()}) is not known")
        if libc.syscall(PIVOT_ROOT[machine[0]], b".", b".") != 0:
            raise OSError(ctypes.get_errno(), "pivot_root")
        _call("umount2", b".", MNT_DETACH)
        os.chdir("/")
        _mount(None, "/", None, MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | MS_NODEV)
    except OSError as error:
        raise Refused(f"a file system of its own: {error}") from error


def _bind(source: str, target: str, flags: int) -> None:
    _mount(source, target, None, MS_BIND | MS_REC)
    locked = os.statvfs(target).f_flag
    for seen, flag in LOCKED.items():
        flags |= flag if locked & seen else 0
    _mount(None, target, None, MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | flags)


def _mount(
    source: str | None, target: str, kind: str | None, flags: int, options: str | None = None
) -> None:
    encoded = [part and part.encode() for part in (source, target, kind, options)]
    if libc.mount(*encoded[:3], ctypes.c_ulong(flags), encoded[3]) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"mount {target}: {os.strerror(code)}")


# The keeper


def _run_all(request: dict[str, Any], caged: bool, user: int | None) -> list[dict[str, Any]]:
    """One result per test that was run. After each, nothing of it is left."""
    limits = request["limits"]
    end = time.monotonic() + limits["total_s"]
    if caged and user is None:
        limits = {**limits, "processes": limits["processes"] + 2}  # launcher and keeper count
    results = []
    for test in request["tests"]:
        folder = FOLDER if caged else _temporary(request["temporary"])
        _fresh_folder(folder, limits, user, caged)
        try:
            result = _run(request["program"], test, limits, folder, user, caged, end)
        finally:
            _end_all(caged)
            if not caged:
                _remove(folder)
        results.append(result)
        if time.monotonic() >= end or (request["stop_at_first"] and not result["ended_well"]):
            break
    return results


def _temporary(parent: str) -> str:
    return os.path.join(parent, f"flowd-run-{os.urandom(8).hex()}")


def _remove(folder: str) -> None:
    """Also what the program forbade us to enter."""
    for path, folders, _ in os.walk(folder):
        for name in folders:
            inner = os.path.join(path, name)
            if not os.path.islink(inner):
                os.chmod(inner, 0o700)
    shutil.rmtree(folder)


def _fresh_folder(folder: str, limits: dict[str, int], user: int | None, caged: bool) -> None:
    if caged:
        libc.umount2(folder.encode(), MNT_DETACH)
        owner = os.geteuid() if user is None else user
        options = (
            f"size={limits['disk_bytes']},nr_inodes={limits['files']},mode=700,"
            f"uid={owner},gid={owner}"
        )
        _mount("tmpfs", folder, "tmpfs", MS_NOSUID | MS_NODEV, options)
        return
    os.mkdir(folder, 0o700)
    if user is not None:
        os.chown(folder, user, user)


def _run(
    program: str,
    test: dict[str, Any],
    limits: dict[str, int],
    folder: str,
    user: int | None,
    caged: bool,
    end: float,
) -> dict[str, Any]:
    stdout, out = os.pipe()
    done, tell = os.pipe()
    secret = os.urandom(16)
    given = _given(test.get("input", ""))
    pid = os.fork()
    if pid == 0:
        try:
            _become_program((given, out, tell), limits, folder, user, caged)
            _execute(program, test.get("code"), secret)
        except OSError as error:
            os.write(DONE, f"the cage: {error}".encode())
        finally:
            os._exit(1)
    for descriptor in (given, out, tell):
        os.close(descriptor)
    deadline = min(end, time.monotonic() + limits["timeout_s"])
    result = _attend(pid, stdout, done, limits["output_bytes"], deadline)
    told = result.pop("told")
    result["ended_well"] = (
        result["reason"] == "" and result["code"] == 0 and told.startswith(secret)
    )
    if not result["ended_well"] and not result["reason"]:
        result["reason"] = _reason(result["code"], told, secret)
    return result


def _given(text: str) -> int:
    """A descriptor from which the text can be read; a pipe could be full before anybody reads."""
    descriptor = os.memfd_create("input")
    _write_all(descriptor, text.encode("utf-8", "surrogatepass"))
    os.lseek(descriptor, 0, os.SEEK_SET)
    return descriptor


def _attend(pid: int, stdout: int, done: int, most: int, deadline: float) -> dict[str, Any]:
    """Read what comes until the program ends, floods us or is out of time."""
    ended = os.pidfd_open(pid)
    poll = select.poll()
    texts = {stdout: bytearray(), done: bytearray()}
    room = {stdout: most, done: 4096}
    for descriptor in (ended, *texts):
        poll.register(descriptor, select.POLLIN)
        os.set_blocking(descriptor, False)
    reason, running, code = "", True, None
    while running and not reason:
        left = deadline - time.monotonic()
        ready = {descriptor for descriptor, _ in poll.poll(max(0, left * 1000))} if left > 0 else ()
        if not ready:
            reason = "out of time"
        running = ended not in ready
        if not running:
            _, status = os.waitpid(pid, 0)
            code = os.waitstatus_to_exitcode(status)
        for descriptor, text in texts.items():
            while len(text) <= room[descriptor]:
                try:
                    piece = os.read(descriptor, 65536)
                except BlockingIOError:
                    break
                if not piece:
                    if running:
                        with contextlib.suppress(KeyError):
                            poll.unregister(descriptor)
                    break
                text += piece
            else:
                reason = reason or "too much output"
    for descriptor in (ended, *texts):
        os.close(descriptor)
    output = bytes(texts[stdout][:most]).decode("utf-8", "replace")
    return {"reason": reason, "code": code, "output": output, "told": bytes(texts[done])}


def _reason(code: int | None, told: bytes, secret: bytes) -> str:
    if code is not None and code < 0:
        return f"killed by {signal.Signals(-code).name}"
    if told and not told.startswith(secret):
        return told.decode("utf-8", "replace")[:200]
    return f"ended early with exit code {code}"


def _end_all(caged: bool) -> None:
    """End and reap everything that the test started and left."""
    while True:
        if caged:
            # Every process of this namespace but ours; elsewhere it would be every process of the user.
            assert os.getpid() == 1
            with contextlib.suppress(ProcessLookupError):
                os.kill(-1, signal.SIGKILL)
        else:
            for child in _children():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(child, signal.SIGKILL)
        try:
            os.waitpid(-1, 0)  # orphans come to us
        except ChildProcessError:
            return


def _children() -> list[int]:
    mine = []
    for name in os.listdir("/proc"):
        if name.isdigit():
            with contextlib.suppress(OSError), open(f"/proc/{name}/stat", "rb") as file:
                if int(file.read().rpartition(b")")[2].split()[1]) == os.getpid():
                    mine.append(int(name))
    return mine


# The program


def _become_program(
    descriptors: tuple[int, int, int],
    limits: dict[str, int],
    folder: str,
    user: int | None,
    caged: bool,
) -> None:
    """Give up everything that the program shall not have."""
    os.setsid()
    null = os.open("/dev/null", os.O_WRONLY)
    # First out of the way of the numbers that they are to get.
    given, out, tell, null = (fcntl.fcntl(d, fcntl.F_DUPFD, 64) for d in (*descriptors, null))
    for descriptor, number in ((given, 0), (out, 1), (null, 2), (tell, DONE)):
        os.dup2(descriptor, number)
    os.closerange(DONE + 1, resource.getrlimit(resource.RLIMIT_NOFILE)[0])
    os.chdir(folder)
    for name, most in (
        ("CPU", int(limits["timeout_s"]) + 1),
        ("AS", limits["memory_bytes"]),
        ("FSIZE", limits["file_bytes"]),
        ("NOFILE", 64),
        ("NPROC", limits["processes"]),
        ("CORE", 0),
        ("MEMLOCK", 0),
        ("MSGQUEUE", 0),
    ):
        kind = getattr(resource, f"RLIMIT_{name}", None)
        if kind is not None:
            hard = resource.getrlimit(kind)[1]
            most = most if hard == resource.RLIM_INFINITY else min(most, hard)
            resource.setrlimit(kind, (most, most))
    if user is not None:
        _become(user)
    _drop_capabilities()
    _prctl(PR_SET_NO_NEW_PRIVS, 1)
    _filter_system_calls(REFUSED if caged else REFUSED | SIGNALS)


def _become(user: int) -> None:
    os.setgroups([])
    os.setresgid(user, user, user)
    os.setresuid(user, user, user)


def _drop_capabilities() -> None:
    header = struct.pack("Ii", 0x20080522, 0)  # version 3, this process
    _call("capset", header, bytes(24))


def _filter_system_calls(refused: dict[str, tuple[int, int]]) -> None:
    """Refuse these, and new namespaces by clone; end a program that calls as another machine."""
    machine = MACHINES.get(platform.machine())
    if machine is None:
        return  # without it the cage is not whole: what can be done is found out at the start
    column, architecture = machine
    allow, refuse = 0x7FFF0000, 0x00050000 | errno.EPERM
    numbers = [pair[column] for pair in refused.values()]
    code = [
        (0x20, 0, 0, 4),  # load the architecture
        (0x15, 1, 0, architecture),
        (0x06, 0, 0, 0x80000000),  # kill
        (0x20, 0, 0, 0),  # load the number
        (0x35, 0, 1, 0x40000000),  # x86's x32 calls have numbers of their own
        (0x06, 0, 0, refuse),
    ]
    for number in numbers:
        code += [(0x15, 0, 1, number), (0x06, 0, 0, refuse)]
    # clone3 keeps its flags where a filter cannot look; libc falls back to clone.
    code += [(0x15, 0, 1, CLONE3[column]), (0x06, 0, 0, 0x00050000 | errno.ENOSYS)]
    code += [
        (0x15, 0, 3, CLONE[column]),
        (0x20, 0, 0, 16),  # load the flags
        (0x45, 0, 1, ANY_NAMESPACE),
        (0x06, 0, 0, refuse),
        (0x06, 0, 0, allow),
    ]
    filters = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in code))
    program = struct.pack("HxxxxxxP", len(code), ctypes.addressof(filters))
    header = ctypes.create_string_buffer(program)
    _prctl(PR_SET_SECCOMP, 2, ctypes.addressof(header))


def _execute(program: str, code: str | None, secret: bytes) -> None:
    """Run the program and then the test's code in its names; tell how it ended."""
    module = sys.modules["__main__"] = types.ModuleType("__main__")
    names = vars(module)
    try:
        try:
            exec(compile(program, "program.py", "exec"), names)
        except SystemExit as error:
            if code is not None or error.code not in (None, 0):
                raise
        if code is not None:
            exec(compile(code, "test.py", "exec"), names)
        if "threading" in sys.modules:
            sys.modules["threading"]._shutdown()
        sys.stdout.flush()
    except BaseException as error:
        with contextlib.suppress(BaseException):
            sys.stdout.flush()
        os.write(DONE, f"{type(error).__name__}: {error}".encode("utf-8", "replace")[:400])
        os._exit(1)
    os.write(DONE, secret)
    os._exit(0)


def _prctl(option: int, *arguments: int) -> None:
    """The kernel reads five whole words; what is left out must be zero."""
    words = (*arguments, 0, 0, 0, 0)[:4]
    _call("prctl", option, *map(ctypes.c_ulong, words))


def _call(name: str, *arguments: object) -> None:
    if getattr(libc, name)(*arguments) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{name}: {os.strerror(code)}")


def _read_all(descriptor: int) -> bytes:
    pieces = []
    while piece := os.read(descriptor, 1 << 20):
        pieces.append(piece)
    return b"".join(pieces)


def _write_all(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


if __name__ == "__main__":
    main()
