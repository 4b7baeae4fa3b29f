"""Records a video of one episode of a policy; no screen is needed."""

from __future__ import annotations

import os
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

from tensordict.nn import TensorDictModuleBase
from torchrl.envs import EnvBase

from torchrl_bcq.errors import RunError
from torchrl_bcq.evaluation.rollouts import own_random_state
from torchrl_bcq.files import write_whole

_FPS = 30  # frames per second of environments without render_fps


def render_offscreen() -> None:
    """Select off-screen rendering if there is no display. Call this function before you import MuJoCo."""
    if sys.platform == "linux" and "DISPLAY" not in os.environ:
        os.environ.setdefault("MUJOCO_GL", "egl")
        os.environ.setdefault("SDL_VIDEODRIVER", "dummy")


def record_video(
    env: EnvBase, policy: TensorDictModuleBase, file: Path, *, seed: int = 0, max_steps: int = 1_000
) -> Path:
    """Record an episode as an MP4, or as a GIF if ``file`` ends in ``.gif``. Errors leave no partial file.

    Args:
        env: Gymnasium environment made with ``render_mode="rgb_array"``, wrapped for TorchRL. The function closes the
            environment at the end.
        policy: policy that acts in the environment.
        file: path of the video; missing folders are created.
        seed: seed of the initial state and of the policy.
        max_steps: largest number of steps of the episode.

    Raises:
        RunError: if the environment cannot be rendered.
        ImportError: if a package for rendering or encoding is not installed.
        OSError: if the file cannot be written.
    """
    try:
        from imageio.v3 import imwrite
    except ImportError as error:
        raise ImportError(f"{error}; to record videos: pip install 'torchrl-bcq[video]'") from error

    frames: list[Any] = []

    def draw(*_: Any) -> None:
        try:
            frames.append(env.render())
        except ImportError:
            raise
        except Exception as error:  # rendering raises errors of many kinds
            raise RunError(
                f"{env.spec.id} cannot be rendered: {error}. On a machine without a screen, install OpenGL "
                "(libegl1, or libosmesa6 with MUJOCO_GL=osmesa)."
            ) from error

    with own_random_state(seed, None), closing(env):
        env.set_seed(seed)
        state = env.reset()
        draw()
        steps = env.rollout(max_steps, policy, draw, auto_reset=False, tensordict=state)
        if len(frames) == len(steps):  # TorchRL calls draw after all steps except the last one
            draw()
    fps = env.metadata.get("render_fps", _FPS)
    settings = {"loop": 0, "duration": 1000 / fps} if file.suffix == ".gif" else {"fps": fps, "macro_block_size": 2}
    with write_whole(file) as aside:
        imwrite(aside, frames, **settings)
    return file
