"""A launcher of one's own over torch's interface: a handler for each rank, and a loop that watches them."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

from rankspawn import AffinityMode, NumaOptions, SubprocessHandler, get_subprocess_handler


def start(rank: int, nprocs: int, logs: Path) -> SubprocessHandler:
    return get_subprocess_handler(
        entrypoint="sh",
        args=("-c", "echo I am $RANK of $WORLD_SIZE; exit $RANK"),
        env={"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(nprocs), "LOCAL_WORLD_SIZE": str(nprocs)},
        stdout=str(logs / f"{rank}.out"),
        stderr=str(logs / f"{rank}.err"),
        local_rank_id=rank,
        numa_options=NumaOptions(AffinityMode.NODE),
    )


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        logs = Path(folder)
        handlers = {rank: start(rank, 3, logs) for rank in range(3)}
        try:
            while any(handler.proc.poll() is None for handler in handlers.values()):
                time.sleep(0.01)
        finally:
            for handler in handlers.values():
                handler.close()  # and with it all that the rank has started
        for rank, handler in handlers.items():
            print((logs / f"{rank}.out").read_text().strip(), "->", handler.proc.returncode)


if __name__ == "__main__":
    main()
