"""The commands ``topology`` and ``plan``: tables, JSON, drawings and captures."""

from __future__ import annotations

import argparse
import io
import json
import re
import subprocess
import sys
import tarfile
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path

import pytest

from rankspawn._binding import PlacementError
from rankspawn._cli.main import main
from rankspawn._cli.options import CommandError
from rankspawn._cli.show import _table, add_plan_options, add_topology_options
from rankspawn._place.colours import colour, shade
from rankspawn._place.devices import find_devices
from rankspawn._place.drawing import drawing
from rankspawn._place.plan import plan
from rankspawn._place.surroundings import adapters, cache_size
from rankspawn._place.sysfs import Tree
from rankspawn._place.topology import Topology
from tests.support.sysfs_tree import Gpu, Machine, address, write

TWO_SOCKETS = Machine(
    sockets=2, caches=2, cores=2, threads=2, memory_only=1, offline=frozenset({9}), gpus=(Gpu(0), Gpu(1), Gpu(1))
)
SVG = "{http://www.w3.org/2000/svg}"


def command(*words: object) -> int:
    parser = argparse.ArgumentParser()
    {"topology": add_topology_options, "plan": add_plan_options}[str(words[0])](parser)
    args = parser.parse_args([str(word) for word in words[1:]])
    return int(args.run(args))


def test_the_table_of_a_machine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("topology", "--sysfs", write(tmp_path, TWO_SOCKETS)) == 0
    assert capsys.readouterr().out.splitlines() == [
        "15 CPUs, 8 cores, 2 sockets, 3 nodes",
        "allowed: CPUs 0-8,10-15, nodes 0-2",
        "offline: CPUs 9",
        "",
        "node  socket  CPUs         cores  memory    last-level caches                   distances",
        "0     0       0-3,8,10-11  4      64.0 GiB  1 x L3 of 3 CPUs, 1 x L3 of 4 CPUs  10 21 32",
        "1     1       4-7,12-15    4      64.0 GiB  2 x L3 of 4 CPUs                    21 10 31",
        "2             none         0      64.0 GiB                                      32 31 10",
        "",
        "device  address       node  vendor  name         local CPUs",
        "0       0000:10:00.0  0     nvidia  NVIDIA H100  0-3,8,10-11",
        "1       0000:11:00.0  1     nvidia  NVIDIA H100  4-7,12-15",
        "2       0000:12:00.0  1     nvidia  NVIDIA H100  4-7,12-15",
    ]


def test_one_of_a_kind_is_not_plural(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("topology", "--sysfs", write(tmp_path, Machine(sockets=1, cores=2, threads=1))) == 0
    assert capsys.readouterr().out.startswith("2 CPUs, 2 cores, 1 socket, 1 node\n")


def test_the_table_of_a_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, Machine(sockets=2, cores=2, threads=2, gpus=(Gpu(0), Gpu(-1, local="2-3,6-7"))))
    words = ("plan", "--sysfs", tmp_path, "--numa-binding", "exclusive", "--memory-policy", "preferred")
    assert command(*words, "--nproc-per-node", 2) == 0
    assert capsys.readouterr().out.splitlines() == [
        "rank  device        node  CPUs     cores  memory       OMP_NUM_THREADS",
        "0     0000:10:00.0  0     0-1,4-5  2      preferred:0  2",
        "1     0000:11:00.0  1     2-3,6-7  2      preferred:1  2",
        "note: device 0000:11:00.0: numa_node is -1; by local_cpulist it is on node 1",
    ]


def test_a_plan_that_left_a_rank_unbound(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, Machine(sockets=2, gpus=(Gpu(0), Gpu(-1))))
    by_node = ("plan", "--sysfs", tmp_path, "--numa-binding", "node")
    with pytest.raises(PlacementError, match="unknown"):
        command(*by_node)
    assert command(*by_node, "--numa-binding-optional") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].split() == ["1", "0000:11:00.0", "-", "inherited", "-", "inherited", "6"]
    assert lines[3].startswith("note: rank 1 is left unbound: device 0000:11:00.0: its NUMA node is unknown")


