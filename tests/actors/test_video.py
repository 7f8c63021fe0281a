"""Episodes as videos."""

import subprocess
from pathlib import Path

import numpy as np
import pytest

from actors.env.video import check_encoder, encode
from sim.errors import MissingDependency


def test_without_the_encoder_the_command_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """When the env actor starts, not after the episodes."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingDependency, match=r"pip install 'flowd\[video\]'"):
        check_encoder()


def test_a_video_has_the_pictures_in_order(tmp_path: Path) -> None:
    """Decoded again: their number, their size (even, as the codec wants it) and about their colours."""
    ffmpeg = pytest.importorskip(
        "imageio_ffmpeg", reason="imageio-ffmpeg is not installed: pip install 'flowd[video]'"
    )
    greys = [20, 90, 160, 230]
    pictures = [np.full((33, 48, 3), grey, dtype=np.uint8) for grey in greys]
    path = tmp_path / "episode.mp4"
    path.write_bytes(encode(pictures))
    decode = [ffmpeg.get_ffmpeg_exe(), "-v", "error", "-i", str(path), "-f", "rawvideo"]
    done = subprocess.run([*decode, "-pix_fmt", "rgb24", "-"], capture_output=True, check=False)
    assert done.stderr == b""
    frames = np.frombuffer(done.stdout, np.uint8).reshape(-1, 32, 48, 3)
    assert frames.mean(axis=(1, 2, 3)) == pytest.approx(greys, abs=8)
