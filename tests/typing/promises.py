"""What type checkers have to find: `make lint-types` runs mypy --strict and pyright on it, and nothing executes it.

A comment that silences an error is an error itself where there is none.
"""

from __future__ import annotations

import subprocess
from asyncio.subprocess import PIPE, Process
from pathlib import Path

from typing_extensions import assert_type

from rankspawn import Binding, Failure, Popen, RankFiles, RankGroup, create_subprocess_exec, launch


def a_popen_is_what_its_streams_give() -> None:
    assert_type(Popen(["a"]), Popen[bytes])
    assert_type(Popen("a", shell=True, stdin=Path("in")), Popen[bytes])
    assert_type(Popen(["a"], text=False), Popen[bytes])
    assert_type(Popen(["a"], text=True, binding=Binding({0}), die_with_parent=True), Popen[str])
    assert_type(Popen(["a"], encoding="utf-8"), Popen[str])
    assert_type(Popen(["a"], errors="replace"), Popen[str])
    assert_type(Popen(["a"], universal_newlines=True), Popen[str])
    assert_type(Popen(["a"], text=True).communicate(), tuple[str, str])


def a_popen_is_one_of_the_standard_class() -> None:
    def takes(process: subprocess.Popen[str]) -> None: ...

    takes(Popen(["a"], text=True))
    takes(Popen(["a"]))  # type: ignore[arg-type]


def a_typo_is_an_error() -> None:
    Popen(["a"], start_new_sesion=True)  # type: ignore[call-overload]
    Popen(["a"], binding={0})  # type: ignore[call-overload]
    launch(["a"], 1, numa="nod")  # type: ignore[arg-type]
    launch(["a"], 1, max_restart=1)  # type: ignore[call-arg]


async def in_asyncio() -> None:
    assert_type(await create_subprocess_exec("a", "b", stdout=PIPE, binding=Binding({0})), Process)
    await create_subprocess_exec("a", start_new_sesion=True)  # type: ignore[call-arg]


def a_group_is_a_sequence(group: RankGroup) -> None:
    assert_type(group[0], Popen[bytes])
    assert_type(group[1:], tuple[Popen[bytes], ...])
    assert_type([rank.pid for rank in group], list[int])
    assert_type(group.failures(), list[Failure])
    assert group.files is not None
    assert_type(group.files, tuple[RankFiles, ...])
