# cython: language_level=3, freethreading_compatible=True, boundscheck=False, wraparound=False
"""Marshals one start from Python to csrc/spawn.h and back. No policy, no module state.

Everything is converted before the call and the call is made without the GIL: executing from a slow file system
must not stop the program's other threads (cpython#104372).
"""

from cpython.mem cimport PyMem_Free, PyMem_Malloc, PyMem_Realloc
from libc.limits cimport CHAR_BIT, INT_MAX
from libc.string cimport memchr, memcpy, strerror, strlen
from posix.types cimport gid_t, pid_t, uid_t
from posix.unistd cimport close


cdef extern from "Python.h":
    int PyUnicode_FSConverter(object text, void *encoded) except 0
    bint PyUnicode_IS_ASCII(object text)
    bint PyUnicode_Check(object text)
    object PyNumber_Index(object number)
    void *PyUnicode_DATA(object text)
    Py_ssize_t PyUnicode_GET_LENGTH(object text)


cdef extern from "spawn.h" nogil:
    cdef enum:
        STEP_NONE
        STEP_COUNT
        STREAM_INHERIT
        STREAM_SAME_AS_STDOUT

    cdef enum spawn_outcome:
        SPAWN_STARTED
        SPAWN_DECLINED

    cdef enum spawn_mechanism:
        SPAWN_CLONE
        SPAWN_POSIX

    cdef struct spawn_stream:
        const char *path
        int open_flags
        int fd

    cdef struct spawn_request:
        const char **executables
        char **argv
        char **envp
        const char *cwd
        spawn_stream streams[3]
        int parent_ends[3]
        const int *pass_fds
        size_t pass_fds_count
        bint close_fds
        bint restore_signals
        bint new_session
        pid_t process_group
        int umask
        bint set_gid
        bint set_uid
        gid_t gid
        uid_t uid
        const gid_t *groups
        Py_ssize_t groups_count
        const unsigned long *cpu_mask
        size_t cpu_mask_bytes
        int mem_mode
        const unsigned long *node_mask
        unsigned long node_mask_bits
        bint binding_required
        int death_signal
        int cgroup_fd

    cdef struct spawn_result:
        pid_t pid
        int pidfd
        int pidfd_error
        int step
        int error
        int affinity_error
        int mempolicy_error

    int c_spawn "spawn"(const spawn_request *, spawn_result *, spawn_mechanism)
    int spawn_clone_is_honoured()
    int spawn_pidfd_signal(int pidfd, int sig, bint group)
    void spawn_mask_set(unsigned long *mask, unsigned long bits, unsigned int bit)


cdef extern from *:
    """
    #include <errno.h>
    #include <unistd.h>
    #include "numa_shim.h"

    static int rankspawn_set_mempolicy(int mode, const unsigned long *nodes, unsigned long bits)
    {
    #if defined(RANKSPAWN_HAVE_LIBNUMA) || defined(SYS_set_mempolicy)
        return set_mempolicy(mode, nodes, nodes ? bits + 1 : 0) < 0 ? errno : 0;
    #else
        (void)mode, (void)nodes, (void)bits;
        return ENOSYS;
    #endif
    }
    #ifdef __APPLE__
    #include <crt_externs.h>
    #define rankspawn_environ (*_NSGetEnviron())
    #else
    extern char **environ;
    #define rankspawn_environ environ
    #endif
    #ifdef RANKSPAWN_HAVE_LIBNUMA
    #define rankspawn_has_libnuma 1
    #else
    #define rankspawn_has_libnuma 0
    #endif
    """
    char **rankspawn_environ
    bint rankspawn_has_libnuma
    int rankspawn_set_mempolicy(int mode, const unsigned long *nodes, unsigned long bits)


SAME_AS_STDOUT = STREAM_SAME_AS_STDOUT
CLONE = SPAWN_CLONE
POSIX_SPAWN = SPAWN_POSIX
HAVE_LIBNUMA = bool(rankspawn_has_libnuma)

