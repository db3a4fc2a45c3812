"""The ``rankspawn`` command."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial

from ._bind import add_bind_command
from ._binding import BindingError
from ._options import CommandError
from ._run import add_run_command
from ._show import add_commands
from ._topology import PlacementError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with ``argv`` (the process's own arguments if left out); returns the exit status."""
    args, unknown = _parser().parse_known_args(argv)
    if unknown:
        args.parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    try:
        return int(args.run(args))
    except (CommandError, PlacementError, BindingError) as error:
        print(f"rankspawn: {error}", file=sys.stderr)
        return 1


class _Parser(argparse.ArgumentParser):
    """argparse's, but the terminal is asked for its width when something is printed. argparse asks for it with each
    argument that is added, and imports shutil for that, with all compressions of archives."""

    def __init__(self, **options: Any) -> None:
        super().__init__(formatter_class=partial(argparse.HelpFormatter, width=80), **options)

    def format_help(self) -> str:
        self.formatter_class = argparse.HelpFormatter
        return super().format_help()

    def format_usage(self) -> str:
        self.formatter_class = argparse.HelpFormatter
        return super().format_usage()


def _parser() -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = _Parser(
        prog="rankspawn", description="Starts the ranks of a job, each born bound."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    add_run_command(commands)
    add_bind_command(commands)
    add_commands(commands)
    doctor = commands.add_parser("doctor", help="say what this machine allows")
    doctor.set_defaults(run=_doctor)
    for command in commands.choices.values():
        command.set_defaults(parser=command)
    return parser


def _doctor(args: argparse.Namespace) -> int:
    from ._doctor import report
    from ._engine import mechanisms

    parser: argparse.ArgumentParser = args.parser
    try:
        mechanisms()
    except ValueError as error:
        parser.error(str(error))
    return report()
