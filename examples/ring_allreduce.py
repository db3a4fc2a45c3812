"""A ring all-reduce between ranks, with nothing but the standard library.

    rankspawn run --nproc-per-node 4 --numa-binding node examples/ring_allreduce.py

Every rank has a vector of its own; at the end every rank has the sum of all of them, and has checked each element.
Rank 0 then prints a table of where each rank lives, and how long after the launcher's call it reached its first line.

The ranks find each other as torch's do, by RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT. So any launcher that sets
these will do; by hand, in two terminals:

    RANK=0 WORLD_SIZE=2 MASTER_ADDR=127.0.0.1 MASTER_PORT=29500 python examples/ring_allreduce.py
    RANK=1 WORLD_SIZE=2 MASTER_ADDR=127.0.0.1 MASTER_PORT=29500 python examples/ring_allreduce.py

(torchrun keeps MASTER_PORT for a store of its own, unless TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 is set.)
"""

# The clock is read before the other imports, which take longer than the start of a process.
# ruff: noqa: E402
import time

FIRST_LINE_NS = time.clock_gettime_ns(time.CLOCK_MONOTONIC)

import argparse
import json
import operator
import os
import re
import socket
import struct
import sys
from array import array
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

RANK = int(os.environ.get("RANK", "0"))
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", "1"))
MASTER = (os.environ.get("MASTER_ADDR", "127.0.0.1"), int(os.environ.get("MASTER_PORT", "0")))

RETRY_SECONDS = 0.02


def main() -> None:
    parser = argparse.ArgumentParser(description="Sums one vector per rank by a ring all-reduce over sockets.")
    parser.add_argument("--elements", type=int, default=1_000_000, metavar="N", help="of each vector (%(default)s)")
    parser.add_argument("--timeout", type=float, default=30.0, metavar="SECONDS", help="for each step (%(default)s)")
    options = parser.parse_args()

    job = meet(options.timeout)
    ring = join_ring(job, options.timeout)

    # Whole numbers, so that the sum is exact in whatever order the ring adds them up.
    vector = array("d", range(RANK, RANK + options.elements))
    began = time.perf_counter()
    all_reduce(vector, ring)
    seconds = time.perf_counter() - began

    # Element i was i + rank on each rank: their sum is i * WORLD_SIZE plus all the rank numbers.
    start = sum(range(WORLD_SIZE))
    if vector != array("d", range(start, start + WORLD_SIZE * options.elements, WORLD_SIZE)):
        sys.exit(f"rank {RANK}: the sum is wrong")

    rows = gather(job, whereabouts())
    if RANK == 0:
        print_table(rows)
        took = f"{seconds * 1e3:.0f} ms"
        print(f"\nall-reduce of {options.elements:,} doubles over {WORLD_SIZE} ranks: {took}, the sum is exact")


# ---- finding each other: rank 0 tells everyone where everyone listens -----------------------------------------------


@dataclass
class Job:
    """listener: this rank's own, for its ring neighbour. addresses: every rank's listener, by rank.

    members: on rank 0 a connection to every other rank, by rank; on the others the one to rank 0.
    """

    listener: socket.socket
    addresses: list[tuple[str, int]]
    members: dict[int, socket.socket]


def meet(timeout: float) -> Job:
    return lead(timeout) if RANK == 0 else follow(timeout)


