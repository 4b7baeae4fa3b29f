"""The command ``torchrl-bcq``: parses its arguments and runs one of its subcommands."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from torchrl_bcq.errors import DatasetError, RunError, on_command_line, with_packages
from torchrl_bcq.version import __version__

_EXAMPLES = """\
examples:
  torchrl-bcq train                                       train a first policy, on Pendulum-v1
  torchrl-bcq describe hopper.hdf5                        show statistics and possible defects of a dataset
  torchrl-bcq train dataset=hopper.hdf5 out=runs/hopper   train on this dataset
  torchrl-bcq evaluate runs/hopper                        measure the returns of its policy
  torchrl-bcq rank runs/hopper                            estimate its value without an environment
  torchrl-bcq plot runs/hopper                            draw learning curves and value estimates
  torchrl-bcq export runs/hopper policy.onnx              write its policy to a file that runs without PyTorch

Run torchrl-bcq COMMAND --help to see the arguments of a command.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code: 0 on success, 1 for an invalid input or setting, 130 after Ctrl-C."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    os.environ.setdefault("RL_LOGGING_LEVEL", "WARNING")  # TorchRL reads it when it is imported
    with on_command_line():
        return _run(arguments)


def _run(arguments: list[str]) -> int:
    try:
        if arguments[:1] == ["train"]:  # cli.train parses the NAME=VALUE settings of this command
            from torchrl_bcq.cli.train import main as train

            return train(arguments[1:])
        from torchrl_bcq.cli import dataset  # imported here, so that Ctrl-C during the imports gives no traceback

        reader = dataset.reader_words(arguments)
        args = _parser().parse_args([word for word in arguments if word not in reader])
        args.reader = reader
        args.run(args)
    except (DatasetError, RunError, OSError, ImportError) as error:
        print(f"torchrl-bcq: {with_packages(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("torchrl-bcq: interrupted before the end; no incomplete file is left", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    from torchrl_bcq.cli import dataset, evaluate, export, plot, rank, record

    description = "Batch-constrained deep Q-learning (BCQ): train a policy on a fixed dataset."
    parser = argparse.ArgumentParser(prog="torchrl-bcq", description=description, epilog=_EXAMPLES)
    parser.add_argument("--version", action="version", version=f"torchrl-bcq {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    # only --help uses this entry, because main runs the train command without this parser
    commands.add_parser("train", help="Train a policy on a dataset.", add_help=False)
    evaluate.add_parser(commands)
    rank.add_parser(commands)
    plot.add_parser(commands)
    export.add_parser(commands)
    record.add_parser(commands)
    dataset.add_parsers(commands)
    for each in (parser, *commands.choices.values()):
        each.formatter_class = argparse.RawDescriptionHelpFormatter  # keeps the line breaks of the examples
    return parser


if __name__ == "__main__":
    sys.exit(main())
