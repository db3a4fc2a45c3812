"""The ``rankspawn`` command as a user runs it, with real launchers, ranks and signals."""

from __future__ import annotations

import os
import re
import select
import signal
import stat
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

import rankspawn
from rankspawn import AffinityMode
from rankspawn._binding import MEMORY_MODES
from rankspawn._cli.main import main
from rankspawn._ids import parse_ids
from rankspawn._place.glance import unbound_threads
from tests.support.launchers import (
    ARGUMENTS,
    ENVIRONMENT,
    LAUNCHER,
    SAY,
    SLEEP,
    TIMEOUT,
    TOLD,
    after,
    completed,
    environment_here,
    in_ranks,
    launched,
    said,
    with_grace,
)

pytestmark = pytest.mark.skipif(os.name != "posix", reason="sessions, signals and exec are asked for")
linux = pytest.mark.skipif(sys.platform != "linux", reason="asks the Linux kernel")

# ---- what a rank is told --------------------------------------------------------------------------------------------


def test_each_rank_has_torchruns_variables() -> None:
    done = completed(in_ranks(ENVIRONMENT, "--nproc-per-node", "2"), env=environment_here())
    assert (done.returncode, done.stderr) == (0, "")
    ranks = said(done.stdout)
    assert ranks.keys() == {0, 1}
    for rank, environment in ranks.items():
        of_rank = {"RANK": str(rank), "LOCAL_RANK": str(rank), "ROLE_RANK": str(rank)}
        assert {**environment, **TOLD, **of_rank} == environment
        # The rest is the launcher's environment: no other variable is added, and none is lost.
        ours = {
            *TOLD,
            *of_rank,
            "MASTER_PORT",
            "OMP_NUM_THREADS",
            "TORCH_NCCL_ASYNC_ERROR_HANDLING",
            "RANKSPAWN_CALL_NS",
            "TORCHELASTIC_ERROR_FILE",
        }
        rest = {name: value for name, value in environment.items() if name not in ours}
        if "LC_CTYPE" not in os.environ:
            rest.pop("LC_CTYPE", None)  # an interpreter sets it where the locale is C (PEP 538)
        assert rest == environment_here()
    ports = {environment["MASTER_PORT"] for environment in ranks.values()}
    assert len(ports) == 1 and 1024 <= int(ports.pop()) <= 65535


@linux
def test_each_rank_is_told_when_it_was_called() -> None:
    code = SAY + "say([int(os.environ['RANKSPAWN_CALL_NS']), time.clock_gettime_ns(time.CLOCK_MONOTONIC)])\n"
    before = time.clock_gettime_ns(time.CLOCK_MONOTONIC)
    done = completed(in_ranks(code, "--nproc-per-node", "2"))
    (call_0, first_0), (call_1, first_1) = said(done.stdout)[0], said(done.stdout)[1]
    assert before < call_0 == call_1  # one call starts them all
    assert call_0 < first_0 and call_1 < first_1


def test_omp_num_threads_is_the_users_where_set() -> None:
    """Else it is each rank's share of the cores."""
    for ranks, environment, expected in (
        ("2", environment_here(), str(unbound_threads(2))),
        ("1", environment_here(), str(unbound_threads(1))),
        ("2", environment_here(OMP_NUM_THREADS="5"), "5"),
    ):
        done = completed(in_ranks(ENVIRONMENT, "--nproc-per-node", ranks), env=environment)
        assert said(done.stdout)[0].get("OMP_NUM_THREADS") == expected


def test_the_meeting_place_can_be_named() -> None:
    for dash in "-_":
        done = completed(in_ranks(ENVIRONMENT, f"--master{dash}addr=127.0.0.2", f"--master{dash}port=29555"))
        environment = said(done.stdout)[0]
        assert (environment["MASTER_ADDR"], environment["MASTER_PORT"]) == ("127.0.0.2", "29555")


def test_two_jobs_at_once_meet_at_different_places() -> None:
    with launched(in_ranks(ENVIRONMENT)) as one, launched(in_ranks(ENVIRONMENT)) as other:
        assert one.hear(1)[0]["MASTER_PORT"] != other.hear(1)[0]["MASTER_PORT"]
        assert one.end() == other.end() == 0


