"""An actor's side of its device lease: may I compute, does somebody wait, and the accounting of device memory.

    async with lease:            # waits until the lease is held
        await blocking(step)     # a micro-batch; checks that the lease is held

The section is short (one micro-batch). A revocation that arrives inside takes effect when the section ends; outside,
at once: the owner's `park` is called, then the release is acknowledged. `lease.idle()` says that there is nothing to
compute, which makes a shared lease revocable.

Of a replica of several ranks the leader alone decides when to stop: the others (`follows`) keep the device until it
calls upon them to `let_go`. Otherwise one could park just as the leader begins what takes all of them.
"""

import asyncio
from collections.abc import Awaitable, Callable
from types import TracebackType

from actors.errors import DeviceMemoryExceeded, LeaseViolation


class Lease:
    """The lease of one actor on its replica's devices.

    send_wanted, send_idle, send_busy, send_released: tell flowd; park(offload) frees the device. A wish comes with the
    most memory that was checked so far: what fits beside it may stay on the device.
    failed(error): park raised, so the device was not given up; entering raises the same error from then on.
    An actor without devices (env, conductor) never waits.
    """

    def __init__(
        self,
        *,
        devices: tuple[str, ...],
        memory_limit: int | None,
        send_wanted: Callable[[int | None], None],
        send_idle: Callable[[int], None],
        send_busy: Callable[[int], None],
        send_released: Callable[[int, int], None],
        park: Callable[[bool], Awaitable[int]],
        failed: Callable[[BaseException], None],
        follows: bool = False,
    ) -> None:
        self.devices = devices
        self.memory_limit = memory_limit
        self.epoch = 0
        self.shared = False
        self._most_bytes: int | None = (
            None  # that were kept on the device, as far as it was checked
        )
        self._send_wanted = send_wanted
        self._send_idle = send_idle
        self._send_busy = send_busy
        self._send_released = send_released
        self._park = park
        self._failed = failed
        self._follows = follows
        self._let_go = False
        self._granted = asyncio.Event()
        self._inside = 0
        self._idle = False
        self._wanted = False
        self._revocation: tuple[int, bool] | None = None  # (epoch, offload)
        self._parking: asyncio.Task[None] | None = None
        self._gave_up = asyncio.Event()  # the revocation was answered, or could not be
        self._released: tuple[int, int] | None = None  # the last answer: epoch, bytes left
        self._failure: BaseException | None = None

    @property
    def held(self) -> bool:
        """Whether the devices may be computed on."""
        return not self.devices or self._granted.is_set()

    @property
    def revoking(self) -> bool:
        """Whether somebody waits for the devices; end the current section soon."""
        return self._revocation is not None

    @property
    def _must_park(self) -> bool:
        return self._revocation is not None and (self._let_go or not self._follows)

    async def __aenter__(self) -> "Lease":
        while self.devices and (not self._granted.is_set() or self._must_park):
            if self._failure is not None:
                raise self._failure
            if self._must_park:
                await self._gave_up.wait()  # another section of this actor may have to end first
                continue
            if not self._wanted:
                self._wanted = True
                self._send_wanted(self._most_bytes)
            await self._granted.wait()
        if self._idle:
            self._idle = False
            if self.shared:
                self._send_busy(self.epoch)
        self._inside += 1
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._inside -= 1
        self._park_if_asked()

    def idle(self) -> None:
        """There is nothing to compute: a shared lease may go to whoever waits for it."""
        if self.devices and self._granted.is_set() and not self._idle:
            self._idle = True
            if self.shared:
                self._send_idle(self.epoch)

    def granted(self, epoch: int, shared: bool) -> None:
        """flowd granted the lease under a new epoch."""
        if epoch < self.epoch:
            return
        if self._released is not None and epoch == self._released[0]:
            # It crossed our answer, or flowd was restarted and never heard it.
            self._send_released(*self._released)
            if self._wanted:
                self._send_wanted(self._most_bytes)
            return
        if epoch == self.epoch and self._granted.is_set():
            # Said again: flowd was restarted, or another replica came to share the devices.
            if shared and not self.shared and self._idle:
                self._send_idle(epoch)
            self.shared = shared
            return
        self.epoch = epoch
        self.shared = shared
        # Our last "busy" crossed the revocation, so flowd took it for a wish; what it was about was done meanwhile.
        for_nothing = not self._wanted and self._released is not None and not self._follows
        self._wanted = False
        self._idle = False
        self._revocation = None
        self._let_go = False
        self._gave_up.set()
        self._granted.set()
        if for_nothing:
            self.idle()

    def revoked(self, epoch: int, offload: bool) -> None:
        """flowd wants the devices back; an epoch of the past is answered by nothing."""
        if epoch != self.epoch or self._revocation is not None:
            return
        if not self._granted.is_set() and not offload:
            return  # answered before; a lease that is not held is revoked only to have it offloaded
        self._revocation = (epoch, offload)
        self._gave_up.clear()
        self._park_if_asked()

    def say_again(self) -> None:
        """Tell a new flowd the wishes that the old one may not have heard."""
        if self._wanted:
            self._send_wanted(self._most_bytes)
        elif self._idle and self.shared:
            self._send_idle(self.epoch)

    def let_go(self) -> None:
        """The leader parks: so does this rank, now or when flowd's revocation arrives."""
        self._let_go = True
        self._park_if_asked()

    def check(self) -> None:
        """Raise LeaseViolation unless the lease is held: called around every computation on a virtual device."""
        if not self.held:
            raise LeaseViolation(
                f"computing on {', '.join(self.devices)} without holding its lease (epoch {self.epoch}): "
                "enter `async with lease` first"
            )

    def check_memory(self, used_bytes: int) -> None:
        """Raise DeviceMemoryExceeded when more is kept on the device than the lease allows."""
        if self.memory_limit is not None and used_bytes > self.memory_limit:
            raise DeviceMemoryExceeded(
                f"{used_bytes / 2**20:.1f} MiB on {', '.join(self.devices)}, whose lease allows "
                f"{self.memory_limit / 2**20:.1f} MiB: use a smaller model, rollout.max_running or "
                "trainer.micro_batch_tokens, or give flowd larger devices (--devices cpu:4@2GiB)"
            )
        self._most_bytes = max(used_bytes, self._most_bytes or 0)

    def _park_if_asked(self) -> None:
        if not self._must_park or self._inside or self._parking is not None or self._failure:
            return
        self._parking = asyncio.get_running_loop().create_task(self._give_up(), name="lease-park")
        self._parking.add_done_callback(self._parked)

    async def _give_up(self) -> None:
        assert self._revocation is not None
        epoch, offload = self._revocation
        left = await self._park(offload)
        self._granted.clear()
        self._revocation = None
        self._let_go = False
        self._idle = False
        self._released = (epoch, left)
        self._gave_up.set()
        self._send_released(epoch, left)

    def _parked(self, task: "asyncio.Task[None]") -> None:
        self._parking = None
        error = None if task.cancelled() else task.exception()
        if error is not None:
            self._failure = error
            self._gave_up.set()
            self._failed(error)
