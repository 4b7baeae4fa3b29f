"""Break the algorithm on purpose, one line at a time, and show that some test notices.

python tests/mutations.py           all breaks; exits with 1 if one of them goes unnoticed
python tests/mutations.py KL tau    those whose names contain one of the words

The package and its tests are copied aside; the checkout stays as it is.
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
TESTS = ["tests/objectives", "tests/modules", "tests/trainers", "tests/test_functional.py"]
SLOW = "not compiles and not collects and not two_workers"  # add nothing to what the others see

# name: (file, the line as it is, the line as it must not be)
CONTROL = "nothing broken"
BREAKS = {
    CONTROL: ("functional.py", "import torch\n", "import torch\n"),
    "min and max swapped": (
        "functional.py",
        "return lmbda * qvalue.amin(-1) + (1 - lmbda) * qvalue.amax(-1)",
        "return lmbda * qvalue.amax(-1) + (1 - lmbda) * qvalue.amin(-1)",
    ),
    "target perturbation dropped": (
        "objectives/bcq.py",
        "            candidates = self.actor_network(candidates)\n",
        "            pass\n",
    ),
    "target perturbation is the live one": (
        "objectives/bcq.py",
        "return RunOn(self._targets[name])",
        'return nullcontext() if name == "actor" else RunOn(self._targets[name])',
    ),
    "target critics are the live ones": (
        "objectives/bcq.py",
        "return RunOn(self._targets[name])",
        'return nullcontext() if name == "qvalue" else RunOn(self._targets[name])',
    ),
    "bootstrap through terminated": (
        "objectives/bcq.py",
        "return self.value_estimator.value_estimate(batch)",
        'batch["next", self.tensor_keys.terminated].zero_()\n        return self.value_estimator.value_estimate(batch)',
    ),
    "bootstrap ends at every done": (
        "objectives/bcq.py",
        "{k: getattr(self.tensor_keys, k) for k in shared}",
        '{k: getattr(self.tensor_keys, "done" if k == "terminated" else k) for k in shared}',
    ),
    "latents unclipped": ("functional.py", "device=like.device).clamp_(-clip, clip)", "device=like.device)"),
    "wrong critic for the actor": (
        "modules/q_ensemble.py",
        "critic: Any = self.critics[0]",
        "critic: Any = self.critics[-1]",
    ),
    "mean in place of max over candidates": (
        "functional.py",
        "lmbda).amax(-1, keepdim=True)",
        "lmbda).mean(-1, keepdim=True)",
    ),
    "gradient of the actor leaks into the critics": (
        "objectives/bcq.py",
        "RunOn(self._critics, detached=True)",
        "RunOn(self._critics, detached=False)",
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
    "KL sign": ("modules/vae.py", "return error + self.kl_weight * kl", "return error - self.kl_weight * kl"),
    "tau inverted": (
        "trainers/bcq.py",
        "super().__init__(\n            parallel",
        "target_net_updater.eps = 1 - target_net_updater.eps\n        super().__init__(\n            parallel",
    ),
    "each process follows its own gradients": (
        "trainers/stepper.py",
        "            self.parallel.average_gradients(_parameters(self.optimizers[name]))\n",
        "            pass\n",
    ),
    "gradients added up over processes": (
        "trainers/distributed.py",
        "means = (sums / self.world_size).split(",
        "means = sums.split(",
    ),
    "priority not written": (
        "objectives/bcq.py",
        "tensordict.set(self.tensor_keys.priority, td_error.amax(-1))",
        "td_error.amax(-1)",
    ),
    "priority is the mean over critics": (
        "objectives/bcq.py",
        "self.tensor_keys.priority, td_error.amax(-1)",
        "self.tensor_keys.priority, td_error.mean(-1)",
    ),
    "other weights stay in a network": (
        "objectives/weights.py",
        "            place[name] = tensor\n",
        "            pass\n",
    ),
    "targets leap": ("trainers/targets.py", "1 - updater.eps)", "updater.eps)"),
    "parts of the target in the wrong order": (
        "objectives/bcq.py",
        "for part in self._split(candidates, latent)]",
        "for part in reversed(self._split(candidates, latent))]",
    ),
    "agents draw the same noise": (
        "trainers/together.py",
        "        self._random_state.restore()\n        noise = {}",
        "        torch.manual_seed(0)\n        noise = {}",
    ),
    "agents get the gradients of the first": (
        "trainers/together.py",
        "                    parameter.grad = gradient",
        "                    parameter.grad = stacked.grad[0].clone()",
    ),
    "actor descends": ("objectives/bcq.py", "self._weigh(-value.squeeze", "self._weigh(value.squeeze"),
    "policy takes the worst candidate": ("modules/policy.py", "best = value.argmax(1", "best = value.argmin(1"),
}


def broken_copy(folder: Path, file: str, line: str, broken: str) -> None:
    """Copy the package and its tests, with one line changed."""
    for name in ("torchrl_bcq", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    path = folder / "torchrl_bcq" / file
    source = path.read_text()
    if source.count(line) != 1:
        raise SystemExit(f"{line!r} stands {source.count(line)} times in {file}, expected once; mend this script.")
    path.write_text(source.replace(line, broken))


def failures(folder: Path) -> list[str]:
    """Names of the first tests that fail in the copy."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--maxfail=3", "--tb=no", "-k", SLOW]
    environment = {**os.environ, "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1", "PYTEST_ADDOPTS": ""}
    code = f"import torchrl_bcq, sys; sys.exit(not torchrl_bcq.__file__.startswith({str(folder)!r}))"
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=folder, env=environment, check=True)
    run = subprocess.run([*command, *TESTS], cwd=folder, env=environment, capture_output=True, text=True)
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
            failed = failures(Path(folder).resolve())
        if name == CONTROL and failed:
            raise SystemExit(f"these tests fail already: {', '.join(failed)}")
        unnoticed += name != CONTROL and not failed
        print(f"{name:<46} {'noticed by ' + ', '.join(failed) if failed else 'unnoticed'}", flush=True)
    print(f"{unnoticed} breaks went unnoticed")
    return int(unnoticed > 0)


if __name__ == "__main__":
    sys.exit(main())
