"""The ranks of one job on this machine: started together, watched at once, ended together."""

from __future__ import annotations

import os
import selectors
import signal
import socket
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ._popen import Popen

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from types import TracebackType

    from ._binding import Binding

_KILL = signal.SIGKILL if sys.platform != "win32" else signal.SIGTERM
_POLL_SECONDS = 0.02  # where a rank has no pidfd (not Linux, or no descriptor was left)


@dataclass(frozen=True)
class Job:
    """What the ranks are told of the job, as torchrun tells it.

    nprocs: ranks on this machine. run_id: a name for the job. master_addr, master_port: where rank 0 listens.
    """

    nprocs: int
    run_id: str
    master_addr: str
    master_port: int

    def environment(self, rank: int) -> dict[str, str]:
        """The variables of one rank, by the names that torchrun gives them (torch.distributed.run)."""
        ranks = str(self.nprocs)
        return {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": ranks,
            "LOCAL_WORLD_SIZE": ranks,
            "GROUP_RANK": "0",
            "GROUP_WORLD_SIZE": "1",
            "ROLE_NAME": "default",
            "ROLE_RANK": str(rank),
            "ROLE_WORLD_SIZE": ranks,
            "MASTER_ADDR": self.master_addr,
            "MASTER_PORT": str(self.master_port),
            "TORCHELASTIC_RESTART_COUNT": "0",
            "TORCHELASTIC_MAX_RESTARTS": "0",
            "TORCHELASTIC_RUN_ID": self.run_id,
            # Rank 0 makes the store at MASTER_PORT itself: there is no agent that holds one.
            "TORCHELASTIC_USE_AGENT_STORE": "False",
            "TORCH_NCCL_ASYNC_ERROR_HANDLING": os.environ.get("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1"),
        }


def free_port(address: str) -> int:
    """A TCP port that is free on ``address`` now. Raises OSError when the address is not this machine's."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.bind((address, 0))
        return int(probe.getsockname()[1])


class RankGroup:
    """Ranks that live and die together. Leaving the ``with`` block ends those that still run, and what they started.

    ranks: the Popen objects, in rank order. returncodes: of the ranks that wait_any() has seen to end, by number.

    A rank that has ended is not reaped before the group is: until then its number is its own, and its process group can
    be signalled without a race on every kernel.
    """

    def __init__(self, ranks: Sequence[Popen]) -> None:
        self.ranks = tuple(ranks)
        self.returncodes: dict[int, int] = {}
        self._selector = selectors.DefaultSelector()
        self._running = dict(enumerate(self.ranks))
        for number, rank in self._running.items():
            if rank.pidfd is not None:
                self._selector.register(rank.pidfd, selectors.EVENT_READ, number)

    def watch(self, descriptor: int) -> None:
        """Let wait_any() return early, too, when ``descriptor`` is readable."""
        self._selector.register(descriptor, selectors.EVENT_READ, None)

    @property
    def running(self) -> int:
        """How many ranks have not been seen to end."""
        return len(self._running)

    def wait_any(self, timeout: float | None = None) -> list[int]:
        """Wait until a rank ends; the numbers of those that have ended since the last call, in rank order.

        An empty list means that ``timeout`` seconds passed, that a watched descriptor became readable, or that no rank
        is left.
        """
        until = None if timeout is None else time.monotonic() + timeout
        while self._running:
            seen = {number: _status(rank) for number, rank in self._running.items()}
            ended = {number: status for number, status in seen.items() if status is not None}
            if ended:
                self.returncodes.update(ended)
                for number in ended:
                    rank = self._running.pop(number)
                    if rank.pidfd is not None:
                        self._selector.unregister(rank.pidfd)
                return list(ended)
            left = None if until is None else until - time.monotonic()
            if left is not None and left <= 0:
                break
            if any(rank.pidfd is None for rank in self._running.values()):
                left = _POLL_SECONDS if left is None else min(left, _POLL_SECONDS)
            if any(key.data is None for key, _ in self._selector.select(left)):
                break
        return []

    def send_signal(self, sig: int) -> None:
        """Signal the process group of every rank, also of those that have ended: their children may run.

        Raises PermissionError, after the others have been signalled, when a rank may not be signalled: it runs as
        another user.
        """
        refused = None
        for rank in self.ranks:
            try:
                _signal(rank, sig)
            except PermissionError as error:
                refused = error
        if refused is not None:
            raise refused

    def terminate(self, grace: float = 30.0) -> None:
        """End every rank and its process group: SIGTERM, at most ``grace`` seconds, SIGKILL."""
        if self._running:
            self.send_signal(signal.SIGTERM)
            until = time.monotonic() + grace
            while self._running and (left := until - time.monotonic()) > 0:
                self.wait_any(left)
        self.kill()

    def kill(self) -> None:
        """SIGKILL to every rank's process group, a wait for the ranks, and their end: they are reaped."""
        self.send_signal(_KILL)
        while self._running:
            self.wait_any()
        for rank in self.ranks:
            rank.wait()

    def close(self) -> None:
        """End what runs, and let go of the descriptors."""
        self.terminate()
        self._selector.close()

    def __enter__(self) -> RankGroup:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def launch(
    command: Sequence[str],
    job: Job,
    *,
    bindings: Sequence[Binding | None],
    env: Mapping[str, str],
    rank_env: Sequence[Mapping[str, str]],
    log_dir: str | None = None,
    die_with_parent: bool = True,
) -> RankGroup:
    """Start ``job.nprocs`` ranks of ``command``, each in a session of its own. All or nothing.

    bindings, rank_env: by rank. env: what all ranks share. log_dir: each rank's stdout.log and stderr.log are made in
        ``log_dir/attempt_0/RANK``, as torchrun does.

    Raises what Popen raises, after the ranks that were started have been killed and reaped.
    """
    ranks: list[Popen] = []
    try:
        for number in range(job.nprocs):
            stdout, stderr = _logs(log_dir, number)
            ranks.append(
                Popen(
                    command,
                    env={**env, **job.environment(number), **rank_env[number], **_call_time()},
                    stdout=stdout,
                    stderr=stderr,
                    binding=bindings[number],
                    die_with_parent=die_with_parent,
                    start_new_session=os.name == "posix",
                )
            )
        return RankGroup(ranks)
    except BaseException:
        for rank in ranks:
            _signal(rank, _KILL)
        for rank in ranks:
            rank.wait()
        raise


def _status(rank: Popen) -> int | None:
    """How a rank has ended, as a returncode, without reaping it; None while it runs."""
    if rank.returncode is not None or not hasattr(os, "waitid"):
        return rank.poll()
    try:
        ended = os.waitid(os.P_PID, rank.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return rank.poll()  # reaped behind our back
    if ended is None:
        return None
    return ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status


def _signal(rank: Popen, sig: int) -> None:
    """Signal a rank's process group; nothing when nobody is left in it."""
    with suppress(ProcessLookupError):
        if os.name == "posix":
            rank.send_signal_group(sig)
        else:
            rank.send_signal(sig)


def _call_time() -> dict[str, str]:
    """When the rank was asked for, by the clock that every process shares: nanoseconds of CLOCK_MONOTONIC."""
    return {"RANKSPAWN_CALL_NS": str(time.monotonic_ns())}


def _logs(log_dir: str | None, rank: int) -> tuple[os.PathLike[str] | None, os.PathLike[str] | None]:
    if log_dir is None:
        return None, None
    from pathlib import Path

    folder = Path(log_dir, "attempt_0", str(rank))
    folder.mkdir(parents=True, exist_ok=True)
    return folder / "stdout.log", folder / "stderr.log"