def test_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, TWO_SOCKETS)
    command("topology", "--sysfs", tmp_path, "--json")
    machine = json.loads(capsys.readouterr().out)
    assert machine["nodes"][1] == {
        "id": 1,
        "cpus": "4-7,12-15",
        "memory": 64 << 30,
        "distances": {"0": 21, "1": 10, "2": 31},
    }
    assert machine["offline"] == "9"
    assert [device["address"] for device in machine["devices"]] == [address(i) for i in range(3)]
    command("plan", "--sysfs", tmp_path, "--json", "--numa-binding", "exclusive", "--memory-policy", "bind")
    ranks = json.loads(capsys.readouterr().out)["ranks"]
    assert [rank["cpus"] for rank in ranks] == ["0-3,8,10-11", "4-5,12-13", "6-7,14-15"]
    assert ranks[2]["memory"] == "bind:1"
    assert ranks[2]["omp_num_threads"] == 2


def test_lists_by_hand(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("plan", "--sysfs", write(tmp_path, TWO_SOCKETS), "--cpus", "0-1:4")
    assert command(*words, "--nproc-per-node", 2, "--mems", "2", "--json") == 0
    ranks = json.loads(capsys.readouterr().out)["ranks"]
    assert [(rank["cpus"], rank["memory"]) for rank in ranks] == [("0-1", "bind:2"), ("4", "bind:2")]
    with pytest.raises(PlacementError, match="--numa-binding node cannot be combined with --cpus and --mems"):
        command(*words, "--nproc-per-node", 2, "--numa-binding", "node")


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--reserve-cores", 1],
        ["--numa-binding", "none"],
        ["--numa-binding", "node"],
        ["--cpus", "0"],
        ["--mems", "0"],
    ],
)
def test_one_rank_without_a_number_as_run_starts(
    options: list[object], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path, Machine())
    assert command("plan", "--sysfs", tmp_path, "--json", *options) == 0
    assert len(json.loads(capsys.readouterr().out)["ranks"]) == 1


def test_devices_by_hand(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, TWO_SOCKETS)
    command("plan", "--sysfs", tmp_path, "--json", "--devices", f"pci:{address(2)},{address(0)}")
    assert [rank["node"] for rank in json.loads(capsys.readouterr().out)["ranks"]] == [1, 0]
    command("plan", "--sysfs", tmp_path, "--json", "--devices", "none", "--nproc-per-node", 2)
    assert [rank["device"] for rank in json.loads(capsys.readouterr().out)["ranks"]] == [None, None]
    with pytest.raises(PlacementError, match="--devices 'gpu0': 'gpu0' is not a PCI address"):
        command("plan", "--sysfs", tmp_path, "--devices", "gpu0")


MACHINES = {
    "two sockets": TWO_SOCKETS,
    "NPS4": Machine(sockets=2, nodes=4, caches=2, cores=4, threads=2, gpus=(Gpu(3), Gpu(7), Gpu(-1))),
    "masks, no caches": Machine(cores=20, masks=True, caches_written=False),
    "no node folder": Machine(sockets=4, node_dir=False),
    "hybrid": Machine(cores=12, big=4),
    "a mask, sparse ids": Machine(sockets=2, cpu_stride=7, cpu_base=100, allowed="100,107,149"),
    "a CPU in no node": Machine(sockets=2, extra={"sys/devices/system/node/node1/cpulist": "4-6"}),
}


@pytest.mark.parametrize("name", MACHINES)
def test_a_drawing_has_every_cpu_once_and_every_rank(name: str, tmp_path: Path) -> None:
    topology = Topology.read(write(tmp_path, MACHINES[name]))
    devices = find_devices(topology)
    ranks = plan(topology, "node", nprocs=3, required=False)
    root = ElementTree.fromstring(drawing(topology, devices, ranks))
    titles = [title.text or "" for title in root.iter(f"{SVG}title")]
    drawn = Counter(int(title.split(",")[0].removeprefix("CPU ")) for title in titles if title.startswith("CPU "))
    assert drawn == Counter(topology.cpus)
    texts = [text.text or "" for text in root.iter(f"{SVG}text")]
    for index, rank in enumerate(ranks):
        assert f"rank {index}: {rank.binding}" in " ".join(texts)
    for number, device in enumerate(devices):
        assert any(text.startswith(f"{number}: {device.address}") for text in texts)
    for cpu in topology.cpus - topology.allowed_cpus:
        assert any(title.startswith(f"CPU {cpu}, not allowed") for title in titles)
    width, height = float(root.get("width", "")), float(root.get("height", ""))
    for rect in root.iter(f"{SVG}rect"):
        if rect.get("x"):
            assert float(rect.get("x", "")) + float(rect.get("width", "")) <= width
            assert float(rect.get("y", "")) + float(rect.get("height", "")) <= height


