"""Draws the pictures of README.md and docs/: ``make pictures``.

The machine is made up, so that every computer draws the same: two sockets, 8 GPUs, 256 CPUs, two InfiniBand adapters.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from rankspawn._place.devices import find_devices  # noqa: E402
from rankspawn._place.drawing import drawing  # noqa: E402
from rankspawn._place.plan import plan  # noqa: E402
from rankspawn._place.topology import Topology  # noqa: E402
from tests.support.sysfs_tree import Gpu, Machine, write  # noqa: E402

PLAN = ROOT / "docs" / "_static" / "plan.svg"

_ADAPTERS = {
    f"sys/class/infiniband/mlx5_{number}/{file}": text
    for number in (0, 1)
    for file, text in {"device/numa_node": str(number), "ports/1/link_layer": "InfiniBand"}.items()
}
_CACHES = {f"sys/devices/system/cpu/cpu{cpu}/cache/index3/size": "32768K" for cpu in range(128)}
_MACHINE = Machine(
    sockets=2, caches=8, cores=8, threads=2,
    gpus=tuple(Gpu(i // 4, f"0000:{bus}:00.0") for i, bus in enumerate("18 2a 3a 5d 9a ab ba db".split())),
    extra=_ADAPTERS | _CACHES,
)  # fmt: skip


def plan_svg() -> str:
    """The plan of 8 ranks with cores of their own."""
    with tempfile.TemporaryDirectory() as folder:
        topology = Topology.read(write(Path(folder), _MACHINE))
        devices = find_devices(topology)
        title = "rankspawn plan --numa-binding exclusive --svg plan.svg, on a machine of 8 GPUs and 256 CPUs"
        return drawing(topology, devices, plan(topology, "exclusive"), title=title)


if __name__ == "__main__":
    PLAN.write_text(plan_svg(), encoding="utf-8")
    print(PLAN)
