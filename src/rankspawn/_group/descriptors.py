"""Whether this process may have a descriptor for each rank."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .._start.popen import Popen


def check_descriptors(nprocs: int) -> None:
    """Raise if there cannot be a descriptor for each rank, and one to watch them all."""
    if sys.platform == "linux":
        import resource

        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        if soft != resource.RLIM_INFINITY and nprocs >= soft:
            raise _too_few_descriptors(nprocs)


@contextmanager
def enough_descriptors(ranks: Sequence[Popen]) -> Iterator[None]:
    """Raise if a rank got no pidfd because no descriptor was free: it would have to be polled as long as it runs."""
    try:
        lacking = next((rank for rank in ranks if rank.pidfd is None), None)
        if lacking is not None and hasattr(os, "pidfd_open"):
            try:
                os.close(os.pidfd_open(lacking.pid))
            except OSError as error:
                if error.errno == errno.EMFILE:
                    raise
        yield
    except OSError as error:
        if error.errno != errno.EMFILE:
            raise
        raise _too_few_descriptors(len(ranks)) from error


def _too_few_descriptors(nprocs: int) -> OSError:
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    up_to = "any number" if hard == resource.RLIM_INFINITY else hard
    return OSError(
        errno.EMFILE,
        f"{os.strerror(errno.EMFILE)}: {nprocs} ranks need a descriptor each, and this process may have {soft};"
        f" raise RLIMIT_NOFILE before (ulimit -n, resource.setrlimit), here up to {up_to}",
    )
