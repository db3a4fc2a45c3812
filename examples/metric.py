"""The lines of all ranks, as they are written, become a metric: the mean loss of each step over the ranks."""

from __future__ import annotations

import json
from collections import defaultdict

from rankspawn import launch

SCRIPT = """
for step in 1 2 3; do echo "{\\"step\\": $step, \\"loss\\": $((10 - 2 * step + RANK))}"; done
echo "rank $RANK is done" >&2
"""


def main() -> None:
    losses: dict[int, list[float]] = defaultdict(list)
    with launch(["bash", "-c", SCRIPT], 3, capture_output=True) as group:
        for line in group.lines():
            if line.stream == "stdout":
                told = json.loads(line.text)
                of_step = losses[told["step"]]
                of_step.append(told["loss"])
                if len(of_step) == len(group):
                    print("step", told["step"], "mean loss", sum(of_step) / len(of_step))
        group.check()


if __name__ == "__main__":
    main()
