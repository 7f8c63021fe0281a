"""Full, delta and adapter versions of the weights: the same bits on both sides, whatever happens in between."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from forked import PIPE, Forked
from weights_publisher import KEEP, adapter, first_state, update

from channels.errors import BadFrame, VersionGone, WeightsMismatch
from channels.weights import WeightsDirectory
from channels.weights.delta import Comparison, WeightsDelta, as_integers, checksum

UPDATES = 250
DIES_AT = 100
REBASED_AT = 175
Tensors = dict[str, torch.Tensor]


def bits(state: Mapping[str, torch.Tensor]) -> dict[str, tuple[str, list[int], bytes]]:
    """All there is to compare."""
    return {
        name: (
            str(tensor.dtype),
            list(tensor.shape),
            as_integers(tensor.contiguous()).numpy().tobytes(),
        )
        for name, tensor in state.items()
    }


def copy_of(state: Mapping[str, torch.Tensor]) -> Tensors:
    return {name: tensor.clone() for name, tensor in state.items()}


class Receiver:
    """Holds a state of its own, as a rollout actor does its model."""

    def __init__(self, directory: Path) -> None:
        self.weights = WeightsDirectory(directory, keep=KEEP)
        self.state: Tensors = {}
        self.held = (-1, -1)
        self.variants: list[str] = []

    def adopt_newest(self) -> tuple[int, int]:
        published = self.weights.newest()
        assert published is not None
        name = published.run_attempt, published.policy_version
        with self.weights.borrow(*name, self.held) as found:
            if isinstance(found, WeightsDelta):
                self.variants.append("delta")
                found.apply(self.state)
            else:
                self.variants.append("full")
                if not self.state:
                    self.state = copy_of(found)
                for mine, tensor in found.items():
                    self.state[mine].copy_(tensor)
        self.held = name
        return name


class Publisher:
    """The process of weights_publisher.py."""

    def __init__(self, directory: Path, variant: str) -> None:
        program = Path(__file__).with_name("weights_publisher.py")
        self.process = Forked(program, str(directory), variant, stdin=PIPE, stdout=PIPE)

    def publish(self, run_attempt: int, version: int, **given: object) -> tuple[str, int] | None:
        """Its variant and bytes, or None if it died."""
        command = {"run_attempt": run_attempt, "version": version, **given}
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        return tuple(json.loads(line)) if line else None

    def end(self) -> int:
        self.process.communicate(timeout=30)
        return self.process.wait()


@contextmanager
def publishing(directory: Path, variant: str) -> Iterator[Publisher]:
    publisher = Publisher(directory, variant)
    try:
        yield publisher
    finally:
        publisher.end()


@pytest.mark.parametrize("variant", ["full", "delta"])
def test_both_sides_have_the_same_bits_whatever_happens(tmp_path: Path, variant: str) -> None:
    """One receiver takes every version, one skips some, one joins late; the publisher is killed in mid-publish."""
    random = np.random.default_rng(1)
    expected = first_state()
    steady, skipping = Receiver(tmp_path), Receiver(tmp_path)
    receivers = [steady, skipping]
    run_attempt = 0
    publisher = Publisher(tmp_path, variant)
    published = []
    try:
        for version in range(UPDATES + 1):
            if version:
                update(expected, version)
            if version == DIES_AT:
                assert publisher.publish(run_attempt, version, die=True) is None
                assert publisher.end() == -9
                # Nothing of it is to be seen, and what there was can still be had.
                late = Receiver(tmp_path)
                assert late.adopt_newest() == (0, DIES_AT - 1)
                assert bits(late.state) == bits(steady.state)
                receivers.append(late)
                publisher, run_attempt = Publisher(tmp_path, variant), 1
            answer = publisher.publish(run_attempt, version)
            assert answer is not None
            published.append(answer)
            for receiver in receivers:
                if receiver is skipping and random.random() < 0.4 and version < UPDATES:
                    continue
                assert receiver.adopt_newest() == (run_attempt, version)
                assert bits(receiver.state) == bits(expected)
    finally:
        publisher.end()
    used = [kind for kind, _ in published]
    if variant == "full":
        assert set(used) == set(steady.variants) == {"full"}
    else:
        # The steady receiver could take every delta there was; whoever skipped, some.
        assert steady.variants == used
        assert used.count("delta") > 0.8 * UPDATES
        assert "full" in used[1:DIES_AT], "where everything changed"
        assert used[DIES_AT] == "full", "a new publisher holds nothing to compare with"
        assert 0 < skipping.variants.count("delta") < steady.variants.count("delta")
        full = max(size for kind, size in published if kind == "full")
        assert all(size < 2 * full for kind, size in published)
    left = {path.name.partition("-")[0] for path in tmp_path.iterdir()}
    assert left <= {"weights", "delta"}
    assert len(list(tmp_path.glob("weights-*"))) == KEEP
    assert len(list(tmp_path.glob("delta-*"))) <= KEEP


def test_adapter_versions_go_on_top_of_their_base(tmp_path: Path) -> None:
    """Many adapters over two bases: the receiver loads a base once and merges; it may miss any adapter."""
    random = np.random.default_rng(2)
    weights = WeightsDirectory(tmp_path, keep=KEEP)
    base, base_state = (0, 0), first_state()
    held: tuple[tuple[int, int], Tensors] | None = None
    publisher = Publisher(tmp_path, "full")
    base_bytes = publisher.publish(0, 0)
    try:
        for version in range(1, UPDATES + 1):
            update(base_state, version)
            if version == DIES_AT:
                assert publisher.publish(0, version, base=base, die=True) is None
                publisher.end()
                publisher = Publisher(tmp_path, "full")
            if version == REBASED_AT:
                base = (0, version)
                base_bytes = publisher.publish(*base)
                continue
            answer = publisher.publish(0, version, base=base)
            if random.random() < 0.4 and version < UPDATES:
                continue
            newest = weights.newest()
            assert answer is not None
            assert base_bytes is not None
            assert newest is not None
            assert (newest.policy_version, newest.variant, newest.base) == (
                version,
                *answer[:1],
                base,
            )
            assert newest.variant == "adapter"
            assert newest.variant_bytes < base_bytes[1] / 4
            if held is None or held[0] != newest.base:
                held = base, copy_of(weights.load(*base))
            with weights.borrow(0, version) as tensors:
                assert isinstance(tensors, Mapping)
                assert bits(tensors) == bits(adapter(version))
                merged = held[1]["layer.weight"] + tensors["layer.lora_B"] @ tensors["layer.lora_A"]
            reference = adapter(version)
            by_hand = reference["layer.lora_B"] @ reference["layer.lora_A"]
            assert torch.equal(
                as_integers(merged), as_integers(weights.load(*base)["layer.weight"] + by_hand)
            )
    finally:
        publisher.end()
    assert bits(weights.load(*base)) == bits(held[1] if held else {})
    with pytest.raises(VersionGone):  # nothing that is kept names it any more
        weights.load(0, 0)


def test_adapter_without_its_base_is_refused(tmp_path: Path) -> None:
    """A version that nobody could merge is not published."""
    weights = WeightsDirectory(tmp_path)
    with pytest.raises(VersionGone, match="version 3 of run attempt 0"):
        weights.publish(0, 4, adapter(4).items(), base=(0, 3))
    assert weights.newest() is None


def test_version_published_again_in_another_variant_replaces_it(tmp_path: Path) -> None:
    """One name, one file."""
    weights = WeightsDirectory(tmp_path, keep=4)
    weights.publish(0, 0, first_state().items())
    weights.publish(0, 1, adapter(1).items(), base=(0, 0))
    weights.publish(0, 1, first_state().items())
    newest = weights.newest()
    assert newest is not None
    assert (newest.variant, newest.base) == ("full", None)
    assert bits(weights.load(0, 1)) == bits(first_state())


def test_borrowed_tensors_hold_their_version_and_their_mapping_is_used_again(
    tmp_path: Path,
) -> None:
    """While borrowed a file is not written over; afterwards it is, and the next borrower has it mapped already."""
    publisher, reader = WeightsDirectory(tmp_path), WeightsDirectory(tmp_path)
    state = first_state()
    publisher.publish(0, 0, state.items())
    addresses = set()
    with reader.borrow(0, 0) as tensors:
        assert isinstance(tensors, Mapping)
        for version in range(1, 4):
            publisher.publish(0, version, adapter(version).items())
        assert bits(tensors) == bits(state)
    for version in range(4, 12):
        publisher.publish(0, version, state.items())
        with reader.borrow(0, version) as tensors:
            assert isinstance(tensors, Mapping)
            addresses.add(tensors["layer.weight"].data_ptr())
    assert len(addresses) == 2


def test_state_that_is_not_the_base_is_found_out(tmp_path: Path) -> None:
    """One wrong bit anywhere, also where nothing changed, and the delta refuses; the full state is still there."""
    publisher = WeightsDirectory(tmp_path, variant="delta")
    state = first_state()
    publisher.publish(0, 0, state.items())
    held = copy_of(state)
    as_integers(held["layer.double"])[-1] ^= 1 << 62
    state["scale"] += 1
    assert publisher.publish(0, 1, state.items()).variant == "delta"
    with publisher.borrow(0, 1, (0, 0)) as delta:
        assert isinstance(delta, WeightsDelta)
        assert delta.num_changed == 1
        with pytest.raises(WeightsMismatch, match="checksum"):
            delta.apply(held)
    with publisher.borrow(0, 1, (7, 0)) as full:  # a version that the delta does not start from
        assert isinstance(full, Mapping)
        assert bits(full) == bits(state)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda state: state.pop("scale"), "scale is missing"),
        (lambda state: state.update(scale=torch.tensor(1)), "scale is of torch.int64"),
    ],
)
def test_delta_that_does_not_fit_names_the_tensor(change: object, says: str) -> None:
    """Before anything of that tensor is written."""
    state = first_state()
    comparison = Comparison(10**6)
    comparison.add("scale", state["scale"] + 1, state["scale"])
    assert callable(change)
    change(state)
    with pytest.raises(WeightsMismatch, match=says):
        comparison.delta(state).apply(state)


def test_index_outside_its_tensor_is_refused() -> None:
    """A damaged delta cannot write elsewhere."""
    changes = {"x": (torch.tensor([5], dtype=torch.int32), torch.tensor([1.0]))}
    with pytest.raises(WeightsMismatch, match="points outside its 5"):
        WeightsDelta(changes, "").apply({"x": torch.zeros(5)})


def test_values_without_indices_and_deltas_without_checksum_are_refused(tmp_path: Path) -> None:
    """What a delta's file has to say."""
    with pytest.raises(WeightsMismatch, match="no index for each value"):
        WeightsDelta.of_tensors({"value:x": torch.zeros(2), "index:x": torch.zeros(1)}, "")
    publisher = WeightsDirectory(tmp_path)
    path = Path(publisher.publish(0, 0, first_state().items()).path)
    path.rename(tmp_path / "delta-000000-0000000001-from-000000-0000000000.safetensors")
    publisher.publish(0, 1, first_state().items())
    path = Path(publisher.publish(0, 2, first_state().items()).path)
    path.rename(tmp_path / "delta-000000-0000000001-from-000000-0000000000.safetensors")
    with pytest.raises(BadFrame, match="no checksum"), publisher.borrow(0, 1, (0, 0)):
        pass


