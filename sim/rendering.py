"""Which OpenGL MuJoCo renders with where nobody has chosen: to be asked before mujoco is imported."""

import glob
import os


def choose_mujoco_gl() -> None:
    """Set MUJOCO_GL, unless it is set: "egl" where there is a GPU, else "osmesa", which needs no display."""
    gpu = glob.glob("/dev/nvidia[0-9]*") or glob.glob("/dev/dri/renderD*")
    chosen = os.environ.setdefault("MUJOCO_GL", "egl" if gpu else "osmesa")
    if chosen in ("egl", "osmesa"):
        os.environ.setdefault("PYOPENGL_PLATFORM", chosen)
