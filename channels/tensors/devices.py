"""One GPU as tensors between processes need it: plain memory, handles to it, streams and events.

`CudaDevice` is the real one; what stands on it asks for a `Device`, so that lifetimes, checks and failures can be
tested on a machine without a GPU. Memory is taken from the driver and not from torch's caching allocator: its blocks
cannot be exported when its segments are expandable, and their handles would show a peer the tensors beside the one
that was meant.
"""

import importlib
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

import torch

from channels.tensors.errors import DeviceError

if TYPE_CHECKING:
    from channels.tensors.nccl_link import Library

HANDLE_BYTES = 64  # of an exported allocation, and of an exported event
_Event: Any = torch.cuda.Event  # which torch leaves without types


class DeviceEvent(Protocol):
    """A point in a stream's work. What torch.cuda.Event offers."""

    def record(self, stream: Any = None) -> None:
        """Be the point after all that was given to the stream, by default the current one."""
        ...

    def wait(self, stream: Any = None) -> None:
        """Let the stream's further work start after this point."""
        ...

    def query(self) -> bool:
        """Whether it was reached."""
        ...

    def synchronize(self) -> None:
        """Block this thread until it was reached."""
        ...

    def ipc_handle(self) -> bytes:
        """What another process opens it by; for events made by `shared_event`."""
        ...


class Device(Protocol):
    """See the module docstring. Every method but `view` raises DeviceError when the driver refuses."""

    device: torch.device
    uuid: str  # the same in all processes of a node, whatever CUDA_VISIBLE_DEVICES shows them

    def allocate(self, nbytes: int) -> int:
        """The address of fresh memory that belongs to no other allocation."""
        ...

    def free(self, address: int) -> None:
        """Give back what `allocate` gave out."""
        ...

    def export(self, address: int) -> bytes:
        """The handle by which another process opens an allocation."""
        ...

    def open(self, handle: bytes) -> tuple[int, int]:
        """Map the allocation of another process, also of another GPU. Returns its address here, and its size."""
        ...

    def close(self, address: int) -> None:
        """Undo `open`."""
        ...

    def view(self, address: int, nbytes: int, collected: Callable[[], None]) -> torch.Tensor:
        """Bytes of this device as a tensor. `collected` is called, in any thread, after the last tensor on them."""
        ...

    def copy(self, to: torch.Tensor, address: int) -> None:
        """Fill a tensor of this device, on the current stream, from memory that may be another GPU's."""
        ...

    def stream(self) -> Any:
        """The current stream of this thread."""
        ...

    def event(self) -> DeviceEvent:
        """A new event, for this process."""
        ...

    def shared_event(self) -> DeviceEvent:
        """A new event that other processes can open."""
        ...

    def open_event(self, handle: bytes) -> DeviceEvent:
        """The event of another process."""
        ...

    def nccl(self) -> "Library":
        """NCCL on this GPU."""
        ...


class _Memory:
    """What torch takes an address from. The storage of the tensors made of it holds it."""

    __slots__ = ("__cuda_array_interface__", "__weakref__")

    def __init__(self, address: int, nbytes: int) -> None:
        self.__cuda_array_interface__ = {
            "data": (address, False),
            "shape": (nbytes,),
            "typestr": "|u1",
            "strides": None,
            "version": 3,
        }


