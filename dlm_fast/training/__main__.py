"""The command line of training.

python -m dlm_fast.training {pretrain,samples,distill,trajectories,policy,curves} --help
"""

from __future__ import annotations

import argparse
import importlib
import sys

from ..cli import Parser

COMMANDS = {
    "pretrain": (".train", "train a 0.9 M parameter diffusion language model on synthetic tasks, on a CPU"),
    "samples": ("..tiny.data", "write training samples of the synthetic tasks as JSON lines"),
    "distill": (
        ".distill",
        "distill a full-attention model into a block-causal one (D2F), from JSON lines of prompts and answers",
    ),
    "trajectories": (
        ".trajectories",
        "add to such a file the order in which a teacher fills its answers, for --objective trajectory",
    ),
    "policy": (".policy", "train a small head that says which predictions to keep"),
    "curves": (".curves", "plot the logs of training runs"),
}


class Defaults(argparse.ArgumentDefaultsHelpFormatter):
    """Adds the default to an option's help, if the default is a value that the help does not name."""

    def _get_help_string(self, action: argparse.Action) -> str:
        plain = action.default is None or isinstance(action.default, bool) or "default" in (action.help or "")
        return action.help if plain else super()._get_help_string(action)


def build_parser() -> Parser:
    """A parser with one subcommand per module; the module's `add_arguments` adds the options of the subcommand."""
    parser = Parser(
        prog="python -m dlm_fast.training", description="Training of models and policies for parallel decoding."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (module, purpose) in COMMANDS.items():
        command = commands.add_parser(
            name, help=purpose, description=f"{purpose[0].upper()}{purpose[1:]}.", formatter_class=Defaults
        )
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
        importlib.import_module(module, __package__).add_arguments(command)
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; returns the exit status. Errors are one line on stderr unless --debug is given."""
    values = build_parser().parse_args(arguments)
    try:
        importlib.import_module(COMMANDS[values.command][0], __package__).run(values)
    except KeyboardInterrupt:
        resumes = "; --resume goes on from the last checkpoint" if hasattr(values, "resume") else ""
        print(f"dlm_fast.training {values.command}: interrupted{resumes}", file=sys.stderr)
        return 130
    except Exception as error:
        if values.debug:
            raise
        print(
            f"dlm_fast.training {values.command}: {' '.join(str(error).split()) or type(error).__name__}",
            file=sys.stderr,
        )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
