# A warm start: csrc/fork.c and csrc/title.c, for Python. _spawn.pyx includes it.

from cpython.buffer cimport PyBUF_SIMPLE, PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from libc.stdio cimport fflush
from posix.dlfcn cimport RTLD_LAZY, dlclose, dlopen, dlsym

RESULT_BYTES = sizeof(spawn_result)


cdef extern from "Python.h":
    void PyOS_BeforeFork()
    void PyOS_AfterFork_Parent()
    void PyOS_AfterFork_Child()


cdef extern from "<dlfcn.h>":
    int RTLD_NOLOAD


cdef extern from "spawn.h" nogil:
    pid_t spawn_fork(const spawn_request *, spawn_result *, int keep_below, bint sibling)
    int spawn_adopt(spawn_result *)
    void spawn_unblock_signals()
    int spawn_set_subreaper(bint on)
    bint spawn_is_subreaper()
    int spawn_die_with_parent()
    int spawn_show_command(char **argv, char **envp)
    int spawn_collapse_pages(size_t address, size_t length)


cdef spawn_result *_results(Py_buffer *view, Py_ssize_t count) except NULL:
    if view.len < count * <Py_ssize_t>sizeof(spawn_result):
        raise ValueError("less memory than the ranks' results need")
    return <spawn_result *>view.buf


def fork_crew(Crew crew, memory, int done, int keep_below, int umask, bint siblings=True):
    """Fork the ranks of a crew from this process, which must have one thread. It returns here and in each rank.

    Args:
        crew: the ranks, none of which has started.
        memory: a writable buffer, shared with the launcher, of RESULT_BYTES zeros for each rank.
        done: a pipe that each rank holds open until it has taken all its steps.
        keep_below: descriptors below this number stay open in the rank. It closes all others, except stdin to stderr.
        umask: the ranks' umask.
        siblings: make the ranks children of this process's parent, not of this process.

    Returns:
        In a rank, its number in the crew, after PyOS_AfterFork_Child() and with an empty signal mask; ps(1) shows the
        rank's command. In this process, -1. Each rank's result says whether its start worked.
    """
    cdef Py_buffer view
    cdef spawn_result *results
    cdef size_t rank
    cdef pid_t pid
    PyObject_GetBuffer(memory, &view, PyBUF_SIMPLE | PyBUF_WRITABLE)
    try:
        results = _results(&view, crew.crew.count)
        for rank in range(crew.crew.count):
            crew.requests[rank].pass_fds = &done
            crew.requests[rank].pass_fds_count = 1
            crew.requests[rank].umask = umask
            # The template was born with what a rank's own program would get, and its interpreter has set the rest.
            crew.requests[rank].restore_signals = False
            crew.requests[rank].ignored_signals = 0
        PyOS_BeforeFork()
        for rank in range(crew.crew.count):
            pid = spawn_fork(&crew.requests[rank], &results[rank], keep_below, siblings)
            if pid == 0:
                close(done)
                spawn_show_command(crew.requests[rank].argv, crew.requests[rank].envp)
                PyOS_AfterFork_Child()
                spawn_unblock_signals()
                return rank
            if pid < 0:
                break
        PyOS_AfterFork_Parent()
        return -1
    finally:
        PyBuffer_Release(&view)


def adopt(owner, memory, size_t rank):
    """In the launcher, give a forked rank to its owner after the rank has closed ``done``. Reap a failed rank.

    Args:
        owner: as for spawn().
        memory: as for fork_crew().
        rank: its number in the crew.

    Returns:
        None if the template did not fork this rank; else what spawn() returns.
    """
    cdef Py_buffer view
    cdef spawn_result result
    cdef int outcome
    PyObject_GetBuffer(memory, &view, PyBUF_SIMPLE)
    try:
        result = _results(&view, rank + 1)[rank]
    finally:
        PyBuffer_Release(&view)
    with nogil:
        outcome = spawn_adopt(&result)
    if outcome == SPAWN_NOT_TRIED:
        return None
    return _told(owner, &result, outcome)


def set_subreaper(bint on):
    """Make this process a subreaper or not (PR_SET_CHILD_SUBREAPER of prctl(2)). Returns whether it was one.

    Raises:
        OSError: the system has no subreapers.
    """
    cdef int was = spawn_set_subreaper(on)
    if was < 0:
        raise OSError(-was, f"PR_SET_CHILD_SUBREAPER: {strerror(-was).decode()}")
    return was != 0


def is_subreaper():
    """Whether this process is a subreaper (PR_GET_CHILD_SUBREAPER of prctl(2)); False if the system has none."""
    return spawn_is_subreaper() != 0


def die_with_parent():
    """Have SIGKILL sent to this process when its parent thread ends (PR_SET_PDEATHSIG). Returns 0 or an errno.

    The parent may have ended before: compare os.getppid() afterwards.
    """
    return spawn_die_with_parent()


def own_environment():
    """This process's environment in C: name -> value. A start without an environment of its own inherits it.

    os.environ may differ, because a library can set variables, as readline does with LINES and COLUMNS.
    """
    cdef size_t count
    cdef size_t place
    cdef _Arena arena = _Arena()
    cdef char **variables = arena.callers_environment(&count)
    found = {}
    for place in range(count):
        name, separator, value = (<bytes>variables[place]).partition(b"=")
        if separator:
            found.setdefault(name, value)
    return found


def collapse_pages(size_t address, size_t length):
    """Have the kernel back this part of this process's memory with huge pages (MADV_COLLAPSE of madvise(2), Linux 6.1).

    Returns 0 or an errno.
    """
    cdef int error
    with nogil:
        error = spawn_collapse_pages(address, length)
    return error


# The importer's calls of C. It cannot use ctypes, because ranks would then have a module that their programs have not
# imported, and a descriptor of the file that a newer libffi opens for its trampolines and keeps.


def flush_streams_of_c():
    """Flush the buffers of C's streams (fflush(NULL))."""
    fflush(NULL)


def end_openmp(const char *path):
    """End the threads of a loaded OpenMP library (omp_pause_resource_all of OpenMP 5.0, omp_pause_hard).

    Returns:
        Whether it has ended them; None if no library with such a function is loaded.
    """
    cdef int (*pause)(int) noexcept nogil
    cdef int code
    cdef void *library = dlopen(path, RTLD_LAZY | RTLD_NOLOAD)
    if library is NULL:
        return None
    pause = <int (*)(int) noexcept nogil>dlsym(library, b"omp_pause_resource_all")
    ended = None
    if pause is not NULL:
        with nogil:
            code = pause(2)  # omp_pause_hard of omp.h
        ended = code == 0
    dlclose(library)
    return ended
