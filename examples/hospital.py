"""Treatments in hospital: discrete BCQ and cloning learn from clinicians' decisions; the values are exact.

This example simulates patients of a published model (see sepsis_model.py) with the clinicians' treatments, trains
policies on them, and computes the probability of survival under each policy from the tables of the model. It is for
testing software, not for medical conclusions. Run::

    pip install -e ".[hospital]"
    python examples/hospital.py
    python examples/hospital.py --rows 20000 --steps 6000 --admissible
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
from sepsis_model import SepsisModel
from tensordict import TensorDict
from torchrl.data import Binary, Categorical, Composite, Unbounded
from torchrl.objectives import SoftUpdate

import torchrl_bcq as bcq

THRESHOLDS = (0.0, 0.1, 0.3, 0.5, 0.9)


def learn(
    model: SepsisModel,
    data: TensorDict,
    threshold: float | None,
    steps: int,
    *,
    batch_size: int = 64,
    seed: int = 0,
    masked: bool = False,
    gamma: float = 1.0,
) -> np.ndarray:
    """Train BCQ, or cloning if ``threshold`` is None, and return the policy as a table of 0 and 1, ``[S, A]``."""
    torch.manual_seed(seed)
    actions = Categorical(model.clinicians.shape[1])
    spec = Composite(observation=Unbounded((model.features.shape[1],)))
    if masked:  # the policy chooses admissible treatments only, and learns from admissible treatments only
        spec["action_mask"] = Binary(actions.n, dtype=torch.bool)
        data = data[data["action_mask"].gather(-1, data["action"].unsqueeze(-1)).squeeze(-1)]
    if threshold is None:
        networks = bcq.make_discrete_cloning_modules(spec, actions)
        loss, policy, updater = bcq.DiscreteCloningLoss(*networks), bcq.DiscreteCloningPolicy(*networks), None
    else:
        networks = bcq.make_discrete_bcq_modules(spec, actions)
        loss = bcq.DiscreteBCQLoss(*networks, unlikely_action_threshold=threshold)
        loss.make_value_estimator(gamma=gamma)
        policy = bcq.DiscreteBCQPolicy(*networks, unlikely_action_threshold=threshold)
        updater = SoftUpdate(loss, tau=0.005)
    buffer = bcq.make_replay_buffer(data, batch_size=batch_size, seed=seed)
    stepper = bcq.OfflineOptimizationStepper.adam(loss, lr=3e-4)
    settings = {"total_steps": steps, "optimization_stepper": stepper, "progress_bar": False}
    bcq.OfflineTrainer(loss, buffer, target_net_updater=updater, **settings).train()
    living = np.arange(model.living)
    table = np.zeros_like(model.clinicians)
    table[living, policy(model.to_transitions(living, 0 * living, living))["action"].numpy()] = 1
    return table


def main(arguments: list[str] | None = None, model: SepsisModel | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=5000, help="transitions to simulate (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=1000, help="gradient steps of each policy (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=64, help="rows in a step (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the patients and of training (default: %(default)s)")
    parser.add_argument("--admissible", action="store_true", help="use the admissible treatments as action mask")
    args = parser.parse_args(arguments)
    model = model or SepsisModel.load()
    data = model.simulate(args.rows, args.seed)
    values = {"clinicians": model.value(model.clinicians)}
    for name, threshold in {"cloning": None, **{f"BCQ, threshold {number}": number for number in THRESHOLDS}}.items():
        settings = {"batch_size": args.batch_size, "seed": args.seed, "masked": args.admissible}
        values[name] = model.value(learn(model, data, threshold, args.steps, **settings))
    for name, value in values.items():
        print(f"{name:<20}{value:8.4f}")
    return values


if __name__ == "__main__":
    main()
