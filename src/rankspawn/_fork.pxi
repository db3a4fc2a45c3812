# A warm start, included by _spawn.pyx: what csrc/fork.c and csrc/title.c do, for Python.

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
        crew: the ranks, none of which has been started.
        memory: a writable buffer that is shared with the launcher, of RESULT_BYTES zeros for each rank.
        done: a pipe that each rank holds open until it has taken all its steps.
        keep_below: the rank closes all descriptors from this number on, and after stderr no other.
        umask: the ranks' umask.
        siblings: the ranks become children of this process's parent, and no children of this process.

    Returns:
        In a rank its number in the crew, after PyOS_AfterFork_Child(), and with an empty signal mask; ps(1) shows the
        rank's command. In this process -1: each rank's result says what became of it.
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
    """Give a forked rank to its owner, in the launcher, after the rank has closed ``done``. A failed one is reaped.

    Args:
        owner: as for spawn().
        memory: as for fork_crew().
        rank: its number in the crew.

    Returns:
        None where the template has not come to this rank; else what spawn() returns.
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
        OSError: the system has none.
    """
    cdef int was = spawn_set_subreaper(on)
    if was < 0:
        raise OSError(-was, f"PR_SET_CHILD_SUBREAPER: {strerror(-was).decode()}")
    return was != 0


def is_subreaper():
    """Whether this process is one (PR_GET_CHILD_SUBREAPER of prctl(2)); False where the system has none."""
    return spawn_is_subreaper() != 0


def die_with_parent():
    """SIGKILL for this process when the thread that is its parent now ends (PR_SET_PDEATHSIG). Returns 0 or an errno.

    The parent may have ended before: compare os.getppid() afterwards.
    """
    return spawn_die_with_parent()


def own_environment():
    """This process's environment as C has it, which a start without an environment of its own inherits: name -> value.

    os.environ may have other variables: a library can set some, as readline does with LINES and COLUMNS.
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


# What the importer asks of C. ctypes would do it, too, but ranks would have that module, which their programs have not
# imported, and a descriptor of libffi's own file, which a newer libffi opens for its trampolines and keeps.


def flush_streams_of_c():
    """Write what is in the buffers of C's streams (fflush(NULL))."""
    fflush(NULL)


def end_openmp(const char *path):
    """End the threads of an OpenMP library that is loaded (omp_pause_resource_all of OpenMP 5.0, omp_pause_hard).

    Returns:
        Whether it has ended them; None where it has no such function, or is not loaded.
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
