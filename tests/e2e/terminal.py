"""A command on a terminal of its own: typed to, interrupted and read as a user would."""

import fcntl
import os
import pty
import re
import select
import struct
import termios
import time
from types import TracebackType
from typing import Self

from flowd_process import DEADLINE_S, environment
from forked import Forked

ROWS, COLUMNS = 40, 120
CONTROL_C = "\x03"
ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


class Terminal:
    """Runs a command with a pseudo-terminal as its controlling one. A context manager: the command ends with it."""

    def __init__(self, module: str, *words: str) -> None:
        self._ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
        self._process = Forked(
            module,
            *words,
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            terminal=True,  # so that Ctrl-C is a signal
            env=environment() | {"TERM": "xterm-256color"},
        )
        os.close(theirs)
        self.raw = ""
        self._seen = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._ours)

    @property
    def text(self) -> str:
        """All that was shown so far, without colours and cursor movements."""
        return ESCAPE.sub("", self.raw).replace("\r\n", "\n")

    def type(self, text: str) -> None:
        os.write(self._ours, text.encode())

    def wait_for(self, wanted: str, *, otherwise: str | None = None) -> bool:
        """Read until `wanted` is shown after what was waited for before; False when `otherwise` came first."""
        give_up_at = time.monotonic() + DEADLINE_S
        while True:
            new = self.text[self._seen :]
            places = [new.find(text) for text in (wanted, otherwise) if text is not None]
            found = [place for place in places if place >= 0]
            if found:
                self._seen += min(found) + 1
                return places[0] == min(found)
            assert self._read(give_up_at), f"the command ended without {wanted!r}:\n{self.text}"

    def wait_end(self) -> int:
        """Read to the end; returns the exit code."""
        give_up_at = time.monotonic() + DEADLINE_S
        while self._read(give_up_at):
            pass
        return self._process.wait(DEADLINE_S)

    def _read(self, give_up_at: float) -> bool:
        """Take what comes next; False at the end."""
        left = max(0.0, give_up_at - time.monotonic())
        ready, _, _ = select.select([self._ours], [], [], left)
        assert ready, f"nothing more was shown in {DEADLINE_S:g} s:\n{self.text}"
        try:
            new = os.read(self._ours, 65536)
        except OSError:  # EIO: nobody holds the other end any more
            return False
        self.raw += new.decode(errors="replace")
        return bool(new)
