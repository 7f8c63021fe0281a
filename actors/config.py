"""The base of all config sections: keyword-only, frozen, unknown keys are errors. Torch-free."""

import msgspec


class Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A table of the job file. Fields carry their rule as annotations; `flowd.job` reports violations."""
