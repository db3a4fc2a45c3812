"""Measure every figure and print one table of ratios, with the target beside each: ``python benchmarks/run.py``.

Options: names of sections to measure only those, ``--effort 0.2`` for a quick look, ``--markdown FILE`` to write the
table down, ``--check`` to exit with status 1 where a target is missed or its figure could not be measured.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from figures import NOTES, SECTIONS, Figure
from harness import Bench, Timings, Unable

MARKS = {True: "pass", False: "MISS", None: ""}
HEADER = """# Benchmarks

Written by `python benchmarks/run.py --markdown docs/benchmarks.md`; `make bench` prints the same table.

The measuring process and its children are pinned to one core, unless a row says otherwise; those of `launch` have all.
Competitors are timed in turns, in blocks of a few rounds; a ratio is the median over the blocks, with its quartiles
beside it. Every time is from the call to the return of `wait`, and of `launch` to the end of the `with` block. The
floor is `benchmarks/floor.c`: clone, setsid, sched_setaffinity, set_mempolicy, execve and waitpid of a program of one
system call; the best floor is that of many ranks with the number of threads, of 1 to 16, and with the way that are the
quickest on this machine. Absolute times hold for the machine named here, and only for that hour."""
HEADINGS = ("figure", "measured", "quartiles", "target", "", "medians, us")


@dataclass(frozen=True)
class Row:
    """A line of the table. met: None where nothing is promised; note: why there is no figure."""

    figure: Figure
    value: str = ""
    spread: str = ""
    times: str = ""
    met: bool | None = None
    note: str = ""

    def cells(self) -> tuple[str, ...]:
        bound, sign = (self.figure.most, "<=") if self.figure.most is not None else (self.figure.least, ">=")
        target = f"{sign} {bound:g}" if bound is not None else ""
        mark = "skip" if self.note else MARKS[self.met]
        return (self.figure.text, self.value, self.spread, target, mark, self.times or self.note)


def row(figure: Figure, timings: Timings) -> Row:
    try:
        value, low, high = figure.measured(timings)
        times = " / ".join(f"{timings.median(case) / 1000:,.1f}" for case in figure.cases)
    except Unable as why:
        return Row(figure, note=str(why))
    return Row(figure, f"{value:,.2f}", f"{low:,.2f}-{high:,.2f}", times, figure.met(value))


def aligned(lines: Sequence[Sequence[str]]) -> Iterable[str]:
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    for line in lines:
        yield "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()


def machine(bench: Bench) -> list[str]:
    """What a reader must know of the machine to read the figures."""
    versions = f"Linux {platform.release()}, {platform.python_implementation()} {platform.python_version()}"
    cores = len(os.sched_getaffinity(0))
    load = os.getloadavg()[0]
    facts = [
        f"{versions}, {platform.machine()}, {cores} CPUs (measuring and measured on CPU {bench.cpu}), load {load:.2f}"
    ]
    return [*facts, bench.node_note] if bench.node_note else facts


def main(arguments: Sequence[str] | None = None) -> int:
    names = [section.group.name for section in SECTIONS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=f"one of {', '.join(names)} (default: all)")
    parser.add_argument("--effort", type=float, default=1.0, help="scale the number of blocks (default 1)")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the table to FILE too")
    parser.add_argument("--check", action="store_true", help="status 1 unless every target is met")
    options = parser.parse_args(arguments)
    if unknown := set(options.sections) - set(names):
        parser.error(f"no section {', '.join(sorted(unknown))}")

    rows: list[Row] = []
    with Bench() as bench:
        facts = machine(bench)
        for section in SECTIONS:
            if options.sections and section.group.name not in options.sections:
                continue
            print(f"measuring {section.group.name} ...", file=sys.stderr, flush=True)
            timings = bench.interleave(section.group, effort=options.effort)
            rows += [row(figure, timings) for figure in section.figures]
        facts += bench.facts

    print("\n".join(facts))
    print("\n".join(aligned([HEADINGS, *(one.cells() for one in rows)])))
    print("\n".join(NOTES))
    if options.markdown:
        lines = [HEADINGS, ("---",) * len(HEADINGS), *(one.cells() for one in rows)]
        table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        options.markdown.write_text("\n\n".join([HEADER, *facts, table, *NOTES]) + "\n", encoding="utf-8")
    promised = [one for one in rows if one.figure.most is not None or one.figure.least is not None]
    return int(options.check and not all(one.met for one in promised))


if __name__ == "__main__":
    sys.exit(main())
