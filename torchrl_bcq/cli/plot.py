"""``torchrl-bcq plot``: learning curves of runs, what their critics promised, and their losses."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path

from torchrl_bcq.cli.curves import Curve, Estimate, make_curve, warn
from torchrl_bcq.cli.errors import RunError
from torchrl_bcq.cli.logs import Group, Run, find_runs, group_runs, shorten
from torchrl_bcq.cli.pictures import Style, draw_losses, draw_metric, draw_values
from torchrl_bcq.data.description.picture import save

DEFAULT_METRICS = ("return", "held_out_td_error", "loss_qvalue")  # the first that was logged
ESTIMATED, OBTAINED = "value_estimate", "discounted_return"
LOSSES = ("loss_vae", "loss_qvalue", "loss_actor", "td_error", "held_out_vae_loss", "held_out_td_error")
_logger = logging.getLogger(__name__)
_EPILOG = """\
Runs that differ by the seed alone are one line, with a bootstrapped confidence interval (scipy.stats.bootstrap; why
intervals: arXiv:2108.13264). With two or three seeds such an interval is too narrow; five or more are better.

pictures:
  learning_curve.png    the metric over gradient steps
  value_estimates.png   what the critic promised, and the discounted return obtained (after arXiv:1802.09477, fig. 1)
  losses.png            losses and TD errors
  policy.mp4            with --video: an episode of the best policy, drawn without a screen

examples:
  torchrl-bcq plot runs/hopper                              one run
  torchrl-bcq plot runs/hopper --video
  torchrl-bcq plot runs/sweep                               all runs of a sweep (torchrl-bcq train -m)
  torchrl-bcq plot runs/phi0 runs/phi1 --metric normalized_score --statistic iqm --out pictures
"""


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Add the command to those of ``torchrl-bcq``; its ``run`` takes the parsed arguments and may raise RunError."""
    command = commands.add_parser(
        "plot",
        help="Draw learning curves of runs.",
        description="Draw learning curves of runs, with an interval over seeds, and what their critics promised.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = command.add_argument
    add("runs", metavar="RUN", nargs="+", type=Path, help="folder that train has made, or one that holds several")
    add("--out", type=Path, metavar="FOLDER", help="of the pictures; default: RUN if there is one, else here")
    add("--metric", metavar="NAME", help=f"default: the first that was logged of {', '.join(DEFAULT_METRICS)}")
    over = "over seeds; iqm: the mean of the middle half, of four seeds or more (default: %(default)s)"
    add("--statistic", choices=["mean", "iqm"], default=Estimate.statistic, help=over)
    level = "of the interval (default: %(default)s)"
    add("--confidence", type=_fraction, default=Estimate.confidence, metavar="LEVEL", help=level)
    count = "of the bootstrap (default: %(default)s)"
    add("--resamples", type=_count, default=Estimate.resamples, metavar="N", help=count)
    add("--video", action="store_true", help="also an episode of each run's best policy (needs torchrl-bcq[video])")
    command.set_defaults(run=_plot)


def choose_metric(runs: Sequence[Run], wanted: str | None) -> str:
    """The metric to draw. Raises RunError if nothing was logged, or not that."""
    available = sorted(set().union(*(run.metrics for run in runs)))
    folders = ", ".join(str(run.folder) for run in runs)
    if not available:
        raise RunError(f"nothing was logged in {folders}: no log/scalars/*.csv; pass runs that have made some steps.")
    for name in DEFAULT_METRICS if wanted is None else (wanted,):
        if name in available:
            return name
    lacking = wanted or f"{', '.join(DEFAULT_METRICS[:-1])} or {DEFAULT_METRICS[-1]}"
    raise RunError(f"no {lacking} was logged in {folders}; choose a --metric of {', '.join(available)}.")


def _plot(args: argparse.Namespace) -> None:
    runs = find_runs(args.runs)
    metric = choose_metric(runs, args.metric)
    groups = group_runs(runs)
    estimate = Estimate(args.statistic, args.confidence, args.resamples)
    losses = _losses(runs)
    names = dict.fromkeys([metric, ESTIMATED, OBTAINED, *losses])
    curves = {name: _curves(groups, name, estimate) for name in names}
    if not curves[metric]:
        raise RunError(f"no line of {metric} is complete yet; plot the runs when they have logged some.")
    warn(groups, [curve for each in curves.values() for curve in each])
    style = Style(_title(runs), [group.label for group in groups], estimate)
    figures = {"learning_curve.png": draw_metric(curves[metric], _behaviours(groups), style)}
    if curves[ESTIMATED] and curves[OBTAINED]:
        figures["value_estimates.png"] = draw_values(curves[ESTIMATED], curves[OBTAINED], style)
    else:
        _logger.warning("no value_estimates.png: no run has both %s and %s, which need an env.", ESTIMATED, OBTAINED)
    if shown := [curves[name] for name in losses if curves[name]]:
        figures["losses.png"] = draw_losses(shown, style)
    else:
        _logger.warning("no losses.png: no run has a loss.")
    out = args.out or (args.runs[0] if len(args.runs) == 1 else Path())
    for name, figure in figures.items():
        save(figure, out / name)
    print(f"The pictures are in {out}: {', '.join(figures)}.")
    if args.video:
        from torchrl_bcq.cli.video import record_video

        for run in runs:
            name = "policy.mp4" if run.folder == out else f"{run.folder.name}-policy.mp4"
            print(f"The video is {record_video(run.folder, out / name)}.")


def _curves(groups: Sequence[Group], metric: str, estimate: Estimate) -> list[Curve]:
    return [curve for group in groups if (curve := make_curve(group, metric, estimate))]


def _losses(runs: Sequence[Run]) -> list[str]:
    """The paper's order, then others by name."""
    names = set().union(*(run.metrics for run in runs))
    known = [name for name in LOSSES if name in names]
    return known + sorted(name for name in names - set(known) if name.startswith("loss_"))


def _behaviours(groups: Sequence[Group]) -> dict[float, str]:
    """Mean returns of the datasets, each with the label of a group that has learned from it."""
    labels: dict[float, str] = {}
    for group in groups:
        for run in group.runs:
            if (mean := run.behaviour) is not None:
                labels.setdefault(mean, group.label)
    return labels


def _title(runs: Sequence[Run]) -> str:
    """Environment and dataset, if all runs share them and say which they are."""
    shared = []
    for name in ("env", "evaluation.env", "dataset"):
        values = {str(run.settings.get(name, "auto")) for run in runs}
        if len(values) == 1 and not values & {"auto", "None"}:
            shared.append(shorten(values.pop()))
    return ", ".join(shared)


def _fraction(text: str) -> float:
    value = float(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1, such as 0.95")
    return value


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not 1 or more")
    return value
