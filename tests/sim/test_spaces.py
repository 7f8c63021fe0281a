"""Spaces: membership, samples, equality."""

import numpy as np
import pytest

from sim.spaces import ArraySpace, TextSpace, observation_complaint

BOX = ArraySpace(shape=(2,), dtype="float32", low=-1.0, high=np.array([1.0, np.inf]))


@pytest.mark.parametrize(
    ("value", "complaint"),
    [
        (np.array([1.0, 5.0], np.float32), ""),
        (np.array([1.5, 5.0], np.float32), r"1.5 at [0], outside of [-1.0, 1.0]"),
        (np.array([0.0, np.nan], np.float32), r"nan at [1], outside of [-1.0, inf]"),
        (np.array([0.0, 0.0]), "float64[2] instead of float32[2]"),
        (np.zeros(3, np.float32), "float32[3] instead of float32[2]"),
        ([0.0, 0.0], "list instead of a NumPy array"),
    ],
)
def test_a_stranger_is_told_why(value: object, complaint: str) -> None:
    """Shape and dtype first, then the first number outside; NaN is in no space."""
    assert BOX.complaint(value) == complaint


@pytest.mark.parametrize(
    "space",
    [
        BOX,
        ArraySpace(shape=(), dtype="int64", low=2, high=4),
        ArraySpace(shape=(3,), dtype="int64", low=0, high=np.array([0, 1, 2])),
        ArraySpace(shape=(2, 2), dtype="uint8", low=0, high=255),
        ArraySpace(shape=(4,), dtype="bool", low=0, high=1),
    ],
)
def test_samples_are_members_and_reach_the_ends(space: ArraySpace) -> None:
    """Integers include both bounds."""
    draw = np.random.default_rng(0)
    samples = [space.sample(draw) for _ in range(3000)]
    assert {space.complaint(sample) for sample in samples} == {""}
    if np.dtype(space.dtype).kind in "iu":
        assert (np.min(samples, axis=0) == space.low).all()
        assert (np.max(samples, axis=0) == space.high).all()


def test_discrete_choices_are_counted() -> None:
    """Only integers of shape () with an end are one choice."""
    assert ArraySpace(shape=(), dtype="int64", low=2, high=4).num_choices == 3
    assert ArraySpace(shape=(), dtype="float32", low=2, high=4).num_choices is None
    assert ArraySpace(shape=(1,), dtype="int64", low=2, high=4).num_choices is None
    assert ArraySpace(shape=(), dtype="int64").num_choices is None


def test_equal_spaces_are_equal_however_their_bounds_are_written() -> None:
    """One number stands for all."""
    written_out = ArraySpace(shape=(2,), dtype="float32", low=np.array([-1.0, -1.0]), high=BOX.high)
    assert written_out == BOX
    assert hash(written_out) == hash(BOX)
    assert ArraySpace(shape=(2,), dtype="float32", low=-1.0) != BOX


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "flaot32"}, 'dtype = "flaot32"'),
        ({"low": 2.0, "high": 1.0}, "low = 2.0 is above high = 1.0"),
        ({"low": np.zeros(3)}, r"low of shape \[3\]: give a number, or an array of shape \[2\]"),
    ],
)
def test_impossible_spaces_are_refused(options: dict[str, object], message: str) -> None:
    """When they are written, not when the first value comes."""
    with pytest.raises(ValueError, match=message):
        ArraySpace(**{"shape": (2,), "dtype": "float32", **options})  # type: ignore[arg-type]


def test_an_observation_has_the_names_of_its_space() -> None:
    """All of them, and no other; texts are texts."""
    space = {"state": BOX, "instruction": TextSpace()}
    good = {"state": np.zeros(2, np.float32), "instruction": "push"}
    assert observation_complaint(space, good) == ""
    assert "names ['state'] instead of" in observation_complaint(space, {"state": good["state"]})
    assert observation_complaint(space, good | {"instruction": 3}) == (
        "'instruction' is int instead of a text"
    )
    assert observation_complaint(space, 3) == "int instead of named arrays"
