"""Learn a policy from a dataset with BCQ; the environment serves for evaluation only.

python examples/train_offline.py                            records Pendulum-v1 once, then learns from it
python examples/train_offline.py --dataset FILE.hdf5        or FILE.npz, in D4RL's layout
python examples/train_offline.py --dataset minari:ID        such as minari:mujoco/hopper/medium-v0
python examples/train_offline.py --dataset d4rl:ID --env ENVIRONMENT
"""

from __future__ import annotations

import argparse
import logging
import math
import time
from pathlib import Path

import report
import torch
from open_dataset import open_dataset
from torchrl.envs import SerialEnv
from torchrl.objectives import SoftUpdate
from torchrl.record import CSVLogger

import torchrl_bcq as bcq
from torchrl_bcq.data.episodes import episode_returns

# by default: the paper's settings for a dataset that is given, and those of torchrl-bcq train for the recorded one
PAPER = {"hidden": [400, 300], "vae_hidden": [750, 750], "gamma": 0.99, "tau": 0.005, "normalize": False}
RECORDED = {"hidden": [256, 256], "vae_hidden": [256, 256], "gamma": 0.95, "tau": 0.02, "normalize": True}

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--dataset", help="FILE, minari:ID or d4rl:ID; default: recorded here")
parser.add_argument("--root", type=Path, help="folder for a memory-mapped copy of data larger than memory")
parser.add_argument("--env", help="Gymnasium id; default: the one that the dataset names")
parser.add_argument("--steps", type=int, default=3_500, help="gradient steps (default: %(default)s)")
parser.add_argument("--batch-size", type=int, default=100, help="rows of a batch (default: %(default)s)")
parser.add_argument("--hidden", type=int, nargs="+", help="layers of actor and critics")
parser.add_argument("--vae-hidden", type=int, nargs="+", help="layers of the VAE")
parser.add_argument("--gamma", type=float, help="discount")
parser.add_argument("--tau", type=float, help="share of the trained weights in each update of the targets")
normalize = "scale observations, actions and rewards inside the networks"
parser.add_argument("--normalize", action=argparse.BooleanOptionalAction, help=normalize)
parser.add_argument("--eval-every", type=int, help="gradient steps between two evaluations; default: a tenth of all")
parser.add_argument("--eval-episodes", type=int, default=20, help="episodes of an evaluation (default: %(default)s)")
parser.add_argument("--device", default=torch.get_default_device(), help="any torch device (default: %(default)s)")
parser.add_argument("--seed", type=int, default=0, help="of networks and batches (default: %(default)s)")
parser.add_argument("--out", type=Path, help="new folder of the run; default: runs/ENVIRONMENT-TIME")
parser.add_argument("--resume", action="store_true", help="resume from the checkpoint in --out")


def main() -> None:
    parser.set_defaults(**(PAPER if parser.parse_args().dataset else RECORDED))
    args = parser.parse_args()
    logging.getLogger("torchrl").setLevel("WARNING")
    if args.resume and not (args.out and (args.out / "checkpoint").exists()):
        parser.error("--resume needs the --out of a run that has a checkpoint")
    if args.out and args.out.exists() and not args.resume:
        parser.error(f"{args.out} exists; pass another --out, or --resume to continue it")
    try:
        make_env, transitions = open_dataset(args.dataset, args.env, args.root)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    env, envs = make_env(), SerialEnv(args.eval_episodes, make_env, device=args.device)
    out = args.out or Path("runs") / time.strftime(f"{env.spec.id}-%Y%m%d-%H%M%S")
    buffer = bcq.make_replay_buffer(transitions, batch_size=args.batch_size, device=args.device, seed=args.seed)

    normalization = bcq.Normalization.fit(transitions) if args.normalize else None
    torch.manual_seed(args.seed)
    vae, actor, critics = bcq.make_bcq_modules(
        env.observation_spec,
        env.action_spec,
        hidden=args.hidden,
        vae_hidden=args.vae_hidden,
        normalization=normalization,
        device=args.device,
    )
    loss = bcq.BCQLoss(vae, actor, critics)
    loss.make_value_estimator(gamma=args.gamma)
    eval_every = args.eval_every or max(1, args.steps // 10)
    trainer = bcq.BCQTrainer(
        loss,
        buffer,
        target_net_updater=SoftUpdate(loss, tau=args.tau),
        total_steps=args.steps,
        log_interval=math.gcd(100, eval_every),
        logger=CSVLogger("log", log_dir=str(out)),
        save_trainer_file=out / "checkpoint",
        save_trainer_interval=eval_every - 1,  # TorchRL saves once more than that has passed
        seed=args.seed,
    )

    policy = bcq.BCQPolicy(vae, actor, critics, num_action_samples=100)
    bcq.EnvironmentMetrics(envs, policy, interval=eval_every).register(trainer)
    if args.resume:
        trainer.load_from_file(out / "checkpoint")
        if trainer.collected_frames >= args.steps:
            parser.error(f"the checkpoint is at {trainer.collected_frames} steps; pass --steps above that")
    trainer.train()

    (cloned,) = bcq.make_cloning_modules(
        env.observation_spec, env.action_spec, hidden=args.hidden, normalization=normalization, device=args.device
    )
    cloning, steps = bcq.CloningLoss(cloned), args.steps
    bcq.OfflineTrainer(cloning, buffer, target_net_updater=None, total_steps=steps, seed=args.seed).train()

    policies = {"random": None, "cloning": cloned, "vae_bc": bcq.BehaviorCloningPolicy(vae), "bcq": policy}
    returns = {name: bcq.evaluate(envs, p)["return"].tolist() for name, p in policies.items()}
    returns["behaviour"] = episode_returns(transitions).tolist()
    report.write(out, returns, title=f"{env.spec.id}, {args.steps} gradient steps")


if __name__ == "__main__":
    main()
