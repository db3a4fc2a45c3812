"""The tests provoke each message on the troubleshooting page, and compare it with the page."""

from __future__ import annotations

import errno
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from rankspawn import Binding, BindingError, MemoryPolicy, Popen, Topology, get_context, launch, place
from rankspawn._end.cgroup import GroupCgroup
from rankspawn._place.visible import nvidia_visible
from tests.support.pages import ROOT
from tests.support.processes import new_cgroup, writable_cgroups
from tests.support.state import NOBODY, become, in_child
from tests.support.sysfs_tree import Gpu, Machine, write

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="messages are those of Linux")

PAGE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
MESSAGES = re.findall(r"^### `(.*)`$", PAGE, re.MULTILINE)
NO_GPU = {"CUDA_VISIBLE_DEVICES": ""}

PROVOKED: dict[str, Callable[[Path], str]] = {}


def provokes(*messages: str) -> Callable[[Callable[..., str]], Callable[..., str]]:
    """The function returns a text that has each of ``messages`` in it."""

    def known(function: Callable[..., str]) -> Callable[..., str]:
        PROVOKED.update(dict.fromkeys(messages, function))
        return function

    return known


def pattern(message: str) -> str:
    return ".*".join(map(re.escape, message.split("...")))


@pytest.mark.parametrize("message", MESSAGES)
def test_message(message: str, tmp_path: Path) -> None:
    assert re.search(pattern(message), PROVOKED[message](tmp_path), re.DOTALL)


def test_all_that_is_provoked_is_on_the_page() -> None:
    assert PROVOKED.keys() - set(MESSAGES) == set()


def raised(function: Callable[[], object]) -> str:
    with pytest.raises(Exception) as caught:
        function()
    return str(caught.value)


def python(code: str, **environ: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "default", "-c", code], env={**os.environ, **environ}, text=True, timeout=60,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False,
    )  # fmt: skip
    return done.stdout


def command(*arguments: str, limit: str = "true", **environ: str) -> str:
    """The output of a ``rankspawn`` that fails or warns."""
    line = f'{limit}; exec "$0" -m rankspawn "$@"'
    done = subprocess.run(
        ["bash", "-c", line, sys.executable, *arguments], env={**os.environ, **environ}, text=True, timeout=60,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False,
    )  # fmt: skip
    return done.stdout


def run(*arguments: str, **environ: str) -> str:
    return command("run", *arguments, **environ)


def plan(folder: Path, machine: Machine, *arguments: str) -> str:
    return command("plan", "--sysfs", str(write(folder / "machine", machine)), *arguments)


# ---- binding --------------------------------------------------------------------------------------------------------


@provokes("sched_setaffinity: Invalid argument")
def _(_: Path) -> str:
    return raised(lambda: Popen(["true"], binding=Binding({4095})))


@provokes("set_mempolicy: Invalid argument")
def _(_: Path) -> str:
    return raised(lambda: Popen(["true"], binding=Binding(None, MemoryPolicy("bind", {1000}))))


@provokes("granted only in part")
def _(_: Path) -> str:
    return raised(lambda: Popen(["true"], binding=Binding({min(os.sched_getaffinity(0)), 4095})))


@provokes("rankspawn is installed without its engine")
def _(_: Path) -> str:
    code = "import sys; sys.modules['rankspawn._spawn'] = None; import rankspawn; rankspawn.Popen(['true']).wait()"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stderr


@provokes(
    "sched_setaffinity: Operation not permitted",
    "set_mempolicy: Operation not permitted",
    "set_mempolicy: Function not implemented",
)
def refused_elsewhere(_: Path) -> str:
    """Messages for errors that this kernel does not return; test_injected_faults.py injects the errors themselves."""
    steps = (("sched_setaffinity", errno.EPERM), ("set_mempolicy", errno.EPERM), ("set_mempolicy", errno.ENOSYS))
    binding = Binding({0}, MemoryPolicy("bind", {0}))
    return "\n".join(str(BindingError.refused(step, code, binding)) for step, code in steps)


@provokes("... makes the OpenMP runtime pin each rank's main thread when it is loaded")
def _(_: Path) -> str:
    return run("--numa-binding", "node", "--no-python", "true", OMP_PROC_BIND="close")


