"""Which system packages simulators lack, from what a machine has."""

from dataclasses import replace

import pytest

from sim import drivers
from sim.drivers import Machine, missing

BARE = Machine(vulkan_loader=False, nvidia_vulkan=False, mesa=None, osmesa=False, gpu=False)


@pytest.mark.parametrize(
    ("machine", "packages"),
    [
        (BARE, ["libvulkan1", "mesa-vulkan-drivers", "libosmesa6"]),
        (replace(BARE, vulkan_loader=True, mesa=(22, 3)), ["mesa-vulkan-drivers", "libosmesa6"]),
        (replace(BARE, vulkan_loader=True, mesa=(25, 0), osmesa=True), []),
        (replace(BARE, vulkan_loader=True, nvidia_vulkan=True, gpu=True), []),
        (replace(BARE, gpu=True, osmesa=True, mesa=(25, 0)), ["libvulkan1"]),
    ],
)
def test_what_is_missing(machine: Machine, packages: list[str]) -> None:
    """An old Mesa counts as none; with a GPU nothing is drawn in software."""
    assert missing(machine) == packages


@pytest.mark.parametrize(
    ("printed", "version"),
    [
        ("22.3.6-1+deb12u1", (22, 3)),
        ("1:25.0.7-2~bpo12+1", (25, 0)),
        (
            "Package: mesa-vulkan-drivers\nSource: mesa\nVersion: 24.0.5-1\nPriority: optional",
            (24, 0),
        ),
        ("", None),
    ],
)
def test_versions_are_read_as_debian_prints_them(
    printed: str, version: tuple[int, int] | None
) -> None:
    """Of dpkg-query and of apt-cache, with an epoch or without."""
    assert drivers._version(printed) == version


def test_the_sentence_has_the_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without --install nothing is touched; exit code 1 says that something is missing."""
    monkeypatch.setattr(drivers, "look", lambda: BARE)
    monkeypatch.setattr("sys.argv", ["drivers"])
    assert drivers.main() == 1
    assert "apt-get install libvulkan1 mesa-vulkan-drivers libosmesa6" in capsys.readouterr().err
    monkeypatch.setattr(
        drivers, "look", lambda: replace(BARE, vulkan_loader=True, nvidia_vulkan=True, gpu=True)
    )
    assert drivers.main() == 0
