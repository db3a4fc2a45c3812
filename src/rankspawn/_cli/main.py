"""The ``rankspawn`` command."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from functools import partial

from .._binding import PlacementError
from .._place.sysfs import TopologyError
from .options import USAGE, CommandError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, TypeAlias

    Respell: TypeAlias = Callable[[Sequence[str]], Sequence[str]]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: The arguments after the command's name; None takes those of this process.

    Returns:
        The exit status.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    if argv[:1] == ["torchrun"]:  # its options, help and errors are torch's own
        from ..torchrun import main as torchrun

        return torchrun(argv[1:], prog="rankspawn torchrun")
    if argv[:1] == ["help"]:
        return main([*argv[1:2], "--help"])
    if not argv:
        _parser().print_help(sys.stderr)
        return USAGE
    try:
        args, unknown = _parser(argv[0]).parse_known_args(argv)
        if unknown:
            args.parser.error(f"unrecognized arguments: {' '.join(unknown)}{_meant(args.parser, unknown)}")
        from .._output.console import lenient

        lenient(sys.stdout)
        status = int(args.run(args))
        if sys.stdout is not None:
            sys.stdout.flush()
        return status
    except BrokenPipeError:
        # The interpreter must not try again to write the buffered text when it ends.
        sys.stdout = open(os.devnull, "w", encoding="utf-8")
        return 141  # a shell's status for a death by SIGPIPE
    except (CommandError, PlacementError, OSError) as error:
        from .progress import say

        say(str(error))
        if isinstance(error, CommandError):
            return error.status
        # An impossible placement is wrong usage. A machine that cannot be read is a failure of the system.
        return USAGE if isinstance(error, PlacementError) and not isinstance(error, TopologyError) else 1


def _meant(parser: argparse.ArgumentParser, unknown: Sequence[str]) -> str:
    """Ask whether the user meant another option; "" if none is similar."""
    from .vocabulary import nearest

    options = [word.partition("=")[0] for word in unknown if word.startswith("--")]
    return nearest(options[0], parser._option_string_actions, 0.7) if options else ""


class _Parser(argparse.ArgumentParser):
    """argparse's parser, without the slow parts that a command does not need.

    argparse looks up the terminal's width for each argument that a program adds. For that it imports shutil, and with
    it all modules for compressed archives. This parser looks the width up only when it prints help.

    Args:
        add_options: Adds a command's options. The parser calls it right before it parses them, so that the modules of
            the other commands are not imported. It may return a function that respells the words before that.
        options: The arguments of argparse.ArgumentParser.
    """

    def __init__(
        self, add_options: Callable[[argparse.ArgumentParser], Respell | None] | None = None, **options: Any
    ) -> None:
        self._add_options = add_options
        self._respell: Respell | None = None
        self.suggest_on_error = False  # argparse has it since Python 3.14; ours works in every version
        super().__init__(formatter_class=partial(argparse.HelpFormatter, width=80), **options)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        self.add_all_options()
        if self._respell is not None:
            args = self._respell(args)
        return super().parse_known_args(args, namespace)

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        try:
            super()._check_value(action, value)
        except argparse.ArgumentError as error:
            from .vocabulary import nearest

            near = nearest(str(value), action.choices or (), 0.6)
            # The user may have left out the command: torchrun has none, its options or the script come first.
            is_command = isinstance(action, argparse._SubParsersAction)
            error.message += near or ("; `rankspawn run ...` starts the ranks of a script" if is_command else "")
            raise

    def _get_option_tuples(self, option_string: str) -> list[Any]:
        """Find what an abbreviation stands for: if one of torchrun's options fits, ours are not meant."""
        found: list[Any] = super()._get_option_tuples(option_string)
        if len(found) > 1:
            from .vocabulary import ELASTIC, NEEDLESS, TAKEN

            torchs = {*TAKEN, *NEEDLESS, *ELASTIC}
            fitting = [one for one in found if one[1].replace("_", "-") in torchs]
            return fitting if len(fitting) == 1 else found
        return found

    def add_all_options(self) -> None:
        """Add the command's options, unless the parser already has them."""
        if self._add_options is not None:
            self._respell = self._add_options(self)
            self._add_options = None

    def format_help(self) -> str:
        from .help import ENDS, HelpFormatter

        self.formatter_class = HelpFormatter
        self.epilog = ENDS.get(self.prog.partition(" ")[2])
        return super().format_help()

    def format_usage(self) -> str:
        self.formatter_class = argparse.HelpFormatter
        return super().format_usage()