# ---- what a rank runs -----------------------------------------------------------------------------------------------

AS_GIVEN = ["--nproc-per-node", "7", "-m", "-x=1", "", "--help", "--no-python", "a b", "*", "ü", "a", "--", "b"]


def test_a_script_is_run_by_our_interpreter_unbuffered(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    code = SAY + "say([sys.argv, sys.executable, sys.stdout.write_through])\n"
    script.write_text(f"{code}# --nproc-per-node is its own\n")
    done = completed([*LAUNCHER, "run", str(script), *AS_GIVEN])
    assert (done.returncode, done.stderr) == (0, "")
    assert said(done.stdout)[0] == [[str(script), *AS_GIVEN], sys.executable, True]


def test_a_module(tmp_path: Path) -> None:
    (tmp_path / "package").mkdir()
    code = SAY + "say([__name__, __package__, sys.argv[1:]])\n"
    (tmp_path / "package" / "job.py").write_text(f"{code}# --nproc-per-node is its own\n")
    for option in ("-m", "--module"):
        # `python -m` looks in the working directory. Our own interpreter must still find rankspawn from there.
        path = os.pathsep.join(map(os.path.abspath, filter(None, sys.path)))
        environment = environment_here(PYTHONPATH=path)
        done = completed([*LAUNCHER, "run", option, "package.job", *AS_GIVEN], cwd=tmp_path, env=environment)
        assert (done.returncode, done.stderr) == (0, "")
        assert said(done.stdout)[0] == ["__main__", "package", AS_GIVEN]


def test_a_program_of_its_own(tmp_path: Path) -> None:
    done = completed([*LAUNCHER, "run", "--no-python", "echo", *AS_GIVEN[:6]])  # found on PATH
    assert (done.returncode, done.stdout, done.stderr) == (0, " ".join(AS_GIVEN[:6]) + "\n", "")


def test_a_double_dash_ends_our_options() -> None:
    command = in_ranks(ARGUMENTS)
    command[-3:] = ["--", sys.executable, "-c", ARGUMENTS, "--nproc-per-node", "3"]
    assert said(completed(command).stdout) == {0: ["--nproc-per-node", "3"]}


def test_a_double_dash_right_behind_the_script_is_the_scripts(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(ARGUMENTS)
    assert said(completed([*LAUNCHER, "run", str(script), "--", "x"]).stdout) == {0: ["--", "x"]}


@linux
def test_a_rank_leads_a_session_and_has_only_its_streams() -> None:
    code = SAY + "say([os.getpid(), os.getsid(0), os.getpgid(0), sorted(os.listdir('/proc/self/fd'))])\n"
    done = completed(in_ranks(code, "--nproc-per-node", "2"), stdin=subprocess.DEVNULL)
    for pid, session, group, descriptors in said(done.stdout).values():
        assert pid == session == group
        assert descriptors == ["0", "1", "2", "3"]  # 3 lists the folder


@linux
def test_variables_that_would_shrink_the_mask_are_said() -> None:
    done = completed(in_ranks("pass", "--numa-binding", "node"), env=environment_here(OMP_PROC_BIND="close"))
    assert done.returncode == 0
    assert "OMP_PROC_BIND=close makes the OpenMP runtime pin" in done.stderr


def test_a_rank_starts_with_no_signal_blocked_or_ignored() -> None:
    code = SAY + "say([line.split()[1] for line in open('/proc/self/status') if line[:7] in ('SigBlk:', 'SigIgn:')])\n"
    blocked, ignored = said(completed(in_ranks(code)).stdout)[0]
    assert int(blocked, 16) == 0
    # Signals 32 and 33 are libc's own. make starts programs by glibc's posix_spawn, which leaves them ignored. Python
    # itself ignores the two others.
    assert int(ignored, 16) & ~(1 << 31 | 1 << 32) == 1 << (signal.SIGPIPE - 1) | 1 << (signal.SIGXFSZ - 1)


# ---- how a job ends -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("end", "status", "words"),
    [
        ("sys.exit(3)", 3, "exited with status 3"),
        ("sys.exit(255)", 255, "exited with status 255"),
        ("os.kill(os.getpid(), signal.SIGKILL)", 137, "was killed by SIGKILL"),
        ("os.kill(os.getpid(), signal.SIGSEGV)", 139, "was killed by SIGSEGV"),
        ("os.kill(os.getpid(), signal.SIGRTMIN + 3)", 128 + signal.SIGRTMIN + 3, "was killed by signal"),
    ],
)
def test_status_of_the_failed_rank(end: str, status: int, words: str) -> None:
    # RLIMIT_CORE is 0 because a core file would stay in the working directory.
    code = (
        SAY + f"import resource\nresource.setrlimit(resource.RLIMIT_CORE, (0, 0))\nif os.environ['RANK'] == '1': {end}"
    )
    done = completed(in_ranks(code, "--nproc-per-node", "2"))
    assert done.returncode == status
    assert re.search(rf"^rankspawn: rank 1 \(pid \d+\) {words}", done.stderr, re.MULTILINE), done.stderr


def test_the_others_are_told_to_end() -> None:
    code = SAY + (
        "def end(number, frame):\n"
        "    say(f'told by {signal.Signals(number).name}')\n"
        "    sys.exit(5)\n"
        "signal.signal(signal.SIGTERM, end)\n"
        "say('ready')\n"
        "sys.stdin.read()\n"
        "if os.environ['RANK'] == '1': sys.exit(4)\n"
        "time.sleep(120)\n"
    )
    with launched(in_ranks(code, "--stdin", "all", "--nproc-per-node", "3"), stdin=subprocess.PIPE) as job:
        assert job.hear(3) == dict.fromkeys(range(3), "ready")
        assert job.process.stdin is not None
        job.process.stdin.close()  # at which rank 1 fails
        assert job.hear(2) == {0: "told by SIGTERM", 2: "told by SIGTERM"}
        assert job.end() == 4  # not 5: the job ends with the status of the first failure
        told = job.stderr.read()
        assert "rankspawn: rank 1 has failed: ending the others\n" in told
        assert re.search(
            r"^rankspawn: rank 1 \(pid \d+\) exited with status 4\n  it ended at .*\n"
            r"  what the others did then: 2 ranks \(0,2\): .*\n"
            r"  others: 0,2 exit status 5$",
            told,
            re.MULTILINE,
        )


def test_one_that_will_not_end_is_killed() -> None:
    code = SAY + (
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "say('ready')\n"
        "sys.stdin.read()\n"
        "if os.environ['RANK'] == '0': sys.exit(6)\n"
        "time.sleep(120)\n"
    )
    with launched(with_grace(0.2, in_ranks(code, "--nproc-per-node", "2")), stdin=subprocess.PIPE) as job:
        job.hear(2)
        assert job.process.stdin is not None
        job.process.stdin.close()
        assert job.end() == 6
        assert "the grace period is over: killing" in job.stderr.read()


GRANDCHILD = "import subprocess\nsubprocess.Popen(['sleep', '120'])\n"


@pytest.mark.parametrize(("end", "status"), [("pass", 0), ("sys.exit(9)", 9), ("os.kill(os.getpid(), 9)", 137)])
def test_what_an_ended_rank_started_is_ended(end: str, status: int) -> None:
    # The grandchild holds the output pipe open, so completed() returns only when the grandchild has ended.
    done = completed(in_ranks(SAY + GRANDCHILD + end, "--nproc-per-node", "2"))
    assert done.returncode == status


@linux
def test_a_killed_launcher_leaves_no_rank() -> None:
    code = SAY + "for number in (1, 2, 15): signal.signal(number, signal.SIG_IGN)\nsay(os.getpid())\ntime.sleep(120)\n"
    with launched(in_ranks(code, "--nproc-per-node", "2")) as job:
        ranks = [os.pidfd_open(pid) for pid in job.hear(2).values()]
        try:
            job.process.kill()
            job.end()
            for rank in ranks:
                assert select.select([rank], [], [], TIMEOUT)[0], "the rank outlived its launcher"
        finally:
            for rank in ranks:
                with suppress(ProcessLookupError):
                    signal.pidfd_send_signal(rank, signal.SIGKILL)
                os.close(rank)


# Where a launcher inherits an ignored SIGCHLD (some daemons leave it so), the kernel itself reaps its children.
def test_the_status_is_known_also_where_sigchld_is_ignored() -> None:
    command = after("signal.signal(signal.SIGCHLD, signal.SIG_IGN)", in_ranks("raise SystemExit(3)"))
    assert completed(command).returncode == 3


# ---- signals --------------------------------------------------------------------------------------------------------

NOTE_SIGNALS = SAY + (
    "def note(number, frame):\n"
    "    say(signal.Signals(number).name)\n"
    "    if 'stay' not in sys.argv: sys.exit(0)\n"
    "for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP): signal.signal(number, note)\n"
    "say('ready')\n"
    "while True: time.sleep(1)\n"
)


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_reaches_every_rank(name: str) -> None:
    number = signal.Signals[name]
    with launched(in_ranks(NOTE_SIGNALS, "--nproc-per-node", "2")) as job:
        job.hear(2)
        job.process.send_signal(number)
        assert job.hear(2) == {0: name, 1: name}
        # Even though the ranks end with status 0: whoever sent the signal must see that the job was not done.
        assert job.end() == (-number if name == "SIGHUP" else 128 + number)


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_that_ranks_do_not_handle_ends_them(name: str) -> None:
    number = signal.Signals[name]
    code = "import signal\nsignal.signal(signal.SIGINT, signal.SIG_DFL)\n" + SLEEP
    with launched(in_ranks(code, "--nproc-per-node", "2")) as job:
        job.hear(2)
        job.process.send_signal(number)
        assert job.end() == (-number if name == "SIGHUP" else 128 + number)


def test_a_second_sigint_kills() -> None:
    with launched([*in_ranks(NOTE_SIGNALS, "--nproc-per-node", "2"), "stay"]) as job:
        job.hear(2)
        job.process.send_signal(signal.SIGINT)
        assert job.hear(2) == {0: "SIGINT", 1: "SIGINT"}
        job.process.send_signal(signal.SIGINT)
        assert job.end() == 128 + signal.SIGINT
        assert "Traceback" not in job.stderr.read()


def test_after_a_signal_the_grace_is_counted_too() -> None:
    with launched([*with_grace(0.2, in_ranks(NOTE_SIGNALS)), "stay"]) as job:
        job.hear(1)
        job.process.send_signal(signal.SIGTERM)
        assert job.end() == 128 + signal.SIGTERM
        assert "the grace period is over: killing" in job.stderr.read()


def test_nohup_is_respected() -> None:
    code = SAY + "say(signal.getsignal(signal.SIGHUP) == signal.SIG_IGN)\nsys.stdin.read()\nsay('ended by itself')\n"
    command = after(
        "signal.signal(signal.SIGHUP, signal.SIG_IGN)", in_ranks(code, "--stdin", "all", "--nproc-per-node", "2")
    )
    with launched(command, stdin=subprocess.PIPE) as job:
        assert job.hear(2) == {0: True, 1: True}
        job.process.send_signal(signal.SIGHUP)
        assert job.process.stdin is not None
        job.process.stdin.close()
        assert job.hear(2) == {0: "ended by itself", 1: "ended by itself"}
        assert job.end() == 0


def test_a_repeated_sigterm_does_not_lengthen_the_grace() -> None:
    with launched([*with_grace(1.0, in_ranks(NOTE_SIGNALS)), "stay"]) as job:
        job.hear(1)
        until = time.monotonic() + 3.0
        while job.process.poll() is None and time.monotonic() < until:
            job.process.send_signal(signal.SIGTERM)
            time.sleep(0.1)
        # A signal that comes when the command has done its work ends the command itself. A shell sees the same status.
        assert job.process.poll() in (128 + signal.SIGTERM, -signal.SIGTERM)


# ---- log files ------------------------------------------------------------------------------------------------------


def test_log_files_are_where_torchrun_has_them(tmp_path: Path) -> None:
    logs = tmp_path / "not" / "there" / "yet"
    code = SAY + "say('out')\nprint('err', os.environ['RANK'], file=sys.stderr)\n"
    for option in ("--log-dir", "--log_dir"):  # a second job takes a folder of its own
        done = completed(in_ranks(code, "--nproc-per-node", "2", option, str(logs)))
        assert (done.returncode, done.stdout) == (0, "")
    jobs = sorted(path for path in logs.iterdir() if not path.is_symlink())
    assert len(jobs) == 2 and all(re.fullmatch(r"python[\d.]*-\d{8}-\d{6}(-2)?", job.name) for job in jobs)
    assert any(str(job) in done.stderr for job in jobs), "where the logs are is said"
    for job in jobs:
        files = {str(path.relative_to(job)): path.read_text() for path in job.rglob("*") if path.is_file()}
        assert files == {
            "attempt_0/0/stdout.log": '[0, "out"]\n',
            "attempt_0/0/stderr.log": "err 0\n",
            "attempt_0/1/stdout.log": '[1, "out"]\n',
            "attempt_0/1/stderr.log": "err 1\n",
        }


def test_a_log_folder_that_cannot_be_made_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = completed(in_ranks(ENVIRONMENT, "--log-dir", str(tmp_path / "file")))
    assert done.returncode == 1
    assert done.stdout == "" and done.stderr.count("\n") == 1 and str(tmp_path / "file") in done.stderr


# ---- binding --------------------------------------------------------------------------------------------------------

PLACE = SAY + (
    "from pathlib import Path\n"
    "maps = Path('/proc/self/numa_maps')\n"
    "policy = maps.read_text().split()[1] if maps.exists() else None\n"
    "say([sorted(os.sched_getaffinity(0)), policy, os.environ.get('OMP_NUM_THREADS')])\n"
)


def skip_where_memory_is_refused(done: subprocess.CompletedProcess[str]) -> None:
    """Skip the test where the kernel has no NUMA or is too old for a mode, or a container forbids the call."""
    if done.returncode and "set_mempolicy: " in done.stderr:
        pytest.skip(done.stderr.strip())


@linux
@pytest.mark.parametrize("mode", [mode.value for mode in AffinityMode])
@pytest.mark.parametrize("ranks", [1, 2])
def test_each_mode_stays_inside_the_inherited_mask(mode: str, ranks: int) -> None:
    inherited = os.sched_getaffinity(0)
    if mode == "exclusive" and len(inherited) < ranks:
        pytest.skip("too few CPUs")
    options = ["--nproc-per-node", str(ranks), "--numa-binding", mode, "--memory-policy", "bind"]
    done = completed(in_ranks(PLACE, *options), env=environment_here())
    skip_where_memory_is_refused(done)
    assert done.returncode == 0, done.stderr
    places = said(done.stdout)
    assert places.keys() == set(range(ranks))
    for cpus, policy, threads in places.values():
        assert cpus and set(cpus) <= inherited
        assert re.fullmatch(r"bind:[0-9,-]+", policy)
        assert 1 <= int(threads) <= len(cpus)
    if mode == "exclusive":
        assert sum(len(place[0]) for place in places.values()) == len(
            {cpu for place in places.values() for cpu in place[0]}
        )


@linux
@pytest.mark.parametrize("policy", MEMORY_MODES)
def test_each_memory_policy(policy: str) -> None:
    done = completed(in_ranks(PLACE, "--numa-binding", "node", "--memory-policy", policy))
    skip_where_memory_is_refused(done)
    written = {"preferred": "prefer:", "preferred-many": "prefer", "weighted-interleave": "weighted"}.get(
        policy, policy
    )
    assert said(done.stdout)[0][1].startswith(written)


@linux
def test_unbound_ranks_keep_what_they_inherit() -> None:
    cpus, policy, _ = said(completed(in_ranks(PLACE)).stdout)[0]
    assert set(cpus) == os.sched_getaffinity(0)
    maps = Path("/proc/self/numa_maps")
    assert policy == (maps.read_text().split()[1] if maps.exists() else None)


@linux
@pytest.mark.parametrize("mode", [mode.value for mode in AffinityMode])
def test_a_restricted_launcher_restricts_its_ranks(mode: str) -> None:
    one = max(os.sched_getaffinity(0))
    command = after(f"os.sched_setaffinity(0, [{one}])", in_ranks(PLACE, "--numa-binding", mode))
    done = completed(command)
    assert done.returncode == 0, done.stderr
    assert said(done.stdout)[0][0] == [one]


@linux
def test_what_cannot_be_placed_is_said_and_nothing_starts() -> None:
    one = max(os.sched_getaffinity(0))
    options = ["--nproc-per-node", "2", "--numa-binding", "exclusive"]
    done = completed(after(f"os.sched_setaffinity(0, [{one}])", in_ranks(PLACE, *options)))
    assert (done.returncode, done.stdout) == (2, "")
    assert re.match("rankspawn: rank 0: exclusive: 2 ranks on node .*1 usable core", done.stderr)


@linux
def test_what_cannot_be_placed_starts_unbound_where_that_is_allowed() -> None:
    one = max(os.sched_getaffinity(0))
    options = ["--nproc-per-node", "2", "--numa-binding", "exclusive", "--numa-binding-optional"]
    done = completed(after(f"os.sched_setaffinity(0, [{one}])", in_ranks(PLACE, *options)))
    assert done.returncode == 0
    assert {rank: place[0] for rank, place in said(done.stdout).items()} == {0: [one], 1: [one]}
    assert "rank 0 is left unbound" in done.stderr and "rank 1 is left unbound" in done.stderr


# ---- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("fly", "invalid choice: 'fly'"),
        ("rnu x.py", "(did you mean run?)"),
        ("torchrnu x.py", "(did you mean torchrun?)"),
        ("topolgy", "(did you mean topology?)"),
        ("run --nproc-pre-node 2 x.py", "--nproc-pre-node (did you mean --nproc-per-node?)"),
        ("run --rdzv_endpiont=a:1 x.py", "--rdzv_endpiont=a:1 (did you mean --rdzv_endpoint?)"),
        ("bind --numa-bnding node x.py", "(did you mean --numa-binding?)"),
        ("plan --jsn", "(did you mean --json?)"),
        ("run --numa-binding nod x.py", "(did you mean node?)"),
        ("plan --numa-binding exclusve", "(did you mean exclusive?)"),
        ("bind --memory-policy interleaved x.py", "(did you mean interleave?)"),
        ("run --signal-to sesion x.py", "(did you mean session?)"),
        ("run", "SCRIPT is missing"),
        ("run --nproc-per-node 2", "SCRIPT is missing"),
        ("run --no-such-option x.py", "--no-such-option"),
        ("run --nproc-per-node 0 x.py", "expected a positive integer, auto, cpu, gpu or xpu, got '0'"),
        ("run --nproc-per-node -1 x.py", "--nproc-per-node"),
        ("run --nproc-per-node two x.py", "expected a positive integer, auto, cpu, gpu or xpu, got 'two'"),
        ("run --nproc-per-node 1.5 x.py", "expected a positive integer, auto, cpu, gpu or xpu, got '1.5'"),
        ("run --numa-binding gpu x.py", "--numa-binding"),
        ("run --numa-binding node --memory-policy some x.py", "invalid choice: 'some'"),
        ("run --module --no-python x", "--module and --no-python cannot be combined"),
        ("run --master-port http x.py", "--master-port"),
        ("doctor now", "now"),
        ("dump", "PID|JOB"),
        ("dump --seconds x 1", "expected a number of seconds, got 'x'"),
        ("ps --watch x", "expected a number of seconds, got 'x'"),
        ("topology --capture no/such/x.tar.gz", "no/such/x.tar.gz: No such file or directory"),
        ("topology --svg no/such/x.svg", "no/such/x.svg: No such file or directory"),
        ("plan --nproc-per-node 1 --svg no/such/x.svg", "no/such/x.svg: No such file or directory"),
        ("plan --nproc-per-node 0", "expected a positive integer, auto, cpu, gpu or xpu, got '0'"),
        ("plan --nproc-per-node 1 --devices gpu0", "'gpu0' is not a PCI address"),
        ("plan --threads-per-core 0", "expected a positive integer, got '0'"),
        ("bind --reserve-cores -1 x.py", "expected a non-negative integer, got '-1'"),
        ("run --reserve-cores one --no-python true", "expected a non-negative integer, got 'one'"),
        ("run --cpus 0-x --no-python true", "not a list of ids like 0-3,8: '0-x'"),
        ("run --cpus 0 --numa-binding none --no-python true", "cannot be combined with --cpus and --mems"),
        ("run --nproc-per-node 2 --cpus 0:0:0 --no-python true", "has 3 lists for 2 ranks"),
        ("run --report no/such/x.json --no-python true", "no/such/x.json: No such file or directory"),
        ("run no/such/x.py", "no/such/x.py: No such file or directory"),
        ("bind --local-rank 2 --nproc-per-node 2 true", "local rank 2 does not exist: this node has 2 ranks"),
    ],
)
def test_wrong_usage(arguments: str, words: str, capfd: pytest.CaptureFixture[str]) -> None:
    # main() runs in this process, which is quicker, and starts nothing.
    try:
        status: object = main(arguments.split())
    except SystemExit as ended:
        status = ended.code
    stdout, stderr = capfd.readouterr()
    assert (status, stdout) == (2, "")
    assert words in stderr.splitlines()[-1]
    assert "did you mean" in words or "did you mean" not in stderr


