"""What a drawing shows in addition to the topology: sizes of caches, and network adapters with RDMA.

Neither decides where a rank goes, so only a drawing reads these files.
"""

from __future__ import annotations

import re

from .._frozen import Frozen
from .sysfs import Tree
from .topology import Cache, Topology

_SIZE = re.compile(r"([0-9]+)K")


class Adapter(Frozen):
    """An InfiniBand or RoCE adapter.

    Attributes:
        name: The kernel's name of the RDMA device: "mlx5_0".
        link: "InfiniBand", or "Ethernet" for RoCE; "" if its first port does not say it.
        node: The id of its NUMA node; None if the kernel does not say it.
    """

    name: str
    link: str
    node: int | None


def cache_size(tree: Tree, cache: Cache) -> str:
    """Say how large a last-level cache is: "32 MiB"; "" if the kernel does not say it.

    Documentation/ABI/testing/sysfs-devices-system-cpu: ``size`` is in KiB, followed by a K.
    """
    folder = f"sys/devices/system/cpu/cpu{min(cache.cpus)}/cache"
    for name in tree.names(folder):
        if tree.text(f"{folder}/{name}/level") != str(cache.level):
            continue
        if tree.text(f"{folder}/{name}/type") == "Instruction":
            continue
        found = _SIZE.fullmatch(tree.text(f"{folder}/{name}/size") or "")
        if found:
            kib = int(found[1])
            return f"{kib // 1024} MiB" if kib % 1024 == 0 else f"{kib / 1024:.3g} MiB" if kib > 1024 else f"{kib} KiB"
    return ""


def adapters(tree: Tree, topology: Topology) -> tuple[Adapter, ...]:
    """Find the adapters that the kernel's RDMA core lists, in the order of their names.

    Documentation/ABI/stable/sysfs-class-infiniband.
    """
    folder = "sys/class/infiniband"
    found = []
    for name in sorted(tree.names(folder), key=lambda name: (name.rstrip("0123456789"), len(name), name)):
        node = tree.text(f"{folder}/{name}/device/numa_node")
        known = node is not None and node.isdigit() and topology.node(int(node)) is not None
        link = tree.text(f"{folder}/{name}/ports/1/link_layer") or ""
        found.append(Adapter(name, link, int(node) if known and node else None))
    return tuple(found)
