"""Pictures of an episode as a video: H.264 in an mp4 file, by the ffmpeg that imageio-ffmpeg brings. numpy only.

python -m actors.env.video LEFT.mp4 RIGHT.mp4 OUT.mp4      two videos side by side
"""

import importlib.util
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from sim.errors import MissingDependency, SimError

FRAMES_PER_S = 25  # a turn is a frame, whatever time it takes in the simulator
QUALITY = 23  # of libx264: 0 is lossless, 51 the worst


def check_encoder() -> None:
    """MissingDependency where videos cannot be made."""
    if importlib.util.find_spec("imageio_ffmpeg") is None:
        raise MissingDependency(
            "videos need imageio-ffmpeg: make install-robots, or pip install 'flowd[video]' where env actors run"
        )


def encode(pictures: Sequence[NDArray[Any]]) -> bytes:
    """The bytes of an mp4 file; blocking. pictures: uint8 [height, width, 3] each, one or more of one size."""
    height, width = (side - side % 2 for side in pictures[0].shape[:2])  # the codec wants even ones
    raw = b"".join(picture[:height, :width].tobytes() for picture in pictures)
    read = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}"]
    with tempfile.TemporaryDirectory(prefix="flowd-video-") as folder:
        path = Path(folder) / "episode.mp4"  # an mp4 cannot be written to a pipe
        _ffmpeg(*read, "-r", str(FRAMES_PER_S), "-i", "-", path=path, given=raw)
        return path.read_bytes()


def side_by_side(left: Path, right: Path, path: Path) -> None:
    """Write a video of two of the same height, as long as the shorter; blocking."""
    _ffmpeg(
        "-i",
        str(left),
        "-i",
        str(right),
        "-filter_complex",
        "hstack=shortest=1",
        path=path,
        given=b"",
    )


def _ffmpeg(*arguments: str, path: Path, given: bytes) -> None:
    import imageio_ffmpeg

    codec = ["-c:v", "libx264", "-pix_fmt", "yuv420p", "-crf", str(QUALITY)]
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-y", *arguments, *codec, str(path)]
    done = subprocess.run(command, input=given, capture_output=True, check=False)
    if done.returncode:
        raise SimError(f"a video was not encoded: {done.stderr.decode(errors='replace').strip()}")


if __name__ == "__main__":
    side_by_side(*map(Path, sys.argv[1:4]))
