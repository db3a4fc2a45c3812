"""What ``plan`` says of ranks on some machine, beside what ``run`` would do with them."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest

from rankspawn import PlacementError
from rankspawn._cli.options import PlacementOptions
from rankspawn._cli.run import add_run_options
from rankspawn._cli.settings import place_ranks
from rankspawn._cli.show import add_plan_options
from rankspawn._ids import format_ids


def parsed(add: Any, words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add(parser)
    return parser.parse_args(words)


def planned(root: Path, nprocs: int, options: str, capsys: pytest.CaptureFixture[str]) -> tuple[Any, list[str]]:
    """What ``plan`` says of each rank, and its notes; or its error."""
    words = ["--sysfs", str(root), "--json", "--nproc-per-node", str(nprocs), *options.split()]
    args = parsed(add_plan_options, words)
    try:
        args.run(args)
    except PlacementError as error:
        return str(error), []
    said = json.loads(capsys.readouterr().out)
    return [(rank["cpus"], rank["memory"], rank["required"], rank["omp_num_threads"]) for rank in said["ranks"]], said[
        "notes"
    ]


def would_run(root: Path, nprocs: int, options: str, capsys: pytest.CaptureFixture[str]) -> tuple[Any, list[str]]:
    """How ``run`` would place each rank, and what it says; or its error."""
    args = parsed(add_run_options, ["--nproc-per-node", str(nprocs), *options.split(), "x.py"])
    try:
        bindings, threads = place_ranks(PlacementOptions.read(args), nprocs, str(root))
    except PlacementError as error:
        return str(error), []
    ranks = []
    for binding, count in zip(bindings, threads, strict=True):
        if binding is None:
            ranks.append((None, None, False, count))
            continue
        memory = binding.memory and str(binding.memory)
        ranks.append((binding.cpus and format_ids(binding.cpus), memory, binding.required, count))
    return ranks, [line.removeprefix("rankspawn: ") for line in capsys.readouterr().err.splitlines()]


def agree(root: Path, nprocs: int, options: str, capsys: pytest.CaptureFixture[str]) -> None:
    plan, notes = planned(root, nprocs, options, capsys)
    run, said = would_run(root, nprocs, options, capsys)
    if not isinstance(plan, str):  # a rank that gets nothing is unbound, whether a refusal would have failed it or not
        plan = [(c, m, r if c or m else False, o) for c, m, r, o in plan]
    assert run == plan, (root.name, nprocs, options)
    assert set(said) <= set(notes), (root.name, nprocs, options)
