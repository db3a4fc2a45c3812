"""The drawing of a job's report: what stands where, read back from the SVG as XML."""

from __future__ import annotations

import copy
import itertools
import json
import os
import re
import signal
import sys
import time
import xml.etree.ElementTree as ElementTree
from datetime import datetime

import pytest

from rankspawn import Popen
from rankspawn._output.form import AttemptReport, BindingFacts, Exit, GroupReport, RankReport
from rankspawn._output.report import Attempt, group_report, rank_report
from rankspawn._output.timeline import Axis, spoken, timeline_svg, timeline_text

SVG = "{http://www.w3.org/2000/svg}"


def rank(
    number: int, *, executed: float | None = 0.001, exited: float | None = 10.0, returncode: int | None = 0
) -> RankReport:
    """What rank_report() gives of a rank on four CPUs of its own, bound to the memory of node 1."""
    place = {"cpus": f"{4 * number}-{4 * number + 3}", "memory": "bind:1"}
    name = None if returncode is None or returncode >= 0 else signal.Signals(-returncode).name
    status = None if returncode is None or returncode < 0 else returncode
    end: Exit | None = None
    if returncode is not None:
        end = {"returncode": returncode, "status": status, "signal": name, "core": None}
    binding: BindingFacts = {"asked": place, "required": True, "effective": place, "refused": []}  # type: ignore[typeddict-item]
    return {
        "rank": number,
        "pid": 1000 + number,
        "mechanism": "clone",
        "executed": executed,
        "exited": None if returncode is None else exited,
        "binding": binding,
        "exit": end,
        "rusage": None,
        "now": None,
    }


def job(*attempts: list[RankReport], pause: float = 1.0, duration: float = 0.0) -> GroupReport:
    """Attempts one after the other, ``pause`` seconds between them. duration: the least, where ranks still run."""
    told: list[AttemptReport] = []
    called = 0.0
    for number, ranks in enumerate(attempts):
        took = max([duration, *(one["exited"] or 0.0 for one in ranks)])
        started = "2026-03-01T12:00:00.000000+01:00"
        told.append({"attempt": number, "called": called, "started": started, "duration": took, "ranks": ranks})
        called += took + pause
    return {
        "version": 1,
        "rankspawn": None,
        "host": "node7",
        "command": ["python", "train.py"],
        "nprocs": len(attempts[0]),
        "job": {"run_id": "none"},
        "duration": told[-1]["called"] + told[-1]["duration"],
        "attempts": told,
    }


class Drawn:
    """A drawing, and where things are in it."""

    def __init__(self, report: GroupReport) -> None:
        self.text = timeline_svg(report)
        self.root = ElementTree.fromstring(self.text)
        self.width, self.height = float(self.root.attrib["width"]), float(self.root.attrib["height"])
        self.rows = {int(row.attrib["data-rank"]): row for row in self.all("g") if row.get("class") == "row"}

    def all(self, tag: str) -> list[ElementTree.Element]:
        return list(self.root.iter(SVG + tag))

    def words(self) -> list[str]:
        return [one.text or "" for one in self.all("text")]

    def column(self, number: int) -> list[str]:
        return [one.text or "" for one in self.rows[number].iter(SVG + "text")]

    def attempt(self, number: int, attempt: int) -> ElementTree.Element:
        (group,) = (one for one in self.rows[number] if one.get("data-attempt") == str(attempt))
        return group

    def ran(self, number: int, attempt: int = 0) -> tuple[float, float]:
        """Where the bar of the run begins and ends."""
        (bar,) = (one for one in self.attempt(number, attempt) if one.get("class", "").startswith("ran"))
        return float(bar.attrib["x"]), float(bar.attrib["x"]) + float(bar.attrib["width"])

    def starts(self, number: int, attempt: int = 0) -> list[tuple[float, float]]:
        bars = [one for one in self.attempt(number, attempt) if one.get("class") == "start"]
        return [(float(bar.attrib["x"]), float(bar.attrib["width"])) for bar in bars]

    def mark(self, number: int, attempt: int = 0) -> tuple[str, str]:
        (mark,) = (one for one in self.attempt(number, attempt) if one.get("class", "").startswith("mark"))
        return mark.tag.removeprefix(SVG), mark.attrib["class"].removeprefix("mark ")

    def y(self, number: int) -> tuple[float, float]:
        (bar,) = (one for one in self.rows[number].iter(SVG + "rect") if one.get("class", "").startswith("ran"))
        return float(bar.attrib["y"]), float(bar.attrib["height"])


