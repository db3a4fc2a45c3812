"""``rankspawn topology`` and ``rankspawn plan``: print a machine and a plan as a table, as JSON, and as a drawing."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Collection, Iterable, Sequence

from .._ids import format_ids
from .._place.sysfs import Tree
from .._place.topology import Topology
from .line import warm_start
from .options import AUTO_BINDS, CommandError, PlacementOptions, add_placement_options, placement
from .vocabulary import processes
from .warm import describe

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import IO, Any

    from .._place.plan import Placed
    from .._place.visible import Device

JSON_VERSION = 1
"""The version of the JSON. It changes when a field is removed or changes its meaning, not when a field is added."""

_GIB = 1 << 30
# Two lines of a process's status say what it may use. A capture contains only these.
_STATUS, _STATUS_LINES = "proc/self/status", ("Cpus_allowed_list:", "Mems_allowed_list:")


def add_topology_options(topology: argparse.ArgumentParser) -> None:
    """Add the options of ``topology``.

    ``args.run(args)`` prints the machine and returns the exit status. It raises PlacementError.
    """
    topology.description = "Shows this machine's sockets, NUMA nodes, cores, caches and accelerators."
    _add_common_options(topology)
    topology.add_argument("--capture", metavar="FILE.tar.gz", help="save the files that are read, for a bug report")
    topology.set_defaults(run=_topology)


def add_plan_options(plan: argparse.ArgumentParser) -> None:
    """Add the options of ``plan``; ``args.run(args)`` works as for ``topology``."""
    plan.description = (
        "Shows where `rankspawn run` would put each rank. It takes the same command line and the same PET_ variables,"
        " and starts nothing. The other options of `run` make no difference here."
    )
    plan.add_argument(
        "--nproc-per-node",
        "--nproc_per_node",
        type=processes,
        metavar="N",
        help="how many ranks, or as many as there are of: auto, cpu, gpu, xpu (default: one for each device; with a"
        " SCRIPT, or without devices, 1)",
    )
    plan.add_argument(
        "--warm",
        nargs="?",
        const="",
        metavar="SCRIPT",
        help="show which modules a warm start of SCRIPT would import once, and which not",
    )
    plan.add_argument("-m", "--module", action="store_true", help="with --warm: SCRIPT is the name of a module")
    add_placement_options(plan)
    _add_common_options(plan)
    plan.set_defaults(run=_plan, command=[], preload=None, no_python=False, run_path=False)


def _add_common_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON (default: text)")
    parser.add_argument("--svg", metavar="FILE", help="draw a picture")
    parser.add_argument("--map", action="store_true", help="draw a map as text, with one character for each core")
    parser.add_argument(
        "--distances", action="store_true", help="with --svg: draw also the distances between NUMA nodes"
    )
    parser.add_argument(
        "--sysfs", default="/", metavar="ROOT", help="read another machine: the folder that has its sys/ (default: /)"
    )


def _topology(args: argparse.Namespace) -> int:
    from .._place.devices import find_visible, read_device_files

    _check_folders(args.capture, args.svg)
    tree = Tree(args.sysfs)
    topology = Topology.read(tree)
    seen = find_visible(topology, tree=tree)
    devices = seen.devices
    topology = topology.replace(notes=(*topology.notes, *seen.notes))
    if args.capture:
        read_device_files(tree)
        capture(tree, args.capture)
    if args.svg:
        _draw(args, topology, devices, ())
    if args.map:
        _print_map(topology, devices, ())
    elif args.json:
        print_json(topology_json(topology, devices))
    else:
        _print_topology(topology, devices, sys.stdout)
    return 0


def _has_devices(options: PlacementOptions, topology: Topology) -> bool:
    from .._place.devices import find_devices, parse_devices

    return bool(find_devices(topology) if options.devices is None else parse_devices(options.devices))


def _check_folders(*paths: str | None) -> None:
    """Raise CommandError if the folder of a file to write does not exist; None stands for no file."""
    if any(paths):
        from .program import check_folder_of

        for path in paths:
            check_folder_of(path)


def _plan(args: argparse.Namespace) -> int:
    from .._place.auto import idle_note
    from .._place.devices import find_devices, is_live
    from .._place.openmp import openmp_warnings, quota_note

    words = args.command[1:] if args.command[:1] == ["--"] else args.command
    if args.module and args.warm is None and not words and not args.parser.get_default("module"):  # PET_MODULE
        args.parser.error("--module needs --warm, or SCRIPT")
    warm, script = warm_start(args, words)
    if words and not args.no_python:
        from .settings import say_unmeant

        say_unmeant(words, args.module and not args.run_path)
    if warm is not None and args.nproc_per_node is None and not args.json:
        print(*describe(warm, script), sep="\n")
        return 0
    _check_folders(args.svg)
    topology = Topology.read(args.sysfs)
    options = PlacementOptions.read(args)
    nprocs = args.nproc_per_node
    if nprocs is None and (words or not _has_devices(options, topology)):
        nprocs = 1  # as in `run`
    if isinstance(nprocs, str):
        from .meeting import count_ranks

        nprocs = count_ranks(nprocs, topology)
    ranks = placement(options, topology, nprocs)
    live = is_live(topology.root)
    notes = [_auto_note(options, topology, ranks), *(note for rank in ranks for note in rank.notes)]
    notes += openmp_warnings(os.environ) if live else ()
    notes.append(quota_note(len(topology.allowed_cpus), topology.root))
    notes.append(idle_note(topology, ranks))
    notes = list(dict.fromkeys(filter(None, notes)))
    if args.svg or args.map:
        followed = tuple(dict.fromkeys(rank.device for rank in ranks if rank.device))
        devices = followed or find_devices(topology)
    if args.svg:
        _draw(args, topology, devices, ranks)
    if args.map:
        _print_map(topology, devices, ranks)
        _notes((*topology.notes, *notes), sys.stdout)
    elif args.json:
        data = {"version": JSON_VERSION, "ranks": [rank_json(i, rank) for i, rank in enumerate(ranks)], "notes": notes}
        if warm is not None:
            data["warm"] = {"modules": list(warm.modules), "left_out": dict(warm.left_out)}
        print_json(data)
    else:
        _print_plan(topology, ranks, notes, sys.stdout)
    if warm is not None and not args.json:
        print("", *describe(warm, script), sep="\n")
    return 0


def _auto_note(options: PlacementOptions, topology: Topology, ranks: Sequence[Placed]) -> str:
    """Say what mode auto decided; "" for another mode, or if there was nothing to decide."""
    if not options.auto_decides:
        return ""
    if options.auto_binds(ranks):
        return AUTO_BINDS
    usable = [node for node in topology.nodes if node.cpus & topology.allowed_cpus]
    if len(usable) < 2 or any(rank.notes for rank in ranks):
        return ""
    return f"auto binds no rank to a node: some of nodes {format_ids(node.id for node in usable)} would get no rank"


def topology_json(topology: Topology, devices: Iterable[Device]) -> dict[str, Any]:
    """Turn a machine into plain data. Ids are text in the kernel's list format; memory is in bytes."""
    return {
        "version": JSON_VERSION,
        "root": topology.root,
        "cpus": format_ids(topology.cpus),
        "offline": format_ids(topology.offline),
        "allowed_cpus": format_ids(topology.allowed_cpus),
        "allowed_nodes": format_ids(topology.allowed_nodes),
        "nodes": [
            {"id": one.id, "cpus": format_ids(one.cpus), "memory": one.memory, "distances": dict(one.distances)}
            for one in topology.nodes
        ],
        "sockets": [{"id": one.id, "cpus": format_ids(one.cpus)} for one in topology.sockets],
        "dies": [{"id": one.id, "cpus": format_ids(one.cpus)} for one in topology.dies],
        "cores": [{"cpus": format_ids(one.cpus), "kind": one.kind} for one in topology.cores],
        "caches": [{"level": one.level, "cpus": format_ids(one.cpus)} for one in topology.caches],
        "devices": [device_json(one) for one in devices],
        "notes": list(topology.notes),
    }