class _Version(argparse.Action):
    """argparse's "version" action, which looks the version up only when it is used."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from .. import __version__

        print(f"rankspawn {__version__}")
        parser.exit()


def _parser(word: str = "") -> argparse.ArgumentParser:
    """Make the parser: with one command if ``word`` names it, because each takes half a millisecond; else with all."""
    parser: argparse.ArgumentParser = _Parser(
        prog="rankspawn",
        description="Starts the processes (ranks) of a job on this machine, each bound to its CPUs and memory.",
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    all_commands = (
        ("run", _run, "start the ranks of a script, as torchrun does, and stop all when one fails"),
        ("bind", _bind, "bind one rank that another launcher (mpirun, srun) has started, and execute its program"),
        ("torchrun", None, "run the installed torch's torchrun, and start its workers by rankspawn"),
        ("topology", _topology, "show this machine's nodes, cores, caches and accelerators"),
        ("plan", _plan, "show where ranks would go, and start none"),
        ("ps", _ps, "show the jobs on this machine, and what their ranks do and use"),
        ("dump", _dump, "show what the ranks of a running job do: the stacks of their threads"),
        ("doctor", _doctor, "show what this machine and this installation allow"),
        ("completion", _completion, "print a script by which a shell completes commands and options"),
        ("help", None, "show the help of a command"),
    )
    for name, add_options, help in [one for one in all_commands if one[0] == word] or all_commands:
        command = commands.add_parser(name, add_options=add_options, help=help)
        command.set_defaults(parser=command)
    return parser


def _run(parser: argparse.ArgumentParser) -> Respell:
    from .run import add_run_options
    from .vocabulary import respelt

    add_run_options(parser)
    return partial(respelt, parser)


def _bind(parser: argparse.ArgumentParser) -> None:
    from .bind import add_bind_options

    add_bind_options(parser)


def _topology(parser: argparse.ArgumentParser) -> None:
    from .show import add_topology_options

    add_topology_options(parser)


def _plan(parser: argparse.ArgumentParser) -> Respell:
    from .line import respelt_for_plan
    from .show import add_plan_options

    add_plan_options(parser)
    return partial(respelt_for_plan, parser)


def _ps(parser: argparse.ArgumentParser) -> None:
    from .ps import add_ps_options

    add_ps_options(parser)


def _dump(parser: argparse.ArgumentParser) -> None:
    from .dump import add_dump_options

    add_dump_options(parser)


def _doctor(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Shows what this machine and this installation allow: how ranks are started and bound, which kernel features"
        " are there, which devices are visible, and what is missing."
    )
    parser.add_argument("--json", action="store_true", help="print JSON (default: text)")
    parser.set_defaults(run=_report)


def _completion(parser: argparse.ArgumentParser) -> None:
    from .completion import add_completion_options, commands_of

    def whole() -> argparse.ArgumentParser:
        all_commands = _parser()
        for command in commands_of(all_commands).values():
            if isinstance(command, _Parser):
                command.add_all_options()
        return all_commands

    add_completion_options(parser, whole)


def _report(args: argparse.Namespace) -> int:
    import warnings

    from .._start.engine import mechanisms
    from .doctor import report

    warnings.simplefilter("ignore", RuntimeWarning)  # about a missing engine, because the report says it
    parser: argparse.ArgumentParser = args.parser
    try:
        mechanisms()
    except ValueError as error:
        parser.error(str(error))
    return report(as_json=args.json)