@pytest.mark.parametrize("count", [1, 2, 8, 32, 33, 64, 96, 97, 256, 1000])
def test_rows_follow_each_other_and_stay_apart(count: int) -> None:
    drawn = Drawn(job([rank(number) for number in range(count)]))
    assert sorted(drawn.rows) == list(range(count))
    tops = [drawn.y(number)[0] for number in range(count)]
    (height,) = {drawn.y(number)[1] for number in range(count)}
    pitch = {round(below - above, 3) for above, below in itertools.pairwise(tops)}
    assert len(pitch) <= 1 and all(one > height for one in pitch)
    # Each row has its texts, none smaller than 9 pixels, and no two of a column touch.
    for number, row in drawn.rows.items():
        places = [float(one.attrib["y"]) for one in row.iter(SVG + "text")]
        assert len(set(places)) == 1 and tops[number] < places[0] <= tops[number] + height + 1
        assert drawn.column(number) == [str(number), "exit 0", f"{4 * number}-{4 * number + 3}", "bind:1"]
    assert not pitch or min(pitch) >= 11
    assert drawn.height >= tops[-1] + height


def test_everything_is_inside_and_in_its_column() -> None:
    ranks = [rank(number) for number in range(16)]
    ranks[3]["binding"]["effective"] = {"cpus": ",".join(map(str, range(0, 128, 2))), "memory": "interleave:0-7"}
    report = job(ranks)
    report["command"] = ["python", *("--option=value" for _ in range(100))]
    drawn = Drawn(report)
    for one in (*drawn.all("rect"), *drawn.all("text"), *drawn.all("line")):
        if one.get("class") == "paper":
            continue
        left = float(one.get("x") or one.attrib["x1"])
        right = left + float(one.get("width", 0))
        if one.tag == SVG + "text" and one.get("class") not in ("tick", "note number", "number"):
            right += 5.5 * len(one.text or "")
        assert 0 <= left and right <= drawn.width, ElementTree.tostring(one)
    assert drawn.column(3)[2].endswith("…")
    hint = drawn.attempt(3, 0)[0].text or ""
    assert "124,126, memory interleave:0-7" in hint, "the hint has what did not fit"


def test_bars_are_as_long_as_the_times() -> None:
    drawn = Drawn(job([rank(0, executed=1, exited=10), rank(1, executed=2, exited=20), rank(2, executed=4, exited=40)]))
    (own, length), (left, _) = drawn.starts(2)
    right = drawn.ran(2)[1]
    assert own + length < left, "the two scales are side by side"
    second = (right - left) / 40
    for number, (executed, exited) in enumerate([(1, 10), (2, 20), (4, 40)]):
        assert drawn.ran(number) == pytest.approx((left + executed * second, left + exited * second), abs=0.2)
        assert drawn.starts(number)[0] == pytest.approx((own, length * executed / 4), abs=0.2)
        assert drawn.starts(number)[1] == pytest.approx((left, executed * second), abs=0.2)


def test_a_start_too_short_to_show_stays_on_its_own_scale() -> None:
    drawn = Drawn(job([rank(0, executed=0.0002, exited=3600), rank(1, executed=0.0004, exited=3600)]))
    (first,), (second,) = drawn.starts(0), drawn.starts(1)
    assert first[1] == pytest.approx(second[1] / 2, abs=0.1) and second[1] > 100
    assert "200 µs" in drawn.words() and "30 min" in drawn.words()


