"""A video of a policy at work, without a screen."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch

from torchrl_bcq.cli.errors import RunError
from torchrl_bcq.cli.run import load, make_env

_FPS = 30  # where the environment does not say


def record_video(run: Path, file: Path, *, checkpoint: str = "best", seed: int = 0, max_steps: int = 1_000) -> Path:
    """Write one episode of a run's policy as ``file``, an MP4 or, by its ending, a GIF; it is whole or not there.

    Args:
        run: folder of ``torchrl-bcq train``, or of one of its checkpoints.
        file: its folder is made.
        checkpoint: ``"best"`` or ``"last"``.
        seed: of the initial state and of the policy.
        max_steps: after which it is cut off.

    Raises:
        RunError: if the run has no environment, or that cannot be drawn.
        ImportError: if a package for drawing or encoding is not installed.
        OSError: if it cannot be written.
    """
    from imageio.v3 import imwrite

    if sys.platform == "linux" and "DISPLAY" not in os.environ:
        os.environ.setdefault("MUJOCO_GL", "egl")  # before MuJoCo is imported
        os.environ.setdefault("SDL_VIDEODRIVER", "dummy")
    trained = load(run, checkpoint, "cpu")
    if trained.task.env_id is None:
        raise RunError(f"{run} has no environment to record a video in.")
    env: Any = make_env(trained.task.env_id, render_mode="rgb_array")
    frames: list[Any] = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        env.set_seed(seed)
        try:
            env.rollout(max_steps, trained.policy, lambda env, _: frames.append(env.base_env._env.render()))
        except (ImportError, RunError):
            raise
        except Exception as error:  # of the many ways of drawing
            raise RunError(
                f"{trained.task.env_id} cannot be drawn here: {error}. On a machine without a screen, install OpenGL "
                "(libegl1, or libosmesa6 with MUJOCO_GL=osmesa)."
            ) from error
        finally:
            env.close()
    file.parent.mkdir(parents=True, exist_ok=True)
    aside = file.with_name(f".{os.getpid()}.{file.name}")
    fps = env.base_env._env.metadata.get("render_fps", _FPS)
    settings = {"loop": 0, "duration": 1000 / fps} if file.suffix == ".gif" else {"fps": fps, "macro_block_size": 2}
    try:
        imwrite(aside, frames, **settings)
        aside.replace(file)
    finally:
        aside.unlink(missing_ok=True)
    return file
