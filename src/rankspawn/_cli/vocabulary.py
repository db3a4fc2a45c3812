"""torchrun's vocabulary: its options and their values, its PET_ variables, and what only its elastic agent can do."""

from __future__ import annotations

import argparse
import re

from .._frozen import Frozen
from .._output.console import say

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from typing import NoReturn

# The options of torchrun (torch 2.15): those that `run` has, ignores, and refuses. tests/torch compares them with the
# installed torchrun.
TAKEN = (
    "--nnodes --nproc-per-node --rdzv-backend --rdzv-endpoint --rdzv-id --standalone --max-restarts --role --module"
    " --no-python --run-path --log-dir --redirects --tee --local-ranks-filter --duplicate-stdout-filters"
    " --duplicate-stderr-filters --node-rank --master-addr --master-port --local-addr --numa-binding"
    " --signals-to-handle --shutdown-timeout --virtual-local-rank"
).split()
NEEDLESS = "--monitor-interval --start-method --rdzv-conf".split()
ELASTIC = "--event-log-handler --logs-specs".split()

BARE = "bare"
"""The value of ``--tee`` without a value: all streams of all ranks, as ``--tee 3`` of torchrun."""
_STREAMS = r"[0-3]|\d+:[0-3](,\d+:[0-3])*"
_LIKE_STREAMS = r"[\d:,]+"  # no script has such a name


class Endpoint(Frozen):
    """Where ranks meet: the value of --rdzv-endpoint.

    Attributes:
        host: The host, without the brackets of an IPv6 address.
        port: The port; None if the text has none, 0 for a free one.
    """

    host: str
    port: int | None


def only_torchrun(parser: argparse.ArgumentParser, what: str) -> NoReturn:
    """End the process with a usage error, because ``what`` needs torch's elastic agent."""
    parser.error(f"{what} needs an elastic agent: use `rankspawn torchrun`")


def add_torchrun_options(run: argparse.ArgumentParser) -> None:
    """Add the options of torchrun that ``rankspawn run`` ignores or refuses."""
    group = run.add_argument_group(
        "options of torchrun that are ignored",
        f"{', '.join(NEEDLESS[:-1])} and {NEEDLESS[-1]}, because there is no elastic agent and no rendezvous.",
    )
    add = group.add_argument
    add("--monitor-interval", "--monitor_interval", type=float, metavar="SECONDS", help=argparse.SUPPRESS)
    add("--start-method", "--start_method", choices=("spawn", "fork", "forkserver"), help=argparse.SUPPRESS)
    add("--rdzv-conf", "--rdzv_conf", metavar="KEY=VALUE,...", help=argparse.SUPPRESS)
    add("--event-log-handler", "--event_log_handler", metavar="NAME", help=argparse.SUPPRESS)
    add("--logs-specs", "--logs_specs", metavar="NAME", help=argparse.SUPPRESS)


def settle_torchrun_options(args: argparse.Namespace) -> None:
    """Say which options are ignored, and refuse those that need an elastic agent."""
    for option in ELASTIC:
        value = getattr(args, _dest(option))
        if value is not None and (option, value) != ("--event-log-handler", "null"):
            only_torchrun(args.parser, f"{option} {value}")
    if given := [option for option in NEEDLESS if getattr(args, _dest(option)) is not None]:
        say(f"{' and '.join(given)}: ignored, because rankspawn run has no elastic agent")


def read_variables(parser: argparse.ArgumentParser, environ: Mapping[str, str]) -> None:
    """Make torchrun's PET_ variables the defaults of the options, as torchrun does.

    A line reports a PET_ variable that belongs to no option of torchrun. A value that its option does not accept ends
    the process with status 2.

    Args:
        parser: A parser with all options of ``rankspawn run``.
        environ: The environment.
    """
    names = [name for name in environ if name.startswith("PET_")]
    if not names:
        return
    known = {f"PET_{_dest(option).upper()}": option for option in (*TAKEN, *NEEDLESS, *ELASTIC)}
    for name in names:
        if name not in known:
            say(f"ignoring {name}: torchrun has no such variable{nearest(name, known)}")
            continue
        action = parser._option_string_actions[known[name]]
        try:
            parser.set_defaults(**{action.dest: _value_of(action, environ[name])})
        except (argparse.ArgumentTypeError, ValueError) as error:
            parser.error(f"{name}: {error}")


def _value_of(action: argparse.Action, text: str) -> object:
    """Read the value of an option from a variable. Raises ArgumentTypeError or ValueError for a bad value."""
    if action.nargs == 0:
        if not text.lstrip("+-").isdecimal():
            raise ValueError(f"expected 0 or 1, got {text!r}")
        return bool(int(text))
    value = action.type(text) if callable(action.type) else text
    if action.choices is not None and value not in action.choices:
        raise ValueError(f"expected one of {', '.join(map(str, action.choices))}, got {text!r}")
    return value


