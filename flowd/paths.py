"""Where everything of a state directory lies. Names only: nothing here is read."""

import hashlib
import os
import stat
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from flowd.errors import RequestError

if TYPE_CHECKING:
    from channels.security import Security

# A Unix socket's path holds 107 bytes (sun_path of Linux, less the final zero); some room is left
# for actors' sockets beside the control socket.
MAX_SOCKET_PATH_BYTES = 100


def state_directory(given: str | None) -> Path:
    """The state directory: `--state-dir`, else $FLOWD_HOME, else ~/.flowd; absolute."""
    chosen = given or os.environ.get("FLOWD_HOME") or "~/.flowd"
    return Path(chosen).expanduser().resolve()


def runtime_dir(state_dir: Path) -> Path:
    """Where the sockets are: the state directory, or a short one where that path is too long.

    The short one is keyed by user and state directory, made with mode 0700 and refused with a
    RequestError when someone else got there first. Its place depends on TMPDIR, so a client asks
    the lock file (`flowd.lockfile`) where a running flowd listens rather than this function.
    """
    if len(os.fsencode(state_dir / "control.sock")) <= MAX_SOCKET_PATH_BYTES:
        return state_dir
    key = hashlib.sha256(os.fsencode(state_dir)).hexdigest()[:16]
    short = Path(tempfile.gettempdir()) / f"flowd-{os.getuid()}-{key}"
    if len(os.fsencode(short / "control.sock")) > MAX_SOCKET_PATH_BYTES:
        short = Path("/tmp") / short.name
    short.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = short.lstat()
    if (
        not stat.S_ISDIR(found.st_mode)
        or found.st_uid != os.getuid()
        or stat.S_IMODE(found.st_mode) & 0o077
    ):
        raise RequestError(
            f"{short} is owned by user {found.st_uid} with mode {stat.S_IMODE(found.st_mode):04o}: "
            "flowd's sockets need a directory of your own with mode 0700; remove it, or choose a "
            f"state directory whose path is at most {MAX_SOCKET_PATH_BYTES - 13} bytes"
        )
    return short


@dataclass(frozen=True, slots=True)
class RunPaths:
    """The files of one job, `STATE/runs/JOB/`."""

    root: Path

    @property
    def job_toml(self) -> Path:
        return self.root / "job.toml"

    @property
    def metrics(self) -> Path:
        return self.root / "metrics.jsonl"

    @property
    def events(self) -> Path:
        return self.root / "events.jsonl"

    @property
    def samples(self) -> Path:
        return self.root / "samples.jsonl"

    @property
    def eval_samples(self) -> Path:
        return self.root / "eval_samples.jsonl"

    @property
    def spans(self) -> Path:
        return self.root / "spans.jsonl"

    @property
    def spans_before(self) -> Path:
        """The part that was set aside when spans.jsonl was full."""
        return self.root / "spans.1.jsonl"

    @property
    def ledger(self) -> Path:
        return self.root / "ledger.sqlite"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    @property
    def logs(self) -> Path:
        return self.root / "logs"

    def actor_log(self, actor: str) -> Path:
        return self.logs / f"{actor}.log"


@dataclass(frozen=True, kw_only=True)
class JobPlaces:
    """Where a running job's things lie.

    listen: the TCP address at which each actor is reached from other nodes too, "" for none
    security: of the cluster, for all TCP
    """

    run_dir: Path
    socket_dir: Path
    weights_dir: Path
    cache_dir: Path
    listen: str = ""
    security: "Security | None" = None


@dataclass(frozen=True, slots=True)
class StatePaths:
    """The files of a state directory; `root` is what `state_directory` gave."""

    root: Path

    @property
    def lock(self) -> Path:
        """Held by the running flowd; says its pid and where it listens."""
        return self.root / "flowd.lock"

    @property
    def log(self) -> Path:
        return self.root / "flowd.log"

    @property
    def cluster_key(self) -> Path:
        """What makes this node a member of its cluster, see `flowd.auth`."""
        return self.root / "cluster.key"

    @property
    def database(self) -> Path:
        return self.root / "state.sqlite"

    @property
    def runs(self) -> Path:
        return self.root / "runs"

    @property
    def cache(self) -> Path:
        """What jobs share, such as the results of warm-ups."""
        return self.root / "cache"

    @property
    def sockets(self) -> Path:
        return runtime_dir(self.root)

    @property
    def control_address(self) -> str:
        """The ZeroMQ address of the control socket, for the flowd that binds it."""
        return f"ipc://{self.sockets / 'control.sock'}"

    @property
    def weights(self) -> Path:
        """Host copies of policy versions: in shared memory where the machine has it."""
        shared = Path("/dev/shm")
        if not os.access(shared, os.W_OK):
            return self.root / "weights"
        key = hashlib.sha256(os.fsencode(self.root)).hexdigest()[:16]
        return shared / f"flowd-{os.getuid()}-{key}"

    def run(self, job: str) -> RunPaths:
        return RunPaths(self.runs / job)
