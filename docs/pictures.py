"""Draws the pictures of README.md and docs/: ``make pictures``.

The machine is made up, so that every computer draws the same: two sockets, 8 GPUs, 256 CPUs, two InfiniBand adapters.
The chart shows figures of the tables in docs/, which benchmarks have printed; it has none of its own.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from rankspawn._canvas import Canvas  # noqa: E402
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


CHART = ROOT / "docs" / "_static" / "chart.svg"
_STYLE = """
text { font: 14px system-ui, sans-serif; fill: #1d2733 } .title { font-weight: 600 } .name { text-anchor: end }
.ours { fill: #0072b2 } .theirs { fill: #b3bdc8 }
@media (prefers-color-scheme: dark) {
.paper { fill: #14181d } text { fill: #e3e8ee } .ours { fill: #56b4e9 } .theirs { fill: #5d6a79 }
}
"""
_WIDTH, _NAMES, _LINE, _BAR = 560, 178, 22, 15

# The page, the beginning of the row, the column, and which of the numbers in it, from the left, is meant.
Cell = tuple[str, str, int, int]


def _bench(row: str, which: int) -> Cell:
    return ("benchmarks.md", row, 6, which)


# A title, the unit of what is shown, by what the table's number is divided, and a bar for each line.
_PANELS: tuple[tuple[str, str, float, dict[str, Cell]], ...] = (
    (
        "8 Python ranks that do nothing", "s", 1,
        {
            "rankspawn run": ("torchrun.md", "rankspawn run", 2, 0),
            "torchrun": ("torchrun.md", "torchrun", 2, 0),
        },
    ),
    (
        "A rank dies: 8 ranks have torch imported again", "s", 1,
        {
            "rankspawn, warm": ("guide/warm.md", "a rank dies, and all are forked", 2, 0),
            "rankspawn, cold": ("guide/warm.md", "a rank dies, and all are executed", 2, 0),
        },
    ),
    (
        "DDP example, 4 ranks, two epochs", "s", 1,
        {
            "rankspawn run --warm": ("guide/warm.md", "`rankspawn run --warm`", 2, 0),
            "rankspawn run": ("guide/warm.md", "`rankspawn run`", 2, 0),
            "torchrun": ("guide/warm.md", "`torchrun`", 2, 0),
        },
    ),
    (
        "64 ranks of a small program", "ms", 1000,
        {
            "rankspawn.launch()": _bench("torch's SubprocessContext, node", 1),
            "mpiexec.hydra": _bench("mpiexec.hydra, 64", 0),
            "numactl, one by one": _bench("a loop of subprocess.Popen of numactl", 0),
            "torch's handler": _bench("torch's SubprocessContext, node", 0),
            "rankspawn run": _bench("rankspawn run of 64", 0),
            "srun": _bench("srun, 64", 0),
            "mpirun": _bench("mpirun, 64", 0),
        },
    ),
)  # fmt: skip


def _figure(cell: Cell) -> float:
    """The number in a table's cell, of the first row that begins so."""
    page, row, column, which = cell
    for line in (ROOT / "docs" / page).read_text(encoding="utf-8").splitlines():
        cells = [text.strip() for text in line.split("|")]
        if len(cells) > column and cells[1].startswith(row):
            return float(cells[column].split(" / ")[which].replace(",", ""))
    raise LookupError(f"{page} has no row that begins with {row!r}")


def chart_svg() -> str:
    """Bars for each panel, whose longest fills the line."""
    canvas, y = Canvas(), 0.0
    for title, unit, divisor, bars in _PANELS:
        y += 26
        canvas.text(12, y, f"{title}, {unit}", "title")
        values = {name: _figure(cell) / divisor for name, cell in bars.items()}
        scale = (_WIDTH - _NAMES - 60) / max(values.values())
        for name, value in values.items():
            y += _LINE
            canvas.text(_NAMES - 8, y, name, "name")
            kind = "ours" if name.startswith("rankspawn") else "theirs"
            canvas.rect(_NAMES, y - _BAR + 3, max(value * scale, 2), _BAR, kind)
            digits = 0 if unit == "ms" else 1 if value >= 1 else 2
            canvas.text(_NAMES + max(value * scale, 2) + 6, y, f"{value:.{digits}f}")
        y += 8
    return canvas.document(_WIDTH, y + 8, _STYLE)


if __name__ == "__main__":
    for path, drawn in ((PLAN, plan_svg()), (CHART, chart_svg())):
        path.write_text(drawn, encoding="utf-8")
        print(path)