def device_json(device: Device) -> dict[str, Any]:
    """Turn an accelerator into plain data."""
    return {
        "address": device.address,
        "node": device.node,
        "local_cpus": format_ids(device.local_cpus),
        "vendor": device.vendor,
        "name": device.name,
        "uuid": device.uuid,
    }


def rank_json(index: int, rank: Placed) -> dict[str, Any]:
    """Turn one rank of a plan into plain data, as in a report. Inherited cpus and memory are None."""
    cpus, memory = rank.binding.cpus, rank.binding.memory
    return {
        "rank": index,
        "cpus": None if cpus is None else format_ids(cpus),
        "memory": None if memory is None else str(memory),
        "required": rank.binding.required,
        "node": rank.node,
        "device": None if rank.device is None else device_json(rank.device),
        "omp_num_threads": rank.omp_threads,
        "notes": list(rank.notes),
    }


def print_json(data: dict[str, Any]) -> None:
    """Print plain data, indented."""
    import json

    print(json.dumps(data, indent=2))


def _draw(args: argparse.Namespace, topology: Topology, devices: Sequence[Device], ranks: Sequence[Placed]) -> None:
    from datetime import datetime

    from .._place.devices import is_live
    from .._place.drawing import drawing

    host = os.uname().nodename if is_live(topology.root) else topology.root
    command = " ".join(["rankspawn", *sys.argv[1:]])
    title = f"{host}, {datetime.now():%Y-%m-%d %H:%M}: {command}"
    try:
        with open(args.svg, "w", encoding="utf-8") as file:
            file.write(drawing(topology, devices, ranks, title=title, distances=args.distances))
    except OSError as error:
        raise CommandError(f"--svg {args.svg}: {error.strerror}") from error


def _print_map(topology: Topology, devices: Sequence[Device], ranks: Sequence[Placed]) -> None:
    from .._place.textmap import text_map

    print(text_map(topology, devices, ranks), end="")


