"""The types of _spawn.pyx. Its docstrings describe everything."""

from collections.abc import Collection, Iterable, Mapping, Sequence, Set
from typing import Any

SAME_AS_STDOUT: int
CLONE: int
POSIX_SPAWN: int
HAVE_LIBNUMA: bool
STEP_NAMES: tuple[str, ...]
ALL_DONE: tuple[int, int, int, int]

class Pidfd:
    fd: int
    def __init__(self, fd: int) -> None: ...
    def fileno(self) -> int: ...
    def send_signal(self, sig: int, group: bool = False) -> int: ...

def clone_is_honoured() -> bool: ...
def pack_ids(ids: Collection[int]) -> bytes: ...
def set_mempolicy(mode: int, node_mask: bytes | None) -> int: ...
def spawn(
    owner: object,
    argv: Iterable[object],
    executables: Iterable[str | bytes],
    env: Mapping[object, object] | None,
    cwd: object,
    streams: Sequence[int | tuple[str, int]],
    parent_ends: Sequence[int],
    pass_fds: tuple[int, ...],
    close_fds: bool,
    restore_signals: bool,
    new_session: bool,
    process_group: int,
    gid: int | None,
    groups: Sequence[int] | None,
    uid: int | None,
    umask: int,
    cpu_mask: bytes | None,
    mem_mode: int,
    node_mask: bytes | None,
    binding_required: bool,
    death_signal: int,
    cgroup_fd: int,
    fresh_signals: bool,
    mechanism: int,
    /,
) -> tuple[int, int, int, int] | None: ...

class Crew:
    def __init__(
        self,
        count: int,
        env: Mapping[str, str] | None,
        shared: Mapping[str, str],
        numbered: Mapping[str, int],
        cwd: object,
        new_session: bool,
        death_signal: int,
        cgroup_fd: int,
        guard_fd: int,
        /,
    ) -> None: ...
    def add(
        self,
        owner: object,
        argv: Iterable[object],
        executables: Iterable[str | bytes],
        env: Mapping[str, str],
        streams: Sequence[int | tuple[str, int]],
        cpu_mask: bytes | None,
        mem_mode: int,
        node_mask: bytes | None,
        binding_required: bool,
        /,
    ) -> None: ...
    def run(self, mechanism: int, name: str, workers: int, /) -> list[tuple[int, tuple[int, int, int, int] | None]]: ...
    def started(self) -> int: ...

# _bottom.pxi
class MainAtTheBottom:
    def __init__(self, argv: Iterable[bytes], hook: object) -> None: ...
    def __call__(self, kind: object, error: object, trace: object) -> None: ...

# _fork.pxi
RESULT_BYTES: int

def fork_crew(crew: Crew, memory: object, done: int, keep_below: int, umask: int, siblings: bool = True) -> int: ...
def adopt(owner: object, memory: object, rank: int, /) -> tuple[int, int, int, int] | None: ...
def set_subreaper(on: bool, /) -> bool: ...
def is_subreaper() -> bool: ...
def die_with_parent() -> int: ...
def own_environment() -> dict[bytes, bytes]: ...
def collapse_pages(address: int, length: int, /) -> int: ...
def flush_streams_of_c() -> None: ...
def end_openmp(path: bytes, /) -> bool | None: ...

# _end.pxi
HAS_ENDS: bool

def look(ranks: Sequence[Any]) -> list[int | None]: ...
def await_ends(ranks: Sequence[Any], seconds: float) -> None: ...
def collect(ranks: Sequence[Any]) -> list[tuple[int | None, tuple[Any, ...]]]: ...
def signal_groups(ranks: Sequence[Any], signals: Sequence[int]) -> list[int]: ...
def kill_groups(sessions: Set[int]) -> None: ...
def members(sessions: Set[int], ended: Set[int], kill: bool) -> dict[int, int]: ...
def are_empty(sessions: Set[int], ended: Set[int]) -> bool: ...
def kill_found(found: Mapping[int, int], pause: float) -> None: ...
def signal_members(sessions: Set[int], signals: Sequence[int], groups: bool) -> None: ...
