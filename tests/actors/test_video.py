"""Episodes as videos."""

import subprocess
from pathlib import Path

import numpy as np
import pytest

from actors.env.video import check_encoder, encode, side_by_side
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
    other = tmp_path / "other.mp4"
    other.write_bytes(encode(pictures[::-1][:3]))
    decode[4] = str(tmp_path / "both.mp4")
    side_by_side(path, other, Path(decode[4]))
    both = subprocess.run([*decode, "-pix_fmt", "rgb24", "-"], capture_output=True, check=False)
    frames = np.frombuffer(both.stdout, np.uint8).reshape(-1, 32, 96, 3)
    assert frames[:, :, :48].mean(axis=(1, 2, 3)) == pytest.approx(greys[:3], abs=8)
    assert frames[:, :, 48:].mean(axis=(1, 2, 3)) == pytest.approx(greys[::-1][:3], abs=8)
