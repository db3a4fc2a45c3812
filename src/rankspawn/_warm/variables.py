"""Environment variables and a template: which ones imports read and set, and whether a rank has the same values.

A module keeps what it reads when it is imported. A rank that is forked from a template has what the importer read, so a
rank whose own variable has another value must start cold.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from fnmatch import translate
from typing import Any

# Native code reads these when it is loaded, which no recorder in Python sees. "*" stands for any characters. Found by a
# getenv() that writes its caller's library down (libgomp, OpenBLAS, libtorch_cpu with oneDNN and MKL in it, libc10,
# libgfortran, OpenSSL and numpy), and in the manuals of libomp and glibc.
#
# Not here, because they are read at the first use, which no template makes: CUDA_VISIBLE_DEVICES and what else the CUDA
# driver reads (cuInit), and NCCL_* (ncclCommInitRank).
READ_BY_LIBRARIES = (
    # The interpreter itself, the dynamic linker and the C library.
    "PYTHON*", "LD_*", "GLIBC_TUNABLES", "MALLOC_*", "LANG", "LANGUAGE", "LC_*", "TZ", "TZDIR",
    # libgomp, libomp, libiomp5. Places and a thread limit are read at the load and kept for good.
    "OMP_*", "GOMP_*", "ACC_*", "KMP_*", "LIBOMP_*",
    # OpenBLAS, MKL, oneDNN, BLIS. MKL looks how many ranks of an MPI share the machine.
    "OPENBLAS_*", "GOTO_NUM_THREADS", "MKL_*", "MKLDNN_*", "DNNL_*", "ONEDNN_*", "BLIS_*", "I_MPI_*",
    "MPI_LOCALNRANKS", "OMPI_COMM_WORLD_LOCAL_SIZE",
    # libc10 and libtorch.
    "KINETO_*", "PYTORCH_API_USAGE_STDERR", "TORCH_ALLOW_TF32_*", "TORCH_BLAS_*", "TORCH_CPP_LOG_LEVEL",
    "TORCH_CUSTOM_TERMINATE", "TORCH_DISTRIBUTED_DEBUG", "TORCH_LINALG_*", "TORCH_ROCM_*",
    "TORCH_SHOW_CPP_STACKTRACES", "INTEL_LIBITTNOTIFY64",
    # Others.
    "GFORTRAN_*", "OPENSSL_*", "SSL_CERT_*", "NPY_*", "NUMPY_*", "NUMEXPR_*", "VECLIB_*", "JEMALLOC_*", "ARROW_*",
    "CUDA_MODULE_LOADING", "GRPC_*", "TF_*", "XLA_*", "JAX_*",
)  # fmt: skip

_READ_BY_LIBRARIES = re.compile("|".join(map(translate, READ_BY_LIBRARIES)))

# With these libgomp and libomp bind the threads of a process to places that they choose at the load, among the CPUs
# that the importer has.
BIND_THREADS = ("OMP_PROC_BIND", "OMP_PLACES", "GOMP_CPU_AFFINITY", "KMP_AFFINITY")

# Frames of these only pass a read on.
_BETWEEN = {"os", "_collections_abc", "collections.abc", __name__}

_READS = ("__getitem__", "__iter__", "__len__", "copy")
_WRITES = ("__setitem__", "__delitem__")


class Recorder:
    """What imports do to ``os.environ``, from ``with recorder.recording():`` on.

    Attributes:
        before: The variables that this process was executed with.
        read: By name of a variable, the module that was being imported when it was read first.
        written: By name, the last value that was set; None for a variable that was removed.
        copied: The modules that took all variables at once, which does not show what they need.
    """

    def __init__(self, proc: str) -> None:
        self.before = _executed_with(proc)
        self.read: dict[str, str] = {}
        # The interpreter sets LC_CTYPE, where the locale is C (PEP 538), as it would in a rank.
        self.written: dict[str, str | None] = {
            name: os.environ.get(name)
            for name in {*self.before, *os.environ}
            if self.before.get(name) != os.environ.get(name)
        }
        self.copied: list[str] = []
        self._copying_at: set[tuple[int, int]] = set()

    @contextmanager
    def recording(self) -> Iterator[Recorder]:
        """Record until the end of the block, also what other threads read."""
        kind: Any = type(os.environ)
        own = {name: kind.__dict__.get(name) for name in (*_READS, *_WRITES)}
        kind.__getitem__ = self._reading(kind.__getitem__)
        kind.__iter__ = self._copying(kind.__iter__)
        kind.__len__ = self._copying(kind.__len__)
        kind.copy = self._copying(kind.copy)
        kind.__setitem__ = self._writing(kind.__setitem__)
        kind.__delitem__ = self._writing(kind.__delitem__)
        try:
            yield self
        finally:
            for name, function in own.items():
                if function is None:
                    delattr(kind, name)
                else:
                    setattr(kind, name, function)

    def _reading(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def __getitem__(environ: Any, name: Any) -> Any:
            text = _text(name)
            # What an import has set itself says nothing about the environment.
            if text is not None and text not in self.written and _instruction() not in self._copying_at:
                self.read.setdefault(text, importing())
            return function(environ, name)

        return __getitem__

    def _copying(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(environ: Any) -> Any:
            # dict(os.environ) asks for the names, and then for the value of each.
            self._copying_at.add(_instruction())
            if (module := importing()) not in self.copied:
                self.copied.append(module)
            return function(environ)

        return wrapper

    def _writing(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(environ: Any, name: Any, *value: Any) -> None:
            function(environ, name, *value)
            text = _text(name)
            if text is not None:
                self.written[text] = _text(value[0]) if value else None

        return wrapper


def _executed_with(proc: str) -> dict[str, str]:
    try:
        with open(f"{proc}/self/environ", "rb") as file:
            pairs = [pair.partition(b"=") for pair in file.read().split(b"\0") if b"=" in pair]
    except OSError:
        return dict(os.environ)
    return {os.fsdecode(name): os.fsdecode(value) for name, _, value in pairs}


def _text(name: object) -> str | None:
    if isinstance(name, (str, bytes)):
        return os.fsdecode(name)
    return None


def _instruction() -> tuple[int, int]:
    """The frame that uses os.environ now, and its instruction."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__") in _BETWEEN:
        frame = frame.f_back
    return id(frame), frame.f_lasti


