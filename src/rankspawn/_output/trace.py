"""A job's report as a trace: JSON for Perfetto and chrome://tracing, with the times of torch.profiler's traces.

The form is Chrome's Trace Event Format. Times are microseconds from ``baseTimeNanoseconds``, which is the clock's time
(CLOCK_REALTIME) rounded down to a whole number of quarters of a mean year, as Kineto, torch.profiler's library, chooses
it. Two traces of one quarter therefore have the same base, and their events lie where they happened.
"""

from __future__ import annotations

import json
from datetime import datetime
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .form import AttemptReport, GroupReport, RankReport

_QUARTER = 7889238  # seconds


def trace_json(report: GroupReport) -> str:
    """The text of the trace: a process for each rank, with its start, its run and its end."""
    first = datetime.fromisoformat(report["attempts"][0]["started"]).timestamp()
    base = int(first) // _QUARTER * _QUARTER
    events = [event for attempt in report["attempts"] for event in _attempt(report, attempt, base)]
    return json.dumps(
        {
            "schemaVersion": 1,
            "displayTimeUnit": "ms",
            "baseTimeNanoseconds": base * 10**9,
            "host_name": report["host"],
            "traceEvents": events,
        }
    )


def _attempt(report: GroupReport, attempt: AttemptReport, base: int) -> Iterator[dict[str, Any]]:
    began = (datetime.fromisoformat(attempt["started"]).timestamp() - base) * 1e6
    again = f", attempt {attempt['attempt']}" if attempt["attempt"] else ""
    for rank in attempt["ranks"]:
        where = {"pid": rank["pid"], "tid": rank["pid"]}
        name = f"rank {rank['rank']}{again}: {' '.join(report['command'])}"
        yield {"ph": "M", "name": "process_name", **where, "args": {"name": name}}
        yield {"ph": "M", "name": "process_sort_index", **where, "args": {"sort_index": rank["rank"]}}
        executed = (rank["executed"] or 0.0) * 1e6
        ended = (attempt["duration"] if rank["exited"] is None else rank["exited"]) * 1e6
        event = {"ph": "X", "cat": "rankspawn", **where}
        if executed:
            yield {**event, "name": "start", "ts": began, "dur": executed, "args": {"mechanism": rank["mechanism"]}}
        yield {**event, "name": "run", "ts": began + executed, "dur": max(ended - executed, 0.0), "args": _facts(rank)}
        if rank["exit"] is not None:
            end = rank["exit"]["signal"] or f"exit {rank['exit']['status']}"
            yield {"ph": "i", "s": "p", "cat": "rankspawn", "name": end, **where, "ts": began + ended}


def _facts(rank: RankReport) -> dict[str, Any]:
    binding = rank["binding"]
    return {"rank": rank["rank"], **(binding["effective"] or binding["asked"] or {}), "exit": rank["exit"]}
