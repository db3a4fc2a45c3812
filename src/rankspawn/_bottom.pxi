# Makes the interpreter run another command with no frame below it. _spawn.pyx includes it; _warm/rank.py says why.

from cpython.ref cimport Py_INCREF
from libc.stdlib cimport exit, malloc

import sys as _sys

cdef extern from "Python.h":
    ctypedef struct PyConfig:
        pass
    ctypedef struct PyStatus:
        pass
    ctypedef struct PyInterpreterState:
        pass
    void PyConfig_InitPythonConfig(PyConfig *)
    PyStatus PyConfig_SetBytesArgv(PyConfig *, Py_ssize_t, char **)
    void PyConfig_Clear(PyConfig *)
    PyStatus Py_InitializeFromConfig(const PyConfig *)
    int PyStatus_Exception(PyStatus)
    void Py_ExitStatusException(PyStatus)
    int Py_RunMain()
    void Py_LeaveRecursiveCall()
    PyInterpreterState *PyInterpreterState_Get()

cdef extern from "signal.h":
    int SIGINT
    int c_raise "raise"(int)

cdef extern from *:
    """
    #include <dlfcn.h>
    /* Since Python 3.13 the interpreter notes that its main program runs, and Py_RunMain refuses a second one. */
    static void
    forget_main_program(PyInterpreterState *interpreter)
    {
        void (*forget)(PyInterpreterState *);
        *(void **)&forget = dlsym(RTLD_DEFAULT, "_PyInterpreterState_SetNotRunningMain");
        if (forget) {
            forget(interpreter);
        }
    }
    """
    void forget_main_program(PyInterpreterState *)

# Py_InitializeFromConfig() would compute these anew, from less than it had the first time.
_KEPT = (
    "path", "executable", "_base_executable", "prefix", "exec_prefix", "base_prefix", "base_exec_prefix", "platlibdir",
    "pycache_prefix", "_stdlib_dir",
)


cdef class MainAtTheBottom:
    """An excepthook that runs a command of the interpreter, and ends the process as the interpreter does.

    The interpreter calls its excepthook when the last frame is gone. No Python code may run until the command has
    begun, so everything called here is C.
    """

    cdef list argv
    cdef object hook

    def __init__(self, argv, hook):
        """hook: the sys.excepthook of the program."""
        self.argv = [bytes(word) for word in argv]
        self.hook = hook

    def __call__(self, kind, error, trace):
        Py_INCREF(self)  # never released, because the interpreter borrows its hook from sys
        _sys.excepthook = self.hook
        _clear(error, trace)
        if kind is KeyboardInterrupt:  # it came instead of our exception, and is for the program
            c_raise(SIGINT)
        _run_main(self.argv)


cdef _clear(error, trace):
    """Release what the exception's frames hold, because the caller's C frames would keep them until the end."""
    error.__traceback__ = None
    while trace is not None:
        trace.tb_frame.clear()
        trace.tb_next, trace = None, trace.tb_next
    for name in ("last_type", "last_value", "last_traceback", "last_exc"):
        if hasattr(_sys, name):
            delattr(_sys, name)


cdef _run_main(list argv):
    cdef PyConfig config
    cdef PyStatus status
    cdef char **words = <char **>malloc((len(argv) + 1) * sizeof(char *))
    if words is NULL:
        raise MemoryError
    for number, word in enumerate(argv):
        words[number] = word
    kept = [(name, getattr(_sys, name)) for name in _KEPT if hasattr(_sys, name)]
    Py_LeaveRecursiveCall()  # the level of this call
    forget_main_program(PyInterpreterState_Get())
    PyConfig_InitPythonConfig(&config)
    status = PyConfig_SetBytesArgv(&config, len(argv), words)
    if not PyStatus_Exception(status):
        # In a running interpreter, this changes only its arguments and flags.
        status = Py_InitializeFromConfig(&config)
    if PyStatus_Exception(status):
        Py_ExitStatusException(status)
    PyConfig_Clear(&config)
    free(words)
    for name, value in kept:
        setattr(_sys, name, value)
    exit(Py_RunMain())
