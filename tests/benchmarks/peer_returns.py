"""Trains continuous BCQ of another library on an HDF5 file, and logs returns as ``torchrl-bcq train`` logs them.

python tests/benchmarks/peer_returns.py tianshou pendulum-mixed.hdf5 OUT --seed 0

Sizes of networks, batch size and learning rates are those of the author's code. The policy chooses among 100
candidates, and starts from the same initial states as in the runs of this package. OUT is replaced if it exists.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import torch
from floor import TARGET_SAMPLES
from peers import make_buffer, make_d3rlpy, make_tianshou
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torchrl.record import CSVLogger
from tqdm import trange
from transitions import Sizes

import torchrl_bcq as bcq
from torchrl_bcq.data.episodes import episode_returns
from torchrl_bcq.evaluation.environments import make_envs
from torchrl_bcq.evaluation.rollouts import evaluate, summarize

BATCH, CANDIDATES, FIRST_STATES = 100, 100, 1000  # the last one is the default of evaluation.seed

Act = Callable[[np.ndarray], np.ndarray]  # from states [S, D] to actions [S, A]
Contender = tuple[Callable[[], object], Callable[[], Act]]  # makes a gradient step; returns the present policy


def tianshou(data: TensorDict, sizes: Sizes, seed: int, out: Path) -> Contender:
    """Tianshou's target does not bootstrap after a time limit."""
    from tianshou.data import Batch
    from tianshou.utils.torch_utils import policy_within_training_step

    np.random.seed(seed)  # its buffer draws rows with NumPy
    torch.manual_seed(seed)
    algorithm, buffer = make_tianshou("cpu", sizes, CANDIDATES), make_buffer(data)

    def update() -> None:
        with policy_within_training_step(algorithm.policy):
            algorithm.update(buffer, BATCH)

    def act(states: np.ndarray) -> np.ndarray:
        return algorithm.policy(Batch(obs=states, info={})).act

    return update, lambda: act


def d3rlpy(data: TensorDict, sizes: Sizes, seed: int, out: Path) -> Contender:
    """d3rlpy's policy has as many candidates as its target, so a copy with more candidates acts."""
    import d3rlpy as library

    library.seed(seed)
    pairs = [make_d3rlpy("cpu", sizes, BATCH, samples, False, data) for samples in (TARGET_SAMPLES, CANDIDATES)]
    (algorithm, dataset), (acting, _) = pairs

    def update() -> None:
        algorithm.update(dataset.sample_transition_batch(BATCH))

    def make_act() -> Act:
        algorithm.save_model(weights := str(out / "weights.pt"))
        acting.load_model(weights)
        return acting.predict

    return update, make_act


CONTENDERS = {"tianshou": tianshou, "d3rlpy": d3rlpy}


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    torch.set_num_threads(1)
    shutil.rmtree(args.out, ignore_errors=True)
    args.out.mkdir(parents=True)
    data = bcq.load_hdf5(args.file)
    with h5py.File(args.file) as file:
        env, references = str(file.attrs["env_id"]), [file.attrs["ref_min_score"], file.attrs["ref_max_score"]]
    envs = make_envs(env, args.episodes)
    bound = float(envs.action_spec.space.high.max())
    sizes = Sizes(args.hidden, args.vae_hidden, data["observation"].shape[-1], data["action"].shape[-1], bound)
    update, make_act = CONTENDERS[args.library](data, sizes, args.seed, args.out)
    logger = CSVLogger("log", str(args.out))
    for step in trange(args.steps + 1, disable=None):
        if step % args.interval == 0:
            for name, value in summarize(evaluate(envs, as_module(make_act()), seed=FIRST_STATES), references).items():
                logger.log_scalar(name, value, step)
        if step < args.steps:
            update()
    behaviour = {"mean": float(episode_returns(data).mean())}
    (args.out / "results.json").write_text(json.dumps({"behaviour": behaviour}))


def as_module(act: Act) -> TensorDictModule:
    return TensorDictModule(lambda states: torch.from_numpy(act(states.numpy())), ["observation"], ["action"])


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, default = parser.add_argument, "(default: %(default)s)"
    add("library", choices=[*CONTENDERS])
    add("file", type=Path, help="HDF5 file in D4RL's layout; its actions have bounds of the same magnitude")
    add("out", type=Path, help="folder of the results")
    add("--seed", type=int, default=0, help=f"of networks, batches and latents {default}")
    add("--steps", type=int, default=20_000, help=f"gradient steps {default}")
    add("--interval", type=int, default=5_000, help=f"gradient steps between two evaluations {default}")
    add("--episodes", type=int, default=20, help=f"of each evaluation {default}")
    add("--hidden", type=int, nargs="+", default=Sizes.hidden, help=f"layers of actor and critics {default}")
    add("--vae-hidden", type=int, nargs="+", default=Sizes.vae_hidden, help=f"layers of the VAE {default}")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
