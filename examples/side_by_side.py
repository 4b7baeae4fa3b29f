"""Draws a GIF that shows a recorded episode beside an episode of the learned policy from the same initial state.

python examples/side_by_side.py runs/first picture.gif

The first argument is the folder of a run of ``torchrl-bcq train`` on Pendulum-v1. The script needs
``pip install -e ".[train,video]"``.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import gymnasium
import numpy as np
from PIL import Image, ImageDraw

import torchrl_bcq as bcq
from torchrl_bcq.data.episodes import episode_numbers, episode_returns
from torchrl_bcq.files import write_whole
from torchrl_bcq.reports.video import render_offscreen
from torchrl_bcq.runs.settings import load_settings

SIZE, EVERY = 240, 2  # width of a panel in pixels; steps between two frames

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("run", type=Path, help="folder of a run of torchrl-bcq train")
parser.add_argument("out", type=Path, help="GIF file to write")


def usual_episode(dataset: str) -> tuple[np.ndarray, np.ndarray]:
    """Return observations ``[T, 3]`` and actions ``[T, 1]`` of the episode whose return is nearest to the mean."""
    transitions = bcq.load_transitions(dataset)
    returns = episode_returns(transitions)
    rows = transitions[episode_numbers(transitions) == (returns - returns.mean()).abs().argmin()]
    return rows["observation"].numpy(), rows["action"].numpy()


def play(env: gymnasium.Env, state: np.ndarray, choose, steps: int) -> tuple[list[Image.Image], list[float]]:
    """Run an episode from a state (angle, speed); return frames, and the sum of rewards up to each frame."""
    env.reset()
    env.unwrapped.state = state
    frames, rewards, observation = [], [], np.array([np.cos(state[0]), np.sin(state[0]), state[1]])
    for step in range(steps):
        observation, reward, *_ = env.step(choose(step, observation))
        rewards.append(float(reward))
        if step % EVERY == 0:
            frames.append(Image.fromarray(env.render()).resize((SIZE, SIZE)))
    return frames, list(np.cumsum(rewards)[::EVERY])


def main() -> None:
    args = parser.parse_args()
    render_offscreen()
    policy, env = bcq.load_policy(args.run), gymnasium.make("Pendulum-v1", render_mode="rgb_array")
    history = bcq.History(policy.stack)
    observations, actions = usual_episode(load_settings(args.run).dataset)
    first = observations[0]
    state, steps = np.array([np.arctan2(first[1], first[0]), first[2]]), len(actions)
    panels = {
        "recorded behaviour": play(env, state, lambda step, observation: actions[step], steps),
        "BCQ": play(env, state, lambda step, observation: policy.act(history(observation)), steps),
    }
    pictures = []
    for number in range(len(panels["BCQ"][0])):
        picture = Image.new("RGB", (SIZE * len(panels), SIZE + 30), "white")
        for column, (title, (frames, returns)) in enumerate(panels.items()):
            picture.paste(frames[number], (SIZE * column, 30))
            text = f"{title}: return {returns[number]:.0f}"
            ImageDraw.Draw(picture).text((SIZE * column + 12, 8), text, fill="black", font_size=15)
        pictures.append(picture.quantize(32))
    with write_whole(args.out) as aside:
        pictures[0].save(aside, save_all=True, append_images=pictures[1:], duration=50 * EVERY, loop=0, optimize=True)
    print(f"{args.out}: {len(pictures)} frames, {args.out.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
