"""The figures: which cases are timed together, and which ratios are promised."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import quantiles
from typing import Any

from harness import ALL_CPUS, Case, Group, Situation, Timings


@dataclass(frozen=True)
class Figure:
    """The ratio ``over`` / ``under``, or ``over`` - ``beyond`` in milliseconds, or else the median of ``over``, in
    microseconds or milliseconds.

    most, least: the target, if there is one.
    """

    text: str
    over: Case
    under: Case | None = None
    beyond: Case | None = None
    milliseconds: bool = False
    most: float | None = None
    least: float | None = None

    @property
    def cases(self) -> tuple[Case, ...]:
        """All cases that the figure is made of."""
        return tuple(case for case in (self.over, self.under, self.beyond) if case is not None)

    def measured(self, timings: Timings) -> tuple[float, float, float]:
        """(median, lower quartile, upper quartile). Raises Unable where a case could not run."""
        if self.under is not None:
            return timings.ratio(self.over, self.under)
        if self.beyond is not None:
            middle, low, high = timings.difference(self.over, self.beyond)
            return middle / 1e6, low / 1e6, high / 1e6
        low, middle, high = quantiles(timings.samples(self.over), n=4)
        unit = 1e6 if self.milliseconds else 1e3
        return middle / unit, low / unit, high / unit

    def met(self, value: float) -> bool | None:
        """Whether ``value`` meets the target, both as they are shown, to two decimals. None: there is no target."""
        if self.most is None and self.least is None:
            return None
        shown = round(value, 2)
        return (self.most is None or shown <= self.most) and (self.least is None or shown >= self.least)


@dataclass(frozen=True)
class Section:
    """A group, and the figures that come out of it."""

    group: Group
    figures: tuple[Figure, ...]


USUAL = Situation()


def _popen(label: str, situation: Situation = USUAL, **options: Any) -> Case:
    return Case(label, "popen", tuple(options.items()), situation)


def _spawn() -> Section:
    other = Situation(variables=(("RANKSPAWN_MECHANISM", "posix_spawn"),))
    floor = Case("floor: clone, bound", "floor", (("mode", "clone"),))
    libc = Case("floor: posix_spawn, unbound", "floor", (("mode", "posix_spawn"),))
    plain = _popen("subprocess.Popen, unbound")
    plain_env = _popen("subprocess.Popen, unbound, env=", env=True)
    numactl = Case("subprocess.Popen of numactl", "numactl")
    ours = _popen("rankspawn.Popen(binding=)", api="rankspawn", bound=True)
    ours_env = _popen("rankspawn.Popen(binding=, env=)", api="rankspawn", bound=True, env=True)
    extension = Case("rankspawn's extension alone", "extension")
    engine = Case("the engine, called from C", "floor", (("mode", "engine"), ("way", "one"), ("cores", 1)))
    portable = _popen("rankspawn.Popen, unbound, posix_spawn", other, api="rankspawn")
    cases = (floor, libc, plain, plain_env, numactl, ours, ours_env, extension, engine, portable)
    group = Group("spawn", cases, blocks=100)
    return Section(
        group,
        (
            Figure("Popen(binding=) / floor", ours, floor, most=1.30),
            Figure("Popen(binding=) / subprocess.Popen unbound", ours, plain, most=0.95),
            Figure("subprocess.Popen of numactl / Popen(binding=)", numactl, ours, least=5.5),
            Figure("Popen(binding=, env=) / floor", ours_env, floor),
            Figure("Popen(binding=, env=) / subprocess.Popen unbound, env=", ours_env, plain_env),
            Figure("  its call into the extension, and waitpid / floor", extension, floor),
            Figure("  the engine with its promises, called from C / floor", engine, floor),
            Figure("Popen unbound, portable mechanism / floor", portable, floor),
            Figure("subprocess.Popen unbound / floor", plain, floor),
            Figure("subprocess.Popen unbound, env= / floor", plain_env, floor),
            Figure("subprocess.Popen of numactl / floor", numactl, floor),
            Figure("C posix_spawn unbound / floor", libc, floor),
        ),
    )


def _handlers() -> Section:
    loaded = Situation(name="torch")  # its own process: importing torch leaves threads, fds and memory behind
    cases = {
        (api, logs): Case(
            f"{api}.SubprocessHandler{', log files' if logs else ''}",
            "handler",
            (("api", api), ("logs", logs)),
            loaded,
        )
        for api in ("torch", "rankspawn")
        for logs in (False, True)
    }
    return Section(
        Group("handler", tuple(cases.values()), blocks=40),
        (
            Figure(
                "torch's SubprocessHandler, node / ours", cases["torch", False], cases["rankspawn", False], least=5.0
            ),
            Figure("  both with log files", cases["torch", True], cases["rankspawn", True]),
        ),
    )


def _fds() -> Section:
    few, many = Situation(fds=10), Situation(fds=10_000)
    kinds = {"inherit": "stdio inherited", "null": "/dev/null", "files": "log files", "pipes": "pipes"}
    cases: list[Case] = []
    rows: list[Figure] = []
    beside: list[Figure] = []
    for stdio, text in kinds.items():
        ours = [_popen(f"rankspawn, {text}", s, api="rankspawn", bound=True, stdio=stdio) for s in (few, many)]
        theirs = [_popen(f"subprocess, {text}", s, stdio=stdio) for s in (few, many)]
        cases += ours + theirs
        rows.append(Figure(f"10,000 open fds / 10: {text}", ours[1], ours[0], most=None if stdio == "pipes" else 1.3))
        beside.append(Figure(f"  subprocess: {text}", theirs[1], theirs[0]))
    return Section(Group("fds", tuple(cases), blocks=40, rounds=10), (*rows, *beside))


def _memory() -> Section:
    small, large = USUAL, Situation(touch_mib=4096)
    ours = [_popen("rankspawn.Popen(binding=)", s, api="rankspawn", bound=True) for s in (small, large)]
    theirs = [_popen("subprocess.Popen", s) for s in (small, large)]
    return Section(
        Group("memory", (*ours, *theirs), blocks=60),
        (
            Figure("4 GiB parent / small", ours[1], ours[0], most=1.1),
            Figure("  subprocess", theirs[1], theirs[0]),
        ),
    )


def _notice() -> Section:
    ours, theirs = (
        Case(f"{api}: wait(timeout=) notices", "notice", (("api", api),)) for api in ("rankspawn", "subprocess")
    )
    return Section(
        Group("notice", (ours, theirs), blocks=25, rounds=1, warmup=0),
        (
            Figure("wait(timeout=) notices an exit after (us)", ours, most=1000),
            Figure("  subprocess (us)", theirs),
        ),
    )


def _threads() -> Section:
    two = Situation(cores=2)
    cases = {
        (api, threads): Case(
            f"{api}, {threads} thread{'s' * (threads > 1)}",
            "threads",
            (("api", api), ("threads", threads)),
            two,
        )
        for api in ("rankspawn", "subprocess")
        for threads in (1, 4)
    }
    return Section(
        Group("threads", tuple(cases.values()), blocks=30, rounds=1, warmup=0),
        (
            Figure("rate of 4 threads on 2 cores / of 1", cases["rankspawn", 1], cases["rankspawn", 4], least=1.6),
            Figure("  subprocess", cases["subprocess", 1], cases["subprocess", 4]),
        ),
    )


def _ranks() -> Section:
    """``launch`` of few and many ranks, on all CPUs, beside the quickest of the floor's ways."""
    whole = Situation(cores=ALL_CPUS)
    cases: list[Case] = []
    rows: list[Figure] = []
    for ranks in (8, 64, 256, 1024):
        ways = {"unbound": {"bound": False}, "bound": {}, "with a guard": {"bound": False, "guard": True}}
        ours, bound, guarded = (
            Case(f"launch of {ranks}, {way}", "launch", (("ranks", ranks), *options.items()), whole)
            for way, options in ways.items()
        )
        floor, bound_floor = (
            Case(f"floor: {ranks}, {'bound' if is_bound else 'unbound'}", "floor", _best(ranks, is_bound))
            for is_bound in (False, True)
        )
        engine, bound_engine = (
            Case(f"engine: {ranks}, {'bound' if is_bound else 'unbound'}", "floor", _engine("ranks", ranks, is_bound))
            for is_bound in (False, True)
        )
        cases += [ours, bound, guarded, floor, bound_floor, engine, bound_engine]
        most = 1.4 if ranks < 64 else 1.15
        rows += [
            Figure(f"launch of {ranks} / the best floor", ours, floor, most=most),
            Figure("  bound / bound", bound, bound_floor, most=most),
            Figure("  the engine with its promises, called from C / the best floor", engine, floor),
            Figure("  bound / bound", bound_engine, bound_floor),
            Figure("  with a guard / without", guarded, ours, most=None if ranks < 64 else 1.1),
            Figure("  with a guard / the best floor", guarded, floor),
        ]
    return Section(Group("ranks", tuple(cases), blocks=30, rounds=2, warmup=1), tuple(rows))


