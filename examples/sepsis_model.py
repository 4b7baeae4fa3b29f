"""The model of sepsis treatment in the package icu-sepsis: its tables, simulated patients, exact values of policies.

The package's authors estimated the model from hospital records (arXiv:2406.05646): 713 states of a patient, 25
treatments, and the probability with which clinicians choose each treatment. ``hospital.py`` trains policies on it.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from tensordict import TensorDict


@dataclass
class SepsisModel:
    """Tables of the model, for ``S`` states and ``A`` treatments. The last three states end an episode."""

    transitions: np.ndarray  # probability of the next state, [S, A, S]
    rewards: np.ndarray  # 1 for survival, otherwise 0, [S, A, S]
    start: np.ndarray  # probability of the first state, [S]
    clinicians: np.ndarray  # probability of each treatment, [S, A]
    features: np.ndarray  # what a policy sees of a state, [S, 47]
    admissible: np.ndarray  # True for treatments that clinicians chose often, [S, A]

    @classmethod
    def load(cls) -> SepsisModel:
        """Read the tables from the package's files. Importing the package would import the old gym."""
        spec = find_spec("icu_sepsis")
        if spec is None:
            raise ModuleNotFoundError('The package icu-sepsis is missing; run: pip install -e ".[hospital]"')
        folder = Path(spec.submodule_search_locations[0]) / "envs" / "assets"
        with np.load(folder / "dynamics.npz", allow_pickle=False) as file:
            tables = [file[name] for name in ("tx_mat", "r_mat", "d_0", "expert_policy", "state_cluster_centers")]
        admissible = np.zeros(tables[3].shape, bool)
        for state, line in enumerate((folder / "admissible_actions.txt").read_text().splitlines()[1:]):
            admissible[state, [int(action) for action in line.split()]] = True
        return cls(*tables, admissible)

    @property
    def living(self) -> int:
        return len(self.start) - 3

    def value(self, policy: np.ndarray) -> float:
        """Return the probability of survival under a policy ``[S, A]``, from the linear system ``v = r + P v``."""
        n = self.living
        chances = np.einsum("sa,sax->sx", policy[:n], self.transitions[:n])
        rewards = np.einsum("sa,sax,sax->s", policy[:n], self.transitions[:n], self.rewards[:n])
        return float(self.start[:n] @ np.linalg.solve(np.eye(n) - chances[:, :n], rewards))

    def simulate(self, rows: int, seed: int) -> TensorDict:
        """Return transitions of whole episodes, in which clinicians choose the treatments: ``rows`` or a few more."""
        rng, steps, state = np.random.default_rng(seed), [], None
        while state is not None or len(steps) < rows:
            state = rng.choice(len(self.start), p=self.start) if state is None else state
            action = rng.choice(self.clinicians.shape[1], p=self.clinicians[state])
            following = rng.choice(len(self.start), p=self.transitions[state, action])
            steps.append((state, action, following))
            state = following if following < self.living else None
        return self.to_transitions(*np.array(steps).T)

    def to_transitions(self, state: np.ndarray, action: np.ndarray, following: np.ndarray) -> TensorDict:
        """Return transitions that also hold the clinicians' probability of the treatment, and the admissible ones."""
        features, admissible = torch.from_numpy(self.features).float(), torch.from_numpy(self.admissible)
        ended = torch.from_numpy(following >= self.living).unsqueeze(-1)
        reward = torch.from_numpy(self.rewards[state, action, following]).float().unsqueeze(-1)
        after = {"observation": features[following], "action_mask": admissible[following], "reward": reward}
        probability = torch.from_numpy(self.clinicians[state, action]).float()
        before = {"observation": features[state], "action_mask": admissible[state], "action_probability": probability}
        after |= {"terminated": ended, "done": ended}
        return TensorDict({**before, "action": torch.from_numpy(action), "next": after}, [len(state)])
