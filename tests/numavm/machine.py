"""The virtual machine: QEMU's arguments, and from the same values what the checks expect to find inside.

    socket 0                     socket 1                     no socket
    node 0     node 1            node 2     node 3            node 4
    0-1,4-5    2-3,6-7           8-9,12-13  10-11,14-15       memory only

A die has one core of two threads and an L3 of its own. The dies of a socket are dealt to its nodes in turn, so that the
nodes' CPU lists have gaps, as those of many real machines have.
"""

from __future__ import annotations

SOCKETS = 2
NODES_PER_SOCKET = 2
DIES_PER_NODE = 2
THREADS = 2
MEMORY_ONLY = 4
NODE_MIB = 256

RUNNING = "numavm: running "
"""A line of the job that begins so names the check that begins. It is shown only when that check does not end."""

_DIES = NODES_PER_SOCKET * DIES_PER_NODE  # of a socket
CPU_COUNT = SOCKETS * _DIES * THREADS


def _node_of_die(socket: int, die: int) -> int:
    return socket * NODES_PER_SOCKET + die % NODES_PER_SOCKET


def _cpus_of_die(socket: int, die: int) -> tuple[int, ...]:
    first = (socket * _DIES + die) * THREADS
    return tuple(range(first, first + THREADS))


DIES = {_cpus_of_die(s, d): _node_of_die(s, d) for s in range(SOCKETS) for d in range(_DIES)}
"""The node of each die, by its CPUs. A die is also a core and an L3."""

CPUS = {node: frozenset(c for cpus, of in DIES.items() if of == node for c in cpus) for node in (0, 1, 2, 3)}
"""The CPUs of each node that has any."""

NODES = (*CPUS, MEMORY_ONLY)
SOCKET_CPUS = {0: CPUS[0] | CPUS[1], 1: CPUS[2] | CPUS[3]}

# The memory-only node is nearest to node 2, which neither a tie-break nor "the first node" would choose.
DISTANCES = (
    (10, 12, 32, 32, 40),
    (12, 10, 32, 32, 40),
    (32, 32, 10, 12, 17),
    (32, 32, 12, 10, 28),
    (40, 40, 17, 28, 10),
)
NEAREST_TO_MEMORY_ONLY = 2

# By node: the number of its root bus, and how many accelerators it has. The bus numbers are not in the order of the
# nodes, so that "the i-th accelerator" and "node i" are not the same by chance. A device gets the bus after its root's,
# in order.
_ROOT_BUS = {3: (0x20, 1), 0: (0x40, 1), 1: (0x60, 2), MEMORY_ONLY: (0x80, 1)}

DEVICES = {f"0000:{bus + 1 + i:02x}:00.0": node for node, (bus, count) in _ROOT_BUS.items() for i in range(count)}
"""The node of each accelerator, by PCI address, in ascending order."""

HOMELESS_DEVICE = "0000:01:00.0"
"""An accelerator on the main root bus, which belongs to no node: its numa_node is -1."""


def device_of(node: int) -> str:
    """The address of the first accelerator on a node."""
    return next(address for address, of in DEVICES.items() if of == node)


def qemu_arguments() -> list[str]:
    """CPUs, memory, nodes and devices, for qemu-system-x86_64 7.2 or later."""
    arguments = [
        # Under software emulation only Intel's models show threads and caches: AMD's lose them with topoext.
        *("-cpu", "max,la57=off,vendor=GenuineIntel,family=6,model=106,stepping=6"),
        *("-smp", f"{CPU_COUNT},maxcpus={CPU_COUNT},sockets={SOCKETS},dies={_DIES},cores=1,threads={THREADS}"),
        *("-m", f"{len(NODES) * NODE_MIB}M"),
    ]
    for node in NODES:
        arguments += ["-object", f"memory-backend-ram,id=memory{node},size={NODE_MIB}M"]
        arguments += ["-numa", f"node,nodeid={node},memdev=memory{node}"]
    for socket in range(SOCKETS):
        for die in range(_DIES):
            arguments += ["-numa", f"cpu,node-id={_node_of_die(socket, die)},socket-id={socket},die-id={die}"]
    for a in NODES:
        for b in NODES:
            arguments += ["-numa", f"dist,src={a},dst={b},val={DISTANCES[a][b]}"]
    arguments += _accelerator("homeless", "pcie.0", slot=0x10, chassis=1)
    chassis = 2
    for node, (bus, count) in _ROOT_BUS.items():
        arguments += ["-device", f"pxb-pcie,id=root{node},bus=pcie.0,bus_nr={bus},numa_node={node}"]
        for slot in range(count):
            arguments += _accelerator(f"{node}.{slot}", f"root{node}", slot, chassis)
            chassis += 1
    return arguments


def _accelerator(name: str, bus: str, slot: int, chassis: int) -> list[str]:
    """A display controller (class 0x0380) behind a root port, because QEMU has no device with an accelerator's ids."""
    port = f"pcie-root-port,id=port{name},bus={bus},addr={slot:#x},chassis={chassis}"
    return ["-device", port, "-device", f"bochs-display,bus=port{name}"]
