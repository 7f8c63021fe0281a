"""Where things lie."""

import os
import stat
from pathlib import Path

import pytest

from flowd.errors import RequestError
from flowd.paths import MAX_SOCKET_PATH_BYTES, StatePaths, runtime_dir, state_directory


def test_the_option_wins_over_the_environment_which_wins_over_the_default(tmp_path, monkeypatch):
    """--state-dir, FLOWD_HOME, ~/.flowd, in this order."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("FLOWD_HOME", raising=False)
    assert state_directory(None) == (tmp_path / ".flowd").resolve()
    monkeypatch.setenv("FLOWD_HOME", str(tmp_path / "env"))
    assert state_directory(None) == (tmp_path / "env").resolve()
    assert state_directory(str(tmp_path / "given")) == (tmp_path / "given").resolve()


def test_sockets_lie_in_the_state_directory_where_its_path_is_short():
    """Nothing is made elsewhere."""
    assert runtime_dir(Path("/var/x")) == Path("/var/x")
    assert StatePaths(Path("/var/x")).control_address == "ipc:///var/x/control.sock"


def test_a_long_state_directory_gets_a_short_private_one(tmp_path, monkeypatch):
    """Unix sockets have a length limit; two state directories get two, one gets the same again."""
    monkeypatch.setattr("tempfile.tempdir", "/tmp")
    long = tmp_path / ("d" * 100)
    short = runtime_dir(long)
    try:
        assert len(os.fsencode(short / "control.sock")) <= MAX_SOCKET_PATH_BYTES
        assert stat.S_IMODE(short.stat().st_mode) == 0o700
        assert runtime_dir(long) == short
        short.chmod(0o755)
        with pytest.raises(RequestError, match=r"0755.*0700"):
            runtime_dir(long)
    finally:
        short.rmdir()
