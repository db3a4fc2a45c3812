"""A rank that is forked from a template cannot be told from one that is executed: each program here runs as both.

What a program prints is compared, with the addresses, pids and names of folders made equal, and so is its end.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from rankspawn import Template, launch

# What the template has imported: what the programs would import, so that an import leaves no difference behind. Not
# pdb, because readline, which it imports from Python 3.13 on, sets variables and handles signals of a terminal.
PRELOADED = [
    "asyncio", "concurrent.futures", "faulthandler", "inspect", "logging", "multiprocessing.pool", "random",
    "signal", "subprocess", "tempfile", "threading", "unittest", "warnings",
]  # fmt: skip

# By name: the program, which lies in train.py.
PROGRAMS = {
    "main": """
        import sys
        print(sys.argv, sys.orig_argv, sys.flags, sys.path, sys.warnoptions, sys._xoptions)
        print(list(globals()), __name__, __file__, __spec__, __loader__, __package__, __builtins__, __doc__)
        print(sys.executable, sys._base_executable, sys.prefix, sys.exec_prefix, sys.base_prefix, sys.platlibdir)
        print(sys.modules["__main__"].__dict__ is globals(), sys.excepthook is sys.__excepthook__, sys.exc_info())
        print([name for name in dir(sys) if name.startswith("last_")], sys.gettrace(), sys.getprofile())
        """,
    "frames": """
        import inspect, sys
        print(inspect.stack(), sys._getframe().f_back)
        def depth(n=1):
            try:
                return depth(n + 1)
            except RecursionError:
                return n
        print(depth(), sys.getrecursionlimit(), {t: f.f_lineno for t, f in sys._current_frames().items()}.values())
        """,
    "traceback": """
        def f(): g()
        def g():
            try:
                {}["key"]
            except KeyError as error:
                raise ValueError("text") from error
        f()
        """,
    "syntax error": "print('x'\nprint(",
    "exception group": """
        import sys
        if sys.version_info >= (3, 11):
            raise ExceptionGroup("two", [ValueError(1), TypeError(2)])
        """,
    "exit 3": "import sys; sys.exit(3)",
    "exit text": "import sys; sys.exit('to stderr')",
    "exit 256": "raise SystemExit(256)",
    "exit True": "raise SystemExit(True)",
    "_exit": "import os; print('not flushed'); os._exit(4)",
    "base exception": "class Stop(BaseException): pass\nraise Stop(1)",
    "keyboard interrupt": "import os, signal\nos.kill(os.getpid(), signal.SIGINT)\nfor _ in range(10**8): pass",
    "interrupt raised": "import atexit\natexit.register(print, 'atexit')\nraise KeyboardInterrupt",
    "terminated": "import os, signal\nprint('x', flush=True)\nos.kill(os.getpid(), signal.SIGTERM)",
    "aborted": "import os; os.abort()",
    "segmentation fault": """
        import faulthandler, os, signal, sys
        faulthandler.enable()
        def f(): os.kill(os.getpid(), signal.SIGSEGV)
        f()
        """,
    "faulthandler": """
        import faulthandler, sys
        print(faulthandler.is_enabled())
        def f(): faulthandler.dump_traceback(all_threads=True)
        f()
        """,
    "end": """
        import atexit, os, sys, threading, time, weakref
        class C: pass
        kept = C()
        weakref.finalize(kept, print, "finalized")
        atexit.register(print, "first registered")
        atexit.register(lambda: 1 / 0)
        atexit.register(print, "last registered")
        threading.Thread(target=lambda: (time.sleep(0.05), print("thread")), name="T").start()
        threading.Thread(target=time.sleep, args=(100,), daemon=True).start()
        class AtEnd:
            def __del__(self): print("deleted", sys is None)
        at_end = AtEnd()
        print("end of main")
        """,
    "unraisable": """
        class Bad:
            def __del__(self): 1 / 0
        Bad()
        """,
    "threads": """
        import os, threading
        main = threading.main_thread()
        print(threading.enumerate() == [main], main.name, main.native_id == os.getpid() == threading.get_native_id())
        print(main.ident == threading.get_ident(), threading.current_thread() is main)
        print(os.listdir("/proc/self/task") == [str(os.getpid())])
        def f(): raise ValueError
        thread = threading.Thread(target=f)
        print(thread.name)
        thread.start()
        thread.join()
        """,
    "signals": """
        import signal
        print({s: signal.getsignal(s) for s in sorted(signal.valid_signals())}, signal.set_wakeup_fd(-1))
        with open("/proc/self/status") as status:
            print(*(line for line in status if line.startswith(("Sig", "Shd"))))
        print(signal.pthread_sigmask(signal.SIG_BLOCK, ()), signal.getitimer(signal.ITIMER_REAL))
        """,
    "environment": """
        import os, subprocess
        own = {name: value for name, value in os.environ.items() if name not in ("RANKSPAWN_CALL_NS", "MASTER_PORT")}
        print(own)
        os.environ["NEW"] = "1"
        del os.environ["RANK"]
        said = subprocess.run(["env"], stdout=subprocess.PIPE, text=True).stdout
        print(sorted(x for x in said.splitlines() if x.split("=")[0] not in ("RANKSPAWN_CALL_NS", "MASTER_PORT", "_")))
        """,
    "process": """
        import os, resource, sys
        print(os.getppid(), os.getsid(0) == os.getpgrp() == os.getpid(), os.getcwd())
        print(os.umask(0o22), os.getpriority(0, 0))
        print([resource.getrlimit(n) for n in range(16)], os.sched_getaffinity(0), os.sched_getscheduler(0))
        for name in ("comm", "cmdline", "oom_score_adj", "cgroup"):
            print(open(f"/proc/self/{name}").read().split("\\0"))
        print(sorted(os.listdir("/proc/self/fd")), [os.get_inheritable(n) for n in range(3)])
        seen = dict(line.split("=", 1) for line in open("/proc/self/environ").read().split("\\0") if line)
        print({name: seen[name] for name in ("RANK", "WORLD_SIZE", "HOME", "PATH")})
        """,
    "streams": """
        import os, sys
        for stream in (sys.stdin, sys.stdout, sys.stderr):
            print(stream, stream.mode, stream.errors, stream.newlines, stream.line_buffering, stream.write_through)
            print(stream.buffer, stream.isatty(), stream.fileno(), stream.seekable(), stream.closed)
            raw = getattr(stream.buffer, "raw", stream.buffer)
            print(raw, raw.seekable(), raw.closefd, raw._blksize)
        print(sys.stdin is sys.__stdin__, sys.stdout is sys.__stdout__, sys.stderr is sys.__stderr__)
        print("é ☃", file=sys.stderr)
        print(sys.stdin.read())
        sys.stdout.write("no newline")
        os.write(1, b"first, unless streams are written through\\n")
        """,
    "input": "print([input('? '), input()])\ntry:\n    input()\nexcept EOFError as e:\n    print(repr(e))",
    "breakpoint": "x = 1\nbreakpoint()\nprint(x)",
    "logging": """
        import logging, sys
        logging.warning("by the root logger %s", 1)
        logging.getLogger("a.b").info("not shown")
        logging.basicConfig(format="%(levelname)s %(processName)s %(threadName)s %(module)s %(message)s", force=True)
        logging.error("text", exc_info=ValueError(1))
        print(logging.getLogger().handlers[0].stream is sys.stderr, logging.root.level)
        record = logging.LogRecord("n", 1, "p", 1, "m", (), None)
        print(record.relativeCreated < 10_000, record.process == __import__("os").getpid())
        """,
    "warnings": """
        import warnings
        print(warnings.filters)
        warnings.warn("shown", DeprecationWarning)
        warnings.warn("shown, too", RuntimeWarning)
        """,
    "fork": """
        import multiprocessing as m
        def f(x): return x, m.current_process().name, m.parent_process().pid == __import__("os").getppid()
        if __name__ == "__main__":
            print(m.current_process().name, m.parent_process(), m.active_children(), m.current_process()._identity)
            with m.get_context("fork").Pool(1) as pool: print(pool.map(f, range(3)))
            p = m.get_context("fork").Process(target=print, args=("in the child",)); p.start(); p.join()
            print(p.name, p.exitcode)
        """,
    "spawn": """
        import multiprocessing as m
        def f(x): return x, m.current_process().name, __name__, m.parent_process().pid == __import__("os").getppid()
        if __name__ == "__main__":
            with m.get_context("spawn").Pool(1) as pool: print(pool.map(f, range(3)))
        """,
    "forkserver": """
        import multiprocessing as m
        def f(x): return x, m.current_process().name, __name__
        if __name__ == "__main__":
            with m.get_context("forkserver").Pool(1) as pool: print(pool.map(f, range(3)))
        """,
    "futures": """
        from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
        if __name__ == "__main__":
            for kind in (ProcessPoolExecutor, ThreadPoolExecutor):
                with kind(1) as pool: print(list(pool.map(abs, [-1, 2])))
        """,
    "os.fork": """
        import os, random
        first = random.random()
        if pid := os.fork():
            print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
        else:
            os._exit(3 if random.random() != first else 4)
        """,
    "asyncio": """
        import asyncio, os, signal
        async def main():
            loop = asyncio.get_running_loop()
            done = asyncio.Event()
            loop.add_signal_handler(signal.SIGUSR1, done.set)
            os.kill(os.getpid(), signal.SIGUSR1)
            await asyncio.wait_for(done.wait(), 20)
            child = await asyncio.create_subprocess_exec("sh", "-c", "exit 5")
            print(await child.wait())
        asyncio.run(main())
        """,
    "pickle": """
        import copy, pickle
        class C: pass
        print(type(pickle.loads(pickle.dumps(C()))) is C, C.__module__, C)
        import __main__
        print(__main__.C is C)
        """,
    "local module": "import neighbour\nprint(neighbour.VALUE, neighbour.__file__, neighbour.__spec__)",
    "collector": """
        import gc
        print(gc.isenabled(), gc.get_threshold(), gc.get_debug(), gc.callbacks)
        """,
    "unittest": """
        import unittest
        class Test(unittest.TestCase):
            def test(self): self.assertEqual(1, 1)
        unittest.main(verbosity=0, exit=False, argv=["x"])
        """,
}

# By name: the command behind the interpreter.
COMMANDS = {
    "arguments": ["train.py", "-c", "--x", "ü ☃"],
    "folder of the script": ["sub/other.py"],
    "folder": ["sub", "a"],
    "archive": ["sub.zip", "a"],
    "missing": ["missing.py"],
    "-m": ["-m", "train", "a"],
    "-m of a package": ["-m", "pkg", "a"],
    "-m, missing": ["-m", "missing"],
    "-m, exception": ["-m", "pkg.bad"],
    "-c": ["-c", "import sys; print(sys.argv, sys.path, list(globals()))\n1/0", "a"],
    "-c, indented": ["-c", "  print(1)"],
    "-u": ["-u", "streams.py"],
    "-O": ["-O", "-c", "assert False; print(__debug__, __import__('sys').flags)"],
    "-W": ["-W", "error", "warns.py"],
    "-X dev": ["-X", "dev", "warns.py"],
    "-I": ["-I", "train.py"],
    "-E -s": ["-E", "-s", "train.py"],
    "-S": ["-S", "-c", "import sys; print('site' in sys.modules)"],
    "-X faulthandler": ["-X", "faulthandler", "fault.py"],
    "cProfile": ["-m", "cProfile", "-o", os.devnull, "train.py"],
    "pdb": ["-m", "pdb", "train.py"],
    "timeit": ["-m", "timeit", "-n", "1", "-r", "1", "-q", "pass"],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all programs."""
    folder = tmp_path_factory.mktemp("programs")
    (folder / "neighbour.py").write_text("VALUE = 1\n")
    (folder / "train.py").write_text(textwrap.dedent(PROGRAMS["main"]))
    (folder / "streams.py").write_text(textwrap.dedent(PROGRAMS["streams"]))
    (folder / "warns.py").write_text(textwrap.dedent(PROGRAMS["warnings"]))
    (folder / "fault.py").write_text(textwrap.dedent(PROGRAMS["faulthandler"]))
    (folder / "input").write_text("p x\nc\nq\n")
    (folder / "sub").mkdir()
    (folder / "sub" / "other.py").write_text(textwrap.dedent(PROGRAMS["main"]))
    (folder / "sub" / "__main__.py").write_text(textwrap.dedent(PROGRAMS["main"]) + "import other\n")
    (folder / "pkg").mkdir()
    (folder / "pkg" / "__init__.py").write_text("print(__name__)\n")
    (folder / "pkg" / "bad.py").write_text("def f(): return 1/0\nf()\n")
    (folder / "pkg" / "__main__.py").write_text(textwrap.dedent(PROGRAMS["main"]))
    from zipfile import ZipFile

    with ZipFile(folder / "sub.zip", "w") as archive:
        archive.writestr("__main__.py", textwrap.dedent(PROGRAMS["main"]))
    for name, text in PROGRAMS.items():
        (folder / f"{name.replace(' ', '_')}_program.py").write_text(textwrap.dedent(text))
    return folder


