"""ManiSkill3: its tasks with CPU physics, a scene per slot, states or pictures. Loads the package when it is opened.

Physics runs on the CPU, so several slots a process and several worker processes are the way to more steps; pictures
may be rendered on a GPU. GPU physics needs a library that the package downloads, and is said to be missing where it is.
"""

import difflib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.error import URLError

from sim.errors import MissingDependency, SimError
from sim.slots import SimulatorSlots

INSTALL = "make install-robots, or pip install 'flowd[maniskill]' where env actors run"
VULKAN = (
    "ManiSkill found no Vulkan driver that it can use, and needs one even without pictures: apt-get install "
    "libvulkan1, and mesa-vulkan-drivers 23 or newer (Debian 12 has it in bookworm-backports); as root, make "
    "install-robots does that"
)
# What ManiSkill says when there is no driver, an old one, or one without a device.
NO_VULKAN = ("rendering device", "ErrorIncompatibleDriver", "supported physical device")


class ManiSkill(SimulatorSlots):
    """Episodes of one task.

    num_slots: episodes hosted at the same time, each in a scene of its own
    env_id: of the task, such as "PushCube-v1"
    obs_mode: "state" is one vector of all that the simulator knows; "rgb" is the robot's state beside the cameras
    control_mode: None is the task's own (the Panda's is "pd_joint_delta_pos")
    reward_mode: "normalized_dense", "dense" or "sparse" (1 while it is a success); "none" is always 0
    max_steps: episodes are truncated after so many; None is the registered number
    ignore_terminations: episodes go on until they are truncated, whatever success and failure say
    image_size: pixels of a side of a camera's pictures; None is the task's own
    render: whether videos can be made
    render_backend: of pictures: "cpu" or "gpu"
    sim_backend: of physics: "cpu"
    path: folder with the assets of tasks that need some (MS_ASSET_DIR); it holds data/
    kwargs: more of gymnasium.make, such as robot_uids or sim_config

    Observation: "state" float32; with "rgb" also "image" of the first camera, and of any other "NAME_image"; and
    "instruction" of tasks that have one. Action: float32, mostly in [-1, 1].

    MissingDependency: the package, a Vulkan driver, an asset or the GPU's physics library is not there. SimError: no
    such task, or it has no such mode. ValueError: an argument breaks a rule.
    """

    def __init__(
        self,
        num_slots: int,
        env_id: str,
        *,
        obs_mode: str = "state",
        control_mode: str | None = None,
        reward_mode: str = "normalized_dense",
        max_steps: int | None = None,
        ignore_terminations: bool = False,
        image_size: int | None = None,
        render: bool = False,
        render_backend: str = "cpu",
        sim_backend: str = "cpu",
        path: str | None = None,
        kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        for name, value, known in (
            ("obs_mode", obs_mode, ("state", "rgb")),
            ("reward_mode", reward_mode, ("normalized_dense", "dense", "sparse", "none")),
            ("render_backend", render_backend, ("cpu", "gpu")),
            ("sim_backend", sim_backend, ("cpu", "gpu")),
        ):
            if value not in known:
                raise ValueError(f'{name} = "{value}": it is one of {", ".join(known)}')
        if image_size is not None and image_size < 1:
            raise ValueError(f"image_size = {image_size}: allow at least 1 pixel")
        mani_skill = _import(path)
        if sim_backend == "gpu":
            _refuse_gpu_physics()
        spec = mani_skill.REGISTERED_ENVS.get(env_id)
        if spec is None:
            near = difflib.get_close_matches(env_id, mani_skill.REGISTERED_ENVS, n=3)
            known_ids = ", ".join(near or sorted(mani_skill.REGISTERED_ENVS))
            raise SimError(f'env_id = "{env_id}": ManiSkill has no such task; there is {known_ids}')
        _check_assets(env_id, spec)
        options = dict(kwargs or {})
        if control_mode is not None:
            options["control_mode"] = control_mode
        pictures = obs_mode == "rgb" or render
        options["sim_backend"] = sim_backend
        options["render_backend"] = render_backend if pictures else "none"

        def make() -> Any:
            from sim.maniskill_simulator import ManiSkillSimulator

            try:
                return ManiSkillSimulator(
                    env_id,
                    obs_mode,
                    reward_mode,
                    image_size=image_size,
                    render=render,
                    options=options,
                )
            except RuntimeError as error:
                if any(sign in str(error) for sign in NO_VULKAN):
                    raise MissingDependency(f"{VULKAN}. It said: {error}") from error
                raise
            except URLError as error:  # a robot's or an actor's, which it tries to download
                raise MissingDependency(_assets_sentence(env_id, str(error))) from error

        super().__init__(
            make,
            num_slots,
            max_steps=max_steps or spec.max_episode_steps,
            ignore_terminations=ignore_terminations,
        )


def _import(path: str | None) -> Any:
    """The registry of tasks. path: where assets are; it is read when the package is first imported."""
    if path is not None:
        if not (Path(path) / "data").is_dir():
            raise SimError(
                f'path = "{path}": ManiSkill\'s assets are in a folder that holds data/, this one does not'
            )
        os.environ["MS_ASSET_DIR"] = path
    # Otherwise it asks on the terminal, and waits.
    os.environ["MS_SKIP_ASSET_DOWNLOAD_PROMPT"] = "1"
    try:
        import mani_skill
        import mani_skill.envs
        import torch
        from mani_skill.utils import registration
    except ModuleNotFoundError as error:
        raise MissingDependency(f"ManiSkill needs the module {error.name}: {INSTALL}") from error
    if path is not None and Path(path) / "data" != mani_skill.ASSET_DIR:
        raise SimError(
            f'path = "{path}", but this process has loaded ManiSkill with {mani_skill.ASSET_DIR.parent}: '
            "use one folder per process"
        )
    torch.set_num_threads(
        1
    )  # steps are many small computations, and slots and workers share the cores
    return registration


def _check_assets(env_id: str, spec: Any) -> None:
    """MissingDependency: assets of the task are not there, and would be downloaded."""
    from mani_skill.utils import assets

    sources = [
        source
        for name in spec.asset_download_ids or []
        for source in assets.DATA_GROUPS.get(name, [name])
    ]
    missing = [source for source in sources if not assets.is_data_source_downloaded(source)]
    if missing:
        raise MissingDependency(_assets_sentence(env_id, ", ".join(missing)))


def _assets_sentence(env_id: str, missing: str) -> str:
    import mani_skill

    return (
        f'env_id = "{env_id}" needs assets ({missing}) that are not in {mani_skill.ASSET_DIR}: set path in [env.args] '
        f"to the folder that holds data/, or python -m mani_skill.utils.download_asset {env_id}"
    )


def _refuse_gpu_physics() -> None:
    from sapien import physx

    library = Path.home() / ".sapien" / "physx" / physx.version() / "libPhysXGpu_64.so"
    if not library.exists():
        raise MissingDependency(
            f'sim_backend = "gpu": the physics library {library} is not there; unzip linux-so.zip of release '
            f"{physx.version()} of github.com/sapien-sim/physx-precompiled into its folder, or use CPU physics with "
            "[env] workers"
        )
    raise SimError(
        'sim_backend = "gpu": scenes on a GPU are stepped all at once, and slots are not; use CPU physics with '
        "[env] workers"
    )
