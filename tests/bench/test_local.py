"""Where a bench's numbers come from."""

from bench.local import MachineLoad, surroundings


def test_shares_of_cpu_time_are_fractions():
    """Steal and idle are parts of one whole."""
    report = MachineLoad().report()
    assert 0 <= report["steal_fraction"] <= 1
    assert 0 <= report["idle_fraction"] <= 1
    assert report["steal_fraction"] + report["idle_fraction"] <= 1.001


def test_surroundings_name_hardware_and_versions():
    """A number without them says nothing."""
    facts = surroundings()
    assert facts["hardware"]["cores"] >= 1
    assert facts["versions"]["torch"].startswith("2.")