@pytest.fixture(scope="module")
def template(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Template]:
    """A template whose processes are made before the first test, and so are no leftovers of any."""
    with Template(PRELOADED, required=True) as template:
        Way(folder, template).run(["neighbour.py"], tmp_path_factory.mktemp("first"))
        yield template


class Way:
    """Runs commands as one rank, cold or warm, and says how they ended."""

    def __init__(self, folder: Path, template: Template | None) -> None:
        self.folder = folder
        self.template = template

    def run(self, words: list[str], logs: Path, nprocs: int = 1, env: dict[str, str] | None = None) -> list[str]:
        """What each rank wrote to stdout and stderr, and its status."""
        stdin = os.open(self.folder / "input", os.O_RDONLY)
        before = os.dup(0)
        os.dup2(stdin, 0)
        try:
            group = launch(
                [sys.executable, *words], nprocs, cwd=self.folder, log_dir=logs, keep_going=True, numa=None,
                env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})}, warm=self.template,
            )  # fmt: skip
        finally:
            os.dup2(before, 0)
            os.close(before)
            os.close(stdin)
        with group:
            statuses = group.wait(60)
            assert {rank.mechanism for rank in group.ranks} == {"warm" if self.template else "clone"}
        said = []
        for rank, status in enumerate(statuses):
            files = [(logs / "attempt_0" / str(rank) / f"{name}.log").read_text() for name in ("stdout", "stderr")]
            said.append("\n".join([*map(comparable, files), f"status {status}"]))
        return said


