"""Modules sharded over ranks, which compute in a precision of their own.

FSDP2, used so that a rank may run any number of micro-batches: weights are gathered when a step begins and stay so,
gradients add up unsharded in the masters' precision, and are summed over the ranks once, when the step is complete.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import HashStore
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor


class Sharding:
    """Where and how modules are sharded. One rank with a precision of its own is a mesh of one.

    compute_dtype: of weights and activations in forward and backward; the module's own dtype is the masters'
    """

    def __init__(
        self, group: dist.ProcessGroup | None, device: torch.device, compute_dtype: torch.dtype
    ) -> None:
        self._compute_dtype = compute_dtype
        if group is None:
            _join_alone(device)
            self._mesh = init_device_mesh(device.type, (1,))
        else:
            self._mesh = DeviceMesh.from_group(group, device.type)

    def shard(
        self,
        root: nn.Module,
        exact: Sequence[nn.Module] = (),
        unsharded: Sequence[nn.Parameter] = (),
    ) -> "ShardedModule":
        """Replace the parameters of a module by this rank's shards. Every rank has the same module; nothing is sent.

        exact: modules in it that compute in the masters' precision
        unsharded: parameters that stay whole on every rank, whose gradients the caller sums
        """
        ignored = set(unsharded)
        dtypes = {p.dtype for p in root.parameters() if p.requires_grad and p not in ignored}
        masters = dtypes.pop() if dtypes else self._compute_dtype
        mixed = MixedPrecisionPolicy(
            param_dtype=self._compute_dtype, reduce_dtype=masters, cast_forward_inputs=False
        )
        for unit in exact:
            fully_shard(unit, mesh=self._mesh, reshard_after_forward=False)
        for unit in blocks(root):
            self._shard(unit, mixed, ignored)
        self._shard(root, mixed, ignored)
        return ShardedModule(root, ignored)

    def _shard(
        self, module: nn.Module, policy: MixedPrecisionPolicy, ignored: set[nn.Parameter]
    ) -> None:
        fully_shard(
            module,
            mesh=self._mesh,
            reshard_after_forward=False,
            mp_policy=policy,
            ignored_params=ignored,
        )


class ShardedModule:
    """The life of a sharded module's weights over a step. Its forward on `None` must give a scalar with gradient."""

    def __init__(self, root: nn.Module, unsharded: set[nn.Parameter]) -> None:
        self._root = root
        self._unsharded = unsharded
        self._units = [module for module in root.modules() if isinstance(module, FSDPModule)]
        for unit in self._units:
            unit.set_gradient_divide_factor(1.0)
            unit.set_force_sum_reduction_for_comms(True)  # gloo has no other
        self._gathered = self._begun = False
        self._last(False)

    def gather(self) -> None:
        """Collective: bring all weights here until `reduce` or `release`."""
        if not self._gathered:
            if not self._begun:
                with torch.no_grad():
                    self._root(None)  # FSDP makes its streams in the first forward pass
                self._begun = True
            handles = [unit.unshard(async_op=True) for unit in self._units]
            for handle in handles:
                if handle is not None:
                    handle.wait()
            self._gathered = True

    def reduce(self, *, trained: bool) -> None:
        """Collective: sum gradients over the ranks, each keeps those of its shard; let go of the gathered weights.

        trained: whether this rank had any micro-batch
        """
        if not trained:
            for parameter in self._root.parameters():
                if parameter.requires_grad and parameter not in self._unsharded:
                    parameter.grad = torch.zeros_like(parameter)
        self._last(True)
        # A backward pass that touches next to nothing: FSDP then finishes the modules that took no part in it.
        self._root(None).backward()
        self._last(False)
        self._gathered = False

    def release(self) -> None:
        """Let go of the gathered weights, and of gradients not yet reduced."""
        for parameter in self._root.parameters():
            parameter.grad = None
        for parameter in self._inside():
            parameter.unsharded_accumulated_grad = None
        for unit in self._units:
            unit.reshard()
        self._gathered = False

    def rebind(self) -> None:
        """After the shards' memory was moved to another device."""
        for parameter in self._inside():
            parameter.reset_sharded_param()

    def _inside(self) -> Iterator[Any]:
        # FSDP has no call to forget gradients between micro-batches, nor one for memory moved in place.
        for unit in self._units:
            state = fully_shard.state(unit)  # type: ignore[attr-defined]
            groups = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]
            for group in groups:
                yield from group.fsdp_params if group is not None else ()

    def _last(self, last: bool) -> None:
        for unit in self._units:
            unit.set_is_last_backward(last)
            unit.set_requires_gradient_sync(last, recurse=False)
            unit.set_reshard_after_backward(last, recurse=False)


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor, sharing memory with it; the tensor itself where it is whole.

    What becomes its `data` becomes the tensor's: that is how memory is moved.
    """
    # to_local gives a view of it, whose data is its own.
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def part_of(given: Tensor, like: Tensor) -> Tensor:
    """A whole tensor as `like` is sharded, without a word to other ranks; others as they are."""
    if not isinstance(like, DTensor) or isinstance(given, DTensor):
        return given
    given = given.to(like.to_local().device)
    return distribute_tensor(given, like.device_mesh, like.placements, src_data_rank=None)


def blocks(root: nn.Module) -> Iterator[nn.Module]:
    """The transformer blocks of the models in a module: what is gathered, or compiled, at a time."""
    names: set[str] = set()
    for module in root.modules():
        names.update(getattr(module, "_no_split_modules", None) or ())
    for module in list(root.modules()):
        if type(module).__name__ in names:
            yield module


def _join_alone(device: torch.device) -> None:
    """A mesh wants a process group, also for one rank."""
    if not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