def _print_topology(topology: Topology, devices: Sequence[Device], out: IO[str]) -> None:
    kinds = [core.kind for core in topology.cores]
    hybrid = ", ".join(f"{kinds.count(kind)} of {kind}" for kind in sorted(set(kinds)) if kind)
    cores = _count(kinds, "core") + (f" ({hybrid})" if hybrid else "")
    sockets, nodes = _count(topology.sockets, "socket"), _count(topology.nodes, "node")
    print(f"{_count(topology.cpus, 'CPU')}, {cores}, {sockets}, {nodes}", file=out)
    print(f"allowed: CPUs {format_ids(topology.allowed_cpus)}, nodes {format_ids(topology.allowed_nodes)}", file=out)
    if topology.offline:
        print(f"offline: CPUs {format_ids(topology.offline)}", file=out)
    print(file=out)
    _table(("node", "socket", "CPUs", "cores", "memory", "last-level caches", "distances"), _node_rows(topology), out)
    if devices:
        from .._place.devices import locate

        rows = []
        for number, device in enumerate(devices):
            node, _ = locate(topology, device)
            where = "unknown" if node is None else str(node)
            rows.append((str(number), device.address, where, device.vendor, device.name, format_ids(device.local_cpus)))
        print(file=out)
        _table(("device", "address", "node", "vendor", "name", "local CPUs"), rows, out)
        _notes([note for device in devices for note in locate(topology, device)[1]], out)
    else:
        print("\nno accelerators found", file=out)
    _notes(topology.notes, out)


def _node_rows(topology: Topology) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for node in topology.nodes:
        sockets = [socket.id for socket in topology.sockets if socket.cpus & node.cpus]
        caches = [(cache.level, len(cache.cpus & node.cpus)) for cache in topology.caches if cache.cpus & node.cpus]
        counted = [f"{caches.count(one)} x L{one[0]} of {one[1]} CPUs" for one in dict.fromkeys(caches)]
        cores = sum(bool(node.cpus.intersection(core.cpus)) for core in topology.cores)
        memory = f"{node.memory / _GIB:.1f} GiB" if node.memory else "none"
        distances = " ".join(str(distance) for _, distance in node.distances)
        cpus = format_ids(node.cpus) or "none"
        rows.append((str(node.id), format_ids(sockets), cpus, str(cores), memory, ", ".join(counted), distances))
    return rows


def _print_plan(topology: Topology, ranks: Sequence[Placed], notes: Sequence[str], out: IO[str]) -> None:
    rows = []
    for index, rank in enumerate(ranks):
        cpus, memory = rank.binding.cpus, rank.binding.memory
        rows.append(
            (
                str(index),
                rank.device.address if rank.device else "-",
                "-" if rank.node is None else str(rank.node),
                "inherited" if cpus is None else format_ids(cpus),
                "-" if cpus is None else str(sum(not cpus.isdisjoint(core.cpus) for core in topology.cores)),
                "inherited" if memory is None else str(memory),
                str(rank.omp_threads),
            )
        )
    _table(("rank", "device", "node", "CPUs", "cores", "memory", "OMP_NUM_THREADS"), rows, out)
    _notes((*topology.notes, *notes), out)


def _count(things: Collection[object], word: str) -> str:
    return f"{len(things)} {word}{'' if len(things) == 1 else 's'}"


def _notes(notes: Sequence[str], out: IO[str]) -> None:
    for note in dict.fromkeys(notes):
        print(f"note: {note}", file=out)


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]], out: IO[str]) -> None:
    """Print plain columns, one line for each row, which people and other programs can read."""
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    for row in (head, *rows):
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip(), file=out)


def capture(tree: Tree, path: str) -> None:
    """Write all files that were read from ``tree``, and all folders that were listed, into a tar.gz.

    The unpacked tree gives the same topology and devices.

    Raises:
        CommandError: ``path`` cannot be written.
    """
    import io
    import tarfile

    def header(name: str, size: int, kind: bytes) -> tarfile.TarInfo:
        info = tarfile.TarInfo(f"rankspawn-capture/{name}")
        info.size, info.type, info.mode = size, kind, 0o755 if kind == tarfile.DIRTYPE else 0o644
        return info

    root = tree.root.rstrip("/")
    folders = {f"{folder}/{name}" for folder, names in tree.listed.items() for name in names}
    try:
        with tarfile.open(path, "w:gz") as tar:
            for folder in sorted(one for one in folders if os.path.isdir(f"{root}/{one}")):
                tar.addfile(header(folder, 0, tarfile.DIRTYPE))
            for file, text in sorted(tree.opened.items()):
                if file == _STATUS:
                    text = "\n".join(line for line in text.splitlines() if line.startswith(_STATUS_LINES))
                data = f"{text}\n".encode()
                tar.addfile(header(file, len(data), tarfile.REGTYPE), io.BytesIO(data))
    except OSError as error:
        raise CommandError(f"--capture {path}: {error.strerror}") from error
