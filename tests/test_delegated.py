"""``cgroup="auto"``: the own cgroup where it is this user's, else a scope that a real ``systemd --user`` makes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from rankspawn import launch
from rankspawn._end.delegated import delegated_cgroup, own_cgroup
from rankspawn._start.engine import EXTENSION_ERROR
from tests.support.processes import new_cgroup, writable_cgroups
from tests.support.state import NOBODY, become, in_child

pytestmark = [
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="cgroups are Linux's"),
    pytest.mark.skipif(EXTENSION_ERROR is not None, reason="this install has no extension"),
    pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can make cgroups here"),
]

SYSTEMD = "/lib/systemd/systemd"


@pytest.fixture
def parent() -> Iterator[Path]:
    with new_cgroup() as folder:
        yield folder


def enter(folder: Path) -> None:
    (folder / "cgroup.procs").write_text("0")


def ranks_cgroup(folder: str) -> str:
    """Where a rank of a group with cgroup="auto" runs. folder: where the rank may write."""
    path = f"{folder}/rank"
    code = "import sys; open(sys.argv[1], 'w').write(open('/proc/self/cgroup').read())"
    with launch([sys.executable, "-c", code, path], 1, cgroup="auto", numa=None) as group:
        assert group.wait() == (0,)
    return next(line[3:] for line in Path(path).read_text().splitlines() if line.startswith("0::"))


def test_the_own_cgroup_is_found(parent: Path) -> None:
    def inside() -> list[str | None]:
        enter(parent)
        return [own_cgroup()]

    assert in_child(inside) == [str(parent)]


def test_a_users_own_cgroup_is_taken(parent: Path) -> None:
    """As in a container, or in a unit with Delegate=yes."""
    for path in (parent, parent / "cgroup.procs"):
        os.chown(path, NOBODY, NOBODY)

    def inside() -> list[str]:
        enter(parent)
        become(NOBODY)
        os.environ.pop("XDG_RUNTIME_DIR", None)
        return [delegated_cgroup()]

    assert in_child(inside) == [str(parent)]


def test_a_user_without_a_delegated_cgroup_reads_what_was_tried(parent: Path) -> None:
    def inside() -> list[str]:
        enter(parent)
        become(NOBODY)
        os.environ["XDG_RUNTIME_DIR"] = "/nowhere"
        try:
            delegated_cgroup()
        except OSError as error:
            return [str(error)]
        return []

    (said,) = in_child(inside)
    assert f"own cgroup {parent} is not this user's" in said
    assert "the user's systemd: none runs" in said and "systemd-run --user --scope -p Delegate=yes" in said


def test_no_procfs_says_so(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="no cgroup v2 with this process in it is mounted"):
        delegated_cgroup(str(tmp_path))


def test_a_mount_point_with_a_blank_is_read(tmp_path: Path) -> None:
    folder = tmp_path / "a cgroup"
    (folder / "job").mkdir(parents=True)
    (folder / "job" / "cgroup.procs").touch()
    (tmp_path / "self").mkdir()
    (tmp_path / "self" / "cgroup").write_text("4:memory:/x\n0::/job\n")
    mount = str(folder).replace(" ", "\\040")
    (tmp_path / "self" / "mountinfo").write_text(f"30 24 0:26 / {mount} rw,nosuid shared:9 - cgroup2 cgroup2 rw\n")
    assert own_cgroup(str(tmp_path)) == str(folder / "job")


# In mount namespaces of its own: a systemd --user in a cgroup that is its to divide, and this process beside it in one
# that is not, as a user's shell is in its session.
SESSION = """
set -e
mount -t tmpfs none /run
mkdir -p /run/systemd/system /run/user/0
chmod 700 /run/user/0
umount -l /sys/fs/cgroup
mount -t cgroup2 none /sys/fs/cgroup
mkdir /sys/fs/cgroup$GROUP/manager /sys/fs/cgroup$GROUP/session
export XDG_RUNTIME_DIR=/run/user/0
unset DBUS_SESSION_BUS_ADDRESS
sh -c 'echo $$ > /sys/fs/cgroup$GROUP/manager/cgroup.procs; exec "$0" --user --log-target=null' "$SYSTEMD" &
manager=$!
sh -c 'echo $$ > /sys/fs/cgroup$GROUP/session/cgroup.procs
tries=0
while [ ! -S /run/user/0/systemd/private ] && [ $tries -lt 300 ]; do sleep 0.1; tries=$((tries + 1)); done
exec "$@"' sh "$@"
kill $manager
wait $manager || true
"""

PROGRAM = """
import json, os, sys
sys.path.append(sys.argv[1])
from rankspawn._end.delegated import own_cgroup
from tests.test_delegated import ranks_cgroup
before = own_cgroup()
rank = ranks_cgroup(sys.argv[2])
print(json.dumps([before, own_cgroup(), rank, os.listdir(own_cgroup())]))
"""


def test_the_users_systemd_makes_a_scope(parent: Path, tmp_path: Path) -> None:
    if not os.path.exists(SYSTEMD) or shutil.which("busctl") is None:
        pytest.skip("systemd is not installed")
    (root,) = (folder for folder in writable_cgroups("cgroup2") if folder in parent.parents)
    environ = {**os.environ, "GROUP": f"/{parent.relative_to(root)}", "SYSTEMD": SYSTEMD}
    command = [sys.executable, "-c", PROGRAM, str(Path(__file__).parent.parent), str(tmp_path)]
    done = subprocess.run(
        ["unshare", "--mount", "--propagation", "private", "sh", "-c", SESSION, "sh", *command],
        env=environ, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    if "unshare failed" in done.stderr or "mount:" in done.stderr or "umount:" in done.stderr:
        pytest.skip(f"no mount namespace can be made here: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr
    before, after, rank, left = json.loads(done.stdout)
    assert before.endswith("/session")
    assert "/manager/" in after and after.endswith(".scope")
    assert rank.startswith("/") and f"/{os.path.basename(after)}/rankspawn-" in rank
    assert [name for name in left if name.startswith("rankspawn-")] == []
