"""The steps of a pipeline, each with ranks of its own. One that fails raises, and the rest is not begun."""

from __future__ import annotations

import sys

from rankspawn import RanksFailedError, launch

STEPS = {
    "prepare": "echo shard $RANK is ready",
    "train": 'test "$RANK" = 0 || { echo "out of memory" >&2; exit 9; }; exec sleep 60',
    "evaluate": "echo never",
}


def run(name: str, script: str) -> None:
    with launch(["sh", "-c", script], 2, capture_output=True, numa="none") as group:
        group.wait(check=True)
    print(name, "is done", flush=True)


def main() -> int:
    for name, script in STEPS.items():
        try:
            run(name, script)
        except RanksFailedError as error:
            print(f"{name} failed:\n{error}")
            return error.returncode
    return 0


if __name__ == "__main__":
    sys.exit(main())