def test_equal_bits_are_no_change_and_unequal_zeros_are() -> None:
    """NaN equals itself; minus zero is not zero."""
    nan, zero = torch.tensor([float("nan")] * 3), torch.zeros(3)
    comparison = Comparison(10**6)
    comparison.add("nan", nan.clone(), nan)
    comparison.add("zero", -zero, zero)
    assert list(comparison.delta({}).changes) == ["zero"]


def test_checksum_sees_any_change_of_a_word_and_of_a_row() -> None:
    """Also names, dtypes and shapes; not how the bytes lie in memory."""
    state = {"a": torch.arange(3000, dtype=torch.int64), "b": torch.ones(5, 7)}
    seen = {checksum(state)}
    for place in (0, 1000, 2999):
        changed = copy_of(state)
        changed["a"][place] += 1
        seen.add(checksum(changed))
    swapped = copy_of(state)
    swapped["a"][:128], swapped["a"][128:256] = state["a"][128:256], state["a"][:128]
    seen.add(checksum(swapped))
    seen.add(checksum({"a": state["a"], "c": state["b"]}))
    seen.add(checksum({"a": state["a"], "b": state["b"].reshape(7, 5)}))
    seen.add(checksum({"a": state["a"], "b": state["b"].view(torch.int32)}))
    assert len(seen) == 8
    assert checksum({**state, "b": torch.ones(7, 5).t()}) == checksum(state)
    shifted = torch.zeros(3001, dtype=torch.int64)[1:].copy_(state["a"])
    odd = torch.zeros(141, dtype=torch.uint8)[1:].copy_(as_integers(state["b"]).view(torch.uint8))
    assert checksum({"a": shifted, "b": state["b"]}) == checksum(state)
    assert checksum({"x": odd}) == checksum({"x": odd.clone()})
