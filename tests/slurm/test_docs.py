"""The pages' blocks of code that need Slurm, on nodes that claim the 64 CPUs of the examples."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster, cluster
from tests.support.pages import PROGRAMS, Block, missing, run


@pytest.fixture(scope="module")
def slurm() -> Iterator[Cluster]:
    with cluster(cpus=64) as mine:
        yield mine


@pytest.mark.parametrize("block", [block for block in PROGRAMS if "Slurm" in block.needs()], ids=str)
def test_block(block: Block, slurm: Cluster, tmp_path: Path) -> None:
    if lacking := missing(block, "Slurm"):
        pytest.skip(f"needs {', '.join(sorted(lacking))}")
    # A task cannot be bound to 64 CPUs where there are fewer.
    run(block, tmp_path, {**slurm.environ, "SLURM_CPU_BIND": "none"})
