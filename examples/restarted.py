"""Eight ranks, whose lines are shown behind their numbers, and which are all started again when one fails."""

from __future__ import annotations

from rankspawn import launch

# Rank 3 fails in the first attempt, when it and rank 0 have said something.
SCRIPT = """
echo "attempt $TORCHELASTIC_RESTART_COUNT"
[ $RANK = 3 ] && [ $TORCHELASTIC_RESTART_COUNT = 0 ] && echo "no GPU" >&2 && exit 1
[ $TORCHELASTIC_RESTART_COUNT = 0 ] && exec sleep 60
exit 0
"""


def main() -> None:
    with launch(["sh", "-c", SCRIPT], 8, max_restarts=2, tee=True, tee_ranks={3}, numa="none") as group:
        print(group.wait(timeout=60, check=True), "after", group.job.restart_count, "restart")


if __name__ == "__main__":
    main()
