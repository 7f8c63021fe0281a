"""What a node can lease: its GPUs (or slots of them), or virtual devices on the CPU.

A virtual device has everything a GPU has for the plan and the leases (an id, a memory budget, one
computing replica at a time), so a machine without GPUs runs the same jobs. GPUs are read through
NVML, which neither creates a context nor looks at CUDA_VISIBLE_DEVICES; the variable is honoured
here, because schedulers hand out GPUs with it.
"""

import os
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

AUTO_VIRTUAL_MIN = 4  # so that a plan with two stages and a scale-up fits on a small laptop
VIRTUAL_MAX = 1024
VIRTUAL_MEMORY_FRACTION = 0.6  # of the host; the rest is for the page cache and the user
UNITS = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
FORMS = (
    "auto, cpu:N, cpu:N@SIZE (as in cpu:8@512MiB) "
    "or GPU numbers (as in 0,1; 0,0 makes two slots of GPU 0)"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """One thing that is leased: a GPU, a slot of a GPU, or a virtual device.

    id: "cuda:0", "cuda:0.1" (slot 1 of GPU 0), "cpu:3"
    index: NVML's number of the GPU, or the virtual device's
    uuid: for CUDA_VISIBLE_DEVICES, where numbers depend on CUDA_DEVICE_ORDER; "" if virtual
    memory_bytes: what replicas on this device may hold together
    """

    id: str
    kind: Literal["cpu", "cuda"]
    index: int
    memory_bytes: int
    name: str
    slot: int = 0
    uuid: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """A physical GPU as NVML tells it."""

    index: int
    uuid: str
    memory_bytes: int
    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """The GPUs of the node; where there are none, `reason` says why in a few words."""

    gpus: tuple[Gpu, ...]
    reason: str = ""


def physical(device_id: str) -> str:
    """The hardware behind a device: slots of one GPU have the same one."""
    return device_id.partition(".")[0]


def device_order(device_id: str) -> tuple[str, int, int]:
    """Sort key of device ids (kind, index, slot): the one order in which sets are acquired."""
    kind, _, rest = device_id.partition(":")
    index, _, slot = rest.partition(".")
    return kind, int(index), int(slot or 0)


def inventory(
    spec: str = "auto",
    *,
    probe: Callable[[], Probe] | None = None,
    visible: str | None = None,
    cores: int | None = None,
    host_memory_bytes: int | None = None,
) -> list[Device]:
    """The devices that `--devices SPEC` names, in the global order.

    probe, visible (CUDA_VISIBLE_DEVICES), cores and host_memory_bytes are read from the machine
    unless given. Raises ValueError for a spec that is not one, names a GPU that is not there, or
    asks for zero devices.
    """
    if match := re.fullmatch(r"cpu:(\d+)(?:@(.+))?", spec):
        budget = _size(spec, match[2]) if match[2] else None
        return _virtual(spec, int(match[1]), budget, host_memory_bytes)
    if spec == "auto":
        probed = (probe or probe_gpus)()
        gpus = _visible(probed.gpus, _visible_devices(visible))
        if gpus:
            return _slots(gpus, [gpu.index for gpu in gpus])
        count = max(AUTO_VIRTUAL_MIN, cores or len(os.sched_getaffinity(0)))
        return _virtual(spec, min(count, VIRTUAL_MAX), None, host_memory_bytes)
    if re.fullmatch(r"\d+(,\d+)*", spec):
        probed = (probe or probe_gpus)()
        return _named_gpus(spec, probed, _visible_devices(visible))
    raise ValueError(f"--devices {spec!r} is not a list of devices: write {FORMS}")


def probe_gpus() -> Probe:
    """Ask NVML. A machine without library, driver or GPU gives an empty answer, never an error."""
    import pynvml  # here: `flowctl --help` must not pay for it

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return Probe(gpus=(), reason=f"NVML: {error}")
    try:
        gpus = []
        for index in range(pynvml.nvmlDeviceGetCount()):
            handle = pynvml.nvmlDeviceGetHandleByIndex(index)
            gpus.append(
                Gpu(
                    index=index,
                    uuid=_text(pynvml.nvmlDeviceGetUUID(handle)),
                    memory_bytes=int(pynvml.nvmlDeviceGetMemoryInfo(handle).total),
                    name=_text(pynvml.nvmlDeviceGetName(handle)),
                )
            )
    except pynvml.NVMLError as error:
        return Probe(gpus=(), reason=f"NVML: {error}")
    finally:
        pynvml.nvmlShutdown()
    return Probe(gpus=tuple(gpus), reason="" if gpus else "NVML lists no GPU")


def host_memory() -> int:
    """Bytes that this node's processes may use: the machine's, or its control group's if less."""
    import psutil

    total = int(psutil.virtual_memory().total)
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
    except OSError:
        return total
    return min(total, int(limit)) if limit.isdigit() else total


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


def _visible_devices(visible: str | None) -> str | None:
    return os.environ.get("CUDA_VISIBLE_DEVICES") if visible is None else visible


def _visible(gpus: Sequence[Gpu], visible: str | None) -> list[Gpu]:
    """The GPUs that CUDA_VISIBLE_DEVICES leaves.

    Read as the driver reads it: the list ends at its first bad entry.
    """
    if visible is None:
        return list(gpus)
    chosen: list[Gpu] = []
    for entry in (part.strip() for part in visible.split(",")):
        if entry.startswith("MIG-"):
            raise ValueError(
                f"CUDA_VISIBLE_DEVICES names the MIG slice {entry}, and devices are whole GPUs "
                "or slots of them: use --devices cpu:N, or a node without MIG"
            )
        if entry.isdigit():
            found = [gpu for gpu in gpus if gpu.index == int(entry)]
        else:
            found = [gpu for gpu in gpus if entry and gpu.uuid.startswith(entry)]
        if len(found) != 1 or found[0] in chosen:
            break
        chosen.append(found[0])
    return sorted(chosen, key=lambda gpu: gpu.index)


def _named_gpus(spec: str, probed: Probe, visible: str | None) -> list[Device]:
    indices = [int(part) for part in spec.split(",")]
    gpus = _visible(probed.gpus, visible)
    known = {gpu.index for gpu in gpus}
    for index in indices:
        if index in known:
            continue
        if not probed.gpus:
            raise ValueError(
                f"--devices {spec} names GPU {index}, and this node has none ({probed.reason}): "
                "use --devices cpu:N for virtual devices"
            )
        there = ",".join(str(gpu.index) for gpu in probed.gpus)
        if any(gpu.index == index for gpu in probed.gpus):
            raise ValueError(
                f"--devices {spec} names GPU {index}, which CUDA_VISIBLE_DEVICES={visible} hides: "
                "name only GPUs that it lists, or unset it"
            )
        raise ValueError(
            f"--devices {spec} names GPU {index}, and this node has {there}: "
            "name some of those, or use auto"
        )
    return _slots(gpus, indices)


def _slots(gpus: Sequence[Gpu], indices: Sequence[int]) -> list[Device]:
    """One device per time that a GPU is listed; k slots of one GPU share its memory evenly."""
    devices = []
    for gpu in gpus:
        count = Counter(indices)[gpu.index]
        for slot in range(count):
            devices.append(
                Device(
                    id=f"cuda:{gpu.index}" if count == 1 else f"cuda:{gpu.index}.{slot}",
                    kind="cuda",
                    index=gpu.index,
                    slot=slot,
                    uuid=gpu.uuid,
                    memory_bytes=gpu.memory_bytes // count,
                    name=gpu.name,
                )
            )
    return devices


def _virtual(
    spec: str, count: int, budget: int | None, host_memory_bytes: int | None
) -> list[Device]:
    if not 1 <= count <= VIRTUAL_MAX:
        raise ValueError(
            f"--devices {spec} asks for {count} virtual devices: "
            f"between 1 and {VIRTUAL_MAX} are possible, and one per core is usual"
        )
    if budget is None:
        available = host_memory() if host_memory_bytes is None else host_memory_bytes
        budget = int(available * VIRTUAL_MEMORY_FRACTION) // count
    return [
        Device(id=f"cpu:{index}", kind="cpu", index=index, memory_bytes=budget, name="virtual")
        for index in range(count)
    ]


def _size(spec: str, text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([KMGT]iB)", text)
    size = int(float(match[1]) * UNITS[match[2]]) if match else 0
    if size <= 0:
        raise ValueError(
            f"--devices {spec}: {text!r} is not a memory size above zero: "
            "write a number and KiB, MiB, GiB or TiB, as in cpu:8@512MiB"
        )
    return size