def nearest(name: str, known: Iterable[str], likeness: float = 0.8) -> str:
    """Ask whether the user meant one of ``known``; "" if none is at least as similar as ``likeness`` (0 to 1)."""
    from difflib import get_close_matches

    near = get_close_matches(name, list(known), 1, likeness)
    return f" (did you mean {near[0]}?)" if near else ""


def respelt(parser: argparse.ArgumentParser, words: Sequence[str]) -> list[str]:
    """Respell options whose value is optional, so that the parser does not take SCRIPT for their value.

    ``--tee`` gets a value if the next word is not one, and ``--warm MODULES`` becomes ``--preload=MODULES``. SCRIPT and
    all words after it stay as they are.
    """
    found: list[str] = []
    rest = iter(words)
    for word in rest:
        found.append(word)
        if word == "--" or not word.startswith("-"):
            break
        if word == "--warm":
            from .._warm.command import are_modules

            value = next(rest, None)
            if value is not None and are_modules(value):
                found.append(f"--preload={value}")
                continue
            return [*found, *(respelt(parser, [value, *rest]) if value is not None else ())]
        if "=" in word or not _takes_value(parser, word):
            continue
        value = next(rest, None)
        if word in ("-t", "--tee") and not (value is not None and re.fullmatch(_LIKE_STREAMS, value)):
            found[-1] = f"--tee={BARE}"
            if value is not None:
                found += respelt(parser, [value, *rest])
        elif value is not None:
            found.append(value)
    return [*found, *rest]


def _takes_value(parser: argparse.ArgumentParser, word: str) -> bool:
    """Whether an option, perhaps abbreviated, takes the next word as its value."""
    options = parser._option_string_actions
    if word in options:
        return options[word].nargs != 0
    return any(action.nargs != 0 for name, action in options.items() if word.startswith("--") and name.startswith(word))


def nodes(text: str) -> int | str:
    """Read the value of --nnodes: a number, also as "N:N"; "MIN:MAX" stays text."""
    words = re.fullmatch(r"([1-9]\d*)(?::([1-9]\d*))?", text, re.ASCII)
    if words is None:
        raise argparse.ArgumentTypeError(f"expected a positive integer, or MIN:MAX, got {text!r}")
    return int(words[1]) if words[2] in (None, words[1]) else text


def processes(text: str) -> int | str:
    """Read the value of --nproc-per-node: a number, or the word for what to count."""
    if text in ("auto", "cpu", "gpu", "xpu"):
        return text
    if not (text.isascii() and text.isdecimal() and int(text)):
        raise argparse.ArgumentTypeError(f"expected a positive integer, auto, cpu, gpu or xpu, got {text!r}")
    return int(text)


def endpoint(text: str) -> Endpoint:
    """Read --rdzv-endpoint: HOST or HOST:PORT, with an IPv6 address in brackets. Raises ValueError for other text."""
    words = re.fullmatch(r"(?:\[(?P<six>[0-9A-Fa-f:.%\w]+)\]|(?P<host>[\w.-]+))(?::(?P<port>\d{1,5}))?", text.strip())
    if words is None or int(words["port"] or 0) > 65535:
        raise ValueError(f"expected HOST:PORT, got {text!r}")
    return Endpoint(words["six"] or words["host"], None if words["port"] is None else int(words["port"]))


def streams(text: str) -> str | dict[int, int]:
    """Read the value of --tee and --redirects.

    Returns:
        Bits by local rank: 1 for stdout, 2 for stderr. The rank -1 stands for all ranks. BARE stays BARE.
    """
    if text == BARE:
        return BARE
    if not re.fullmatch(_STREAMS, text):
        raise argparse.ArgumentTypeError(
            f"expected 0 (none), 1 (stdout), 2 (stderr) or 3 (both), or these by local rank (0:3,1:2), got {text!r}"
        )
    return dict(_pairs(text))


def _pairs(text: str) -> Iterator[tuple[int, int]]:
    for word in text.split(","):
        rank, colon, bits = word.rpartition(":")
        yield (int(rank) if colon else -1), int(bits)


def needles(text: str) -> tuple[str, ...]:
    """Read the words of a line filter, separated by commas. Two commas stand for one comma in a word."""
    return tuple(word.replace("\0", ",") for word in text.replace(",,", "\0").split(","))


def _dest(option: str) -> str:
    return option.removeprefix("--").replace("-", "_")