# By enum spawn_step: what an error message calls the step.
STEP_NAMES = (
    "", "pthread_create", "clone", "cgroup.procs", "setsid", "setpgid", "sched_setaffinity", "set_mempolicy", "chdir",
    "close_range", "pass_fds", "stdin", "stdout", "stderr", "setgroups", "setregid", "setreuid", "prctl", "execve",
)
if len(STEP_NAMES) != STEP_COUNT:
    raise ImportError("STEP_NAMES does not match enum spawn_step: rebuild rankspawn")


ALL_DONE = (0, 0, 0, 0)


cdef class _Strings:
    """A NULL-ended char ** over one block of text, filled by add() and add_pair(), then closed by ready()."""

    cdef char *text
    cdef size_t used, room
    cdef char **pointers  # offsets into text until ready() turns them into pointers
    cdef size_t count, slots

    def __dealloc__(self):
        PyMem_Free(self.text)
        PyMem_Free(self.pointers)

    cdef int reserve(self, size_t room) except -1:
        if room > self.room:
            grown = PyMem_Realloc(self.text, room)
            if grown is NULL:
                raise MemoryError()
            self.text = <char *>grown
            self.room = room
        return 0

    cdef int append(self, const char *data, size_t size) except -1:
        if self.used + size > self.room:
            self.reserve(2 * (self.used + size) + 256)
        if size:  # nothing may be copied from or to NULL, not even nothing
            memcpy(self.text + self.used, data, size)
        self.used += size
        return 0

    cdef int begin(self) except -1:
        cdef size_t slots
        # One slot more than strings: ready() ends the list with NULL.
        if self.count + 2 > self.slots:
            slots = 2 * self.slots + 16
            grown = PyMem_Realloc(self.pointers, slots * sizeof(char *))
            if grown is NULL:
                raise MemoryError()
            self.pointers = <char **>grown
            self.slots = slots
        self.pointers[self.count] = <char *>self.used
        self.count += 1
        return 0

    cdef int put(self, object part, bint is_name) except -1:
        # Text in ASCII is its own file system encoding; all else goes through os.fsencode's converter, which raises
        # TypeError for a wrong type and ValueError for a NUL byte.
        cdef const char *data
        cdef size_t size
        cdef void *converted = NULL
        if PyUnicode_Check(part) and PyUnicode_IS_ASCII(part):
            data = <const char *>PyUnicode_DATA(part)
            size = PyUnicode_GET_LENGTH(part)
            if memchr(data, 0, size) is not NULL:
                raise ValueError("embedded null byte")
            encoded = None
        else:
            PyUnicode_FSConverter(part, &converted)
            encoded = <object>converted
            _release(converted)
            data = <const char *><char *>encoded
            size = len(<bytes>encoded)
        if is_name and memchr(data, c'=', size) is not NULL:
            raise ValueError("illegal environment variable name")
        return self.append(data, size)

    cdef int add(self, object part) except -1:
        self.begin()
        self.put(part, False)
        return self.append("", 1)

    cdef int add_pair(self, object name, object value) except -1:
        self.begin()
        self.put(name, True)
        self.append("=", 1)
        self.put(value, False)
        return self.append("", 1)

    cdef int add_all(self, char **strings) except -1:
        # A copy, made with the GIL held: os.environ in another thread moves the table, and in musl the strings too.
        cdef size_t i, size = 0
        if strings is NULL:
            return 0
        for i in range(<size_t>-1):
            if strings[i] is NULL:
                break
            size += strlen(strings[i]) + 1
        self.reserve(size)
        for i in range(<size_t>-1):
            if strings[i] is NULL:
                break
            self.begin()
            self.append(strings[i], strlen(strings[i]) + 1)
        return 0

    cdef char **ready(self) except NULL:
        cdef size_t i
        if self.pointers is NULL:
            self.begin()
            self.count = 0
        for i in range(self.count):
            self.pointers[i] = self.text + <size_t>self.pointers[i]
        self.pointers[self.count] = NULL
        return self.pointers