def comparable(text: str) -> str:
    """Without what differs from one process to the next."""
    text = re.sub(r"0x[0-9a-f]{6,}", "0x", text)
    text = re.sub(r"/(cold|warm)/attempt", "/way/attempt", text)
    text = re.sub(r"SigQ:\t\d+/", "SigQ:\t/", text)  # counts what is pending for all processes of this user
    text = re.sub(r"\nExtension modules: [^\n]*\n", "", text)  # faulthandler lists what is loaded
    # From Python 3.14 on it lists frames of C, too. A forked rank has more of them below the interpreter's.
    text = re.sub(r"(?<=C stack trace \(most recent call first\):\n)(  Binary file [^\n]*\n)+", "", text)
    return re.sub(r"\d+ function calls.*|in \d+\.\d+s|[\d.]+ [mn]?sec per loop|\(pid \d+\)", "", text)


def assert_same(folder: Path, template: Template, tmp_path: Path, words: list[str]) -> None:
    cold = Way(folder, None).run(words, tmp_path / "cold")
    warm = Way(folder, template).run(words, tmp_path / "warm")
    assert warm == cold


@pytest.mark.parametrize("name", PROGRAMS)
def test_program(name: str, folder: Path, template: Template, tmp_path: Path) -> None:
    assert_same(folder, template, tmp_path, [f"{name.replace(' ', '_')}_program.py", "an argument"])