class CudaDevice:
    """A GPU that this process may use, by default torch's current one."""

    def __init__(self, ordinal: int | None = None) -> None:
        if not torch.cuda.is_available():
            raise DeviceError(
                "torch sees no GPU in this process: look at CUDA_VISIBLE_DEVICES, driver and build"
            )
        try:
            # CUDA builds of torch bring it; others have no use for it.
            driver = importlib.import_module("cuda.bindings.driver")
        except ImportError as error:
            raise DeviceError(
                "device tensors need the package cuda-bindings: install it beside torch, "
                "in the version that its CUDA has"
            ) from error
        torch.cuda.init()  # type: ignore[no-untyped-call]
        ordinal = torch.cuda.current_device() if ordinal is None else ordinal
        self.device = torch.device("cuda", ordinal)
        self.uuid = f"GPU-{torch.cuda.get_device_properties(ordinal).uuid}"
        self._driver: Any = driver
        self._context = self._done("cuDevicePrimaryCtxRetain", ordinal)[0]

    def allocate(self, nbytes: int) -> int:
        return int(self._call("cuMemAlloc", nbytes)[0])

    def free(self, address: int) -> None:
        self._call("cuMemFree", self._driver.CUdeviceptr(address))

    def export(self, address: int) -> bytes:
        (exported,) = self._call("cuIpcGetMemHandle", self._driver.CUdeviceptr(address))
        handle: bytes = exported.reserved
        return handle

    def open(self, handle: bytes) -> tuple[int, int]:
        # In this GPU's own context, wherever the memory is: a process need not see the other GPU for it, and makes no
        # context there. Peer access is enabled with the first mapping.
        opened = self._driver.CUipcMemHandle()
        opened.reserved = handle
        lazily = self._driver.CUipcMem_flags.CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS
        (address,) = self._call("cuIpcOpenMemHandle", opened, int(lazily))
        try:
            _, size = self._call("cuMemGetAddressRange", address)
        except DeviceError:
            self.close(int(address))
            raise
        return int(address), int(size)

    def close(self, address: int) -> None:
        self._call("cuIpcCloseMemHandle", self._driver.CUdeviceptr(address))

    def view(self, address: int, nbytes: int, collected: Callable[[], None]) -> torch.Tensor:
        memory = _Memory(address, nbytes)
        tensor = torch.as_tensor(memory, device=self.device)
        if tensor.data_ptr() != address:
            raise DeviceError(f"torch copied memory at {address:#x} that belongs to {self.device}")
        weakref.finalize(memory, collected).atexit = False
        return tensor

    def copy(self, to: torch.Tensor, address: int) -> None:
        driver = self._driver
        self._call(
            "cuMemcpyAsync",
            driver.CUdeviceptr(to.data_ptr()),
            driver.CUdeviceptr(address),
            to.nbytes,
            driver.CUstream(self.stream().cuda_stream),
        )

    def stream(self) -> torch.cuda.Stream:
        return torch.cuda.current_stream(self.device)

    def event(self) -> DeviceEvent:
        with torch.cuda.device(self.device):
            event: DeviceEvent = _Event(blocking=True)
        return event

    def shared_event(self) -> DeviceEvent:
        try:
            with torch.cuda.device(self.device):
                event: DeviceEvent = _Event(interprocess=True)
                event.ipc_handle()  # makes it now, on this device
        except RuntimeError as error:
            raise DeviceError(f"no event for other processes on {self.device}: {error}") from error
        return event

    def open_event(self, handle: bytes) -> DeviceEvent:
        try:
            event: DeviceEvent = _Event.from_ipc_handle(self.device, handle)
        except RuntimeError as error:
            raise DeviceError(f"an event of another process cannot be opened: {error}") from error
        return event

    def nccl(self) -> "Library":
        from channels.tensors.nccl_library import NcclLibrary

        return NcclLibrary(self)

    def _call(self, name: str, *arguments: Any) -> tuple[Any, ...]:
        """Call the driver with this GPU's context, whatever the thread's current one is."""
        self._done("cuCtxPushCurrent", self._context)
        try:
            return self._done(name, *arguments)
        finally:
            self._done("cuCtxPopCurrent")

    def _done(self, name: str, *arguments: Any) -> tuple[Any, ...]:
        result, *values = getattr(self._driver, name)(*arguments)
        if result != self._driver.CUresult.CUDA_SUCCESS:
            raise DeviceError(f"{name} on {self.device}: {result.name}")
        return tuple(values)
