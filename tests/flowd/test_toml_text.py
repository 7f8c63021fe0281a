"""TOML that is written reads back equal."""

import datetime
import tomllib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowd.toml_text import dump_toml, value_text

scalars = (
    st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False)
    | st.text(st.characters(exclude_categories=["Cs"]))
)
names = st.text(st.characters(exclude_categories=["Cs"]), min_size=1)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3),
    max_leaves=8,
)
tables = st.dictionaries(names, values, max_size=4)


@given(st.dictionaries(names, tables, max_size=4))
def test_what_is_written_reads_back_equal(document):
    """For any nesting of what TOML holds, keys and strings with any character included."""
    assert tomllib.loads(dump_toml(document)) == document


def test_none_is_left_out_and_tables_get_headers():
    """The layout of a job file: scalars first, a header per table of the first two levels."""
    text = dump_toml(
        {"env": {"task": "gsm8k", "python": None, "args": {"path": "/d", "deep": {"a": 1}}}}
    )
    assert text == '[env]\ntask = "gsm8k"\n\n[env.args]\npath = "/d"\ndeep = {a = 1}\n'


def test_a_date_is_refused():
    """Jobs hold no dates."""
    with pytest.raises(TypeError, match="date"):
        value_text(datetime.date(2024, 1, 1))
