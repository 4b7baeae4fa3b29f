"""Break the code on purpose, one line at a time, and check that a test fails.

python tests/mutations.py           all breaks; exits with 1 if no test fails for one of them
python tests/mutations.py KL tau    breaks whose names contain one of the words

The package and its tests are copied to a temporary folder; the checkout stays unchanged.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
TESTS = ["tests/objectives", "tests/modules", "tests/trainers", "tests/evaluation", "tests/test_functional.py"]
EXPORT = ["tests/export"]  # for the breaks of this package
SLOW = "not compile and not collects and not two_workers"  # the other tests notice the same breaks

# name: (file, correct lines, broken lines)
CONTROL = "nothing broken"
BREAKS = {
    CONTROL: ("functional.py", "import torch\n", "import torch\n"),
    # the equations
    "min and max swapped": (
        "functional.py",
        "return lmbda * qvalue.amin(-1) + (1 - lmbda) * qvalue.amax(-1)",
        "return lmbda * qvalue.amax(-1) + (1 - lmbda) * qvalue.amin(-1)",
    ),
    "mean in place of max over candidates": (
        "functional.py",
        "lmbda).amax(-1, keepdim=True)",
        "lmbda).mean(-1, keepdim=True)",
    ),
    "latents unclipped": ("functional.py", "device=like.device).clamp_(-clip, clip)", "device=like.device)"),
    "KL sign": ("modules/vae.py", "return error + self.kl_weight * kl", "return error - self.kl_weight * kl"),
    "wrong critic for the actor": (
        "modules/q_ensemble.py",
        "critic: Any = self.critics[0]",
        "critic: Any = self.critics[-1]",
    ),
    "actor descends": ("objectives/bcq.py", "self.reduce(-value, tensordict)", "self.reduce(value, tensordict)"),
    "policy takes the worst candidate": ("modules/policy.py", "best = value.argmax(1", "best = value.argmin(1"),
    "cloning by the absolute error": ("objectives/cloning.py", ".square().mean(-1)", ".abs().mean(-1)"),
    "cloned network sees the action": ("objectives/cloning.py", "batch.exclude(key)", "batch.copy()"),
    # discrete actions
    "discrete: threshold is not strict": ("functional.py", "keepdim=True) > lowest", "keepdim=True) >= lowest"),
    "discrete: mask ignored by the ratio": (
        "functional.py",
        "    logits = available_logits(logits, mask)\n    lowest",
        "    lowest",
    ),
    "discrete: next action is not filtered": (
        "objectives/discrete_bcq.py",
        "best_allowed(value, allowed)",
        "value.argmax(-1, keepdim=True)",
    ),
    "discrete: target network chooses": (
        "objectives/discrete_bcq.py",
        "best_allowed(value, allowed)",
        "best_allowed(next_value, allowed)",
    ),
    "discrete: current network evaluates": (
        "objectives/discrete_bcq.py",
        "next_value.gather(-1, best",
        "value.gather(-1, best",
    ),
    "discrete: policy acts by unfiltered values": (
        "modules/discrete_policy.py",
        "index = best_allowed(value, allowed)",
        "index = value.argmax(-1, keepdim=True)",
    ),
    "discrete: policy explores in each mode": (
        "modules/discrete_policy.py",
        "if self.epsilon > 0 and is_random():",
        "if self.epsilon > 0:",
    ),
    "discrete: frames are not scaled": (
        "modules/frame_trunk.py",
        "frames.to(dtype).sub_(self.loc.to(dtype)).div_(self.scale.to(dtype))",
        "frames.to(dtype)",
    ),
    "frames are not centred": ("modules/frame_trunk.py", ".sub_(self.loc.to(dtype))", ""),
    # fitted Q evaluation
    "fqe: mean over critics instead of over actions": (
        "objectives/fqe.py",
        ".set(self.tensor_keys.action, actions)).mean(-2)",
        ".set(self.tensor_keys.action, actions)).mean(-1, keepdim=True).mean(-2)",
    ),
    "fqe: target with trained weights": (
        "objectives/fqe.py",
        "self.target_autocast(), self.target_networks():",
        "self.target_autocast():",
    ),
    "fqe: actions are equally likely": (
        "objectives/fqe.py",
        "(scores * probability.unsqueeze(-2)).sum(-1)",
        "scores.mean(-1)",
    ),
    "fqe: targets are not clipped": (
        "objectives/fqe.py",
        "target = target.clamp(*self.value_range)",
        "pass",
    ),
    "fqe: recorded next actions are those of the row itself": (
        "evaluation/policy_actions.py",
        "recorded.roll(-1, 0)",
        "recorded",
    ),
    "fqe: rows before a cut get the action of the next episode": (
        "evaluation/policy_actions.py",
        "if not known.all():",
        "if False:",
    ),
    "priorities are written in steps without a TD error": (
        "trainers/offline.py",
        "update(batch) if key in batch.keys(True) else None",
        "update(batch)",
    ),
    "Welch: the episodes of the dataset do not count": (
        "cli/evaluate.py",
        "total**2 / below if below else sum(freedom)",
        "freedom[0]",
    ),
    "rank: estimates of the same actions and rewards are reused": (
        "cli/rank.py",
        "dataset_digest(transitions)",
        'dataset_digest(transitions.select("action", ("next", "reward"), ("next", "done")))',
    ),
    "fqe: critics of held-out episodes": (
        "evaluation/selection.py",
        "critics = fit_fqe(labelled[self._train_rows]",
        "critics = fit_fqe(labelled[self._held_rows]",
    ),
    "importance: an episode loses its weight at its end": (
        "evaluation/importance.py",
        "log_importance_weights(pad(ratio, 1.0))",
        "log_importance_weights(pad(ratio, 0.0))",
    ),
    "importance: the value after an end counts": (
        "evaluation/importance.py",
        'following * ~transitions["next", "terminated"].squeeze(-1)',
        "following",
    ),
    "importance: cloned probabilities although they are logged": (
        "evaluation/selection.py",
        '(logged := self._held.get("action_probability", None)) is not None',
        '(logged := self._held.get("no_such_entry", None)) is not None',
    ),
    "support: distances of the same rows": (
        "evaluation/support.py",
        "self._rows = join_entries(rows, observation_keys) / self._scale",
        "self._rows = join_entries(rows, observation_keys)",
    ),
    "bootstrap: groups are ignored": (
        "evaluation/estimate.py",
        "members = None if groups is None else",
        "members = None if True else",
    ),
    "verdict: the interval may include 0": (
        "evaluation/estimate.py",
        "self.difference_interval[0] > 0 or",
        "self.difference_interval[0] > -1e9 or",
    ),
    "doubly robust: no correction": (
        "functional.py",
        "state_value[..., 0] + discounted_sum(correction, gamma)",
        "state_value[..., 0]",
    ),
    "doubly robust: bootstrap without gamma": (
        "functional.py",
        "(reward + gamma * next_value - qvalue)",
        "(reward + next_value - qvalue)",
    ),
    # targets
    "target perturbation dropped": (
        "objectives/bcq.py",
        "                candidates = perturb_action(self.actor_network, candidates)\n",
        "                pass\n",
    ),
    "target perturbation is the trained one": (
        "objectives/bcq.py",
        'with self.target_networks("actor"):',
        "with torch.no_grad():",
    ),
    "target: the behaviour model also uses shared target layers": (
        "objectives/bcq.py",
        "with self.target_autocast():",
        "with self.target_autocast(), self.target_networks():",
    ),
    "target critics are the trained ones": (
        "objectives/base.py",
        "for name in self.delayed_names if not names or name in names]:",
        "for name in {*self.delayed_names} - {'qvalue', 'critic'} if not names or name in names]:",
    ),
    "parts of the target in the wrong order": (
        "objectives/candidates.py",
        "for pair in pairs]",
        "for pair in reversed([*pairs])]",
    ),
    "target in parts with batch normalisation": (
        "objectives/bcq.py",
        "size = candidates.numel() if self.mixes_rows else self.target_chunk_size",
        "size = self.target_chunk_size",
    ),
    "bootstrap through terminated": (
        "objectives/values.py",
        "return self.value_estimator.value_estimate(",
        'batch["next", self.tensor_keys.terminated].zero_()\n            return self.value_estimator.value_estimate(',
    ),
    "bootstrap ends at every done": (
        "objectives/values.py",
        "{k: getattr(self.tensor_keys, k) for k in shared}",
        '{k: getattr(self.tensor_keys, "done" if k == "terminated" else k) for k in shared}',
    ),
    "one trajectory of unrelated rows": (
        "objectives/values.py",
        "if self._sums_steps:  # of",
        "if False:  # of",
    ),
    "priority not written": (
        "objectives/values.py",
        "tensordict.set(self.tensor_keys.priority, td_error.amax(-1).float())",
        "td_error.amax(-1)",
    ),
    "priority is the mean over critics": (
        "objectives/values.py",
        "self.tensor_keys.priority, td_error.amax(-1)",
        "self.tensor_keys.priority, td_error.mean(-1)",
    ),
    "tau inverted": (
        "trainers/offline.py",
        "            hook = FastTargetNetUpdaterHook(target_net_updater)\n",
        "            target_net_updater.eps = 1 - target_net_updater.eps\n"
        "            hook = FastTargetNetUpdaterHook(target_net_updater)\n",
    ),
    "targets leap": ("trainers/targets.py", "1 - updater.eps)", "updater.eps)"),
    "targets of frozen weights move": (
        "trainers/targets.py",
        "updater._distinct_and_params.items() if is_moved]",
        "updater._distinct_and_params.items() if is_moved or key[-1] != 'num_batches_tracked']",
    ),
    # gradients and weights
    "gradient of the actor leaks into the critics": (
        "objectives/base.py",
        "RunOn(self._own[name][1], detached=True)",
        "RunOn(self._own[name][1], detached=False)",
    ),
    "gradient of the actor leaks into the VAE": (
        "objectives/bcq.py",
        "with torch.no_grad():\n            sampled",
        "with torch.enable_grad():\n            sampled",
    ),
    "gradient of the critics runs into the target": (
        "objectives/bcq.py",
        "@torch.no_grad()\n    def _target_value",
        "@torch.enable_grad()\n    def _target_value",
    ),
    "other weights stay in a network": (
        "objectives/ownership.py",
        "            place[name] = tensor\n",
        "            pass\n",
    ),
    "swapped weights are ignored": (
        "objectives/ownership.py",
        "if all(params._param_td is self._own[name][0] for name, params in current.items()):",
        "if True:",
    ),
    "swapped targets are ignored": (
        "objectives/base.py",
        "slots += found if params._param_td is known else",
        "slots += found if True else",
    ),
    "a layer has one name only": ("objectives/ownership.py", "remove_duplicate=False", "remove_duplicate=True"),
    "shared layers are torn apart in copies": (
        "objectives/base.py",
        "            if isinstance(params, TensorDictParams):\n",
        "            if False:\n",
    ),
    "precision of targets is not restored": (
        "trainers/execution.py",
        "            self._loss.target_dtype = target_dtype\n",
        "",
    ),
    # training
    "a schedule is off by one": (
        "trainers/stepper.py",
        "since > 0 and since % self.every == 0",
        "since > 0 and (since - 1) % self.every == 0",
    ),
    "optimizers for frozen networks": (
        "objectives/base.py",
        "if any(weight.requires_grad for weight in own)",
        "if any(True for weight in own)",
    ),
    "an interrupt loses steps": (
        "trainers/offline.py",
        '{"steps": self._optim_count}',
        '{"steps": self.collector._steps}',
    ),
    "an interrupted hook repeats its step": (
        "trainers/offline.py",
        "self._steps_left -= 1\n        super()._post_optim_hook()",
        "super()._post_optim_hook()\n        self._steps_left -= 1",
    ),
    "no checkpoint after an interrupted one": (
        "trainers/offline.py",
        "if self._saved_at != self.collected_frames:",
        "if False:",
    ),
    "each process follows its own gradients": (
        "trainers/stepper.py",
        "            processes.average_gradients(_parameters(optimizer))\n",
        "            pass\n",
    ),
    "gradients added up over processes": (
        "trainers/distributed.py",
        "means = (sums / self.world_size).split(",
        "means = sums.split(",
    ),
    "mixture: always the first component": ("modules/behavior.py", "[..., :-1] < uniform)", "[..., :-1] < 0)"),
    "flow: steps of the wrong length": ("modules/behavior.py", "point, time) / self.steps", "point, time)"),
    "mixture: deviations without a gradient at their bounds": (
        "modules/behavior.py",
        "log_std = low + softplus(high - softplus(high - log_std) - low)",
        "log_std = log_std.clamp(low, high)",
    ),
    "metrics of the weights that are not averaged": (
        "runs/assembly.py",
        "        loss = average.loss_module\n",
        "        pass\n",
    ),
    "average: decay ignored": ("trainers/average.py", "get_ema_multi_avg_fn(decay)", "get_ema_multi_avg_fn(0.5)"),
    "candidates always ranked by the first critic": (
        "modules/policy.py",
        'if self.choose_by == "first" else self.critics',
        "if True else self.critics",
    ),
    # export
    "export: history starts with zeros": (
        "export/graph.py",
        "past = torch.where(start, first, given[f",
        "past = torch.where(start, 0 * first, given[f",
    ),
    "export: random actions": ("export/graph.py", "(ExplorationType.DETERMINISTIC)", "(ExplorationType.RANDOM)"),
    "export: any difference is accepted": ("export/exporter.py", "TOLERANCE = 1e-4", "TOLERANCE = 1e4"),
    "export: BatchNorm in training mode": ("export/exporter.py", ".cpu().eval()", ".cpu().train()"),
    "export: range of a part of the rows": (
        "export/exporter.py",
        "split(_CHUNK_ROWS)\n    ]",
        "split(_CHUNK_ROWS)\n    ][:1]",
    ),
    "export: candidates of lower value accepted": (
        "export/check.py",
        "torch.maximum(apart, shortfall(value))",
        "apart",
    ),
    "export: every call warns": (
        "export/exported_policy.py",
        "            limits[0][feature], limits[1][feature] = np.finfo(array.dtype).min, np.finfo(array.dtype).max\n",
        "",
    ),
    "export: latents beyond their clip": ("export/exported_policy.py", "drawn = drawn.clip(", "drawn.clip("),
    "export: parts in reverse order": (
        "export/exported_policy.py",
        "for each in zip(*parts, strict=True)",
        "for each in zip(*parts[::-1], strict=True)",
    ),
    "export: reset of all environments": (
        "export/exported_policy.py",
        "self._starts = self._starts | starts",
        "self._starts = starts | True",
    ),
    "held-out metrics with dropout": (
        "evaluation/metrics.py",
        "in_eval_mode(self.policy, *self.loss_module.networks)",
        "in_eval_mode()",
    ),
}


def broken_copy(folder: Path, file: str, line: str, broken: str) -> None:
    """Copy the package and its tests, with one line changed."""
    for name in ("torchrl_bcq", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    path = folder / "torchrl_bcq" / file
    source = path.read_text()
    if source.count(line) != 1:
        raise SystemExit(f"{line!r} occurs {source.count(line)} times in {file}, expected once; update this script.")
    path.write_text(source.replace(line, broken))


def failures(folder: Path, tests: list[str]) -> list[str]:
    """Names of the first tests that fail in the copy."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--maxfail=3", "--tb=no", "-k", SLOW]
    environment = {**os.environ, "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1", "PYTEST_ADDOPTS": ""}
    code = f"import torchrl_bcq, sys; sys.exit(not torchrl_bcq.__file__.startswith({str(folder)!r}))"
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=folder, env=environment, check=True)
    run = subprocess.run([*command, *tests], cwd=folder, env=environment, capture_output=True, text=True)
    if run.returncode not in (0, 1) or re.search("^ERROR ", run.stdout, re.MULTILINE):
        raise SystemExit(f"pytest did not run:\n{run.stdout}\n{run.stderr}")
    return re.findall(r"^FAILED \S+::(\S+)", run.stdout, re.MULTILINE)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", metavar="WORD", help="in the names of breaks to try; all if none is given")
    words = parser.parse_args().words
    unnoticed = 0
    for name, change in BREAKS.items():
        if words and name != CONTROL and not any(word in name for word in words):
            continue
        with tempfile.TemporaryDirectory() as folder:
            broken_copy(Path(folder).resolve(), *change)
            failed = failures(Path(folder).resolve(), EXPORT if name.startswith("export") else TESTS)
        if name == CONTROL and failed:
            raise SystemExit(f"these tests fail already: {', '.join(failed)}")
        unnoticed += name != CONTROL and not failed
        print(f"{name:<46} {'noticed by ' + ', '.join(failed) if failed else 'unnoticed'}", flush=True)
    print(f"{unnoticed} breaks went unnoticed")
    return int(unnoticed > 0)


if __name__ == "__main__":
    sys.exit(main())