def texts_of(drawn: str) -> list[str]:
    return [text.text or "" for text in ElementTree.fromstring(drawn).iter(f"{SVG}text")]


def test_ranks_that_share_a_node_are_chips_at_its_frame(tmp_path: Path) -> None:
    topology = Topology.read(write(tmp_path, Machine(sockets=2, cores=4)))
    drawn = drawing(topology, (), plan(topology, "node", nprocs=40))
    classes = Counter(rect.get("class") for rect in ElementTree.fromstring(drawn).iter(f"{SVG}rect"))
    assert classes["shared"] == len(topology.cpus) + 1, "a cell for each CPU, and one in the legend"
    # Each rank's number is in its node and in the legend; a CPU's number may be the same.
    chips = Counter(
        text.text for text in ElementTree.fromstring(drawn).iter(f"{SVG}text") if "chip" in text.get("class", "")
    )
    assert chips == {str(rank): 2 for rank in range(40)}


def test_neighbouring_ranks_have_colours_that_differ() -> None:
    colours = [colour(rank) for rank in range(24)]
    assert len(set(colours)) == 24
    assert all(re.fullmatch("#[0-9a-f]{6}", one) for one in colours)
    assert {shade(rank) for rank in range(24)} == {"dark", "light"}


def test_a_drawing_has_a_title_and_the_distances(tmp_path: Path) -> None:
    root = write(tmp_path / "tree", TWO_SOCKETS)
    command("plan", "--sysfs", root, "--svg", tmp_path / "plain.svg")
    command("plan", "--sysfs", root, "--svg", tmp_path / "more.svg", "--distances")
    plain, more = (texts_of((tmp_path / f"{name}.svg").read_text()) for name in ("plain", "more"))
    assert plain[0].startswith(f"{root}, ") and ": rankspawn" in plain[0]
    assert not any(text.startswith("distance") for text in plain)
    found = more.index("distance between nodes (10 is the node itself)")
    assert [text for text in more[found + 1 :] if text.isdigit()] == "0 1 2 10 21 32 21 10 31 32 31 10".split()


WITH_ADAPTERS = {
    **{f"sys/class/infiniband/mlx5_{i}/device/numa_node": str(i % 2) for i in (0, 1, 10)},
    **{f"sys/class/infiniband/mlx5_{i}/ports/1/link_layer": "InfiniBand" for i in (0, 10)},
    "sys/class/infiniband/mlx5_1/ports/1/link_layer": "Ethernet",
    "sys/class/infiniband/mlx5_2/device/numa_node": "-1",
    **{f"sys/devices/system/cpu/cpu{cpu}/cache/index3/size": "36864K" for cpu in range(4)},
}


def test_a_drawing_shows_cache_sizes_and_network_adapters(tmp_path: Path) -> None:
    topology = Topology.read(write(tmp_path, Machine(sockets=2, cores=4, extra=WITH_ADAPTERS)))
    tree = Tree(topology.root)
    assert [(one.name, one.link, one.node) for one in adapters(tree, topology)] == [
        ("mlx5_0", "InfiniBand", 0),
        ("mlx5_1", "Ethernet", 1),
        ("mlx5_2", "", None),
        ("mlx5_10", "InfiniBand", 0),
    ]
    assert [cache_size(tree, cache) for cache in topology.caches] == ["36 MiB", ""]
    texts = texts_of(drawing(topology, (), ()))
    assert {"L3 36 MiB", "L3", "mlx5_0 InfiniBand", "mlx5_1 RoCE", "mlx5_2 RDMA"} <= set(texts)


