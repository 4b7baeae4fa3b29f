"""Pong from frames: discrete BCQ and cloning learn from recorded games, and then play against the computer.

A script plays the recorded games; it reads the game's memory. The learned policies see only the last four frames::

    pip install -e ".[train,atari]"
    python examples/pong.py --frames 2000 --steps 50 --episodes 1 seed=1

Settings of ``torchrl-bcq train`` may follow. The same command resumes a stopped training. To evaluate the run again:
``PYTHONPATH=examples torchrl-bcq evaluate runs/pong/run``.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import ale_py
import gymnasium
import h5py
import numpy as np
from gymnasium.wrappers import AtariPreprocessing

from torchrl_bcq.__main__ import main as torchrl_bcq

ID = "PongFrames-v0"
NOISES = (0.1, 0.2, 0.3, 0.5)  # probability of a random action in the first episode, in the second one, and so on
STAY, UP, DOWN = 0, 2, 3
BALL, PADDLE = 54, 51  # bytes of the memory: the height of the ball, or 0 if there is none, and of the player's paddle
SETTINGS = [  # most bytes are background, so they are scaled; the author copies the target every 8,000 steps
    "stack=4", "batch_size=32", "normalize=true", "loss.copy_interval=1000", "policy.epsilon=0.001", "reward.clip=1",
    "baseline=discrete_cloning", "checkpoint.keep=1",
]  # fmt: skip


def make_pong(**settings) -> gymnasium.Env:
    """Pong as most papers use it: every fourth picture, in gray, 84 x 84, after up to 30 steps without an action."""
    return AtariPreprocessing(ale_py.AtariEnv("pong", frameskip=1, repeat_action_probability=0.0, **settings))


ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)
if ID not in gymnasium.registry:  # this file may be imported twice: as a script, and as pong:PongFrames-v0
    gymnasium.register(ID, make_pong, max_episode_steps=10_000)


def follow(now: np.ndarray, before: np.ndarray) -> int:
    """Return the action that moves the paddle to the ball, from the memory now and one step before."""
    ball, paddle = int(now[BALL]), int(now[PADDLE])
    moved = ball - int(before[BALL]) if before[BALL] else 0
    gap = ball + moved - 6 - (paddle + 0.7 * (paddle - int(before[PADDLE])))  # the paddle glides on
    return STAY if not ball or abs(gap) <= 8 else UP if gap < 0 else DOWN


def play(env: gymnasium.Env, noise: float, rng: np.random.Generator, limit: int) -> dict[str, list]:
    """Play one episode of at most ``limit`` steps."""
    names = ("observations", "actions", "rewards", "terminals", "timeouts", "action_probabilities")
    rows: dict[str, list] = {name: [] for name in names}
    frame, _ = env.reset(seed=int(rng.integers(2**31)))
    now = before = env.unwrapped.ale.getRAM()
    number, ended = int(env.action_space.n), False
    while not ended:
        best = follow(now, before)
        action = int(rng.integers(number)) if rng.random() < noise else best
        after, reward, terminated, truncated, _ = env.step(action)
        truncated = not terminated and (truncated or len(rows["actions"]) + 1 == limit)
        step = (frame, action, reward, terminated, truncated, noise / number + (1 - noise) * (action == best))
        for name, value in zip(names, step, strict=True):
            rows[name].append(value)
        frame, before, now, ended = after, now, env.unwrapped.ale.getRAM(), terminated or truncated
    return rows


def record(path: Path, frames: int, seed: int = 0) -> None:
    """Write at most this many steps, without the last episode if it is cut off, and print the returns."""
    env, rng = gymnasium.make(ID), np.random.default_rng(seed)
    aside, rows, returns = path.with_suffix(".part"), 0, {noise: [] for noise in NOISES}
    with h5py.File(aside, "w") as file:
        file.attrs.update(env_id=f"pong:{ID}", n_actions=env.action_space.n)
        while rows < frames:
            noise = NOISES[sum(map(len, returns.values())) % len(NOISES)]
            episode = play(env, noise, rng, frames - rows)
            if rows and rows + len(episode["actions"]) == frames and episode["timeouts"][-1]:
                break
            for name, values in episode.items():
                if name not in file:
                    shape, kind = np.shape(values)[1:], np.array(values[0]).dtype
                    file.create_dataset(name, (0, *shape), kind, maxshape=(None, *shape), compression="gzip")
                file[name].resize(rows + len(values), 0)
                file[name][rows:] = values
            rows += len(episode["actions"])
            returns[noise].append(sum(episode["rewards"]))
    env.close()
    aside.rename(path)
    for noise, some in returns.items():
        if some:
            print(f"{noise:.0%} random actions: episodes {len(some)}, mean return {np.mean(some):.1f}", flush=True)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=100_000, help="steps to record (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=30_000, help="gradient steps (default: %(default)s)")
    parser.add_argument("--episodes", type=int, default=5, help="episodes of each evaluation (default: %(default)s)")
    parser.add_argument("--out", type=Path, default="runs/pong", help="folder to write (default: %(default)s)")
    args, settings = parser.parse_known_args(arguments)
    data, run = args.out / f"pong-{args.frames}.hdf5", args.out / "run"
    if not data.is_file():
        args.out.mkdir(parents=True, exist_ok=True)
        record(data, args.frames)
    interval = min(5000, args.steps)
    words = [f"dataset={data}", f"root={args.out / 'copies'}", f"out={run}", "resume=true", f"steps={args.steps}"]
    words += [f"evaluation.env=pong:{ID}", f"evaluation.episodes={args.episodes}", f"checkpoint.interval={interval}"]
    words += [f"evaluation.interval={interval}", f"log_interval={np.gcd(100, interval)}"]
    return torchrl_bcq(["train", *words, *SETTINGS, *settings]) or torchrl_bcq(
        ["evaluate", str(run), "--checkpoint", "last", "--episodes", str(args.episodes)]
    )


if __name__ == "__main__":
    raise SystemExit(main())
