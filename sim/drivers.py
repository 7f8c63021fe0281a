"""System libraries that simulators draw with: says which are missing, and installs them where it may.

    python -m sim.drivers              what is missing, with the command; exit code 1 if anything is
    python -m sim.drivers --install    as root on Debian or Ubuntu: install it first

ManiSkill needs a Vulkan driver even without pictures; MuJoCo (Meta-World, LIBERO) draws with EGL on a GPU, else with
OSMesa.
"""

import ctypes
import glob
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

MESA = (23, 0)  # older ones' software Vulkan lacks what SAPIEN asks for
BACKPORTS = Path("/etc/apt/sources.list.d/flowd-backports.sources")
BACKPORTS_SOURCE = """Types: deb
URIs: http://deb.debian.org/debian
Suites: {release}-backports
Components: main
Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What is there. mesa: version of the installed Mesa Vulkan drivers; None without."""

    vulkan_loader: bool
    nvidia_vulkan: bool
    mesa: tuple[int, int] | None
    osmesa: bool
    gpu: bool


def missing(machine: Machine) -> list[str]:
    """Debian's names of the packages that are missing."""
    packages = []
    if not machine.vulkan_loader:
        packages.append("libvulkan1")
    if not machine.nvidia_vulkan and (machine.mesa is None or machine.mesa < MESA):
        packages.append("mesa-vulkan-drivers")
    if not machine.osmesa and not machine.gpu:
        packages.append("libosmesa6")
    return packages


def look() -> Machine:
    """This machine."""
    icds = [
        name
        for folder in ("/usr/share/vulkan/icd.d", "/etc/vulkan/icd.d")
        for name in glob.glob(f"{folder}/*.json")
    ]
    return Machine(
        vulkan_loader=_loads("libvulkan.so.1"),
        nvidia_vulkan=any("nvidia" in name for name in icds),
        mesa=_version(_output("dpkg-query", "-W", "-f", "${Version}", "mesa-vulkan-drivers")),
        osmesa=_loads("libOSMesa.so.8") or _loads("libOSMesa.so.6"),
        gpu=bool(glob.glob("/dev/nvidia[0-9]*")),
    )


def main() -> int:
    """See the module docstring."""
    packages = missing(look())
    install = "--install" in sys.argv[1:]
    if packages and install and os.geteuid() == 0 and shutil.which("apt-get"):
        _install(packages)
        packages = missing(look())
    if not packages:
        print("nothing is missing: simulators can draw")
        return 0
    print(
        f"simulators need system packages that are missing: as root, apt-get install {' '.join(packages)}"
        + (
            f" (mesa-vulkan-drivers {MESA[0]} or newer: Debian 12 has it in bookworm-backports)"
            if "mesa-vulkan-drivers" in packages
            else ""
        ),
        file=sys.stderr,
    )
    return 1


def _install(packages: list[str]) -> None:
    apt = ["apt-get", "-o", "DPkg::Lock::Timeout=120"]
    subprocess.run([*apt, "update", "-qq"], check=False)
    options = ["install", "-y", "-qq", "--no-install-recommends"]
    release = _release()
    offered = _version(_output("apt-cache", "show", "--no-all-versions", "mesa-vulkan-drivers"))
    if "mesa-vulkan-drivers" in packages and release == "bookworm" and (offered or (0, 0)) < MESA:
        BACKPORTS.write_text(BACKPORTS_SOURCE.format(release=release))
        subprocess.run([*apt, "update", "-qq"], check=False)
        options += ["-t", f"{release}-backports"]
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    subprocess.run([*apt, *options, *packages], check=False, env=environment)


def _release() -> str:
    try:
        text = Path("/etc/os-release").read_text()
    except FileNotFoundError:
        return ""
    found = re.search(r"^VERSION_CODENAME=(\w+)", text, re.MULTILINE)
    return found.group(1) if found else ""


def _version(text: str) -> tuple[int, int] | None:
    """The first version in what dpkg-query and apt-cache print."""
    found = re.search(r"(?:^|Version: )(?:\d+:)?(\d+)\.(\d+)", text, re.MULTILINE)
    return (int(found.group(1)), int(found.group(2))) if found else None


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout
    except FileNotFoundError:  # no Debian
        return ""


def _loads(library: str) -> bool:
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True


if __name__ == "__main__":
    sys.exit(main())
