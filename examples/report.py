"""Reports the returns of policies: prints a table, and writes ``summary.json`` and a learning curve as PNG."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from statistics import fmean, pstdev

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt

LABELS = {"random": "random", "behaviour": "behaviour", "cloning": "cloning", "vae_bc": "VAE-BC", "bcq": "BCQ"}


def write(out: Path, returns: dict[str, list[float]], title: str) -> None:
    """Print a table of the returns, and write ``summary.json`` and ``learning_curve.png`` into the run folder.

    Args:
        out: folder of the run, which contains TorchRL's CSV log of ``return`` in ``log/scalars``.
        returns: undiscounted return of each episode, by the name of the policy.
        title: title of the picture.
    """
    rows = {name: returns[name] for name in LABELS}
    summary = {name: {"mean": fmean(r), "std": pstdev(r), "episodes": len(r)} for name, r in rows.items()}
    print(f"\n{'policy':<20}{'return':>10}{'std':>10}{'episodes':>10}")
    for name, row in summary.items():
        print(f"{LABELS[name]:<20}{row['mean']:>10.1f}{row['std']:>10.1f}{row['episodes']:>10}")
    aside = out / "summary.json.part"
    aside.write_text(json.dumps(summary, indent=2) + "\n")
    aside.replace(out / "summary.json")
    plot(out, summary, title)
    print(f"\nThe checkpoint, log/scalars/*.csv, learning_curve.png and summary.json are in {out.resolve()}.")


def plot(out: Path, summary: dict[str, dict[str, float]], title: str) -> None:
    """Draw the return of BCQ over gradient steps, and the mean returns of other policies as horizontal lines."""
    with open(out / "log" / "scalars" / "return.csv", newline="") as file:
        steps, means = zip(*((int(step), float(mean)) for step, mean in csv.reader(file)), strict=True)
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    axes.plot(steps, means, marker="o", color="C0", label=LABELS["bcq"])
    for name, style, color in (("cloning", "-.", "C1"), ("behaviour", "--", "C2"), ("random", ":", "C3")):
        axes.axhline(summary[name]["mean"], linestyle=style, color=color, label=LABELS[name])
    axes.set(xlabel="gradient steps", ylabel=f"mean return of {summary['bcq']['episodes']} episodes", title=title)
    axes.legend()
    aside = out / "learning_curve.part.png"
    figure.savefig(aside, dpi=150)
    aside.replace(out / "learning_curve.png")
    plt.close(figure)