def test_starts_that_nobody_noted_take_no_room() -> None:
    noted, not_noted = Drawn(job([rank(0)])), Drawn(job([rank(0, executed=None)]))
    assert not_noted.starts(0) == []
    assert not_noted.ran(0)[0] < noted.ran(0)[0] - 100
    assert "call to execve" in noted.words() and "call to execve" not in not_noted.words()


def test_each_end_has_its_form_and_colour() -> None:
    ranks = [rank(0), rank(1, exited=5, returncode=3), rank(2, returncode=-signal.SIGTERM), rank(3, returncode=None)]
    drawn = Drawn(job(ranks, duration=12))
    assert [drawn.mark(number) for number in range(4)] == [
        ("circle", "ok"),
        ("polygon", "failed first"),
        ("polygon", "killed"),
        ("polygon", "running"),
    ]
    assert [drawn.column(number)[1] for number in range(4)] == ["exit 0", "exit 3", "SIGTERM", "runs"]
    corners = [polygon.attrib["points"].split() for row in drawn.rows.values() for polygon in row.iter(SVG + "polygon")]
    assert [len(one) for one in corners] == [4, 4, 3]
    for row, polygon in ((1, corners[0]), (2, corners[1])):
        across = [float(corner.partition(",")[0]) for corner in polygon]
        assert (min(across) + max(across)) / 2 == pytest.approx(drawn.ran(row)[1], abs=0.2), (
            "it stands where the run ends"
        )
    # The bar of a rank that runs reaches the end of the axis, beyond those that have ended.
    assert drawn.ran(3)[1] > drawn.ran(2)[1] > drawn.ran(1)[1]
    for name in ("exit 0", "nonzero exit", "ended by a signal", "runs", "failed first"):
        assert name in drawn.words(), "the legend"
    assert "nonzero exit" not in Drawn(job([rank(0)])).words(), "the legend has only what there is"


def test_the_one_that_failed_first_stands_out() -> None:
    ranks = [rank(number, exited=20 + number, returncode=-signal.SIGTERM) for number in range(8)]
    ranks[5] = rank(5, exited=19.5, returncode=-signal.SIGSEGV)
    ranks[5]["exit"]["core"] = True  # type: ignore[index]
    drawn = Drawn(job(ranks))
    first = [number for number in range(8) if drawn.mark(number)[1].endswith("first")]
    assert first == [5] and drawn.column(5)[1] == "SIGSEGV, core"
    emphasised = [one.text for one in drawn.all("text") if "first" in one.get("class", "").split()]
    assert emphasised == ["5", "SIGSEGV, core"]


def test_a_refused_binding_is_said() -> None:
    one = rank(0)
    one["binding"]["effective"] = {"cpus": "0-3", "memory": "default"}
    one["binding"]["refused"] = [{"step": "set_mempolicy", "errno": 1, "name": "EPERM", "text": "Not permitted"}]
    drawn = Drawn(job([one]))
    assert drawn.column(0)[2:] == ["0-3", "(set_mempolicy EPERM)"]
    assert "refused: set_mempolicy: Not permitted" in (drawn.attempt(0, 0)[0].text or "")


def test_what_was_asked_stands_for_what_nobody_saw() -> None:
    one = rank(0)
    one["binding"]["effective"] = None
    assert Drawn(job([one])).column(0)[2:] == ["0-3", "bind:1"]
    one["binding"]["asked"] = None
    assert Drawn(job([one])).column(0)[2:] == ["", ""]


def test_attempts_follow_each_other() -> None:
    bad = [rank(0, exited=10, returncode=-15), rank(1, exited=9, returncode=1)]
    good = [rank(0, exited=30), rank(1, exited=30)]
    drawn = Drawn(job(bad, copy.deepcopy(bad), good))
    for number in (0, 1):
        bars = [drawn.ran(number, attempt) for attempt in range(3)]
        assert bars[0][0] < bars[0][1] < bars[1][0] < bars[1][1] < bars[2][0] < bars[2][1]
        assert drawn.column(number)[1] == "exit 0", "the last attempt's end is written"
    begins = [float(line.attrib["x1"]) for line in drawn.all("line") if line.get("class") == "again"]
    left, right = drawn.ran(0, 0)[0], drawn.ran(0, 2)[1]
    assert begins == pytest.approx([left + (right - left) * at / 52 for at in (11, 22)], abs=0.2)
    assert drawn.words().count("attempt 1") == drawn.words().count("attempt 2") == 1
    assert [drawn.mark(1, attempt)[1] for attempt in range(3)] == ["failed first", "failed first", "ok"]
    assert drawn.starts(0, 0) == drawn.starts(0, 1) == [] != drawn.starts(0, 2)
    assert any("2 restarts" in one for one in drawn.words())


