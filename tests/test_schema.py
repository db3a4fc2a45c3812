"""docs/schema.json, and what the commands print and write: each fits its part of it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from tests.support.launchers import LAUNCHER, completed
from tests.support.schema import PATH, schema
from tests.support.sysfs_tree import Gpu, Machine, write

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="binds ranks")


def check(said: Any, name: str) -> None:
    jsonschema.Draft202012Validator({**json.loads(PATH.read_text()), "anyOf": [{"$ref": f"#/$defs/{name}"}]}).validate(
        said
    )


def test_it_is_what_the_types_say() -> None:
    """Else: python -m tests.support.schema"""
    assert json.loads(PATH.read_text()) == schema()
    jsonschema.Draft202012Validator.check_schema(schema())


@pytest.mark.parametrize("words", ["topology", "plan", "plan --numa-binding exclusive --memory-policy bind"])
def test_a_machine_and_a_plan(words: str, tmp_path: Path) -> None:
    root = write(tmp_path, Machine(sockets=2, cores=4, gpus=(Gpu(0, "0000:10:00.0"), Gpu(1, "0000:11:00.0"))))
    name, *options = words.split()
    done = completed([*LAUNCHER, name, "--json", "--sysfs", str(root), *options])
    said = json.loads(done.stdout)
    check(said, name)
    with pytest.raises(jsonschema.ValidationError):
        check({**said, "version": 2}, name)


def test_doctor() -> None:
    done = completed([*LAUNCHER, "doctor", "--json"])
    said = json.loads(done.stdout)
    check(said, "doctor")
    assert said["bound_at_birth"] is (done.returncode == 0) is True
    assert said["findings"]["CPU affinity"].startswith("yes")


def test_a_report(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    words = ["--nproc-per-node", "2", "--max-restarts", "1", "--report", str(path), "--no-python", "sh", "-c", "exit 3"]
    assert completed([*LAUNCHER, "run", *words]).returncode == 3
    said = json.loads(path.read_text())
    check(said, "GroupReport")
    assert len(said["attempts"]) == 2
    del said["attempts"][0]["ranks"][0]["pid"]
    with pytest.raises(jsonschema.ValidationError):
        check(said, "GroupReport")
