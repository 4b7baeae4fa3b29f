"""BCQ from a dataset to a policy, with no environment in between (it serves to evaluate only).

python examples/train_offline.py                            records Pendulum-v1 once, then learns from it
python examples/train_offline.py --dataset FILE.hdf5        D4RL's layout
python examples/train_offline.py --dataset minari:ID        such as minari:mujoco/hopper/medium-v0
"""

from __future__ import annotations

import argparse
import logging
import math
import time
from pathlib import Path

import h5py
import minari
import record_pendulum
import report
import torch
from torchrl.checkpoint import Checkpoint
from torchrl.envs import DoubleToFloat, EnvBase, GymEnv, TransformedEnv
from torchrl.objectives import SoftUpdate
from torchrl.record import CSVLogger

import torchrl_bcq as bcq

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--dataset", help="PATH.hdf5 or minari:ID; default: recorded here")
parser.add_argument("--env", help="Gymnasium id; default: the one that the dataset names")
parser.add_argument("--steps", type=int, default=5_000, help="gradient steps (default: %(default)s)")
parser.add_argument("--batch-size", type=int, default=100, help="rows of a batch (default: %(default)s)")
parser.add_argument(
    "--hidden", type=int, nargs="+", help="actor and critics; default: 400 300, recorded Pendulum 128 128"
)
parser.add_argument("--vae-hidden", type=int, nargs="+", help="VAE; default: 750 750, recorded Pendulum 128 128")
parser.add_argument("--eval-every", type=int, help="gradient steps between two evaluations; default: a tenth of all")
parser.add_argument("--eval-episodes", type=int, default=20, help="episodes of an evaluation (default: %(default)s)")
parser.add_argument("--device", default=torch.get_default_device(), help="any torch device (default: %(default)s)")
parser.add_argument("--seed", type=int, default=0, help="of networks, batches and evaluations (default: %(default)s)")
parser.add_argument(
    "--out", type=Path, help="new folder of the run; default: one in runs/, named by environment and time"
)
parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")


def find_dataset(name: str | None) -> tuple[str, str | None]:
    """The dataset's name, recorded first if there is none yet, and its environment's id."""
    if name is None:
        if record_pendulum.DATASET_ID not in minari.list_local_datasets():
            record_pendulum.record()
        name = f"minari:{record_pendulum.DATASET_ID}"
    if name.startswith("minari:"):
        spec = minari.load_dataset(name.removeprefix("minari:"), download=True).env_spec
        return name, None if spec is None else spec.id
    with h5py.File(name) as file:
        return name, file.attrs.get("env_id")


def evaluate(env: EnvBase, policy, episodes: int, seed: int) -> list[float]:
    """Returns of whole episodes, from the same initial states for every policy; training's random state is kept."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        env.set_seed(seed)
        return [env.rollout(1_000_000, policy)["next", "reward"].sum().item() for _ in range(episodes)]


def main() -> None:
    args = parser.parse_args()
    logging.getLogger("torchrl").setLevel("WARNING")
    name, env_id = find_dataset(args.dataset)
    if not (env_id := args.env or env_id):
        parser.error(f"{name} does not name its environment; pass --env")
    out = args.out or Path("runs") / f"{env_id}-{time.strftime('%Y%m%d-%H%M%S')}"
    if out.exists() and not args.resume:
        parser.error(f"{out} exists; pass another --out, or --resume to go on with it")

    env = TransformedEnv(GymEnv(env_id, device=args.device), DoubleToFloat())
    if name.startswith("minari:"):
        transitions = bcq.load_minari(name.removeprefix("minari:"))
    else:
        transitions = bcq.load_hdf5(name, action_spec=env.action_spec)
    buffer = bcq.make_replay_buffer(transitions, batch_size=args.batch_size, device=args.device, seed=args.seed)

    torch.manual_seed(args.seed)
    vae, actor, critics = bcq.make_bcq_modules(
        env.observation_spec,
        env.action_spec,
        hidden=args.hidden or ([400, 300] if args.dataset else [128, 128]),
        vae_hidden=args.vae_hidden or ([750, 750] if args.dataset else [128, 128]),
        device=args.device,
    )
    policy = bcq.BCQPolicy(vae, actor, critics, num_action_samples=100)
    loss = bcq.BCQLoss(vae, actor, critics)
    eval_every = args.eval_every or max(1, args.steps // 10)
    trainer = bcq.BCQTrainer(
        loss,
        buffer,
        target_net_updater=SoftUpdate(loss, tau=0.005),
        total_steps=args.steps,
        log_interval=math.gcd(100, eval_every),
        logger=CSVLogger("log", log_dir=str(out)),
        checkpoint=Checkpoint(),
        save_trainer_file=out / "checkpoint",
        save_trainer_interval=eval_every - 1,
        seed=args.seed,
    )

    def log_return(tick) -> dict[str, float] | None:
        if trainer.collected_frames % eval_every:
            return None
        returns = evaluate(env, policy, args.eval_episodes, args.seed)
        return {"return": sum(returns) / len(returns), "log_pbar": True}

    trainer.register_op("post_steps_log", log_return)
    if args.resume:
        trainer.load_from_file(out / "checkpoint")
    trainer.train()

    cloning = bcq.BehaviorCloningPolicy(vae)
    returns = {
        "random": evaluate(env, None, args.eval_episodes, args.seed),
        "behaviour": report.episode_returns(transitions),
        "behaviour_cloning": evaluate(env, cloning, args.eval_episodes, args.seed),
        "bcq": evaluate(env, policy, args.eval_episodes, args.seed),
    }
    report.write(out, returns, title=f"{env_id}, {args.steps} gradient steps")


if __name__ == "__main__":
    main()