@pytest.mark.parametrize("name", COMMANDS)
def test_command(name: str, folder: Path, tmp_path: Path) -> None:
    with Template(PRELOADED, required=True) as template:
        assert_same(folder, template, tmp_path, COMMANDS[name])


SEEDS = """
import multiprocessing, os, random, secrets, sys, tempfile, uuid
said = [random.random(), tempfile.mktemp(), bytes(multiprocessing.current_process().authkey), uuid.uuid4()]
said += [secrets.token_hex(), os.urandom(8)]
if "numpy" in sys.modules or __import__("importlib.util").util.find_spec("numpy"):
    import numpy
    said.append(numpy.random.random())
print(*said, sep="\\n")
"""


def test_ranks_have_random_numbers_of_their_own(folder: Path, template: Template, tmp_path: Path) -> None:
    (folder / "seeds.py").write_text(SEEDS)
    for way, warm in (("cold", None), ("warm", template)):
        said = [one.splitlines() for one in Way(folder, warm).run(["seeds.py"], tmp_path / way, nprocs=3)]
        for numbers in zip(*(one[:-3] for one in said), strict=True):
            assert len(set(numbers)) == 3, f"{way}: {numbers}"


def test_the_hash_seed_is_the_templates(folder: Path, template: Template, tmp_path: Path) -> None:
    (folder / "hashes.py").write_text("print(hash('text'))")
    words = ["hashes.py"]
    assert len(set(Way(folder, None).run(words, tmp_path / "cold", nprocs=3))) == 3
    assert len(set(Way(folder, template).run(words, tmp_path / "warm", nprocs=3))) == 1, "as the guide says"


