"""Fine-tunes an offline policy in its environment, with TorchRL's trainer, collector and offline-to-online buffer.

python examples/finetune_online.py

Half of each batch comes from the dataset, the other half from the environment steps of the policy.
"""

import argparse

import torch
from pendulum_data import SMALL, mean_return, record, run, train
from torchrl.collectors import Collector
from torchrl.data import LazyTensorStorage, OfflineToOnlineReplayBuffer, ReplayBuffer
from torchrl.envs import GymEnv
from torchrl.objectives import SoftUpdate
from torchrl.trainers import LogScalar, SelectKeys, TargetNetUpdaterHook, Trainer

from torchrl_bcq import BCQLoss, BCQPolicy, OfflineOptimizationStepper, make_bcq_modules


def finetune(loss: BCQLoss, policy: BCQPolicy, offline: ReplayBuffer, frames: int) -> None:
    """Make one gradient step for each step in the environment, with TorchRL's ``Trainer``."""
    updater = SoftUpdate(loss, tau=0.02)
    buffer = OfflineToOnlineReplayBuffer(offline, online_capacity=frames, offline_fraction=0.5, batch_size=64)
    collector = Collector(
        GymEnv("Pendulum-v1"), policy, frames_per_batch=200, total_frames=frames, auto_register_policy_transforms=False
    )
    trainer = Trainer(
        collector=collector,
        total_frames=frames,
        frame_skip=1,
        optim_steps_per_batch=200,
        loss_module=loss,
        optimization_stepper=OfflineOptimizationStepper.adam(loss),
        target_net_updater=updater,
        seed=0,
    )
    trainer.register_op("batch_process", SelectKeys(loss.in_keys))
    trainer.register_op("batch_process", buffer.extend)
    trainer.register_op("process_optim_batch", lambda collected: buffer.sample())
    trainer.register_op("post_optim", TargetNetUpdaterHook(updater))
    trainer.register_op("pre_steps_log", LogScalar(("next", "reward"), "reward", log_pbar=True))
    trainer.train()


def main(steps: int, frames: int) -> dict[str, float]:
    torch.manual_seed(0)
    env = GymEnv("Pendulum-v1")
    networks = make_bcq_modules(env.observation_spec, env.action_spec, **SMALL)
    loss, policy = BCQLoss(*networks), BCQPolicy(*networks)
    recorded = record(env)
    train(loss, recorded, steps)
    returns = {"behaviour": mean_return(recorded), "offline": mean_return(run(env, policy))}
    offline = ReplayBuffer(storage=LazyTensorStorage(len(recorded)))
    offline.extend(recorded.select(*loss.in_keys))
    finetune(loss, policy, offline, frames)
    return {**returns, "finetuned": mean_return(run(env, policy))}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000, help="offline gradient steps (default: %(default)s)")
    parser.add_argument("--frames", type=int, default=2000, help="online environment steps (default: %(default)s)")
    print(main(**vars(parser.parse_args())))
