"""What is in the wheel that `make wheel` built from the sdist: no source, libnuma with its licence, hardened code."""

from __future__ import annotations

import email
import hashlib
import json
import os
import re
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from tests.support import elf

ROOT = Path(__file__).parent.parent.parent
SUFFIXES = {".py", ".pyi", ".typed"}

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="make wheel builds wheels on Linux")


@pytest.fixture(scope="module")
def wheel() -> Path:
    (path,) = (ROOT / "dist").glob("*.whl")
    return path


@pytest.fixture(scope="module")
def unpacked(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


@pytest.fixture(scope="module")
def extension(unpacked: Path) -> Path:
    (path,) = (unpacked / "rankspawn").glob(f"_spawn{sysconfig.get_config_var('EXT_SUFFIX')}")
    return path


@pytest.fixture(scope="module")
def guard(unpacked: Path) -> Path:
    return unpacked / "rankspawn" / "rankspawn-guard"


@pytest.fixture(scope="module")
def libnuma(unpacked: Path) -> Path:
    (path,) = (unpacked / "rankspawn.libs").iterdir()
    return path


def source_files() -> set[str]:
    """What a wheel carries of src/rankspawn, by its path there."""
    source = ROOT / "src" / "rankspawn"
    found = {path.relative_to(source).as_posix() for path in source.rglob("*") if path.suffix in SUFFIXES}
    assert len(found) > 40
    return found


def test_its_name_says_what_it_is_for(wheel: Path, version: str) -> None:
    python = f"cp{sys.version_info.major}{sys.version_info.minor}"
    abi = python + getattr(sys, "abiflags", "")
    machine = sysconfig.get_platform().partition("-")[2]
    assert re.fullmatch(rf"rankspawn-{version}-{python}-{abi}-(many|musl)linux_\d+_\d+_{machine}\.whl", wheel.name)


def test_it_has_the_package_and_nothing_else(
    unpacked: Path, extension: Path, guard: Path, libnuma: Path, version: str
) -> None:
    files = {path for path in unpacked.rglob("*") if path.is_file()}
    package = unpacked / "rankspawn"
    inside = {path for path in files if package in path.parents} - {extension, guard}
    assert {path.relative_to(package).as_posix() for path in inside} == source_files()
    others = files - inside - {extension, guard, libnuma}
    assert {path.relative_to(unpacked).parts[0] for path in others} == {f"rankspawn-{version}.dist-info"}


def test_licences_are_there(unpacked: Path, version: str) -> None:
    info = unpacked / f"rankspawn-{version}.dist-info"
    assert (info / "licenses" / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()
    assert "GNU LESSER GENERAL PUBLIC LICENSE" in (info / "licenses" / "LICENSE.libnuma").read_text()
    metadata = email.message_from_string((info / "METADATA").read_text(encoding="utf-8"))
    assert metadata.get_all("License-File") == ["LICENSE", "LICENSE.libnuma"]
    # Which libnuma it is, because that decides where its source can be found.
    parts = json.loads((info / "sboms" / "auditwheel.cdx.json").read_text())["components"]
    assert [part["version"] for part in parts if "numa" in part["name"]] != []


def test_it_is_linked_to_its_own_libnuma_and_to_libc(extension: Path, libnuma: Path) -> None:
    needed = elf.dynamic(extension, "NEEDED")
    assert libnuma.name in needed
    assert [name for name in needed if not re.match(r"libnuma-|libc\.|libpthread\.|ld-linux", name)] == []
    # No search path of the Python that built it, because the loader would search that folder on others' machines.
    assert elf.dynamic(extension, "R(?:UN)?PATH") == ["$ORIGIN/../rankspawn.libs"]


def test_its_guard_needs_no_library(guard: Path) -> None:
    """Nobody relocates it, either: csrc/search/kernel.c."""
    assert elf.dynamic(guard, "NEEDED") == []
    assert "INTERP" not in elf.readelf("-l", guard)
    assert "There are no relocations" in elf.readelf("-r", guard)


def test_its_guard_can_be_executed_where_pip_installs_it(wheel: Path, tmp_path: Path) -> None:
    """pip sets the mode that the wheel's entry has."""
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-compile", "--target", tmp_path, wheel]
    subprocess.run(install, check=True)
    done = subprocess.run([tmp_path / "rankspawn" / "rankspawn-guard"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr[:16]) == (2, "rankspawn-guard:")


@pytest.mark.parametrize("which", ["extension", "guard"])
def test_it_names_no_folder_of_the_machine_that_built_it(which: str, request: pytest.FixtureRequest) -> None:
    code = request.getfixturevalue(which).read_bytes()
    assert [folder for folder in (str(ROOT), "/tmp/", "/home/", "/root/") if folder.encode() in code] == []


def test_it_is_hardened(extension: Path, guard: Path, libnuma: Path) -> None:
    assert elf.weaknesses(extension, "PyInit__spawn") == []
    assert elf.memory_weaknesses(guard) == []
    assert elf.memory_weaknesses(libnuma) == []


def test_the_same_source_gives_the_same_wheel(sdist: Path, wheel: Path, tmp_path: Path) -> None:
    """Every bit is the same, where the compiler and the time are the same (SOURCE_DATE_EPOCH)."""
    make = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--wheel-dir", str(tmp_path), str(sdist)]
    subprocess.run(make, check=True)
    (built,) = tmp_path.glob("*.whl")
    repair = ["auditwheel", "repair", "--plat", "auto", "--strip", "-w", str(tmp_path / "repaired"), str(built)]
    subprocess.run(repair, check=True)
    (again,) = (tmp_path / "repaired").glob("*.whl")
    assert hashlib.sha256(again.read_bytes()).hexdigest() == hashlib.sha256(wheel.read_bytes()).hexdigest()


def test_windows_has_a_wheel_of_its_own(sdist: Path, tmp_path: Path, version: str) -> None:
    make = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "--wheel-dir", tmp_path]
    subprocess.run([*make, "-C--build-option=--plat-name=win_amd64", str(sdist)], check=True)
    (path,) = tmp_path.iterdir()
    assert path.name == f"rankspawn-{version}-py3-none-win_amd64.whl"
    with zipfile.ZipFile(path) as archive:
        package = {name.partition("/")[2] for name in archive.namelist() if name.startswith("rankspawn/")}
    assert package == source_files()


def test_a_wheel_without_the_extension_is_for_no_system(sdist: Path, tmp_path: Path, version: str) -> None:
    """So it is where there is no compiler. What it installs says so at the first start."""
    make = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "--wheel-dir", tmp_path]
    environ = {**os.environ, "CC": "/bin/false", "RANKSPAWN_LIBNUMA": "0", "RANKSPAWN_REQUIRE_EXTENSION": "0"}
    subprocess.run([*make, "--no-cache-dir", str(sdist)], env=environ, check=True)
    (path,) = tmp_path.iterdir()
    assert path.name == f"rankspawn-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path) as archive:
        archive.extractall(tmp_path / "unpacked")
    assert {one.name for one in (tmp_path / "unpacked" / "rankspawn").iterdir()}.isdisjoint({"rankspawn-guard"})
    program = "import rankspawn; rankspawn.Popen(['true']).wait(); rankspawn.Popen(['true']).wait()"
    done = subprocess.run(
        [sys.executable, "-S", "-c", program],
        env={**os.environ, "PYTHONPATH": str(tmp_path / "unpacked")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and done.stderr.count("rankspawn is installed without its engine (No module") == 1