def test_the_map_of_a_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = write(tmp_path, TWO_SOCKETS)
    words = ("plan", "--sysfs", root, "--map")
    assert command(*words, "--numa-binding", "exclusive") == 0
    assert capsys.readouterr().out.splitlines()[:-1] == [
        "node 0, socket 0, 64 GiB, rank 0",
        "  00  CPUs 0-1,8      L3",
        "  00  CPUs 2-3,10-11  L3",
        "  device 0: 0000:10:00.0 NVIDIA H100, rank 0",
        "node 1, socket 1, 64 GiB, ranks 1-2",
        "  11  CPUs 4-5,12-13  L3",
        "  22  CPUs 6-7,14-15  L3",
        "  device 1: 0000:11:00.0 NVIDIA H100, rank 1",
        "  device 2: 0000:12:00.0 NVIDIA H100, rank 2",
        "node 2, 64 GiB, no CPUs",
        "",
    ]
    assert command(*words, "--numa-binding", "node", "--nproc-per-node", 4) == 0
    out = capsys.readouterr().out
    assert "node 1, socket 1, 64 GiB, ranks 1-2\n  **  CPUs 4-5,12-13" in out
    assert out.splitlines()[-1] == "each character is a core: * several ranks"


def test_the_map_of_a_machine_marks_what_may_not_be_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command("topology", "--map", "--sysfs", write(tmp_path, Machine(cores=4, allowed="0-2")))
    assert capsys.readouterr().out.splitlines() == [
        "node 0, socket 0, 64 GiB",
        "  ...-  CPUs 0-3  L3",
        "",
        "each character is a core: . no rank, - this process may not use it",
    ]


def test_drawings_are_written(tmp_path: Path) -> None:
    root = write(tmp_path / "tree", TWO_SOCKETS)
    command("topology", "--sysfs", root, "--svg", tmp_path / "machine.svg")
    command("plan", "--sysfs", root, "--svg", tmp_path / "plan.svg", "--numa-binding", "exclusive")
    machine, plan_ = ((tmp_path / name).read_text() for name in ("machine.svg", "plan.svg"))
    assert "CPU 12, rank 1" not in machine
    assert "CPU 12, rank 1" in plan_
    with pytest.raises(CommandError, match=r"absent/x\.svg: No such file or directory"):
        command("topology", "--sysfs", root, "--svg", tmp_path / "absent" / "x.svg")


