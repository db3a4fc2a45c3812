"""A sweep over parameters: one group after another, each with its own variables and its own folder of logs."""

from __future__ import annotations

import tempfile
from itertools import product
from pathlib import Path

from rankspawn import launch


def score(rate: float, width: int, logs: Path) -> int:
    """Train with these parameters; what rank 0 wrote last is the score."""
    variables = {"RATE": str(rate), "WIDTH": str(width)}
    script = "echo $((WIDTH * ${RATE#0.}))"
    with launch(["sh", "-c", script], 2, rank_env=[variables] * 2, log_dir=logs) as group:
        group.wait(timeout=600, check=True)
        assert group.files is not None and group.files[0].stdout is not None
        return int(group.files[0].stdout.read_text().split()[-1])


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        scores = {
            (rate, width): score(rate, width, Path(folder, f"rate-{rate}-width-{width}"))
            for rate, width in product((0.1, 0.3), (2, 4))
        }
    for parameters, found in sorted(scores.items(), key=lambda item: -item[1]):
        print(*parameters, found)


if __name__ == "__main__":
    main()
