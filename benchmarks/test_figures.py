"""The figures under pytest-benchmark: ``pytest benchmarks``. ``run.py`` prints the same samples as ratios with targets.

The samples of a group are taken in turns (see ``harness``) and then played back to pytest-benchmark through a clock of
our own. pytest-benchmark itself would measure one test after the other, so the machine's mood would be in every ratio.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from figures import SECTIONS, Measured, Section
from harness import Case, Unable


class Playback:
    """A clock that advances by one recorded sample with each play()."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.samples: Iterator[int] = iter(())

    def __call__(self) -> float:
        return self.seconds

    def play(self) -> None:
        self.seconds += next(self.samples) / 1e9


CLOCK = Playback()
CASES = [
    pytest.param(section, case, id=f"{section.group.name}: {case.label} ({case.situation.fds} fds)")
    for section in SECTIONS
    for case in section.group.cases
]


@pytest.mark.benchmark(timer=CLOCK, disable_gc=False)
@pytest.mark.parametrize(("section", "case"), CASES)
def test_figure(benchmark: Any, measured: Measured, section: Section, case: Case) -> None:
    timings = measured.timings(section)
    try:
        samples = timings.samples(case)
    except Unable as why:
        pytest.skip(str(why))
    CLOCK.seconds, CLOCK.samples = 0.0, iter(samples)
    benchmark.group = section.group.name
    for figure in section.figures:
        if figure.over == case and not timings.unable.keys() & set(figure.cases):
            benchmark.extra_info[figure.text] = round(figure.measured(timings)[0], 3)
    benchmark.pedantic(CLOCK.play, rounds=len(samples), iterations=1)