def test_wrong_usage_ends_the_process_with_2() -> None:
    done = completed([*LAUNCHER, "run"])
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("usage: rankspawn run ") and "Traceback" not in done.stderr


def test_a_wrong_mode_is_answered_with_the_right_ones() -> None:
    done = completed([*LAUNCHER, "run", "--numa-binding", "nodes", "x.py"])
    message = done.stderr.splitlines()[-1]
    assert all(mode.value in message for mode in AffinityMode)


@pytest.mark.parametrize(
    "options", [["--master-port", "99999"], ["--master-port", "-1"], ["--master-addr", "192.0.2.1"]], ids=" ".join
)
def test_a_meeting_place_that_cannot_be(options: list[str]) -> None:
    done = completed(in_ranks(ENVIRONMENT, *options))
    assert done.returncode in (1, 2) and done.stdout == ""
    assert options[1] in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("words", [["plan", "--help"], ["plan", "--unknown"]])
@pytest.mark.parametrize("width", [60, 80, 150])
def test_help_and_usage_are_as_wide_as_the_terminal(words: list[str], width: int) -> None:
    done = completed([*LAUNCHER, *words], env={**os.environ, "COLUMNS": str(width)})
    usage = re.findall(r"^(?:usage| {5,}\[).*", done.stdout + done.stderr, re.MULTILINE)
    assert width - 30 < max(map(len, usage)) <= width - 2


