"""A rank fails: who it was, how it ended, where it was bound, what it wrote last."""

from __future__ import annotations

from rankspawn import launch

SCRIPT = 'test "$RANK" = 2 || exec sleep 60; echo "loss is nan at step 7" >&2; exit 3'


def main() -> None:
    with launch(["sh", "-c", SCRIPT], 4, numa="node", capture_output=True) as group:
        group.wait(timeout=60)
        first, *others = group.failures()
    print(first)
    print(first.rank, first.returncode, first.output.lines if first.output else ())
    print("ended because of it:", *(failure.rank for failure in others))


if __name__ == "__main__":
    main()
