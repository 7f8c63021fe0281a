"""The cluster key and its token: made once, readable by its owner alone, carried whole or not at all."""

import os
import stat
from pathlib import Path

import pytest

from flowd.__main__ import main as flowd
from flowd.auth import adopt, cluster_key, join, key_of, token_of
from flowd.errors import RequestError
from flowd.flowctl import main as flowctl

KEY = bytes(range(32))


def test_the_key_is_made_on_first_need_and_stays(tmp_path: Path) -> None:
    """In a file of mode 0600, whatever the umask; two that make it at once get the same one."""
    path = tmp_path / "state" / "cluster.key"
    before = os.umask(0)
    try:
        key = cluster_key(path)
    finally:
        os.umask(before)
    assert len(key) == 32
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert cluster_key(path) == key
    assert adopt(path, KEY) == key  # as the slower of two: what is there wins
    assert [entry.name for entry in path.parent.iterdir()] == ["cluster.key"]


def test_a_token_carries_the_key() -> None:
    """White space around it is the terminal's."""
    token = token_of(KEY)
    assert key_of(f"  {token}\n") == KEY
    assert len(token.split()) == 1


@pytest.mark.parametrize(
    ("token", "rule"),
    [
        ("", 'does not begin with "flowd1-"'),
        ("hello", 'of 5 characters that does not begin with "flowd1-"'),
        (token_of(KEY)[:-1], "is damaged"),
        (token_of(KEY) + "A", "is damaged"),
        (token_of(KEY).replace("AAEC", "AAED"), "is damaged"),
        ("flowd1-ümläut", "is damaged"),
    ],
)
def test_what_is_no_token_is_refused_without_being_shown(token: str, rule: str) -> None:
    """Cut off, mistyped, or another thing: a log must not show what may be most of a key."""
    with pytest.raises(RequestError, match=rule) as error:
        key_of(token)
    assert token[7:] == "" or token[7:] not in str(error.value)


def test_a_key_that_others_can_read_is_refused(tmp_path: Path, capsys) -> None:
    """Exit code 2, with what to do; neither made nor repaired in silence."""
    assert flowd(["token", "--state-dir", str(tmp_path)]) == 0
    token = capsys.readouterr().out.strip()
    path = tmp_path / "cluster.key"
    for mode in (0o640, 0o604, 0o660):
        path.chmod(mode)
        assert flowd(["token", "--state-dir", str(tmp_path)]) == 2
        captured = capsys.readouterr()
        assert f"mode {mode:04o}" in captured.err
        assert f"chmod 600 {path}" in captured.err
        assert token not in captured.out + captured.err
    path.chmod(0o600)
    path.write_text("something else")
    assert flowd(["token", "--state-dir", str(tmp_path)]) == 2
    assert "holds no cluster key" in capsys.readouterr().err


def test_joining_by_token(tmp_path: Path) -> None:
    """Twice is once; a directory of another cluster is left alone."""
    one, other = tmp_path / "one" / "cluster.key", tmp_path / "other" / "cluster.key"
    key = cluster_key(one)
    join(other, token_of(key))
    join(other, token_of(key))
    assert cluster_key(other) == key
    with pytest.raises(RequestError, match="holds the key of another cluster"):
        join(other, token_of(KEY))
    assert cluster_key(other) == key


@pytest.mark.parametrize(
    ("words", "rule"),
    [
        (["--listen", "tcp://0.0.0.0:7780"], "not an address that other nodes can be told"),
        (["--listen", "tcp://127.0.0.1"], "not an address that other nodes can be told"),
        (["--listen", "tcp://127.0.0.1:0"], "not an address that other nodes can be told"),
        (["--listen", "ipc:///x"], "not an address that other nodes can be told"),
        (["--bulk", "plain"], "--bulk plain is about other nodes"),
        (["--token", "T"], "--token is about other nodes"),
        (["--listen", "tcp://127.0.0.1:7780", "--token", "T"], "does not begin with"),
    ],
)
def test_options_of_up_that_are_wrong(tmp_path: Path, capsys, words: list[str], rule: str) -> None:
    """Exit code 2, and nothing was started or made."""
    assert flowd(["up", "--state-dir", str(tmp_path / "state"), *words]) == 2
    assert rule in capsys.readouterr().err
    assert not (tmp_path / "state").exists()


def test_token_is_a_command_of_flowd(capsys) -> None:
    """flowctl says so."""
    assert flowctl(["token"]) == 2
    assert "it is `flowd token`" in capsys.readouterr().err