def test_help_names_every_option() -> None:
    done = completed([*LAUNCHER, "run", "--help"])
    assert (done.returncode, done.stderr) == (0, "")
    for option in "nproc-per-node numa-binding memory-policy log-dir master-addr master-port module no-python".split():
        assert f"--{option}" in done.stdout
    assert "{run,doctor}" not in completed([*LAUNCHER, "--help"]).stdout


def test_a_program_that_is_not_there() -> None:
    for program in ("/no/such/program", "no-such-program"):
        done = completed([*LAUNCHER, "run", "--nproc-per-node", "2", "--no-python", program])
        assert (done.returncode, done.stdout) == (127, "")
        assert done.stderr.count("\n") == 1 and program in done.stderr and "No such file" in done.stderr


def test_a_program_that_cannot_be_executed(tmp_path: Path) -> None:
    plain, folder = tmp_path / "plain", tmp_path / "folder"
    plain.write_text("#!/bin/sh\n")
    assert not plain.stat().st_mode & stat.S_IXUSR
    folder.mkdir()
    for program in (plain, folder):
        done = completed([*LAUNCHER, "run", "--nproc-per-node", "2", "--no-python", str(program)])
        assert (done.returncode, done.stdout) == (126, "")
        assert done.stderr.count("\n") == 1 and str(program) in done.stderr and "Permission denied" in done.stderr


