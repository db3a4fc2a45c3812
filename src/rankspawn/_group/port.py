"""The TCP port on which rank 0 will listen, held for it until the job ends."""

from __future__ import annotations

import socket
import sys
from contextlib import suppress

from .job import Job


def check_local(address: str) -> None:
    """Check that a process of this machine can listen at an address.

    Args:
        address: An IPv4 or IPv6 address, or a host name.

    Raises:
        OSError: The address is not one of this machine's.
    """
    if address.replace(".", "").isdecimal():
        # An IPv4 address needs no look-up, which would take as long as starting half a rank.
        with suppress(OSError), socket.socket(socket.AF_INET) as probe:
            probe.bind((address, 0))
            return
    failed = OSError("no address")
    for family, kind, protocol, _, place in socket.getaddrinfo(address, 0, type=socket.SOCK_STREAM):
        with socket.socket(family, kind, protocol) as probe:
            try:
                probe.bind(place)
                return
            except OSError as error:
                failed = error
    raise failed


def hold_port(port: int = 0) -> socket.socket:
    """Hold a port on all addresses of this machine, so that only a listener that sets SO_REUSEADDR gets it.

    The socket is bound with SO_REUSEADDR and does not listen. Linux gives its port to no other process that asks for a
    free one, or that connects, and refuses it to a plain bind(2). A process that sets SO_REUSEADDR, as torch's TCPStore
    and nearly all servers do, can bind it and listen. Other systems have no such way: there the port is found,
    but not held.

    Args:
        port: Its number; 0 for a free one.

    Returns:
        The socket; closing it gives the port back.

    Raises:
        OSError: The port is taken (EADDRINUSE).
    """
    try:
        held = socket.socket(socket.AF_INET6, socket.SOCK_STREAM)
        try:
            held.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)  # IPv4's addresses, too
            return _bound(held, "::", port)
        except BaseException:
            held.close()
            raise
    except OSError:  # a system without IPv6
        held = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        try:
            return _bound(held, "", port)
        except BaseException:
            held.close()
            raise


def _bound(held: socket.socket, address: str, port: int) -> socket.socket:
    if sys.platform == "linux":
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    held.bind((address, port))
    return held


def hold_port_of(job: Job) -> tuple[Job, socket.socket | None]:
    """Hold the port of a job, if its rank 0 runs on this machine.

    Args:
        job: The job; its port 0 means a free one.

    Returns:
        The job, with the number of the port, and the socket that holds it. The socket is None if another machine has
        rank 0, or if the port that the job names is taken: rank 0 reports that better.

    Raises:
        OSError: No port is free, or the address is not this machine's and no port was given.
    """
    if job.node_rank:
        return job, None
    held = None
    if not job.master_port:
        check_local(job.master_addr)
        held = hold_port()
        job = job._replace(master_port=held.getsockname()[1])
    else:
        with suppress(OSError):
            held = hold_port(job.master_port)
    if held is not None and sys.platform != "linux":
        held.close()
        held = None
    return job, held