def _best(ranks: int, bound: bool) -> tuple[tuple[str, Any], ...]:
    return (("mode", "best"), ("ranks", ranks), ("cores", ALL_CPUS), ("bound", bound))


def _engine(way: str, ranks: int, bound: bool, cores: int = ALL_CPUS) -> tuple[tuple[str, Any], ...]:
    return (("mode", "engine"), ("way", way), ("ranks", ranks), ("cores", cores), ("bound", bound))


def _launch() -> Section:
    two = Situation(cores=2)
    loaded = Situation(cores=2, name="torch")
    cases: list[Case] = []
    rows: list[Figure] = []
    for ranks in (64, 256):
        ours = Case(f"launch of {ranks}", "launch", (("ranks", ranks),), two)
        loop = Case(f"subprocess.Popen of numactl, {ranks}", "numactl_loop", (("ranks", ranks),), two)
        theirs = Case(f"torch's SubprocessContext, {ranks}", "context", (("ranks", ranks),), loaded)
        cases += [ours, loop, theirs]
        rows += [
            Figure(f"torch's SubprocessContext, node, {ranks} ranks / launch", theirs, ours, least=6.0),
            Figure("  a loop of subprocess.Popen of numactl / launch", loop, ours, least=3.0),
        ]
    return Section(Group("launch", tuple(cases), blocks=20, rounds=2, warmup=1), tuple(rows))