def test_a_script_that_is_not_there() -> None:
    done = completed([*LAUNCHER, "run", "--nproc-per-node", "2", "no_such_script.py"])
    assert done.returncode == 2  # the interpreter's own status
    assert done.stderr == "rankspawn: no_such_script.py: No such file or directory\n"


# ---- the other mechanisms -------------------------------------------------------------------------------------------


def test_posix_spawn_gives_the_same() -> None:
    options = ["--nproc-per-node", "2"] + (["--numa-binding", "node"] if sys.platform == "linux" else [])
    environment = environment_here(RANKSPAWN_MECHANISM="posix_spawn")
    done = completed(in_ranks(SAY + "say(os.getpid() == os.getsid(0))\n", *options), env=environment)
    assert (done.returncode, said(done.stdout)) == (0, {0: True, 1: True})


def test_run_without_the_engine() -> None:
    environment = environment_here(RANKSPAWN_MECHANISM="subprocess")
    code = SAY + "say(os.getpid() == os.getsid(0))\nif os.environ['RANK'] == '1': sys.exit(3)\n"
    # Without --keep-going, the failure of one rank could end the other before it has said anything.
    done = completed(in_ranks(code, "--nproc-per-node", "2", "--keep-going"), env=environment)
    assert (done.returncode, said(done.stdout)) == (3, {0: True, 1: True})


