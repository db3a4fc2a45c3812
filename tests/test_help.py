"""The help of each command, and what a shell completes."""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from rankspawn._cli import main as command
from rankspawn._cli.completion import commands_of
from rankspawn._cli.help import ENDS
from tests.support.launchers import LAUNCHER, completed, environment_here

OURS = sorted(name for name in ENDS if name)


def parsers() -> dict[str, argparse.ArgumentParser]:
    """The parsers of all commands, with all their options."""
    found = commands_of(command._parser())
    for name in OURS:
        one = found[name]
        assert isinstance(one, command._Parser)
        one.add_all_options()
    return found


def test_alone_it_shows_its_help_as_wrong_usage() -> None:
    alone, asked = completed(LAUNCHER), completed([*LAUNCHER, "--help"])
    assert (alone.returncode, alone.stdout, alone.stderr) == (2, "", asked.stdout)
    assert asked.returncode == 0 and asked.stderr == ""
    assert completed([*LAUNCHER, "help"]).stdout == asked.stdout


@pytest.mark.parametrize("name", OURS)
def test_each_command_has_a_sentence_examples_and_statuses(name: str) -> None:
    done = completed([*LAUNCHER, "help", name], env={**os.environ, "COLUMNS": "80"})
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == completed([*LAUNCHER, name, "--help"], env={**os.environ, "COLUMNS": "80"}).stdout
    usage, sentence, *_ = re.split(r"\n\n", done.stdout)
    assert usage.startswith(f"usage: rankspawn {name} ") and re.match(r"[A-Z][^.]*\.", sentence)
    examples, statuses = re.findall(r"(?s)\nexamples:\n(.*)\n\nexit status:\n(.*)$", done.stdout)[0]
    assert 2 <= len(examples.splitlines()) <= 4
    assert " 2 " in statuses and max(map(len, done.stdout.splitlines())) <= 80


def test_a_command_that_is_none() -> None:
    done = completed([*LAUNCHER, "help", "rum"])
    assert done.returncode == 2 and "did you mean run?" in done.stderr


@pytest.mark.parametrize("name", sorted({*OURS} - {"completion"}))
def test_each_option_with_a_value_says_its_default(name: str) -> None:
    needless = {"--preload", "--warm", "--svg", "--capture", "--report", "--timeline", "--rdzv-endpoint"}  # none
    for action in parsers()[name]._actions:
        if action.option_strings and action.nargs != 0 and action.help != argparse.SUPPRESS:
            if not needless.intersection(action.option_strings):
                assert "(default" in str(action.help) or "default:" in str(action.help), action.option_strings


def test_the_examples_of_run_are_accepted() -> None:
    run = parsers()["run"]
    for line in re.findall(r"^  rankspawn run (.*)$", "\n".join(ENDS.values()), re.MULTILINE):
        words = line.partition("   ")[0].split()
        assert run.parse_args(words).command, line


# ---- completion -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("shtab")
    done = completed([*LAUNCHER, "completion", "bash"])
    assert (done.returncode, done.stderr) == (0, "")
    path = tmp_path_factory.mktemp("completion") / "rankspawn"
    path.write_text(done.stdout)
    return path


def completions(script: Path, folder: Path, *words: str) -> set[str]:
    """What a real bash offers at the end of these words."""
    if shutil.which("bash") is None:
        pytest.skip("needs bash")
    ask = (
        'source "$1"; shift; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); '
        "function=$(complete -p rankspawn | sed -n 's/.*-F \\([^ ]*\\).*/\\1/p'); "
        '"$function" rankspawn "${COMP_WORDS[COMP_CWORD]}"; printf "%s\\n" "${COMPREPLY[@]}"'
    )
    done = subprocess.run(
        ["bash", "--norc", "-c", ask, "bash", str(script), "rankspawn", *words],
        cwd=folder, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    return {line.strip() for line in done.stdout.splitlines()}


def test_bash_completes_commands_options_values_and_files(script: Path, tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text("")
    (tmp_path / "logs").mkdir()
    assert {"run", "bind", "plan", "torchrun", "help"} <= completions(script, tmp_path, "")
    assert completions(script, tmp_path, "do") == {"doctor"}
    assert completions(script, tmp_path, "run", "--nproc-per") == {"--nproc-per-node"}
    assert "--max-restarts" in completions(script, tmp_path, "run", "--m")
    assert completions(script, tmp_path, "run", "--numa-binding", "") == set(
        "auto node socket exclusive core-complex none".split()
    )
    assert completions(script, tmp_path, "run", "--nproc-per-node", "g") == {"gpu"}
    assert completions(script, tmp_path, "plan", "--memory-policy", "inter") == {"interleave"}
    assert "train.py" in completions(script, tmp_path, "run", "tr")
    assert "logs" in {one.rstrip("/") for one in completions(script, tmp_path, "run", "--log-dir", "lo")}


@pytest.mark.parametrize("shell", ["zsh", "tcsh"])
def test_other_shells(shell: str) -> None:
    pytest.importorskip("shtab")
    done = completed([*LAUNCHER, "completion", shell])
    assert done.returncode == 0 and "numa-binding" in done.stdout


def test_without_shtab_it_says_what_to_install(tmp_path: Path) -> None:
    (tmp_path / "shtab.py").write_text("raise ImportError\n")
    done = completed([*LAUNCHER, "completion", "bash"], env=environment_here(PYTHONPATH=str(tmp_path)))
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        'rankspawn: completion needs shtab, which is not installed: pip install "rankspawn[completion]"\n'
    )


def test_nothing_else_imports_shtab(tmp_path: Path) -> None:
    (tmp_path / "shtab.py").write_text("raise SystemExit('shtab is imported')\n")
    for words in (["help", "run"], ["plan", "--nproc-per-node", "1"], ["run", "--no-python", "true"]):
        done = completed([*LAUNCHER, *words], env=environment_here(PYTHONPATH=str(tmp_path)))
        assert done.returncode == 0 and "shtab" not in done.stderr, sys.version