@provokes("a CPU quota limits all ranks together to ...")
def _(folder: Path) -> str:
    files = {
        "proc/self/cgroup": "0::/\n",
        "proc/self/mountinfo": "30 23 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n",
        "sys/fs/cgroup/cpu.max": "100000 100000\n",
    }
    return plan(folder, Machine(extra=files), "--nproc-per-node", "1")


@provokes("is not a number of threads: ignoring it")
def _(_: Path) -> str:
    return run("--no-python", "true", OMP_NUM_THREADS="all")


@provokes("local rank ... runs without ...")
def _(_: Path) -> str:
    return python(
        "import logging, rankspawn._torch.handler as handler; from rankspawn._start.outcome import RefusedStep\n"
        "logging.basicConfig(); handler.warn_of_refused(0, (RefusedStep('set_mempolicy', 1),))"
    )


# ---- starting -------------------------------------------------------------------------------------------------------


@provokes("Too many open files: ... ranks need a descriptor each")
def _(_: Path) -> str:
    return python(
        "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (20, 20))\n"
        "from rankspawn import launch; launch(['true'], 30)"
    )


@provokes("too many ranks: they need ... open files, and the limit is ...")
def _(_: Path) -> str:
    return run("--nproc-per-node", "30", "--no-python", "true", limit="ulimit -n 40")


@provokes("die_with_parent and cgroup need rankspawn's engine")
def _(_: Path) -> str:
    code = "from rankspawn import Popen; Popen(['true'], die_with_parent=True)"
    return python(code, RANKSPAWN_MECHANISM="subprocess")


@provokes("guard needs rankspawn's engine")
def _(_: Path) -> str:
    return python("from rankspawn import launch; launch(['true'], 1, guard=True)", RANKSPAWN_MECHANISM="subprocess")


@provokes("rankspawn has no engine here: ranks may outlive this launcher")
def _(_: Path) -> str:
    return run("--no-python", "true", RANKSPAWN_MECHANISM="subprocess")


@provokes("RANKSPAWN_MECHANISM=...: expected clone, posix_spawn or subprocess")
def _(_: Path) -> str:
    return run("--no-python", "true", RANKSPAWN_MECHANISM="magic")


@provokes("preexec_fn cannot be used beside binding, die_with_parent or cgroup")
def _(_: Path) -> str:
    return raised(lambda: Popen(["true"], binding=Binding({0}), preexec_fn=os.getpid))


@provokes("rankspawn does not know this subprocess.Popen")
def _(_: Path) -> str:
    return python(
        "import subprocess; subprocess.Popen._execute_child = lambda self, args: 0; from rankspawn import Popen"
    )


@provokes("rankspawn does not know this multiprocessing")
def _(_: Path) -> str:
    return python(
        "from multiprocessing import popen_spawn_posix as own; own.Popen._launch = lambda self: 0\n"
        "from rankspawn import get_context; get_context('spawn')"
    )


@provokes("a guard needs the program rankspawn-guard, which is not at ...")
def _(folder: Path) -> str:
    return python(
        f"from rankspawn import launch, _spawn\n_spawn.__file__ = '{folder}/_spawn.so'\nlaunch(['true'], 1, guard=True)"
    )


@provokes("not a group leader: start it with start_new_session=True or process_group=0")
def _(_: Path) -> str:
    with Popen(["true"]) as process:
        return raised(lambda: process.send_signal_group(15))


@provokes("process group ...: its leader has been waited for")
def _(_: Path) -> str:
    with Popen(["true"], start_new_session=True) as process:
        process.wait()
        process._pidfd = None  # as on a kernel that gives none
        return raised(lambda: process.send_signal_group(15))


@provokes("the ranks are children of process ..., of which this is a forked copy")
def _(_: Path) -> str:
    with launch(["true"], 1) as group:
        return in_child(lambda: raised(group.poll))


# ---- ranks that end -------------------------------------------------------------------------------------------------


@provokes("rank ... has failed: ending the others")
def _(_: Path) -> str:
    return run("--nproc-per-node", "2", "--no-python", "sh", "-c", "[ $RANK = 0 ] && exit 1; exec sleep 60")


@provokes("was killed by SIGKILL")
def _(_: Path) -> str:
    return run("--no-python", "sh", "-c", "kill -KILL $$")


@provokes("was killed by SIGBUS")
def _(_: Path) -> str:
    return run("--no-python", "sh", "-c", "kill -BUS $$")