def lead(timeout: float) -> Job:
    """Rank 0: wait for everyone, then send everyone the list of addresses."""
    listener = listen(MASTER[0])
    addresses = {0: listener.getsockname()[:2]}
    members: dict[int, socket.socket] = {}
    deadline = time.monotonic() + timeout
    with explained(f"cannot listen at {MASTER[0]}:{MASTER[1]} (MASTER_ADDR, MASTER_PORT)"):
        door = listen(*MASTER)
    with door:
        while len(addresses) < WORLD_SIZE:
            missing = [rank for rank in range(WORLD_SIZE) if rank not in addresses]
            with explained(f"ranks {missing} did not come to {MASTER[0]}:{door.getsockname()[1]}"):
                door.settimeout(max(deadline - time.monotonic(), 0.001))
                member, _ = door.accept()
                member.settimeout(timeout)
                rank, address = receive(member)
                if rank not in missing:
                    raise ConnectionError(f"rank {rank} came, which is not one of them")
                members[rank], addresses[rank] = member, address
    in_order = [addresses[rank] for rank in range(WORLD_SIZE)]
    for rank, member in members.items():
        with explained(f"cannot tell rank {rank} the addresses"):
            send(member, in_order)
    return Job(listener, in_order, members)


def follow(timeout: float) -> Job:
    """Every other rank: tell rank 0 where we listen, and learn where the others do."""
    with explained(f"rank 0 is not at {MASTER[0]}:{MASTER[1]} (MASTER_ADDR, MASTER_PORT)"):
        leader = connect_patiently(MASTER, timeout)
    # The address by which rank 0 is reached is one by which the other ranks reach us.
    listener = listen(leader.getsockname()[0])
    # Rank 0 is to give up first: it knows who is missing.
    leader.settimeout(timeout + 5)
    with explained("rank 0 did not send the addresses"):
        send(leader, [RANK, listener.getsockname()[:2]])
        addresses = [(host, port) for host, port in receive(leader)]
    leader.settimeout(timeout)
    return Job(listener, addresses, {0: leader})


def gather(job: Job, row: dict[str, str]) -> list[dict[str, str]]:
    """Every rank's row, by rank, on rank 0; nothing on the others."""
    if RANK != 0:
        with explained("cannot send rank 0 our row of the table"):
            send(job.members[0], row)
        return []
    rows = [row]
    for rank in range(1, WORLD_SIZE):
        with explained(f"rank {rank} did not send its row of the table"):
            rows.append(receive(job.members[rank]))
    return rows


# ---- the ring -------------------------------------------------------------------------------------------------------


@dataclass
class Ring:
    previous: socket.socket
    next: socket.socket


def join_ring(job: Job, timeout: float) -> Ring:
    """Connect to the next rank, and let the previous one connect to us. One rank alone is its own neighbour."""
    after, before = (RANK + 1) % WORLD_SIZE, (RANK - 1) % WORLD_SIZE
    with explained(f"cannot connect to rank {after}, the next in the ring"):
        # This does not wait for accept(): the kernel takes connections for whoever listens. So nobody waits in a ring.
        next_one = socket.create_connection(job.addresses[after], timeout)
        send(next_one, RANK)
    with explained(f"rank {before}, the previous in the ring, did not connect"):
        job.listener.settimeout(timeout)
        previous, _ = job.listener.accept()
        previous.settimeout(timeout)
        if receive(previous) != before:
            raise ConnectionError("somebody else did")
    return Ring(previous, next_one)


def all_reduce(vector: "array[float]", ring: Ring) -> None:
    """Make ``vector`` the sum of every rank's, in place.

    It is cut into one chunk per rank. In each of 2 * (WORLD_SIZE - 1) steps, every rank sends one chunk to the next
    rank while it receives another from the previous. So all links are busy all the time, and each rank sends less than
    twice the vector, however many ranks there are.
    """
    cuts = [len(vector) * i // WORLD_SIZE for i in range(WORLD_SIZE + 1)]
    whole = memoryview(vector)
    chunks = [whole[a:b] for a, b in pairwise(cuts)]

    # Reduce-scatter: a chunk grows by one rank's numbers at each stop. At the end rank r has the sum of chunk r + 1.
    for step in range(WORLD_SIZE - 1):
        mine = chunks[(RANK - step - 1) % WORLD_SIZE]
        theirs = memoryview(array("d", bytes(mine.nbytes)))
        exchange(ring, chunks[(RANK - step) % WORLD_SIZE], theirs)
        mine[:] = array("d", map(operator.add, mine, theirs))

    # All-gather: the finished chunks go round once more.
    for step in range(WORLD_SIZE - 1):
        exchange(ring, chunks[(RANK - step + 1) % WORLD_SIZE], chunks[(RANK - step) % WORLD_SIZE])


def exchange(ring: Ring, outgoing: memoryview, incoming: memoryview) -> None:
    """Send to the next rank and receive from the previous one, at the same time.

    One after the other would hang: a chunk does not fit into the sockets' buffers, and if every rank only sends, nobody
    makes room.
    """
    with ThreadPoolExecutor(max_workers=1) as thread:
        sent = thread.submit(ring.next.sendall, outgoing)
        with explained(f"no data from rank {(RANK - 1) % WORLD_SIZE}"):
            receive_into(ring.previous, incoming.cast("B"))
        with explained(f"cannot send data to rank {(RANK + 1) % WORLD_SIZE}"):
            sent.result()


# ---- sockets --------------------------------------------------------------------------------------------------------


def listen(host: str, port: int = 0) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, port), family=family, backlog=WORLD_SIZE)


