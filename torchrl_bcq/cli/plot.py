"""``torchrl-bcq plot``: draw learning curves, value estimates and losses of runs."""

from __future__ import annotations

import argparse
from pathlib import Path

from torchrl_bcq.errors import RunError
from torchrl_bcq.files import check_writable, home
from torchrl_bcq.reports.curves import STATISTICS
from torchrl_bcq.reports.logs import DEFAULT_METRICS, choose_metric, find_runs
from torchrl_bcq.reports.pictures import draw_runs, save

_EPILOG = """\
Runs that differ only in the seed become one line with a bootstrapped confidence interval (as arXiv:2108.13264
recommends). With two or three seeds, this interval is too narrow; use five or more seeds.

pictures:
  learning_curve.png    the metric as a function of the gradient steps
  value_estimates.png   the critic's estimate and the discounted return that the policy obtained (see arXiv:1802.09477)
  losses.png            losses and TD errors, in training and on held-out episodes
  policy.mp4            with --video: one episode of the best policy; no screen is needed

examples:
  torchrl-bcq plot runs/hopper                              one run
  torchrl-bcq plot runs/hopper --video
  torchrl-bcq plot runs/sweep                               all runs that one torchrl-bcq train -m has made
  torchrl-bcq plot runs/phi0 runs/phi1 --metric normalized_score --statistic iqm --out pictures
"""


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Add the command ``plot`` to the parser. ``args.run(args)`` then runs this command."""
    description = "Draw learning curves with confidence intervals over seeds, and the value estimates of critics."
    command = commands.add_parser("plot", help="Draw learning curves of runs.", description=description, epilog=_EPILOG)
    add = command.add_argument
    add("runs", metavar="RUN", nargs="+", type=Path, help="folder of one run, or a folder that contains runs")
    add(
        "--out",
        type=home,
        metavar="FOLDER",
        help="folder for the pictures (default: RUN if only one RUN is given, else the current folder)",
    )
    default = f"metric to draw (default: the first one that was logged of {', '.join(DEFAULT_METRICS)}, or a loss)"
    add("--metric", metavar="NAME", help=default)
    shown = "(default: %(default)s)"
    over = f"statistic over seeds; iqm is the mean of the middle half, for four or more seeds {shown}"
    add("--statistic", choices=[*STATISTICS], default="mean", help=over)
    add("--video", action="store_true", help="also record a video of each best policy (needs torchrl-bcq[video])")
    command.set_defaults(run=_plot)


def _plot(args: argparse.Namespace) -> None:
    from torchrl_bcq.runs.settings import flat, load_settings

    runs = find_runs(args.runs, lambda run: flat(load_settings(run)))
    metric = choose_metric(runs, args.metric)
    out = args.out or (args.runs[0] if len(args.runs) == 1 else Path())
    check_writable(out / "learning_curve.png", "choose another folder with --out")
    figures = draw_runs(runs, metric, args.statistic)
    for name, figure in figures.items():
        save(figure, out / name)
    print(f"The pictures are in {out}: {', '.join(figures)}.")
    if args.video:
        paths = [run.folder.resolve().parts for run in runs]
        # runs of two sweeps have equal names, so take as many parts of the path as needed
        size = next(n for n in range(1, 100) if len({path[-n:] for path in paths}) == len({*paths}))
        for run, path in zip(runs, paths, strict=True):
            name = "policy.mp4" if run.folder == out else f"{'-'.join(path[-size:])}-policy.mp4"
            _record_video(run.folder, out / name)


def _record_video(run: Path, file: Path) -> None:
    from torchrl_bcq.evaluation.environments import make_env
    from torchrl_bcq.reports.video import record_video, render_offscreen
    from torchrl_bcq.runs.environment import check_trusted
    from torchrl_bcq.runs.folder import load

    trained = load(run, "best", "cpu")
    if (env := trained.task.env) is None:
        raise RunError(f"{run} has no environment to record a video in; leave out --video, or this run.")
    check_trusted(env, trained.path, {}, "leave out --video")
    render_offscreen()
    made = make_env(env, remedy="install what is missing, or leave out --video", render_mode="rgb_array")
    print(f"The video is {record_video(made, trained.policy, file)}.")