@provokes("exited with status ... (as a shell whose command ... killed)")
def _(_: Path) -> str:
    return run("--no-python", "sh", "-c", "sh -c 'kill -KILL $$'; exit $?")


@provokes("ranks still run: ...")
def _(_: Path) -> str:
    with launch(["sleep", "60"], 1) as group:
        return raised(lambda: group.wait(timeout=0.01))


@provokes("a group of ranks was not closed: pids ...")
def _(_: Path) -> str:
    return python("from rankspawn import launch; launch(['sleep', '60'], 1)")


@provokes("the guard (process ...) has ended")
def _(_: Path) -> str:
    return python(
        "import psutil; from rankspawn import launch\n"
        "with launch(['sleep', '60'], 1, guard=True, grace=0) as group:\n"
        "    (guard,) = (one for one in psutil.Process().children() if one.pid not in group.pids())\n"
        "    guard.kill(); group.advance(30)"
    )


# ---- placement ------------------------------------------------------------------------------------------------------

TWO_NODES = Machine(nodes=2)


@provokes("exclusive: ... ranks on node ..., which has ... usable cores")
def _(folder: Path) -> str:
    return plan(folder, Machine(), "--nproc-per-node", "5", "--numa-binding", "exclusive")


@provokes("node ... has no usable CPU")
def _(folder: Path) -> str:
    return plan(folder, Machine(nodes=2, gpus=(Gpu(0),), allowed="4-7"), "--numa-binding", "node")


@provokes("its NUMA node is unknown: numa_node is -1")
def _(folder: Path) -> str:
    return plan(folder, Machine(nodes=2, gpus=(Gpu(-1),)), "--numa-binding", "node")


@provokes("no CPU is left: allowed are ...")
def _(folder: Path) -> str:
    topology = Topology.read(write(folder, TWO_NODES))
    return raised(lambda: place(topology, "node", nprocs=1, allowed_cpus={100}))


@provokes("... lists for ... ranks: give one each or one for all")
def _(folder: Path) -> str:
    return plan(folder, TWO_NODES, "--nproc-per-node", "3", "--cpus", "0:1")


@provokes("... may not be used (allowed: ...)")
def _(folder: Path) -> str:
    return plan(folder, TWO_NODES, "--nproc-per-node", "1", "--cpus", "0-100")


@provokes("nodes ... are absent or not allowed")
def _(folder: Path) -> str:
    topology = Topology.read(write(folder, TWO_NODES))
    return raised(lambda: place(topology, "node", nprocs=1, memory_policy=MemoryPolicy("bind", {7})))


@provokes("memory policy ...: node ... is not allowed")
def _(folder: Path) -> str:
    machine = Machine(nodes=2, allowed="0-3", mems="1")
    return plan(folder, machine, "--nproc-per-node", "1", "--numa-binding", "node", "--memory-policy", "bind")


@provokes("gpu_index ...: only ... devices are visible")
def _(folder: Path) -> str:
    topology = Topology.read(write(folder, Machine(gpus=(Gpu(0),))))
    return raised(lambda: place(topology, "node", gpu_index=1))


@provokes("gpu_index ...: no accelerator was found, and ... ranks are placed here; pass nprocs")
def _(folder: Path) -> str:
    topology = Topology.read(write(folder, Machine()))
    return raised(lambda: place(topology, "node", gpu_index=1))


@provokes("there are no accelerators to count: give the number of ranks, nprocs")
def _(folder: Path) -> str:
    topology = Topology.read(write(folder, Machine()))
    return raised(lambda: place(topology, "node"))


@provokes("is not a PCI address like 0000:3b:00.0")
def _(folder: Path) -> str:
    return plan(folder, Machine(), "--devices", "gpu0")


@provokes("device ...: there is no ...")
def _(folder: Path) -> str:
    return plan(folder, Machine(), "--devices", "0000:3b:00.0")


@provokes("only NVML knows which GPU has ...")
def _(_: Path) -> str:
    return raised(lambda: nvidia_visible((), {"CUDA_VISIBLE_DEVICES": "MIG-1234"}))


