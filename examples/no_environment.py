"""Trains without an environment: measures on held-out episodes, stops early, and chooses a checkpoint.

python examples/no_environment.py
python examples/no_environment.py --table trips.csv

The dataset imitates recorded data: 200 trips of a cart. In each trip, somebody pushes the cart towards the middle of a
track, but not well. The TD error and the distance of the actions show when the values have converged, and when the
policy's actions are far from the data. The checkpoint is chosen by fitted Q evaluation (fqe), which estimates the value
of the policy.
"""

import argparse
import csv
from pathlib import Path

import numpy as np
import torch
from tensordict import TensorDict
from torchrl.checkpoint import CheckpointRotation
from torchrl.data import Bounded, Unbounded
from torchrl.objectives import SoftUpdate
from torchrl.record import CSVLogger
from torchrl.trainers import EarlyStopping

import torchrl_bcq as bcq

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--steps", type=int, default=2_000, help="largest number of gradient steps (default: %(default)s)")
parser.add_argument("--out", type=Path, default=Path("runs/cart"), help="folder of the run (default: %(default)s)")
parser.add_argument("--table", type=Path, metavar="CSV", help="write the trips to this table, and do not train")

TRIPS, STEPS = 200, 40


def move(state: np.ndarray, push: np.ndarray) -> np.ndarray:
    """Compute the next position and speed of the cart, ``[N, 2]``."""
    speed = 0.9 * state[:, 1] + 0.2 * push[:, 0]
    return np.stack([state[:, 0] + 0.2 * speed, speed], 1)


def log_trips(seed: int = 0) -> TensorDict:
    """Simulate trips in which somebody pushes in the right direction, but too weakly, or in a random direction."""
    rng = np.random.default_rng(seed)
    state, trips = np.stack([rng.uniform(-1, 1, TRIPS), np.zeros(TRIPS)], 1), []
    for step in range(STEPS):
        meant = -0.5 * np.sign(state[:, :1])
        push = np.where(rng.random((TRIPS, 1)) < 0.5, rng.uniform(-1, 1, (TRIPS, 1)), meant)
        after = move(state, push)
        trips.append((state, push, -(after[:, 0] ** 2), np.full(TRIPS, step == STEPS - 1), after))
        state = after
    columns = [np.concatenate(list(np.stack(column, 1))) for column in zip(*trips, strict=True)]  # sorted by trip
    observations, actions, rewards, cut_off, following = columns
    return bcq.from_arrays(observations, actions, rewards, np.zeros(len(rewards)), cut_off, following)


def write_table(data: TensorDict, path: Path) -> None:
    """Write a row for each step; no trip ends with a crash."""
    trip = torch.arange(len(data))[:, None] // STEPS
    columns = [trip, data["observation"], data["action"], data["next", "reward"], data["next", "terminated"]]
    header = "trip,x,v,force,r,crashed"
    np.savetxt(path, torch.cat(columns, 1), "%.9g", delimiter=",", header=header, comments="")


def main() -> None:
    args = parser.parse_args()
    if args.table is None and (args.out / "log").exists():
        parser.error(f"{args.out} holds another run; pass another --out")
    data = log_trips()
    if args.table is not None:
        if args.table.exists():
            parser.error(f"{args.table} exists already; pass another --table")
        write_table(data, args.table)
        print(f"{TRIPS} trips are in {args.table}.")
        return
    train, held_out = bcq.split_episodes(data, 0.1)
    torch.manual_seed(0)
    action_spec = Bounded(-1, 1, (1,))
    networks = bcq.make_bcq_modules(Unbounded((2,)), action_spec, hidden=(64, 64), vae_hidden=(64, 64))
    loss = bcq.BCQLoss(*networks).make_value_estimator(gamma=0.9)
    policy = bcq.BCQPolicy(*networks, num_action_samples=50)
    trainer = bcq.BCQTrainer(
        loss,
        bcq.make_replay_buffer(data, batch_size=100, seed=0, weights=train),
        target_net_updater=SoftUpdate(loss, tau=0.02),
        total_steps=args.steps,
        logger=CSVLogger("log", log_dir=str(args.out)),
        checkpoint_rotation=CheckpointRotation(args.out / "checkpoints", keep_last=2),
        save_trainer_interval=199,
        seed=0,
    )
    bcq.DatasetMetrics(loss, policy, data[held_out], interval=200).register(trainer)
    fqe = {"fqe_steps": 500, "hidden": (64, 64), "gamma": 0.9, "held_out": 0.1}  # for real data, more steps
    bcq.FQEMetrics(data, policy, action_spec, interval=200, **fqe).register(trainer)
    best = bcq.KeepBest(args.out / "best", "fqe")
    best.register(trainer)
    EarlyStopping(monitor="fqe", mode="max", patience=1_000, wait_for=200).register(trainer)
    trainer.train()

    names = ("held_out_td_error", "held_out_loss_vae", "initial_value", "action_distance", "fqe")
    files = [args.out / "log" / "scalars" / f"{name}.csv" for name in names]
    print(f"{'step':>6}" + "".join(f"{name:>20}" for name in names))
    for rows in zip(*(csv.reader(file.read_text().splitlines()) for file in files), strict=True):
        print(f"{rows[0][0]:>6}" + "".join(f"{float(value):20.4f}" for _, value in rows))

    chosen = best.best()
    bcq.make_checkpoint(loss_module=loss).load(chosen)  # the policy uses the same networks as the loss
    push = policy.act([[0.8, 0.0], [-0.8, 0.0]])
    print(f"\nThe policy in {chosen} pushes {push[0].item():+.2f} at position 0.8 and {push[1].item():+.2f} at -0.8.")


if __name__ == "__main__":
    main()
