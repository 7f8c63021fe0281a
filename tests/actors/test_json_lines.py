"""What a run leaves behind is JSON that any reader takes."""

import json
import math

import numpy as np
import pytest

from actors.json_lines import as_json, line_of


def refuse(constant: str) -> None:
    raise AssertionError(f"{constant} is not JSON")


def test_numbers_that_json_lacks_are_null() -> None:
    """Wherever they are, also as numpy's; everything else stays what it was."""
    data = {
        "loss": math.nan,
        "nested": {"list": [math.inf, -math.inf, 1.5, -0.0]},
        "numpy": [np.float32("nan"), np.float64(0.1), np.int64(3), np.bool_(True)],
        "text": 'NaN "quoted"\n\u2028ü',
    }
    expected = {
        "loss": None,
        "nested": {"list": [None, None, 1.5, 0.0]},
        "numpy": [None, 0.1, 3, True],
        "text": 'NaN "quoted"\n\u2028ü',
    }
    line = line_of(data)
    assert line.endswith(b"}\n")
    assert line.count(b"\n") == 1
    assert json.loads(line, parse_constant=refuse) == expected
    assert as_json(data) == expected


def test_what_is_no_data_is_refused() -> None:
    """By its type, and with what to write instead."""
    with pytest.raises(TypeError, match="object cannot be written as JSON: use numbers"):
        line_of({"info": object()})
    with pytest.raises(TypeError, match="ndarray cannot be written"):
        line_of({"info": np.zeros(3)})