@linux
def test_a_memory_policy_without_the_engine_is_refused_and_said() -> None:
    environment = environment_here(RANKSPAWN_MECHANISM="subprocess")
    done = completed(in_ranks(PLACE, "--numa-binding", "node", "--memory-policy", "bind"), env=environment)
    assert done.returncode != 0 and done.stdout == ""
    assert "set_mempolicy" in done.stderr and "Traceback" not in done.stderr


def test_an_unknown_mechanism_is_said() -> None:
    for arguments in (["run", "--no-python", "true"], ["doctor"]):
        done = completed([*LAUNCHER, *arguments], env=environment_here(RANKSPAWN_MECHANISM="fork"))
        assert done.returncode == 2
        assert "RANKSPAWN_MECHANISM='fork'" in done.stderr and "Traceback" not in done.stderr


# ---- doctor ---------------------------------------------------------------------------------------------------------

LINES = {
    "system": r"\w+ .*Python 3\.\d+",
    "extension": r"built with(out)? libnuma|missing",
    "mechanism": r"clone|posix_spawn|subprocess",
    "pidfd": r"yes|no",
    "group signal": r"free of races|only until",
    "cgroup at birth": r"yes, tried in /|no",
    "guard": r"yes",
    "sessions": r"the processes of",
    "Python stacks": r"can be read by (the standard library|py-spy)|no: ",
    "CPU affinity": r"yes, tried with|refused|not on this system",
    **{f"memory {mode}": r"yes, tried with|refused|unknown" for mode in MEMORY_MODES},
    "NUMA nodes": r"\d+ \(CPUs [\d,-]+\)|unknown",
    "inherited CPUs": r"[\d,-]+",
    "inherited nodes": r"[\d,-]+",
    "CPU quota": r"none|[\d.]+ CPUs? \(/",
}