def test_many_attempts_are_not_numbered_over_each_other() -> None:
    drawn = Drawn(job(*([rank(0, exited=1, returncode=1)] for _ in range(200))))
    lines = [one for one in drawn.all("line") if one.get("class") == "again"]
    labels = [float(one.attrib["x"]) for one in drawn.all("text") if (one.text or "").startswith("attempt ")]
    assert len(lines) == 199 and 3 < len(labels) < 15
    assert all(b - a >= 60 for a, b in itertools.pairwise(labels))


@pytest.mark.parametrize(
    ("span", "most", "texts"),
    [
        (3.2e-8, 4, ["0", "10 ns", "20 ns", "30 ns"]),
        (4.9e-4, 5, ["0", "100 µs", "200 µs", "300 µs", "400 µs"]),
        (1e-3, 4, ["0", "500 µs", "1 ms"]),
        (2.2e-3, 5, ["0", "500 µs", "1 ms", "1.5 ms", "2 ms"]),
        (1.0, 5, ["0", "200 ms", "400 ms", "600 ms", "800 ms", "1 s"]),
        (7.5, 8, ["0", "1 s", "2 s", "3 s", "4 s", "5 s", "6 s", "7 s"]),
        (90, 6, ["0", "15 s", "30 s", "45 s", "1 min", "1 min 15 s", "1 min 30 s"]),
        (3725, 8, ["0", "10 min", "20 min", "30 min", "40 min", "50 min", "1 h"]),
        (9000, 5, ["0", "30 min", "1 h", "1 h 30 min", "2 h", "2 h 30 min"]),
        (30 * 3600, 6, ["0", "6 h", "12 h", "18 h", "1 d", "1 d 6 h"]),
        (9 * 86400, 5, ["0", "2 d", "4 d", "6 d", "8 d"]),
    ],
)
def test_ticks_are_round(span: float, most: int, texts: list[str]) -> None:
    axis = Axis(100, 200, span)
    ticks = list(axis.ticks(most))
    assert [text for _, text in ticks] == texts
    steps = {round(axis.x(b) - axis.x(a), 6) for (a, _), (b, _) in itertools.pairwise(ticks)}
    assert len(steps) == 1 and axis.x(ticks[0][0]) == 100 and axis.x(ticks[-1][0]) <= 300


@pytest.mark.parametrize("power", range(-8, 9))
@pytest.mark.parametrize("digits", [1.0, 1.01, 2.7, 4.99, 9.99])
def test_there_are_never_too_few_ticks_nor_too_many(power: int, digits: float) -> None:
    ticks = list(Axis(0, 600, digits * 10.0**power).ticks(8))
    assert 3 <= len(ticks) <= 9
    assert len({text for _, text in ticks}) == len(ticks)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (4e-9, "4 ns"),
        (0.00064, "640 µs"),
        (0.0123, "12.3 ms"),
        (0.99951, "1 s"),
        (12.34, "12.3 s"),
        (99.94, "99.9 s"),
        (99.96, "1 min 40 s"),
        (3725.2, "1 h 2 min 5 s"),
        (90000, "1 d 1 h"),
    ],
)
def test_times_in_words(seconds: float, text: str) -> None:
    assert spoken(seconds) == text


