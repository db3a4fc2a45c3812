"""Draws a job's report as SVG: a row for each rank, with what its start cost, how long it ran, how it ended, and where
it was bound. The drawing has no script, and follows the reader's choice of light or dark."""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING, NamedTuple

from .._canvas import Canvas, Svg, escaped

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .form import AttemptReport, GroupReport, RankReport

_PAD, _TOP = 12, 94  # around everything; above the rows
_RANK, _START, _RUN, _END = 44, 160, 600, 84  # the widths of the columns; those of the binding follow from their texts
_MOST = 40  # characters of each half of a binding; the tooltip of the row has all
_CHARACTER = 6.6  # pixels, at 11px: above the average, so that the widest fonts fit

_STYLE = """
text { font: 11px system-ui, sans-serif; fill: #1d2733 }
.dense text { font-size: 9px } .job { font-size: 13px; font-weight: 600 }
.note, .tick { fill: #5d6a79 } .tick { text-anchor: middle; font-size: 10px } .number { text-anchor: end }
.band { fill: #f3f5f8 } .grid { stroke: #dce1e8 } .again { stroke: #7d8997; stroke-dasharray: 3 3 }
.start { fill: #d8b13f } .ran { fill: #bccde1 } .ran.first { fill: #f0b9bd } .mark.first { stroke: #1d2733 }
.ok { fill: #2f8f4e } .failed { fill: #cf2f3b } .killed { fill: #b0601a } .running { fill: #2f6fb5 }
text.first { font-weight: 700 }
@media (prefers-color-scheme: dark) {
.paper { fill: #14181d } text { fill: #e3e8ee } .note, .tick { fill: #97a3b0 }
.band { fill: #1b2027 } .grid { stroke: #303842 } .again { stroke: #77838f }
.start { fill: #b08f35 } .ran { fill: #40566f } .ran.first { fill: #84353c } .mark.first { stroke: #ffffff }
.ok { fill: #58bf7a } .failed { fill: #ff6b6f } .killed { fill: #e39a54 } .running { fill: #6fb0f5 }
}
"""

_OUTCOMES = {"ok": "exit 0", "failed": "nonzero exit", "killed": "ended by a signal", "running": "runs"}

# The distances of ticks, in seconds: 1, 2 and 5 times powers of ten, and divisors of a minute, an hour and a day.
_STEPS = (
    *(float(f"{digit}e{power}") for power in range(-9, 0) for digit in (1, 2, 5)),
    *(float(unit * count) for unit in (1, 60) for count in (1, 2, 5, 10, 15, 30)),
    *(float(3600 * count) for count in (1, 2, 3, 6, 12)),
    *(float(86400 * digit * 10**power) for power in range(5) for digit in (1, 2, 5)),
)
_UNITS = (("d", 86400), ("h", 3600), ("min", 60))


class Axis(NamedTuple):
    """A stretch of time, in seconds from 0, over a stretch of the drawing, in pixels."""

    left: float
    width: float
    span: float

    def x(self, seconds: float) -> float:
        return self.left + self.width * min(max(seconds, 0.0), self.span) / self.span

    def ticks(self, most: int) -> Iterator[tuple[float, str]]:
        """At most ``most`` + 1 round times, from 0 on, and their texts."""
        step = next((one for one in _STEPS if self.span <= one * most), self.span)
        for number in range(int(self.span / step * (1 + 1e-9)) + 1):
            yield number * step, _round_time(number * step, step)


class _Rows(NamedTuple):
    """The height of a row, that of its bar, and how far below the row's top its text stands, in pixels."""

    height: int
    bar: int
    text: int


def timeline_text(report: GroupReport, path: str) -> str:
    """The text of a timeline's file: a trace for a name that ends in ".json", else the drawing."""
    if path.lower().endswith(".json"):
        from .trace import trace_json

        return trace_json(report)
    return timeline_svg(report)