def hidden(folder: Path, visible: str) -> str:
    from rankspawn._place.glance import hidden_devices

    extra = {"proc/driver/nvidia/gpus/0000:3b:00.0/information": "Model: H\nGPU UUID: GPU-aa"}
    root = write(folder, Machine(gpus=(Gpu(0, "0000:3b:00.0"),), extra=extra))
    return " ".join(hidden_devices({"CUDA_VISIBLE_DEVICES": visible}, str(root)))


@provokes("hides all accelerators")
def _(folder: Path) -> str:
    return hidden(folder, "NoDevFiles")


@provokes("is no device here, and the list ends before it")
def _(folder: Path) -> str:
    return hidden(folder, "0,9")


@provokes("is listed twice, which hides all devices")
def _(folder: Path) -> str:
    from rankspawn._place.devices import find_devices

    found = find_devices(Topology.read(write(folder, Machine(gpus=(Gpu(0),)))))
    return raised(lambda: nvidia_visible(found, {"CUDA_VISIBLE_DEVICES": "0,0"}))


@provokes("no online CPU below sys/devices/system/cpu; is this the folder that has sys/ in it?")
def _(folder: Path) -> str:
    return command("topology", "--sysfs", str(folder))


@provokes("reserve_cores ...: must be from 0 to ...")
def _(folder: Path) -> str:
    return plan(folder, Machine(), "--nproc-per-node", "1", "--reserve-cores", "4")


@provokes("cannot be combined with --cpus and --mems, which already say where ranks go")
def _(folder: Path) -> str:
    return plan(folder, Machine(), "--cpus", "0", "--numa-binding", "node")


# ---- rankspawn run --------------------------------------------------------------------------------------------------


@provokes("cannot be combined with --numa-binding none, which leaves ranks unbound")
def _(_: Path) -> str:
    return run("--numa-binding", "none", "--memory-policy", "bind", "x.py")


@provokes("--nnodes needs --node-rank")
def _(_: Path) -> str:
    return run("--nnodes", "2", "x.py")


@provokes("... needs an elastic agent: use `rankspawn torchrun`")
def _(_: Path) -> str:
    several = ("--nnodes", "2", "--node-rank", "0", "--master-addr", "x", "--master-port", "1")
    return run(*several, "--max-restarts", "1", "x.py")


@provokes("ignoring PET_...: torchrun has no such variable")
def _(_: Path) -> str:
    return run("--no-python", "true", PET_NPROC="2")


@provokes("ignored, because rankspawn run has no elastic agent")
def _(_: Path) -> str:
    return run("--monitor-interval", "1", "--no-python", "true")


@provokes("--master-addr ...: cannot listen there")
def _(_: Path) -> str:
    return run("--master-addr", "192.0.2.1", "x.py")


@provokes("... after SCRIPT: passed to ...")
def _(folder: Path) -> str:
    (folder / "script.py").touch()
    return run(str(folder / "script.py"), "--nproc-per-node", "2")


@provokes("ended with status 0 ... s ago, and ... still run")
def _(folder: Path) -> str:
    return run("--nproc-per-node", "2", "--wait", "0.1", "--no-python", "sh", "-c", "test $RANK = 0 || exec sleep 60")


@provokes("cannot make a folder for log files: ...; pass --log-dir DIR")
def _(folder: Path) -> str:
    return command("run", "--redirects", "3", "--no-python", "true", limit="ulimit -f 0")


@provokes("--log-dir: ...")
def _(folder: Path) -> str:
    (folder / "file").touch()
    return run("--log-dir", str(folder / "file"), "--no-python", "true")


# ---- under other launchers ------------------------------------------------------------------------------------------

MPIRUN = {"OMPI_COMM_WORLD_LOCAL_RANK": "0", "OMPI_COMM_WORLD_RANK": "0"}


@provokes("started ... processes on this node, and each would start all ranks")
def _(_: Path) -> str:
    return run("x.py", OMPI_COMM_WORLD_LOCAL_SIZE="2", OMPI_COMM_WORLD_SIZE="2", **MPIRUN)


@provokes("but does not say which host the first is: pass --master-addr HOST")
def _(_: Path) -> str:
    return run("x.py", OMPI_COMM_WORLD_LOCAL_SIZE="1", OMPI_COMM_WORLD_SIZE="2", **MPIRUN)


@provokes("cannot tell the local rank: no launcher variable (LOCAL_RANK, SLURM_LOCALID, ...) is set; pass --local-rank")
def _(_: Path) -> str:
    return command("bind", "true")


