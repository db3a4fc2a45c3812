"""The blocks of the pages that need mpirun and mpiexec."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from tests.support.pages import PROGRAMS, Block, missing, run

# Debian's names of the two; `mpirun` may be either. The variables allow root, and more ranks than CPUs.
LAUNCHERS = {"mpirun": "mpirun.openmpi", "mpiexec": "mpiexec.hydra"}
ENVIRONMENT = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "OMPI_MCA_rmaps_base_oversubscribe": "1",
}


@pytest.mark.parametrize("block", [block for block in PROGRAMS if "MPI" in block.needs()], ids=str)
def test_block(block: Block, tmp_path: Path) -> None:
    if lacking := missing(block, "MPI"):
        pytest.skip(f"needs {', '.join(sorted(lacking))}")
    (tmp_path / "bin").mkdir()
    for name, debians in LAUNCHERS.items():
        found = shutil.which(debians)
        assert found, f"{debians} is not installed; on Debian or Ubuntu: apt-get install openmpi-bin mpich"
        (tmp_path / "bin" / name).symlink_to(found)
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    (tmp_path / "page").mkdir()
    run(block, tmp_path / "page", {**os.environ, **ENVIRONMENT, "PATH": path})
