"""What a flowd that was killed leaves in its place: host copies of weights, sockets. Whoever is left removes it."""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from flowd import lockfile
from flowd.paths import StatePaths


def clear(paths: StatePaths) -> bool:
    """Remove the leftovers of a dead flowd and of its actors, all gone; False when a flowd runs there.

    That one has taken the place over, and what lies there is its own.
    """
    aside = _aside(paths)
    clear_aside(paths)
    with lockfile.kept_free(paths.lock) as free:
        if not free:
            return False
        # Memory takes seconds to be freed and the lock must not be held for long: a flowd that
        # starts meanwhile makes a directory of its own.
        with contextlib.suppress(FileNotFoundError):
            paths.weights.rename(aside)
        for socket in _sockets(paths.sockets):
            socket.unlink(missing_ok=True)
    shutil.rmtree(aside, ignore_errors=True)
    return True


def clear_aside(paths: StatePaths) -> None:
    """Remove what a `clear` that was killed had begun to remove."""
    shutil.rmtree(_aside(paths), ignore_errors=True)


def _aside(paths: StatePaths) -> Path:
    return paths.weights.with_name(f"{paths.weights.name}.left")


def _sockets(folder: Path) -> Iterator[Path]:
    with contextlib.suppress(FileNotFoundError):
        for entry in list(folder.iterdir()):
            if entry.is_socket():
                yield entry