cdef extern from "Python.h":
    void Py_DECREF(object)


cdef inline void _release(void *owned):
    # PyUnicode_FSConverter gives a new reference through a void *, which Cython does not count.
    Py_DECREF(<object>owned)


cdef class _Ints:
    """A C array of int (descriptors) or gid_t (groups): both are 32 bits wide. OverflowError for what is wider."""

    cdef unsigned int *items
    cdef size_t count

    def __cinit__(self, values):
        self.items = <unsigned int *>PyMem_Malloc((len(values) + 1) * sizeof(unsigned int))
        if self.items is NULL:
            raise MemoryError()
        for value in values:
            self.items[self.count] = value
            self.count += 1

    def __dealloc__(self):
        PyMem_Free(self.items)


cdef class Pidfd:
    """A process file descriptor, closed with its last reference: a thread that waits on it keeps it open."""

    cdef readonly int fd

    def __cinit__(self, int fd):
        self.fd = fd

    def __dealloc__(self):
        close(self.fd)

    def fileno(self):
        return self.fd

    def send_signal(self, int sig, bint group=False):
        """Signal the process, or with ``group`` the process group that it leads or led. Returns 0 or an errno.

        pidfd_send_signal(2); for a group the flag is PIDFD_SIGNAL_PROCESS_GROUP of Linux 6.9.
        """
        return spawn_pidfd_signal(self.fd, sig, group)


def clone_is_honoured():
    """Whether clone(CLONE_VM | CLONE_VFORK) does what it says here: tried on a child that ends at once.

    Raises OSError when no child could be made.
    """
    cdef int honoured
    with nogil:
        honoured = spawn_clone_is_honoured()
    if honoured < 0:
        raise OSError(-honoured, f"clone: {strerror(-honoured).decode()}")
    return honoured != 0


def pack_ids(ids):
    """The bit mask of ``ids`` as the kernel takes it: whole unsigned longs, lowest first."""
    cdef unsigned long bits = sizeof(unsigned long) * CHAR_BIT
    cdef unsigned long words = max(ids, default=0) // bits + 1
    packed = bytearray(words * sizeof(unsigned long))
    cdef char *mask = packed
    for one in ids:
        spawn_mask_set(<unsigned long *><void *>mask, words * bits, one)
    return bytes(packed)


def set_mempolicy(int mode, bytes node_mask):
    """set_mempolicy(2) for the calling thread alone; node_mask is from pack_ids, or None. Returns 0 or an errno."""
    if node_mask is None:
        return rankspawn_set_mempolicy(mode, NULL, 0)
    return rankspawn_set_mempolicy(
        mode, <const unsigned long *><const void *><char *>node_mask, len(node_mask) * CHAR_BIT
    )


cdef int _set_stream(spawn_stream *stream, object target) except -1:
    # A descriptor, one of the two constants, or (path in bytes, open flags).
    stream.path = NULL
    stream.fd = STREAM_INHERIT
    stream.open_flags = 0
    if type(target) is tuple:
        if b"\0" in (<tuple>target)[0]:
            raise ValueError("embedded null byte")
        stream.path = <char *>(<tuple>target)[0]
        stream.open_flags = (<tuple>target)[1]
    else:
        stream.fd = target
    return 0


cdef int _index(object number) except? -1:
    # Cython's own conversion would cut 1.5 down to 1.
    return PyNumber_Index(number)


cdef int _check_pass_fds(tuple fds) except -1:
    # The same words as CPython's fork_exec has.
    cdef long long last = -1
    for fd in fds:
        if not isinstance(fd, int) or fd < 0 or fd <= last or fd > INT_MAX:
            raise ValueError("bad value(s) in fds_to_keep")
        last = fd
    return 0