def _commands() -> Section:
    two = Situation(cores=2)
    ours = Case("rankspawn run, 64 ranks", "run", (("ranks", 64),), two)
    call = Case("launch of 64", "launch", (("ranks", 64),), two)
    commands = {
        # Open MPI 4.1 waits for ever for some processes that do not call MPI_Init, if they are more than this cutoff.
        "mpirun": ("mpirun.openmpi", "--oversubscribe", "--mca", "odls_base_cutoff", "1000", "-np", "64"),
        "mpiexec.hydra": ("mpiexec.hydra", "-np", "64"),
        "srun": ("srun", "--overcommit", "-N1", "-n64"),
    }
    others = [Case(f"{name}, 64 ranks", "command", (("command", words),), two) for name, words in commands.items()]
    rows = [Figure("rankspawn run of 64 ranks, an interpreter's start with it (ms)", ours, milliseconds=True)]
    for case in others:
        rows.append(Figure(f"{case.label} / rankspawn run", case, ours))
        rows.append(Figure("  / launch", case, call, least=1.0))
    return Section(Group("commands", (ours, call, *others), blocks=10, rounds=1, warmup=1), tuple(rows))


def _groups() -> Section:
    two = Situation(cores=2)
    notice = Case("wait_any of 256 ranks notices", "group_notice", (("ranks", 256),), two)
    idle = {
        api: Case(f"{api}: watching 256 ranks", "group_idle", (("ranks", 256), ("api", api)), two)
        for api in ("rankspawn", "torch")
    }
    ours = Case("terminate() of 64", "group_terminate", (("ranks", 64),), two)
    floor = Case("kill and wait in C, 64", "floor", (("mode", "ends"), ("ranks", 64)))
    engine = Case("the engine's end of 64, called from C", "floor", _engine("ends", 64, bound=False, cores=2))
    return Section(
        Group("groups", (notice, *idle.values(), ours, floor, engine), blocks=20, rounds=1, warmup=0),
        (
            Figure("wait_any among 256 ranks notices an exit after (us)", notice, most=1000),
            Figure("CPU time of watching 256 idle ranks, in a second (us)", idle["rankspawn"]),
            Figure("  torch's polling (us)", idle["torch"]),
            Figure("terminate() of 64 ranks / kill and wait in C", ours, floor, most=1.2),
            Figure("  the engine with its promises, called from C / the same", engine, floor),
        ),
    )


