"""``rankspawn run``: starts the ranks of a script and watches them until the last has ended."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from .._ids import parse_ids
from .options import CommandError, add_placement_options, natural, seconds
from .progress import say
from .settings import read_settings
from .vocabulary import add_torchrun_options, needles, nodes, processes, read_variables, streams
from .warm import add_warm_options

# The modules that start and watch processes, also the standard library's, are imported where they are used, because
# the other commands start no process and spend most of their time in imports.
if TYPE_CHECKING:
    from .._output.logs import LogFolder
    from .settings import RunSettings


def add_run_line(parser: argparse.ArgumentParser) -> None:
    """Have another command take the command line of ``run``: accept the options that it does not have, and SCRIPT.

    Their values are for ``run`` alone. The help does not show them.
    """
    run = argparse.ArgumentParser(add_help=False)
    _add_options(run)
    for action in run._actions:
        if parser._option_string_actions.keys().isdisjoint(action.option_strings):
            action.help = argparse.SUPPRESS
            parser._add_action(action)
    read_variables(parser, os.environ)
    parser.add_argument("command", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)


def add_run_options(run: argparse.ArgumentParser) -> None:
    """Add the options of ``run``.

    ``args.run(args)`` runs the job and returns the exit status. It raises CommandError, PlacementError and OSError.
    """
    run.usage = "rankspawn run [OPTIONS] SCRIPT [ARGS ...]"
    run.description = (
        "Starts N ranks of SCRIPT with the variables that torchrun sets (RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR,"
        " ...). When a rank fails, it ends the others and reports the first failure."
    )
    _add_options(run)
    read_variables(run, os.environ)
    # One list for both, because argparse would remove a double dash right after a SCRIPT argument of its own.
    run.add_argument("command", nargs=argparse.REMAINDER, metavar="SCRIPT ARGS", help="what each rank runs")
    run.set_defaults(run=_run)


def _add_options(run: argparse.ArgumentParser) -> None:
    add = run.add_argument
    add(
        "--nproc-per-node",
        "--nproc_per_node",
        type=processes,
        default=1,
        metavar="N",
        help="how many ranks on this machine, or as many as there are of: auto, cpu, gpu, xpu (default: 1)",
    )
    add("-m", "--module", action="store_true", help="SCRIPT is the name of a module, as for python -m")
    add("--no-python", "--no_python", action="store_true", help="SCRIPT is a program, not a Python script")
    add("--run-path", "--run_path", action="store_true", help="run SCRIPT by runpy.run_path")
    add("--role", metavar="NAME", help="the ranks' ROLE_NAME (default: default)")
    add(
        "--virtual-local-rank",
        "--virtual_local_rank",
        action="store_true",
        help="each rank sees only its own GPU (CUDA_VISIBLE_DEVICES) and has LOCAL_RANK 0",
    )
    add = run.add_argument_group(
        "several machines", "Start one launcher on each machine. Under srun and mpirun none of these options is needed."
    ).add_argument
    add(
        "--nnodes",
        type=nodes,
        metavar="N",
        help="how many machines (default: what the job step of Slurm or MPI says, else 1)",
    )
    add(
        "--node-rank",
        "--node_rank",
        type=natural,
        metavar="R",
        help="the number of this machine, from 0 (default: what the job step says)",
    )
    add(
        "--master-addr",
        "--master_addr",
        metavar="ADDR",
        help="the first machine's address, on which rank 0 listens (default: 127.0.0.1 on one machine)",
    )
    add(
        "--master-port",
        "--master_port",
        type=_port,
        metavar="PORT",
        help="the port on which rank 0 listens (default: a free one on one machine)",
    )
    add("--standalone", action="store_true", help="use this machine alone, even inside a job step of several machines")
    add(
        "--rdzv-endpoint",
        "--rdzv_endpoint",
        metavar="ADDR:PORT",
        help="--master-addr and --master-port in one",
    )
    add(
        "--rdzv-backend",
        "--rdzv_backend",
        metavar="NAME",
        help="static, or c10d if the number of this machine is known (default: static)",
    )
    add("--rdzv-id", "--rdzv_id", metavar="NAME", help="the job's name, TORCHELASTIC_RUN_ID (default: none)")
    add(
        "--local-addr",
        "--local_addr",
        metavar="ADDR",
        help="with c10d on one machine: the address on which rank 0 listens (default: 127.0.0.1)",
    )
    add = run.add_argument_group("failure").add_argument
    add("--keep-going", action="store_true", help="let the other ranks run when one fails (default: end them)")
    add(
        "--max-restarts",
        "--max_restarts",
        type=natural,
        default=0,
        metavar="N",
        help="how often to restart all ranks after a failure (default: 0)",
    )
    add(
        "--grace",
        "--shutdown-timeout",
        "--shutdown_timeout",
        type=seconds,
        metavar="SECONDS",
        help="how long ranks may take to end, between SIGTERM and SIGKILL (default: 30)",
    )
    add(
        "--wait",
        type=_wait,
        metavar="SECONDS",
        help="how long the other ranks may run after the first has ended with status 0 (default: no limit)",
    )
    add(
        "--signal-to",
        choices=("rank", "group", "session"),
        default="session",
        metavar="WHOM",
        help="which processes of a rank get SIGTERM first: rank, group or session; the others get it after half of"
        " the grace period (default: session)",
    )
    add(
        "--signals-to-handle",
        "--signals_to_handle",
        type=_signals,
        metavar="LIST",
        help="signals that end the job, besides SIGINT, SIGTERM, SIGHUP and SIGQUIT (default: SIGUSR1 and SIGUSR2 are"
        " passed to the ranks, and the job keeps running)",
    )
    add(
        "--guard",
        action=argparse.BooleanOptionalAction,
        help="end also the processes that ranks started, if this launcher is killed (default: on where"
        " the system allows it)",
    )
    add(
        "--stacks",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="report what the ranks were doing, before they are ended because another failed, and before SIGKILL"
        " (default: on)",
    )
    add(
        "--cgroup",
        metavar="DIR",
        help="make a cgroup for the ranks in DIR, a delegated cgroup v2; auto finds one (default: no cgroup)",
    )
    add(
        "--hang-timeout",
        "--hang_timeout",
        type=_above_0,
        metavar="SECONDS",
        help="report what each rank is doing when no rank has written a line or used CPU time for so long"
        " (default: off)",
    )
    add(
        "--on-hang",
        "--on_hang",
        choices=("report", "end", "restart"),
        metavar="WHAT",
        help="what to do about a hang: report it and let the ranks run, end the job as failed, or restart it within"
        " --max-restarts"
        " (default: report)",
    )
    add = run.add_argument_group("input and output").add_argument
    add(
        "--stdin",
        type=_ranks_with_stdin,
        default=0,
        metavar="WHICH",
        help="which ranks read this command's stdin: all, none, or the number of one (default: 0)",
    )
    add(
        "--log-dir",
        "--log_dir",
        metavar="DIR",
        help="write each rank's output to files in DIR/SCRIPT-TIME; DIR/latest is the newest (default: no files)",
    )
    add(
        "-t",
        "--tee",
        nargs="?",
        type=streams,
        metavar="WHICH",
        help="write to files and show the lines here, too, each behind its [rank N]: (WHICH as for --redirects;"
        " default: all)",
    )
    add(
        "-r",
        "--redirects",
        type=streams,
        metavar="WHICH",
        help="what goes to files: 0 nothing, 1 stdout, 2 stderr, 3 both; or by local rank, 0:3,1:2 (default: 3 with"
        " --log-dir, else 0)",
    )
    add(
        "--local-ranks-filter",
        "--local_ranks_filter",
        type=_ids,
        metavar="LIST",
        help="show only the lines of these local ranks: 0,2-3 (default: all)",
    )
    for stream in ("stdout", "stderr"):
        add(
            f"--duplicate-{stream}-filters",
            f"--duplicate_{stream}_filters",
            type=needles,
            metavar="WORDS",
            help=f"copy lines of --tee that have one of these words (a,b) to filtered_{stream}.log (default: none)",
        )
    add(
        "--log-line-prefix-template",
        "--log_line_prefix_template",
        metavar="TEXT",
        help="the prefix of --tee's lines, with ${rank}, ${local_rank} and ${role_name} (default: [rank ${rank}]:)",
    )
    add("--report", metavar="FILE.json", help="write times, bindings, exit statuses and resource use of each rank")
    add("--timeline", metavar="FILE", help="draw the ranks' times (FILE.svg), or trace them for Perfetto (FILE.json)")
    add_warm_options(run)
    add_placement_options(run)
    add_torchrun_options(run)


def _ranks_with_stdin(text: str) -> str | int:
    if text in ("all", "none"):
        return text
    try:
        return natural(text)
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(f"expected all, none or the number of a rank, got {text!r}") from None


def _port(text: str) -> int:
    number = int(text) if text.isascii() and text.isdecimal() else -1
    if not 0 <= number <= 65535:
        raise argparse.ArgumentTypeError(f"expected a port from 1 to 65535, or 0 for a free one, got {text!r}")
    return number


def _wait(text: str) -> float:
    found = seconds(text)
    if not found:  # for srun, 0 means no limit
        raise argparse.ArgumentTypeError(
            f"expected a number of seconds above 0, got {text!r}; leave --wait out for no limit"
        )
    return found


def _above_0(text: str) -> float:
    if not (found := seconds(text)):
        raise argparse.ArgumentTypeError(f"expected a number of seconds above 0, got {text!r}")
    return found


def _ids(text: str) -> frozenset[int]:
    try:
        return parse_ids(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _signals(text: str) -> frozenset[int]:
    from .signals import parse_signals

    try:
        return parse_signals(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _run(args: argparse.Namespace) -> int:
    """Run the job, with as many restarts as --max-restarts allows. Return the exit status."""
    from .._output.console import say_traceback
    from .attempts import run_attempts
    from .signals import catch_signals, die_of

    sys.excepthook = say_traceback
    warnings.showwarning = lambda message, *where: say(str(message))
    settings = read_settings(args)
    if not settings.engine:
        say("rankspawn has no engine here: ranks may outlive this launcher; see `rankspawn doctor`")
    _make_room(settings.job.nprocs * (3 if settings.streams.tee else 1))
    # If the parent ignores SIGCHLD, this process inherits that, and the kernel would drop the ranks' exit statuses.
    if hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    with (
        catch_signals(settings.signals_to_handle) as signals,
        _folder(settings) as folder,
    ):
        if not folder.path:
            settings = settings.replace(streams=settings.streams.without_files())
        status = run_attempts(settings, folder, signals)
    if status < 0:
        die_of(-status)
    return status if status >= 0 else 128 - status


@contextmanager
def _folder(settings: RunSettings) -> Iterator[LogFolder]:
    """Make the folder of the log files and error files: a new folder in --log-dir, or a temporary one.

    If no temporary folder can be made, the job still runs, as long as only this launcher would read its files: for
    --tee, and for the errors that ranks record.

    Raises:
        CommandError: The system refuses a folder that the job needs.
    """
    from .._output.logs import LogFolder

    parent, streams = settings.log_dir, settings.streams
    try:
        if parent is not None:
            os.makedirs(parent, exist_ok=True)
        folder = LogFolder(parent, name=settings.name, optional=parent is None and not streams.kept)
    except OSError as error:
        if parent is None:
            raise CommandError(f"cannot make a folder for log files: {error.strerror}; pass --log-dir DIR") from error
        raise CommandError(f"--log-dir: {error.strerror}: {error.filename}") from error
    folder.keep = folder.keep or streams.kept
    with folder:
        if folder.keep:
            say(f"logs in {folder.path}")
        elif not folder.path:
            here = "ranks write here by themselves, without --tee's prefixes; " if streams.tee else ""
            say(f"cannot make a temporary folder (TMPDIR, /tmp): {here}errors that ranks record will not be shown")
        yield folder


def _make_room(descriptors: int) -> None:
    """Raise the soft limit of open files (often 1024), but no further than needed, because the ranks inherit it.

    Raises:
        CommandError: The hard limit is too low.
    """
    if sys.platform == "win32":
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = descriptors + 24  # this process's own
    if soft == resource.RLIM_INFINITY or needed <= soft:
        return
    if hard != resource.RLIM_INFINITY and needed > hard:
        raise CommandError(f"too many ranks: they need {needed} open files, and the limit is {hard} (ulimit -Hn)")
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