@pytest.mark.parametrize("locale", [{"LC_ALL": "C"}, {"LC_ALL": "", "LC_CTYPE": "", "LANG": ""}])
def test_the_interpreters_own_variables(folder: Path, tmp_path: Path, locale: dict[str, str]) -> None:
    env = {**locale, "PYTHONHASHSEED": "3", "PYTHONIOENCODING": "latin-1", "PYTHONWARNINGS": "error"}
    words = [
        "-c",
        "import os, sys; print(hash('x'), sys.flags, sys.stdout, sys.warnoptions, os.environ.get('LC_CTYPE'))",
    ]
    cold = Way(folder, None).run(words, tmp_path / "cold", env=env)
    with Template(PRELOADED, required=True) as template:
        assert Way(folder, template).run(words, tmp_path / "warm", env=env) == cold


def test_what_an_import_sets_is_there(folder: Path, tmp_path: Path) -> None:
    (folder / "sets.py").write_text(
        "import os, signal, sys\nos.environ['SET'] = '1'\nos.environ.pop('HOME')\n"
        "signal.signal(signal.SIGUSR1, signal.SIG_IGN)\nsys.excepthook = lambda *e: print('hooked', e[0])\n"
    )
    program = (
        "import sets, os, signal; print(os.environ['SET'], 'HOME' in os.environ, signal.getsignal(signal.SIGUSR1))"
    )
    program += "; print(*[l for l in open('/proc/self/status') if l.startswith('Sig')]); 1/0"
    cold = Way(folder, None).run(["-c", program], tmp_path / "cold")
    with Template(["sets"], required=True) as template:
        assert Way(folder, template).run(["-c", program], tmp_path / "warm") == cold
    assert "hooked" in cold[0]


LAUNCHER = """
import sys
from rankspawn import Template, launch
with Template(["random"], required=True) as template:
    warm = template if sys.argv[1] == "warm" else False
    with launch([sys.executable, *sys.argv[2:]], 1, numa=None, warm=warm) as group:
        group.wait(60)
        assert group.ranks[0].mechanism == ("warm" if warm else "clone")
"""


@pytest.mark.parametrize("name", ["streams", "breakpoint", "input"])
def test_at_a_terminal(folder: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "launcher.py").write_text(LAUNCHER)
    said = {}
    for way in ("cold", "warm"):
        ours, theirs = os.openpty()
        command = [sys.executable, tmp_path / "launcher.py", way, f"{name}_program.py"]
        with subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, cwd=folder) as process:
            os.close(theirs)
            os.write(ours, b"p x\nc\n\x04")
            with open(ours, "rb") as terminal:
                parts = []
                try:
                    while part := terminal.read1():
                        parts.append(part)
                except OSError:  # EIO: nobody has the other end
                    pass
        assert process.returncode == 0, parts
        said[way] = comparable(b"".join(parts).decode())
    assert said["warm"] == said["cold"]