def test_one_file_without_scripts_for_light_and_dark() -> None:
    drawn = Drawn(job([rank(0)]))
    assert "prefers-color-scheme: dark" in drawn.text
    assert {one.tag.removeprefix(SVG) for one in drawn.root.iter()} <= {
        *("svg", "style", "rect", "text", "line", "g", "title", "circle", "polygon")
    }
    # Nothing is fetched, and each class that is drawn has a colour of its own in the style.
    assert re.findall(r"url\(|href|@import|https?://(?!www\.w3\.org/2000/svg)", drawn.text) == []
    style = drawn.all("style")[0].text or ""
    light, dark = style.split("@media")
    for name in ("band", "grid", "start", "ran", "ok", "failed", "killed", "running", "again"):
        assert f".{name} {{" in light and f".{name} {{" in dark, name


def test_odd_words_are_still_xml() -> None:
    report = job([rank(0)])
    report["command"] = ["a<b>&\"'", "caf\udce9", "\x1b[31m\0", "😀"]
    report["host"] = "<node>"
    drawn = Drawn(report)
    assert drawn.words()[0] == "a<b>&\"' caf\ufffd \ufffd[31m\ufffd 😀"
    drawn.text.encode()


def test_no_ranks_and_no_time() -> None:
    empty = Drawn(job([]))
    assert empty.rows == {}
    still = Drawn(job([rank(0, executed=0.0, exited=0.0)]))
    assert still.ran(0)[0] <= still.ran(0)[1] <= still.width


@pytest.mark.skipif(sys.platform != "linux", reason="asks the Linux kernel")
def test_real_ranks() -> None:
    called_ns, called_at = time.monotonic_ns(), time.time()
    ranks = []
    for number, command in enumerate(("exit 0", "exit 3", "kill -9 $$")):
        process = Popen(["/bin/sh", "-c", command])
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        facts = {"exited_ns": time.monotonic_ns(), "returncode": process.returncode, "usage": usage}
        ranks.append(rank_report(number, process, called_ns=called_ns, effective=None, **facts))  # type: ignore[arg-type]
    report = group_report([Attempt(called_ns, called_at, ranks)], command=["sh"], nprocs=3, run_id="none")
    drawn = Drawn(report)
    assert [drawn.column(number)[1] for number in range(3)] == ["exit 0", "exit 3", "SIGKILL"]
    assert [drawn.mark(number)[1] for number in range(3)] == ["ok", "failed first", "killed"]
    ends = [drawn.ran(number)[1] for number in range(3)]
    assert ends == sorted(ends) and f"pid {ranks[1]['pid']}" in (drawn.attempt(1, 0)[0].text or "")


def test_a_trace_has_each_rank_as_a_process() -> None:
    report = job([rank(0, exited=2.0), rank(1, exited=2.5, returncode=-9)], [rank(0), rank(1, returncode=None)])
    trace = json.loads(timeline_text(report, "job.JSON"))
    events = trace["traceEvents"]
    assert trace["baseTimeNanoseconds"] % (7889238 * 10**9) == 0
    called = datetime.fromisoformat(report["attempts"][0]["started"]).timestamp() * 1e6
    base = trace["baseTimeNanoseconds"] / 1e3
    spans = [one for one in events if one["ph"] == "X"]
    assert [(one["name"], one["pid"]) for one in spans] == [
        (name, pid) for _ in range(2) for pid in (1000, 1001) for name in ("start", "run")
    ]
    assert [round(one["ts"] + base - called) for one in spans[:4]] == [0, 1000, 0, 1000]
    assert [round(one["dur"]) for one in spans[:4]] == [1000, 1999000, 1000, 2499000]
    assert spans[1]["args"]["cpus"] == "0-3"
    assert [one["name"] for one in events if one["ph"] == "i"] == ["exit 0", "SIGKILL", "exit 0"]
    names = [one["args"]["name"] for one in events if one["name"] == "process_name"]
    assert [name.partition(":")[0] for name in names] == ["rank 0", "rank 1", "rank 0, attempt 1", "rank 1, attempt 1"]


def test_a_timeline_is_a_drawing_unless_its_name_is_json() -> None:
    report = job([rank(0)])
    assert timeline_text(report, "job.svg") == timeline_text(report, "job") == timeline_svg(report)
