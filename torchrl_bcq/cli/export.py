"""``torchrl-bcq export``: write the policy of a run to an ONNX file."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torchrl_bcq.cli.environment import DATASET
from torchrl_bcq.data import DatasetError
from torchrl_bcq.errors import RunError
from torchrl_bcq.files import check_writable

_EPILOG = """\
The file contains the whole policy: from raw observations, including their scaling and the short history of a run with
stack above 1, to the action in the units of the environment. It accepts any number of observations. Without --latents,
equal states give equal actions. In Python, torchrl_bcq.ExportedPolicy runs the file; the module of this class
needs only NumPy and onnxruntime, and you can copy it. The command compares the file with the policy on states of the
dataset, and writes no file if they differ.

examples:
  torchrl-bcq export runs/hopper policy.onnx
  torchrl-bcq export runs/hopper policy.onnx --value --candidates
  torchrl-bcq export runs/hopper policy.onnx --random-states     without the dataset
"""


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Add the command ``export`` to the parser. ``args.run(args)`` then runs this command."""
    what = "Write the policy of a run to an ONNX file, which runs without PyTorch."
    command = commands.add_parser("export", help=what, description=what, epilog=_EPILOG)
    add = command.add_argument
    add("folder", type=Path, metavar="RUN", help="folder of a run, or one of its checkpoints")
    add("file", type=Path, metavar="FILE.onnx", help="file to write; an existing file is replaced")
    add("--checkpoint", choices=("best", "last"), default="best", help="checkpoint (default: best if kept, else last)")
    add("--dataset", metavar="NAME", help=DATASET)
    add("--value", action="store_true", help="also write the value of the chosen action")
    add("--candidates", action="store_true", help="also write the candidate actions and their values")
    latents = (
        "make the latents an input of the file; ExportedPolicy then draws new random latents in each call, as in the "
        "paper"
    )
    add("--latents", action="store_true", help=latents)
    states = "do not read the dataset: check the file with random states, and store no range of the observations"
    add("--random-states", action="store_true", help=states)
    command.set_defaults(run=_export)


def _export(args: argparse.Namespace) -> None:
    from torchrl_bcq.export import export_policy
    from torchrl_bcq.runs.dataset import reopen_dataset
    from torchrl_bcq.runs.folder import load

    if args.file.suffix.lower() != ".onnx":
        raise RunError(f"FILE is {str(args.file)!r}, expected the name of an ONNX file, such as policy.onnx.")
    if args.random_states and args.dataset is not None:
        raise RunError("--random-states does not read a dataset; leave out --random-states or --dataset.")
    trained = load(args.folder, args.checkpoint, "cpu")
    check_writable(args.file, "choose another FILE")
    policy: Any = trained.policy
    if args.value or args.candidates:
        if not hasattr(policy, "set_outputs"):
            raise RunError(
                f"a policy of {trained.algorithm.title} has no values or candidates; leave out these options."
            )
        policy.set_outputs(value=args.value, candidates=args.candidates)
    if args.latents and getattr(policy, "latent_shape", None) is None:
        raise RunError(f"a policy of {trained.algorithm.title} has no latents; leave out --latents.")
    transitions = None
    if not args.random_states:
        try:
            transitions, _ = reopen_dataset(trained, args.dataset)
        except (DatasetError, OSError, RunError) as error:
            raise RunError(f"{error} To export without the dataset, use --random-states.") from error
    has_frames = any(len(shape) == 3 for shape in trained.task.shapes.values())
    facts = {
        "algorithm": trained.algorithm.title,
        "dataset": str(trained.settings.dataset),
        "step": trained.step,
        # frames are not joined with vectors, so such a policy reads "observation" and "pixels"
        "observation_entries": None if has_frames else trained.task.observation or _columns(trained.settings.reader),
    }
    print(f"{trained.path}: {trained.step:,} gradient steps on {trained.settings.dataset}")
    try:
        made = export_policy(policy, args.file, transitions, latents=args.latents, facts=facts)
    except ValueError as error:
        raise RunError(str(error)) from error
    for what in ("inputs", "outputs"):
        for port in made.contract[what]:
            shape = ", ".join(map(str, ["batch", *port["shape"]]))
            bounds = ""
            if what == "outputs" and "low" in port:
                low, high = ([float(f"{end:.6g}") for end in port[side]] for side in ("low", "high"))
                bounds = f", from {low} to {high}"
            print(f"{what[:-1]:<7} {port['name']}: {port['dtype']} [{shape}]{bounds}")
    source = "random states" if transitions is None else "states of the dataset"
    *numbers, last = map(str, made.differences)
    print(
        f"checked with {', '.join(numbers)} and {last} {source}: largest difference from the policy "
        f"{max(made.differences.values()):.2g} of the range"
    )
    print(f"The policy is in {made.path} ({made.path.stat().st_size / 1e6:.1f} MB).")


def _columns(reader: Mapping[str, Any]) -> list[str] | None:
    """Return the columns of a table, or the entries of a file, that the reader joined to one observation."""
    named = reader.get("observation") or (reader.get("names") or {}).get("observations")
    return [named] if isinstance(named, str) else [*named] if named else None