def doctor(**environment: str) -> tuple[int, dict[str, str]]:
    """The status of `rankspawn doctor`, and its lines by name."""
    done = completed([*LAUNCHER, "doctor"], env=environment_here(**environment))
    assert done.stderr == ""
    lines = (re.split(r"\s{2,}", line, maxsplit=1) for line in done.stdout.splitlines())
    return done.returncode, dict(lines)


@linux
def test_doctor_says_each_thing() -> None:
    status, lines = doctor()
    assert status == 0
    assert list(lines) == list(LINES)
    for name, text in lines.items():
        assert re.match(LINES[name], text), name
    assert parse_ids(lines["inherited CPUs"]) == os.sched_getaffinity(0)


@linux
def test_doctor_says_it_where_there_is_no_engine() -> None:
    status, lines = doctor(RANKSPAWN_MECHANISM="subprocess")
    assert status == 1
    assert lines["mechanism"].startswith("subprocess") and lines["pidfd"].startswith("no")
    assert lines["memory bind"].startswith("refused: ")
    assert lines["guard"].startswith("no: a guard needs rankspawn's engine")


@linux
def test_doctor_is_told_the_mask_that_a_launcher_would_inherit() -> None:
    one = max(os.sched_getaffinity(0))
    done = completed(after(f"os.sched_setaffinity(0, [{one}])", [*LAUNCHER, "doctor"]))
    assert re.search(rf"^inherited CPUs +{one}$", done.stdout, re.MULTILINE)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert (ended.value.code, capsys.readouterr().out) == (0, f"rankspawn {rankspawn.__version__}\n")
