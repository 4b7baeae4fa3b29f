"""The command line."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence

from torchrl_bcq.cli import dataset, evaluate, plot, record
from torchrl_bcq.cli.errors import RunError
from torchrl_bcq.data import DatasetError

_EXAMPLES = """\
examples:
  torchrl-bcq train                                       a first run, on Pendulum-v1
  torchrl-bcq describe hopper.hdf5                        look at a dataset
  torchrl-bcq train dataset=hopper.hdf5 out=runs/hopper   learn from it
  torchrl-bcq evaluate runs/hopper                        what its policy is worth
  torchrl-bcq plot runs/hopper                            learning curves, value estimates, a video

torchrl-bcq COMMAND --help tells the rest.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; 0 if all went well, 1 if something was refused."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    logging.getLogger("torchrl").setLevel("WARNING")
    try:
        if arguments[:1] == ["train"]:  # its arguments are Hydra's
            from torchrl_bcq.cli.train import main as train

            return train(arguments[1:])
        args = _parser().parse_args(arguments)
        args.run(args)
    except (DatasetError, RunError, OSError) as error:
        print(f"torchrl-bcq: {error}", file=sys.stderr)
        return 1
    except ImportError as error:
        print(f"torchrl-bcq: {error}: pip install 'torchrl-bcq[train]'", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("torchrl-bcq: interrupted; nothing of it was kept", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="torchrl-bcq",
        description="Batch-constrained deep Q-learning: from a dataset to a policy.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    commands.add_parser("train", help="Learn a policy from a dataset.", add_help=False)  # see above
    evaluate.add_parser(commands)
    plot.add_parser(commands)
    record.add_parser(commands)
    dataset.add_parsers(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
