"""Pictures of an episode as a video: H.264 in an mp4 file, by the ffmpeg that imageio-ffmpeg brings. numpy only."""

import importlib.util
import subprocess
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
    import imageio_ffmpeg

    height, width = (side - side % 2 for side in pictures[0].shape[:2])  # the codec wants even ones
    with tempfile.TemporaryDirectory(prefix="flowd-video-") as folder:
        path = Path(folder) / "episode.mp4"  # an mp4 cannot be written to a pipe
        command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-f", "rawvideo"]
        command += [
            "-pix_fmt",
            "rgb24",
            "-s",
            f"{width}x{height}",
            "-r",
            str(FRAMES_PER_S),
            "-i",
            "-",
        ]
        command += ["-c:v", "libx264", "-pix_fmt", "yuv420p", "-crf", str(QUALITY), str(path)]
        raw = b"".join(picture[:height, :width].tobytes() for picture in pictures)
        done = subprocess.run(command, input=raw, capture_output=True, check=False)
        if done.returncode:
            raise SimError(
                f"a video was not encoded: {done.stderr.decode(errors='replace').strip()}"
            )
        return path.read_bytes()
