"""The blocks of the pages that need Slurm, on nodes that say to have the 64 CPUs of the examples."""

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
    # Bound to 64 CPUs a task cannot be, where there are fewer.
    run(block, tmp_path, {**slurm.environ, "SLURM_CPU_BIND": "none"})