def spawn(
    owner, argv, executables, env, cwd, streams, parent_ends, tuple pass_fds, bint close_fds, bint restore_signals,
    bint new_session, process_group, gid, groups, uid, umask, bytes cpu_mask, int mem_mode, bytes node_mask,
    bint binding_required, int death_signal, int cgroup_fd, spawn_mechanism mechanism,
):
    """Start one process for ``owner``; the other arguments are the fields of struct spawn_request.

    A started process is given to its owner here, as pid, _pidfd (a Pidfd or None) and _child_created: a signal handler
    that raises, such as Ctrl-C's, runs as soon as this call returns, and must find an owner to clean up.

    argv, executables: text or bytes. cwd: the same, or None. env: a mapping or None for the caller's. streams: three of
    what _set_stream takes. cpu_mask, node_mask: from pack_ids, or None.

    Returns None when the mechanism cannot express the request, else (step, errno of the step, errno of a refused
    affinity, errno of a refused memory policy); step is an index into STEP_NAMES, 0 when the program was executed.
    ALL_DONE itself stands for four zeros.

    Raises TypeError and ValueError as subprocess does for arguments that cannot be passed on.
    """
    cdef spawn_request request
    cdef spawn_result result
    cdef _Strings arguments = _Strings(), candidates = _Strings(), environment = _Strings(), folder = None
    cdef _Ints fds = None, gids = None
    cdef int i, outcome

    for one in argv:
        arguments.add(one)
    for one in executables:
        candidates.add(one)
    if env is None:
        environment.add_all(rankspawn_environ)
    else:
        for name, value in env.items():
            environment.add_pair(name, value)
    request.envp = environment.ready()
    request.argv = arguments.ready()
    request.executables = <const char **>candidates.ready()
    if cwd is None:
        request.cwd = NULL
    else:
        folder = _Strings()
        folder.add(cwd)
        request.cwd = folder.ready()[0]
    for i in range(3):
        _set_stream(&request.streams[i], streams[i])
        request.parent_ends[i] = parent_ends[i]
    _check_pass_fds(pass_fds)
    fds = _Ints(pass_fds)
    request.pass_fds = <const int *>fds.items
    request.pass_fds_count = fds.count
    request.close_fds = close_fds
    request.restore_signals = restore_signals
    request.new_session = new_session
    request.process_group = _index(process_group)
    request.umask = _index(umask)
    request.set_gid = gid is not None
    request.gid = 0 if gid is None else gid
    request.set_uid = uid is not None
    request.uid = 0 if uid is None else uid
    request.groups = NULL
    request.groups_count = -1
    if groups is not None:
        # The same words as CPython's fork_exec has.
        if len(groups) > 65536:
            raise ValueError("too many extra_groups")
        try:
            gids = _Ints(groups)
        except OverflowError:
            raise ValueError("invalid group id") from None
        request.groups = <const gid_t *>gids.items
        request.groups_count = gids.count
    request.cpu_mask = NULL
    request.cpu_mask_bytes = 0
    if cpu_mask is not None:
        request.cpu_mask = <const unsigned long *><const void *><char *>cpu_mask
        request.cpu_mask_bytes = len(cpu_mask)
    request.mem_mode = mem_mode
    request.node_mask = NULL
    request.node_mask_bits = 0
    if node_mask is not None:
        request.node_mask = <const unsigned long *><const void *><char *>node_mask
        request.node_mask_bits = len(node_mask) * CHAR_BIT
    request.binding_required = binding_required
    request.death_signal = death_signal
    request.cgroup_fd = cgroup_fd

    with nogil:
        outcome = c_spawn(&request, &result, mechanism)
    if outcome == SPAWN_DECLINED:
        return None
    if outcome == SPAWN_STARTED:
        owner.pid = result.pid
        owner._child_created = True
        owner._pidfd = None if result.pidfd < 0 else Pidfd(result.pidfd)
        if not result.affinity_error and not result.mempolicy_error:
            return ALL_DONE
    return result.step, result.error, result.affinity_error, result.mempolicy_error