def connect_patiently(address: tuple[str, int], timeout: float) -> socket.socket:
    """Connect, also to a rank that is still starting and does not listen yet."""
    deadline = time.monotonic() + timeout
    while True:
        try:
            return socket.create_connection(address, timeout)
        except ConnectionRefusedError:
            if time.monotonic() > deadline:
                raise
            time.sleep(RETRY_SECONDS)


def send(peer: socket.socket, message: Any) -> None:
    """Send what json can express, after its length: a stream has no borders between messages."""
    text = json.dumps(message).encode()
    peer.sendall(struct.pack("!I", len(text)) + text)


def receive(peer: socket.socket) -> Any:
    (length,) = struct.unpack("!I", receive_into(peer, bytearray(4)))
    return json.loads(receive_into(peer, bytearray(length)))


def receive_into(peer: socket.socket, buffer: Any) -> Any:
    """Fill the whole buffer; one recv_into() gives only what has come so far."""
    left = memoryview(buffer)
    while left:
        count = peer.recv_into(left)
        if count == 0:
            raise ConnectionError("it closed the connection")
        left = left[count:]
    return buffer


@contextmanager
def explained(what: str) -> Iterator[None]:
    """End this rank with one clear line where a socket fails; the launcher then stops the others."""
    try:
        yield
    except OSError as error:
        raise SystemExit(f"rank {RANK}: {what}: {error}") from error


# ---- the table ------------------------------------------------------------------------------------------------------


def whereabouts() -> dict[str, str]:
    """Where this rank lives, as the kernel says."""
    called = os.environ.get("RANKSPAWN_CALL_NS")
    microseconds = "-" if called is None else f"{(FIRST_LINE_NS - int(called)) // 1000:,}"
    return {
        "rank": str(RANK),
        "pid": str(os.getpid()),
        "session": str(os.getsid(0)),
        "CPUs": found_in("/proc/self/status", r"^Cpus_allowed_list:\s*(\S+)"),
        # The policy of memory that has none of its own; two of the names have a space in them (proc(5)).
        "memory policy": found_in("/proc/self/numa_maps", r"^\w+ ((?:prefer \(many\)|weighted interleave|\w+)\S*)"),
        "us to first line": microseconds,
    }


def found_in(path: str, pattern: str) -> str:
    """What the first group of ``pattern`` matches in a file; "-" where there is no such file or line."""
    try:
        with open(path, encoding="utf-8") as file:
            match = re.search(pattern, file.read(), re.MULTILINE)
    except OSError:
        return "-"
    return match[1] if match else "-"


def print_table(rows: list[dict[str, str]]) -> None:
    widths = {name: max(len(name), *(len(row[name]) for row in rows)) for name in rows[0]}
    for row in [{name: name for name in widths}, *rows]:
        print("  ".join(row[name].rjust(width) for name, width in widths.items()))


if __name__ == "__main__":
    main()
