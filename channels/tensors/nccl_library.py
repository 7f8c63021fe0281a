"""The NCCL that torch has loaded, called by ctypes.

Neither torch nor cupy lets one make a communicator without blocking and abort it while it is being made.
"""

import ctypes
import threading
from typing import Any

import torch

from channels.tensors.devices import CudaDevice, DeviceEvent
from channels.tensors.errors import DeviceError
from channels.tensors.nccl_link import UNIQUE_ID_BYTES, Communicator


class _Config(ctypes.Structure):
    """The part of ncclConfig_t that NCCL 2.18 had; later versions take the rest from their defaults."""

    _fields_ = (
        ("size", ctypes.c_size_t),
        ("magic", ctypes.c_uint),
        ("version", ctypes.c_uint),
        ("blocking", ctypes.c_int),
        ("cga_cluster_size", ctypes.c_int),
        ("min_ctas", ctypes.c_int),
        ("max_ctas", ctypes.c_int),
        ("net_name", ctypes.c_char_p),
        ("split_share", ctypes.c_int),
        ("traffic_class", ctypes.c_int),
    )


class _UniqueId(ctypes.Structure):
    _fields_ = (("internal", ctypes.c_char * UNIQUE_ID_BYTES),)


_SUCCESS, _IN_PROGRESS = 0, 7
_UINT8 = 1
_MAGIC = 0xCAFEBEEF
_CONFIG_VERSION = 21800
_UNDEFINED = -(1 << 31)


class NcclLibrary:
    """See `Library`. Raises DeviceError when there is no NCCL."""

    def __init__(self, gpu: CudaDevice) -> None:
        self.device = gpu.device
        self._gpu = gpu
        self._functions = _load()
        version = ctypes.c_int()
        _check(
            self._functions,
            "ncclGetVersion",
            self._functions.ncclGetVersion(ctypes.byref(version)),
        )
        self.version = version.value
        # Freed blocks of a stream are given out again on that stream, where nothing ever runs: so at once.
        self._memory: Any = torch.cuda.Stream(gpu.device)  # type: ignore[no-untyped-call]

    def unique_id(self) -> bytes:
        unique_id = _UniqueId()
        result = self._functions.ncclGetUniqueId(ctypes.byref(unique_id))
        _check(self._functions, "ncclGetUniqueId", result)
        return bytes(unique_id)

    def connect(self, unique_id: bytes, rank: int) -> Communicator:
        return _CudaCommunicator(self._functions, self._gpu, unique_id, rank)

    def now(self) -> DeviceEvent:
        event = self._gpu.event()
        event.record(self._gpu.stream())
        return event

    def empty(self, nbytes: int) -> torch.Tensor:
        current = self._gpu.stream()
        with torch.cuda.stream(self._memory):
            tensor = torch.empty(nbytes, dtype=torch.uint8, device=self.device)
        tensor.record_stream(current)
        return tensor


def _load() -> ctypes.CDLL:
    """NCCL's functions, declared."""
    try:
        # Already in the process, with a CUDA build of torch.
        functions = ctypes.CDLL("libnccl.so.2")
    except OSError as error:
        raise DeviceError(
            f"NCCL cannot be loaded: {error}; CUDA builds of torch bring it"
        ) from error
    pointer, size, number = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    transfer = (pointer, size, number, number, pointer, pointer)
    arguments = {
        "ncclGetVersion": (ctypes.POINTER(number),),
        "ncclGetUniqueId": (ctypes.POINTER(_UniqueId),),
        "ncclCommInitRankConfig": (
            ctypes.POINTER(pointer),
            number,
            _UniqueId,
            number,
            ctypes.POINTER(_Config),
        ),
        "ncclCommGetAsyncError": (pointer, ctypes.POINTER(number)),
        "ncclCommAbort": (pointer,),
        "ncclSend": transfer,
        "ncclRecv": transfer,
    }
    for name, types in arguments.items():
        function = getattr(functions, name)
        function.argtypes, function.restype = types, number
    for name in ("ncclGetErrorString", "ncclGetLastError"):
        getattr(functions, name).restype = ctypes.c_char_p
    functions.ncclGetErrorString.argtypes = (number,)
    functions.ncclGetLastError.argtypes = (pointer,)
    return functions


def _check(functions: ctypes.CDLL, name: str, result: int) -> None:
    if result not in (_SUCCESS, _IN_PROGRESS):
        what = functions.ncclGetErrorString(result).decode(errors="replace")
        last = (functions.ncclGetLastError(None) or b"").decode(errors="replace").strip()
        raise DeviceError(f"{name}: {what}" + (f" ({last})" if last else ""))


class _CudaCommunicator:
    """See Communicator. For any thread: none of its calls but the last takes longer than some microseconds."""

    def __init__(
        self, functions: ctypes.CDLL, gpu: CudaDevice, unique_id: bytes, rank: int
    ) -> None:
        self._functions, self._gpu, self._rank = functions, gpu, rank
        self._lock = threading.Lock()  # NCCL's calls on a communicator are for one thread at a time
        self._aborted = False
        self._communicator = ctypes.c_void_p()
        self._stream: Any = torch.cuda.Stream(gpu.device)  # type: ignore[no-untyped-call]
        config = _Config(
            ctypes.sizeof(_Config),
            _MAGIC,
            _CONFIG_VERSION,
            0,
            _UNDEFINED,
            _UNDEFINED,
            _UNDEFINED,
            None,
            _UNDEFINED,
            _UNDEFINED,
        )
        self._call(
            "ncclCommInitRankConfig",
            ctypes.byref(self._communicator),
            2,
            _UniqueId.from_buffer_copy(unique_id),
            rank,
            ctypes.byref(config),
        )

    def settled(self) -> bool:
        state = ctypes.c_int()
        self._call("ncclCommGetAsyncError", self._communicator, ctypes.byref(state))
        _check(self._functions, "NCCL", state.value)
        return state.value == _SUCCESS

    def send(self, tensor: torch.Tensor, after: DeviceEvent) -> None:
        after.wait(self._stream)
        self._transfer("ncclSend", tensor)

    def receive(self, tensor: torch.Tensor) -> None:
        self._transfer("ncclRecv", tensor)

    def mark(self) -> DeviceEvent:
        event = self._gpu.event()
        event.record(self._stream)
        return event

    def abort(self) -> None:
        with self._lock, torch.cuda.device(self._gpu.device):
            self._aborted = True
            result = self._functions.ncclCommAbort(self._communicator)
        _check(self._functions, "ncclCommAbort", result)
        self._stream.synchronize()  # it may return before the transfers have ended

    def _transfer(self, name: str, tensor: torch.Tensor) -> None:
        self._call(
            name,
            tensor.data_ptr(),
            tensor.nbytes,
            _UINT8,
            1 - self._rank,
            self._communicator,
            self._stream.cuda_stream,
        )

    def _call(self, name: str, *arguments: Any) -> None:
        # NCCL looks at the thread's current device.
        with self._lock, torch.cuda.device(self._gpu.device):
            if self._aborted:
                raise DeviceError(f"{name}: the communicator was aborted")
            _check(self._functions, name, getattr(self._functions, name)(*arguments))