def _placement() -> Section:
    loaded = Situation(name="placement")  # its own process: torch's functions are pointed at another machine there
    known = Case("place(), the topology known", "plan", (), loaded)
    whole = Case("Topology.read() and place()", "plan", (("whole", True),), loaded)
    theirs = Case("torch's functions, 8 ranks", "plan", (("api", "torch"),), loaded)
    files = Case("open() and read()", "files", (), loaded)
    bare, ours, popen, stock = (
        Case(f"python -c {code!r}", "interpreter", (("code", code), ("light", "rankspawn" in code)))
        for code in ("pass", "import rankspawn", "from rankspawn import Popen", "import subprocess")
    )
    # What the installed command runs.
    command = "from rankspawn._cli.main import main; sys.exit(main(['plan', '--nproc-per-node', '2']))"
    plan = Case("rankspawn plan --nproc-per-node 2", "interpreter", (("code", command),))
    return Section(
        Group(
            "placement", (known, whole, theirs, files, bare, ours, popen, stock, plan), blocks=30, rounds=4, warmup=1
        ),
        (
            Figure(
                "torch's functions, pointed at the tree / place(), topology known",
                theirs,
                known,
                least=50.0,
            ),
            Figure("  / Topology.read() and place(), which finds the devices", theirs, whole),
            Figure("Topology.read() and place() / open() and read() of its files", whole, files, most=5.0),
            Figure("import rankspawn adds to a bare start (ms)", ours, beyond=bare, most=15.0),
            Figure("  from rankspawn import Popen (ms)", popen, beyond=bare),
            Figure("  import subprocess (ms)", stock, beyond=bare),
            Figure("rankspawn plan --nproc-per-node 2 / python -c pass", plan, bare, most=3.0),
        ),
    )


# Printed under the table.
NOTES = (
    "launch: the with block: all are reaped, and nobody is left in their sessions. srun needs a cluster, as that of",
    "`python -m tests.slurm.cluster python benchmarks/run.py commands`.",
    "torch: where it sees no GPU, the device properties it asks for are those of some PCI device; where fewer than",
    "ranks, each GPU's in turn. The rest is its own.",
    "Log files: the caller opens them for subprocess, and closes them; for rankspawn they are opened by the child.",
    "Plans: 8 ranks, exclusive, 8 GPUs, on a made-up tree of 256 CPUs in 2 sockets, in memory. torch's functions are",
    "patched to read below its root and to be told its GPUs; they read its files again for each rank.",
    "Starts: python -I with compiled files; plan is what the installed script runs. Neither import loads psutil,",
    "asyncio, pynvml or torch, which is checked.",
)
SECTIONS = (
    _spawn(),
    _handlers(),
    _fds(),
    _memory(),
    _notice(),
    _threads(),
    _ranks(),
    _launch(),
    _groups(),
    _commands(),
    _placement(),
)
