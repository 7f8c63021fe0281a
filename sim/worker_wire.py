"""How an environment's calls and results pass between processes: framed MessagePack, large arrays in shared memory.

Only plain data, arrays and the contract's own types pass; nothing that runs code when it is read. One call is answered
before the next is sent, so the worker's area is written anew for every answer, and the parent has copied what it
needs from it before it asks again.
"""

import mmap
import os
import socket
import struct
from typing import Any

import msgpack
import numpy as np
from numpy.typing import NDArray

from sim.contract import ChatMessage, StepResult, TextObservation
from sim.spaces import ArraySpace, TextSpace

LARGE = 16 << 10  # bytes of an array, from which on it goes through shared memory
ALIGNMENT = 64
HEADER = struct.Struct("<Q")
LONGEST = 1 << 30  # bytes of one message: more is nonsense

ARRAY, SHARED_ARRAY, TEXT, RESULT, ARRAY_SPACE, TEXT_SPACE = range(1, 7)


class SharedArea:
    """Memory that parent and child have mapped; it grows at the writer's end, and is gone with the last of the two."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._map: mmap.mmap | None = None
        self._size = 0
        self._used = 0

    def clear(self) -> None:
        """Begin to write at the start again."""
        self._used = 0

    def put(self, array: NDArray[Any]) -> int:
        """Copy an array in; returns where it is."""
        begin = self._used
        end = begin + array.nbytes
        if end > self._size:
            self._map_bytes(max(end, 2 * self._size))
        self._used = -(-end // ALIGNMENT) * ALIGNMENT
        target: NDArray[Any] = np.ndarray(array.shape, array.dtype, self._map, begin)
        target[...] = array
        return begin

    def get(self, begin: int, dtype: str, shape: list[int]) -> NDArray[Any]:
        """A copy of an array that the other end has put."""
        if begin + np.dtype(dtype).itemsize * int(np.prod(shape)) > self._size:
            self._map_bytes(os.fstat(self._descriptor).st_size)
        return np.ndarray(shape, dtype, self._map, begin).copy()

    def _map_bytes(self, size: int) -> None:
        if os.fstat(self._descriptor).st_size < size:
            os.ftruncate(self._descriptor, size)
        # The old mapping goes with the last array that lies in it.
        self._map = mmap.mmap(self._descriptor, size)
        self._size = size


class Wire:
    """One end of a worker's socket. area: the worker writes large arrays into it, the parent reads them."""

    def __init__(self, connection: socket.socket, area: SharedArea, *, writes_area: bool) -> None:
        self._connection = connection
        self._area = area
        self._writes_area = writes_area

    def send(self, message: Any) -> None:
        """Send plain data, arrays and types of the contract. OSError: the other end is gone."""
        self._area.clear()
        body = msgpack.packb(message, default=self._pack)
        self._connection.sendall(HEADER.pack(len(body)) + body)

    def receive(self) -> Any:
        """What the other end sent. EOFError: it has closed, or is gone."""
        (size,) = HEADER.unpack(self._exactly(HEADER.size))
        if size > LONGEST:
            raise EOFError(f"a message of {size} bytes: something else wrote to this socket")
        return msgpack.unpackb(
            self._exactly(size), ext_hook=self._unpack, strict_map_key=False, use_list=True
        )

    def _exactly(self, size: int) -> bytearray:
        data = bytearray(size)
        view, got = memoryview(data), 0
        while got < size:
            count = self._connection.recv_into(view[got:])
            if not count:
                raise EOFError("the other end has closed")
            got += count
        return data

    def _pack(self, value: Any) -> msgpack.ExtType:
        match value:
            case StepResult():
                parts = [getattr(value, name) for name in StepResult.__slots__]
                parts[4] = dict(value.info)
                return self._nested(RESULT, parts)
            case np.ndarray() | np.generic():
                array = np.ascontiguousarray(value)  # makes shape () into [1]
                form = [array.dtype.str, list(np.shape(value))]
                if self._writes_area and array.nbytes >= LARGE:
                    return self._nested(SHARED_ARRAY, [*form, self._area.put(array)])
                return self._nested(ARRAY, [*form, array.tobytes()])
            case TextObservation():
                return self._nested(TEXT, [[m.role, m.content] for m in value.messages])
            case ArraySpace():
                return self._nested(
                    ARRAY_SPACE, [list(value.shape), value.dtype, value.low, value.high]
                )
            case TextSpace():
                return msgpack.ExtType(TEXT_SPACE, b"")
        raise TypeError(
            f"{type(value).__name__}: a worker's observations, actions and info are arrays, texts and numbers, "
            "in dicts and lists"
        )

    def _nested(self, code: int, value: Any) -> msgpack.ExtType:
        return msgpack.ExtType(code, msgpack.packb(value, default=self._pack))

    def _unpack(self, code: int, data: bytes) -> Any:
        if code == TEXT_SPACE:
            return TextSpace()
        parts = msgpack.unpackb(data, ext_hook=self._unpack, strict_map_key=False, use_list=True)
        match code:
            case 1:  # ARRAY
                dtype, shape, content = parts
                return np.frombuffer(content, dtype).reshape(shape).copy()
            case 2:  # SHARED_ARRAY
                dtype, shape, begin = parts
                return self._area.get(begin, dtype, shape)
            case 3:  # TEXT
                messages = (ChatMessage(role=role, content=content) for role, content in parts)
                return TextObservation(messages=tuple(messages))
            case 4:  # RESULT
                return StepResult(**dict(zip(StepResult.__slots__, parts, strict=True)))
            case 5:  # ARRAY_SPACE
                shape, dtype, low, high = parts
                return ArraySpace(shape=tuple(shape), dtype=dtype, low=low, high=high)
        raise ValueError(f"extension type {code} is none of ours")