def timeline_svg(report: GroupReport) -> Svg:
    """The SVG text of a report.

    The attempts of a restarted job follow each other on one axis. The drawn costs of the start, and the written ends
    and bindings, are those of the last attempt.
    """
    return _Timeline(report).drawn()


class _Timeline(Canvas):
    def __init__(self, report: GroupReport) -> None:
        super().__init__()
        self.report, self.attempts = report, report["attempts"]
        self.last = self.attempts[-1]
        self.ranks: dict[int, list[tuple[AttemptReport, RankReport, str]]] = {}
        for attempt in self.attempts:
            culprit = _first_failed(attempt)
            for rank in attempt["ranks"]:
                kind = _outcome(rank) + (" first" if rank is culprit else "")
                self.ranks.setdefault(rank["rank"], []).append((attempt, rank, kind))
        self.count = 1 + max(self.ranks, default=-1)
        self.rows = _Rows(20, 12, 14) if self.count <= 32 else _Rows(15, 9, 11) if self.count <= 96 else _Rows(11, 7, 9)
        starts = [rank["executed"] for rank in self.last["ranks"] if rank["executed"] is not None]
        left = _PAD + _RANK
        self.start = Axis(left, _START, max(starts) or 1e-6) if starts else None
        self.run = Axis(left + (_START + 3 * _PAD if starts else 0), _RUN, report["duration"] or 1e-6)
        self.side = self.run.left + self.run.width + 2 * _PAD
        cpus, memory = (max([8, *(len(text(rank)) for rank in self.last["ranks"])]) for text in (_cpus, _memory))
        self.memory = self.side + _END + _CHARACTER * cpus + _PAD
        self.width = self.memory + _CHARACTER * memory + _PAD
        self.bottom = _TOP + self.count * self.rows.height

    def drawn(self) -> Svg:
        self.title()
        for number in range(1, self.count, 2):
            top = _TOP + number * self.rows.height
            self.rect(_PAD, top, self.width - 2 * _PAD, self.rows.height, "band")
        self.text(_PAD + _RANK - 10, _TOP - 24, "rank", "note number")
        self.text(self.side, _TOP - 24, "end", "note")
        self.text(self.side + _END, _TOP - 24, "CPUs", "note")
        self.text(self.memory, _TOP - 24, "memory", "note")
        if self.start:
            self.axis(self.start, "call to execve", 4)
        self.axis(self.run, "run", 8)
        self.restarts()
        self.lines.append('<g class="dense">' if self.count > 96 else "<g>")
        for number in range(self.count):
            self.row(number, _TOP + number * self.rows.height)
        self.lines.append("</g>")
        return self.document(self.width, self.bottom + (20 if len(self.attempts) == 1 else 34) + _PAD, _STYLE)

    def title(self) -> None:
        report, room = self.report, int(self.width / 7.6)
        self.text(_PAD, 24, _clipped(" ".join(report["command"]), room), "job")
        when = datetime.fromisoformat(self.attempts[0]["started"]).isoformat(" ", "seconds")
        told = [f"{_counted(report['nprocs'], 'rank')} on {report['host']}", when, spoken(report["duration"])]
        if len(self.attempts) > 1:
            told.append(_counted(len(self.attempts) - 1, "restart"))
        self.text(_PAD, 42, _clipped(", ".join(told), room), "note")
        self.legend()

    def legend(self) -> None:
        """The marks of the kinds of ends that occur in this report."""
        seen = {kind for ranks in self.ranks.values() for _, _, kind in ranks}
        x, y = self.run.left + 48, _TOP - 24
        if any(kind.endswith("first") for kind in seen):
            self.rect(x - 14, y - 8, 18, 9, "ran first")
            self.text(x + 9, y, "failed first", "note")
            x += 9 + _CHARACTER * 12 + 14
        for kind, name in _OUTCOMES.items():
            if kind in seen or f"{kind} first" in seen:
                self.mark(x, y - 3.5, 4, kind)
                self.text(x + 9, y, name, "note")
                x += 9 + _CHARACTER * len(name) + 14

    def axis(self, axis: Axis, name: str, most: int) -> None:
        self.text(axis.left, _TOP - 24, name, "note")
        for seconds, text in axis.ticks(most):
            x = axis.x(seconds)
            self.line(x, _TOP - 4, x, self.bottom + 4, "grid")
            self.text(x, _TOP - 8, text, "tick")
            self.text(x, self.bottom + 15, text, "tick")

    def restarts(self) -> None:
        """A line where each attempt after the first begins, with its number where there is room."""
        free = 0.0
        for one in self.attempts[1:]:
            x = self.run.x(one["called"])
            self.line(x, _TOP - 4, x, self.bottom + 4, "again")
            if x >= free:
                self.text(x, self.bottom + 29, f"attempt {one['attempt']}", "tick")
                free = x + 60

    def row(self, number: int, top: float) -> None:
        text = top + self.rows.text
        self.lines.append(f'<g class="row" data-rank="{number}">')
        for attempt, rank, kind in self.ranks.get(number, ()):
            self.bars(attempt, rank, kind, top + (self.rows.height - self.rows.bar) / 2)
            if attempt is self.last:
                self.text(_PAD + _RANK - 10, text, str(number), f"number{' first' * kind.endswith('first')}")
                self.text(self.side, text, _end(rank), kind)
                self.text(self.side + _END, text, _cpus(rank))
                self.text(self.memory, text, _memory(rank), "failed" if rank["binding"]["refused"] else "")
        self.lines.append("</g>")

    def bars(self, attempt: AttemptReport, rank: RankReport, kind: str, y: float) -> None:
        height, called, executed = self.rows.bar, attempt["called"], rank["executed"] or 0.0
        exited = attempt["duration"] if rank["exited"] is None else rank["exited"]
        begin, ready, end = (self.run.x(called + seconds) for seconds in (0.0, executed, exited))
        self.lines.append(f'<g data-attempt="{attempt["attempt"]}"><title>{escaped(_hint(attempt, rank))}</title>')
        if self.start and attempt is self.last:
            self.rect(self.start.left, y, self.start.x(executed) - self.start.left, height, "start")
        if ready - begin >= 0.5:  # a shorter bar cannot be seen, and would hide the beginning of the run
            self.rect(begin, y, ready - begin, height, "start")
        self.rect(ready, y, max(end - ready, 0.5), height, "ran first" if kind.endswith("first") else "ran")
        self.mark(end, y + height / 2, height / 2 - 0.5, kind)
        self.lines.append("</g>")

    def line(self, x1: float, y1: float, x2: float, y2: float, kind: str) -> None:
        self.lines.append(f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>')

    def mark(self, x: float, y: float, r: float, kind: str) -> None:
        """Draw how a rank ended, by shape and by colour: a disc, a square, a diamond; an arrow for one that runs."""
        if kind == "ok":
            self.lines.append(f'<circle class="mark ok" cx="{x:.1f}" cy="{y:.1f}" r="{r:.1f}"/>')
            return
        corners = {
            "failed": ((-r, -r), (r, -r), (r, r), (-r, r)),
            "killed": ((0, -r - 1), (r + 1, 0), (0, r + 1), (-r - 1, 0)),
            "running": ((-r, -r), (r + 1, 0), (-r, r)),
        }[kind.split()[0]]
        points = " ".join(f"{x + dx:.1f},{y + dy:.1f}" for dx, dy in corners)
        self.lines.append(f'<polygon class="mark {kind}" points="{points}"/>')


def _outcome(rank: RankReport) -> str:
    end = rank["exit"]
    if end is None:
        return "running"
    return "killed" if end["signal"] else "failed" if end["returncode"] else "ok"


def _first_failed(attempt: AttemptReport) -> RankReport | None:
    """The first rank that failed; the others may have been ended because of it."""
    failed = [rank for rank in attempt["ranks"] if _outcome(rank) in ("failed", "killed")]
    return min(failed, key=lambda rank: (rank["exited"] or 0.0, rank["rank"]), default=None)


def _end(rank: RankReport) -> str:
    end = rank["exit"]
    if end is None:
        return "runs"
    return (end["signal"] or f"exit {end['status']}") + (", core" if end["core"] else "")


def _cpus(rank: RankReport) -> str:
    """The CPUs that the rank had, or that were asked for if the launcher never looked."""
    place = rank["binding"]["effective"] or rank["binding"]["asked"]
    return _clipped((place and place["cpus"]) or "", _MOST)


def _memory(rank: RankReport) -> str:
    """As _cpus(), the memory policy, unless it is the kernel's default; and the steps that were refused."""
    binding = rank["binding"]
    place = binding["effective"] or binding["asked"]
    policy = place and place["memory"]
    refused = [f"{one['step']} {one['name'] or one['errno']}" for one in binding["refused"]]
    words = [policy] if policy and policy != "default" else []
    return _clipped(" ".join([*words, f"({', '.join(refused)})"] if refused else words), _MOST)


def _hint(attempt: AttemptReport, rank: RankReport) -> str:
    """The tooltip of a row: all that does not fit in the row."""
    lines = [f"rank {rank['rank']}, pid {rank['pid']}, attempt {attempt['attempt']}"]
    if rank["executed"] is not None:
        lines.append(f"executed after {spoken(rank['executed'])}")
    lines.append(_end(rank) + ("" if rank["exited"] is None else f", seen after {spoken(rank['exited'])}"))
    for word in ("asked", "effective"):
        place = rank["binding"][word]
        if place is not None:
            lines.append(f"{word}: cpus {place['cpus'] or 'inherited'}, memory {place['memory'] or 'unknown'}")
    lines += [f"refused: {one['step']}: {one['text']}" for one in rank["binding"]["refused"]]
    used, now = rank["rusage"], rank["now"]
    if used is not None:
        most = "" if used["max_rss"] is None else f", at most {used['max_rss'] / (1 << 20):.0f} MiB"
        lines.append(f"CPU {spoken(used['user'])} user, {spoken(used['system'])} system{most}")
    if now is not None:
        cpu = f"CPU {spoken(now['user'])} user, {spoken(now['system'])} system"
        lines.append(f"{cpu}, {now['rss'] / (1 << 20):.0f} MiB, {now['children']} children")
    return "\n".join(lines)


def _counted(number: int, name: str) -> str:
    return f"{number} {name}{'s' if number != 1 else ''}"


def _clipped(text: str, most: int) -> str:
    """``text``, with characters that XML cannot hold replaced, and cut after ``most`` characters."""
    text = "".join(one if one.isprintable() else "\ufffd" for one in text)
    return text if len(text) <= most else text[: most - 1] + "\u2026"


def _round_time(seconds: float, step: float) -> str:
    """A multiple of ``step``, in the units in which it is round: "250 µs", "1.5 ms", "45 s", "1 h 30 min"."""
    if not seconds:
        return "0"
    if step < 1 or seconds < 60:
        unit, name = next(
            one for one in ((1e-9, "ns"), (1e-6, "µs"), (1e-3, "ms"), (1.0, "s")) if seconds < one[0] * 1000
        )
        return f"{seconds / unit:.6g} {name}"
    return _units(round(seconds))


def _units(seconds: int) -> str:
    parts = []
    for name, size in _UNITS:
        if seconds >= size:
            parts.append(f"{seconds // size} {name}")
            seconds %= size
    return " ".join([*parts, f"{seconds} s"] if seconds else parts)


def spoken(seconds: float) -> str:
    """A time of ``seconds`` to about three digits: "640 µs", "12.3 s", "1 h 2 min 5 s"."""
    if seconds >= 99.95:
        return _units(round(seconds))
    for unit, name in ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")):
        if seconds >= unit * 0.9995:
            return f"{seconds / unit:.3g} {name}"
    return "0 s" if seconds == 0 else f"{seconds * 1e9:.3g} ns"