@pytest.mark.parametrize("name", MACHINES)
def test_a_capture_gives_the_same_machine(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = write(tmp_path / "tree", MACHINES[name])
    command("topology", "--sysfs", root, "--json", "--capture", tmp_path / "capture.tar.gz")
    before = json.loads(capsys.readouterr().out)
    with tarfile.open(tmp_path / "capture.tar.gz") as tar:
        assert len(tar.getnames()) == len(set(tar.getnames()))
        tar.extractall(tmp_path, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    command("topology", "--sysfs", tmp_path / "rankspawn-capture", "--json")
    after = json.loads(capsys.readouterr().out)
    assert {**before, "root": ""} == {**after, "root": ""}


def test_a_capture_of_this_machine_holds_nothing_private(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command("topology", "--json", "--capture", tmp_path / "capture.tar.gz")
    before = json.loads(capsys.readouterr().out)
    with tarfile.open(tmp_path / "capture.tar.gz") as tar:
        tar.extractall(tmp_path, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    status = (tmp_path / "rankspawn-capture/proc/self/status").read_text()
    assert [line.partition(":")[0] for line in status.splitlines()] == ["Cpus_allowed_list", "Mems_allowed_list"]
    command("topology", "--json", "--sysfs", tmp_path / "rankspawn-capture")
    after = json.loads(capsys.readouterr().out)
    for key in ("cpus", "allowed_cpus", "allowed_nodes", "cores", "caches", "sockets"):
        assert after[key] == before[key]


def test_a_table_is_plain_columns() -> None:
    out = io.StringIO()
    _table(("node", "CPUs"), [("0", "0-3"), ("10", "4")], out)
    assert out.getvalue() == "node  CPUs\n0     0-3\n10    4\n"


def test_nothing_dear_is_imported_until_it_is_used() -> None:
    modules = "json tarfile pynvml psutil asyncio pathlib rankspawn._place.drawing rankspawn._place.devices"
    code = (
        "import sys, rankspawn._binding; before = set(sys.modules); import rankspawn._cli.show\n"
        f"print(*sorted(set({modules!r}.split()) & (set(sys.modules) - before)))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == []


# A line of `run`, and the words of `plan` that mean the same.
LINES_OF_RUN = {
    "--nproc-per-node 3 train.py --json --lr 3": "--nproc-per-node 3",
    "--standalone --nproc_per_node=3 --tee 3 --log-dir logs --max-restarts 2 train.py": "--nproc-per-node 3",
    "--tee --nproc-per-node 3 train.py": "--nproc-per-node 3",
    "--nproc-per 3 --no-python -- prog --lr 3": "--nproc-per-node 3",
    "--numa-binding exclusive --nproc-per-node gpu -m train": "--numa-binding exclusive --nproc-per-node 3",
    "--nproc-per-node auto train.py": "",
    "--nproc-per-node cpu train.py": "--nproc-per-node 15",
    "train.py --nproc-per-node 3": "--nproc-per-node 1",
    "-t 0:1,1:2 --rdzv-backend c10d --nnodes 2 --node-rank 1 train.py": "--nproc-per-node 1",
}


@pytest.mark.parametrize("line", LINES_OF_RUN)
def test_plan_takes_a_line_of_run(line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = str(write(tmp_path, TWO_SOCKETS))
    assert main(["plan", "--sysfs", root, *line.split()]) == 0
    said = capsys.readouterr()
    assert said.err == ""
    assert main(["plan", "--sysfs", root, *LINES_OF_RUN[line].split()]) == 0
    assert capsys.readouterr().out == said.out != ""


@pytest.mark.parametrize(
    ("variables", "line"),
    [
        ({"PET_NPROC_PER_NODE": "3"}, "train.py"),
        ({"PET_NPROC_PER_NODE": "2", "PET_NUMA_BINDING": "exclusive"}, "--nproc-per-node 3 train.py"),
        ({"PET_NPROC_PER_NODE": "gpu"}, ""),
    ],
)
def test_plan_reads_the_variables_that_run_reads(
    variables: dict[str, str],
    line: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    root = str(write(tmp_path, TWO_SOCKETS))
    mode = variables.get("PET_NUMA_BINDING", "auto")
    assert main(["plan", "--sysfs", root, "--nproc-per-node", "3", "--numa-binding", mode]) == 0
    expected = capsys.readouterr().out
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert main(["plan", "--sysfs", root, *line.split()]) == 0
    assert capsys.readouterr().out == expected


def test_a_line_of_run_with_a_warm_start(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script = tmp_path / "train.py"
    script.write_text("import psutil\n")
    shown = f"a warm start of {script} preloads psutil\n"
    for line in (["--warm", script], ["--standalone", "--warm", script]):
        assert main(["plan", *map(str, line)]) == 0
        assert capsys.readouterr().out == shown
    for line in (
        ["--nproc-per-node", 2, "--warm", "--max-restarts", 1, script, "--lr", 3],
        ["--nproc-per-node", 2, "--warm", "psutil", script, "--lr", 3],
        ["--nproc-per-node", 2, "--preload", "psutil", script],
        ["--warm", script, "--nproc-per-node", 2],
    ):
        assert main(["plan", *map(str, line)]) == 0
        rows = capsys.readouterr().out
        assert rows.startswith("rank ") and rows.endswith(f"\n\n{shown}")


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ("--bogus train.py", "unrecognized arguments: --bogus"),
        ("--nproc-per-node 0 train.py", "expected a positive integer, auto, cpu, gpu or xpu, got '0'"),
        ("--warm", "--warm needs SCRIPT"),
        ("-m", "--module needs --warm, or SCRIPT"),
        ("--nproc-per-node xpu", "--nproc-per-node xpu: no Intel GPU is visible"),
        ("--tee 9 train.py", "expected 0 (none), 1 (stdout), 2 (stderr) or 3 (both)"),
    ],
)
def test_a_line_that_run_refuses(line: str, error: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        status = main(["plan", "--sysfs", str(write(tmp_path, TWO_SOCKETS)), *line.split()])
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else -1
    assert status == 2
    said = capsys.readouterr()
    assert error in said.err
    assert said.out == ""