@provokes("cannot tell how many ranks this node has: pass --nproc-per-node")
def _(_: Path) -> str:
    return command("bind", "true", LOCAL_RANK="0")


@provokes("LOCAL_RANK=... contradicts ...: pass --local-rank")
def _(_: Path) -> str:
    told = {**MPIRUN, "OMPI_COMM_WORLD_LOCAL_SIZE": "2", "OMPI_COMM_WORLD_SIZE": "2"}
    return command("bind", "true", LOCAL_RANK="1", **told)


@provokes("bound this rank to CPUs ..., so rankspawn keeps it there")
def _(_: Path) -> str:
    slurm = {
        "SLURM_LOCALID": "0", "SLURM_PROCID": "0", "SLURM_NODEID": "0", "SLURM_STEP_NUM_NODES": "1",
        "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_STEP_ID": "0", "SLURM_JOB_ID": "1",
        "SLURM_CPU_BIND_TYPE": "mask_cpu:", "SLURM_CPU_BIND_LIST": "0x1,0x2",
    }  # fmt: skip
    return command("bind", "true", **slurm)


@provokes("ranks share CPUs ...")
def _(_: Path) -> str:
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("needs two CPUs")
    told = {**MPIRUN, "OMPI_COMM_WORLD_LOCAL_SIZE": "1", "OMPI_COMM_WORLD_SIZE": "1"}
    cpu = min(os.sched_getaffinity(0))
    return run("--nproc-per-node", "2", "--no-python", "true", limit=f"taskset -p -c {cpu} $$ >/dev/null", **told)


# ---- cgroups --------------------------------------------------------------------------------------------------------


@provokes("expected a directory of cgroup v2, got no cgroup")
def _(folder: Path) -> str:
    return run("--cgroup", str(folder), "--no-python", "true")


@provokes("expected a directory of cgroup v2, got a cgroup of version 1")
def _(_: Path) -> str:
    roots = writable_cgroups("cgroup")
    if not roots:
        pytest.skip("no cgroup v1 is mounted that we may write to")
    return run("--cgroup", str(roots[0]), "--no-python", "true")


@provokes("it must be delegated")
def _(_: Path) -> str:
    if os.geteuid():
        pytest.skip("only root can become another user")
    with new_cgroup() as parent:

        def as_nobody() -> str:
            become(NOBODY)
            return raised(lambda: GroupCgroup.make(parent))

        return in_child(as_nobody)


@provokes("a cgroup made here cannot hold processes: its cgroup.type is ...")
def _(_: Path) -> str:
    with new_cgroup() as parent:
        (parent / "threaded").mkdir()
        (parent / "threaded" / "cgroup.type").write_text("threaded")
        return run("--cgroup", str(parent / "threaded"), "--no-python", "true")


@provokes("no more cgroups may be made in it")
def _(_: Path) -> str:
    with new_cgroup() as parent:
        (parent / "cgroup.max.descendants").write_text("0")
        return run("--cgroup", str(parent), "--no-python", "true")


# ---- multiprocessing and torch --------------------------------------------------------------------------------------


@provokes("method: expected 'spawn', 'forkserver' or 'warm'")
def _(_: Path) -> str:
    return raised(lambda: get_context("fork"))


@provokes("die_with_parent is for 'spawn'")
def _(_: Path) -> str:
    return raised(lambda: get_context("forkserver", die_with_parent=True))


@provokes("the process ended before it was bound: see what it wrote to stderr")
def _(folder: Path) -> str:
    (folder / "ends_early.py").write_text("import os; os.register_at_fork(after_in_child=lambda: os._exit(7))")
    return python(
        "from rankspawn import Binding, get_context; context = get_context('forkserver', [Binding({0})])\n"
        "context.set_forkserver_preload(['ends_early']); context.Process(target=print).start()",
        PYTHONPATH=str(folder),
    )


@provokes("torch is not installed")
def _(folder: Path) -> str:
    (folder / "torch.py").write_text("raise ModuleNotFoundError('none here', name='torch')")
    return command("torchrun", "x.py", PYTHONPATH=str(folder))


@provokes("rankspawn.torchrun does not know torch ...")
def _(folder: Path) -> str:
    (folder / "torch.py").write_text("__version__ = '1.0'")
    return python("from rankspawn.torchrun import install; install()", PYTHONPATH=str(folder))