def importing() -> str:
    """The module that the caller imports now; if it imports none, the module whose function called.

    A helper that reads for others does not count: the nearest frame is only taken if no module is being executed.
    """
    frame = sys._getframe(1)
    nearest = ""
    while frame is not None:
        name = frame.f_globals.get("__name__", "?")
        if name not in _BETWEEN and not name.startswith(("importlib.", "rankspawn.")):
            if frame.f_code.co_name == "<module>" and name != "__main__":
                return str(name)
            nearest = nearest or str(name)
        frame = frame.f_back  # type: ignore[assignment]
    return nearest


def by_library(name: str) -> bool:
    """Whether ``name`` is one of those that libraries read when they are loaded."""
    return _READ_BY_LIBRARIES.match(name) is not None


def difference(prepared: Mapping[str, Any], env: Mapping[str, str]) -> str | None:
    """Why a rank with the variables ``env`` cannot be forked from a template, in one sentence; None if it can.

    Args:
        prepared: What prepare() returned in the importer, or its copy by JSON.
        env: All variables that the rank would be executed with.
    """
    for name in BIND_THREADS if prepared["openmp"] else ():
        if name in env:
            return f"{name} is set: OpenMP chooses CPUs when it is loaded, and binds its threads to them"
    before: Mapping[str, str] = prepared["environment"]
    for name in sorted({*before, *env}):
        if before.get(name) != env.get(name):
            module = prepared["environment_read"].get(name)
            if module is not None:
                return f"{module} read {name} when it was imported: {_values(before.get(name), env.get(name))}"
            if by_library(name):
                return f"libraries read {name} when they are loaded: {_values(before.get(name), env.get(name))}"
    return None


def _values(of_template: str | None, of_rank: str | None) -> str:
    def said(value: str | None) -> str:
        return "unset" if value is None else repr(value)

    return f"it was {said(of_template)} in the template, and is {said(of_rank)} in the rank"
