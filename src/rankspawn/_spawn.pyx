# cython: language_level=3, freethreading_compatible=True, boundscheck=False, wraparound=False
"""Marshals starts from Python to csrc/spawn.h and back. No policy, no module state.

It converts everything before the call. The call runs without the GIL, because execve(2) of a program on a slow file
system must not stop the caller's other threads (cpython#104372).
"""

from libc.limits cimport CHAR_BIT, INT_MAX
from libc.stdint cimport int64_t
from libc.stdlib cimport free
from libc.string cimport memchr, memcpy, memset, strerror
from posix.types cimport gid_t, pid_t
from posix.unistd cimport close

SAME_AS_STDOUT = STREAM_SAME_AS_STDOUT
CLONE = SPAWN_CLONE
POSIX_SPAWN = SPAWN_POSIX
HAVE_LIBNUMA = bool(spawn_has_libnuma())

# The names of the steps of enum spawn_step in error messages.
STEP_NAMES = (
    "", "pthread_create", "clone", "cgroup.procs", "setsid", "setpgid", "guard", "sched_setaffinity", "set_mempolicy",
    "chdir", "close_range", "pass_fds", "stdin", "stdout", "stderr", "setgroups", "setregid", "setreuid", "prctl",
    "execve",
)
if len(STEP_NAMES) != STEP_COUNT:
    raise ImportError("STEP_NAMES does not match enum spawn_step: rebuild rankspawn")

# What spawn() and Crew.run() return for a start without a refused step.
ALL_DONE = (0, 0, 0, 0)


cdef object _encoded(object part, const char **data, size_t *size):
    """The bytes of text, bytes or a path. They live as long as the returned object."""
    # ASCII text is its own file system encoding. Everything else goes through os.fsencode's converter, which raises
    # TypeError for a wrong type and ValueError for a NUL byte.
    cdef void *converted = NULL
    if PyUnicode_Check(part) and PyUnicode_IS_ASCII(part):
        data[0] = <const char *>PyUnicode_DATA(part)
        size[0] = PyUnicode_GET_LENGTH(part)
        if memchr(data[0], 0, size[0]) is not NULL:
            raise ValueError("embedded null byte")
        return part
    PyUnicode_FSConverter(part, &converted)
    encoded = <object>converted
    Py_DECREF(encoded)  # the converter's reference, which Cython does not count
    data[0] = <const char *><char *>encoded
    size[0] = len(<bytes>encoded)
    return encoded


cdef class _Arena:
    """The memory that requests point to."""

    cdef arena memory
    cdef char **callers  # the caller's environment, in a separate block

    def __dealloc__(self):
        arena_free(&self.memory)
        free(self.callers)

    cdef void *take(self, size_t size) except NULL:
        taken = arena_take(&self.memory, size)
        if taken is NULL:
            raise MemoryError()
        return taken

    cdef char *text(self, object part) except NULL:
        cdef const char *data
        cdef size_t size
        _held = _encoded(part, &data, &size)
        taken = <char *>self.take(size + 1)
        memcpy(taken, data, size)
        taken[size] = 0
        return taken

    cdef char **texts(self, parts) except NULL:
        cdef size_t count = 0
        cdef tuple fixed = tuple(parts)  # a copy, because a list may change while its parts are encoded
        taken = <char **>self.take((len(fixed) + 1) * sizeof(char *))
        for part in fixed:
            taken[count] = self.text(part)
            count += 1
        taken[count] = NULL
        return taken

    cdef char *pair(self, object name, object value) except NULL:
        cdef const char *name_data
        cdef const char *value_data
        cdef size_t name_size, value_size
        _held_name = _encoded(name, &name_data, &name_size)
        _held_value = _encoded(value, &value_data, &value_size)
        if memchr(name_data, c'=', name_size) is not NULL:
            raise ValueError("illegal environment variable name")
        taken = <char *>self.take(name_size + value_size + 2)
        memcpy(taken, name_data, name_size)
        taken[name_size] = c'='
        memcpy(taken + name_size + 1, value_data, value_size)
        taken[name_size + 1 + value_size] = 0
        return taken

    cdef char **environment(self, env, size_t *count) except NULL:
        """``env`` as execve(2) takes it, with the number of its variables in ``count``; None is the caller's."""
        cdef size_t room
        cdef char **taken
        count[0] = 0
        if env is None:
            return self.callers_environment(count)
        room = len(env)
        taken = <char **>self.take((room + 1) * sizeof(char *))
        for name, value in env.items():
            if count[0] == room:
                raise RuntimeError("the environment changed size while it was read")
            taken[count[0]] = self.pair(name, value)
            count[0] += 1
        taken[count[0]] = NULL
        return taken

    cdef char **callers_environment(self, size_t *count) except NULL:
        cdef environment copy = rankspawn_callers_environment()
        if copy.variables is NULL:
            raise MemoryError()
        self.callers = copy.variables
        count[0] = copy.count
        return self.callers

    cdef unsigned int *ints(self, values) except NULL:
        """A C array of int (descriptors) or gid_t (groups), which are 32 bits wide. Raises OverflowError for more."""
        cdef size_t count = 0
        cdef tuple fixed = tuple(values)
        taken = <unsigned int *>self.take((len(fixed) + 1) * sizeof(unsigned int))
        for value in fixed:
            taken[count] = value
            count += 1
        return taken


cdef class Pidfd:
    """A process file descriptor (pidfd_open(2)). It is closed with its last reference, so never while a thread waits.

    Args:
        fd: the descriptor, which this object owns from now on.
    """

    cdef readonly int fd

    def __cinit__(self, int fd):
        self.fd = fd

    def __dealloc__(self):
        close(self.fd)

    def fileno(self):
        return self.fd

    def send_signal(self, int sig, bint group=False):
        """Send a signal by pidfd_send_signal(2).

        Args:
            sig: the signal's number.
            group: signal the process group that the process leads or led (PIDFD_SIGNAL_PROCESS_GROUP, Linux 6.9).

        Returns:
            0 or an errno: EINVAL if the kernel does not know the flag, ENOSYS if it has no pidfds.
        """
        return spawn_pidfd_signal(self.fd, sig, group)


def clone_is_honoured():
    """Check, with a child that ends at once, whether clone(CLONE_VM | CLONE_VFORK) works here as clone(2) says.

    Raises:
        OSError: no child could be made.
    """
    cdef int honoured
    with nogil:
        honoured = spawn_clone_is_honoured()
    if honoured < 0:
        raise OSError(-honoured, f"clone: {strerror(-honoured).decode()}")
    return honoured != 0


def pack_ids(ids):
    """The bit mask of ``ids`` (CPUs or nodes) in the kernel's form: unsigned longs, the lowest first."""
    cdef unsigned long bits = sizeof(unsigned long) * CHAR_BIT
    cdef unsigned long words = max(ids, default=0) // bits + 1
    packed = bytearray(words * sizeof(unsigned long))
    cdef char *mask = packed
    for one in ids:
        spawn_mask_set(<unsigned long *><void *>mask, words * bits, one)
    return bytes(packed)


def set_mempolicy(int mode, bytes node_mask):
    """Set the memory policy of the calling thread by set_mempolicy(2).

    Args:
        mode: MPOL_* of <numaif.h>.
        node_mask: of pack_ids(); None for a mode without nodes.

    Returns:
        0 or an errno: ENOSYS if the system has no memory policies.
    """
    if node_mask is None:
        return spawn_set_mempolicy(mode, NULL, 0)
    return spawn_set_mempolicy(
        mode, <const unsigned long *><const void *><char *>node_mask, len(node_mask) * CHAR_BIT
    )


cdef int _set_stream(_Arena arena, spawn_stream *stream, object target) except -1:
    """``target`` is a descriptor, one of the constants STREAM_*, or (path, open flags)."""
    stream.path = NULL
    stream.fd = STREAM_INHERIT
    stream.open_flags = 0
    if type(target) is tuple:
        stream.path = arena.text((<tuple>target)[0])
        stream.open_flags = (<tuple>target)[1]
    else:
        stream.fd = target
    return 0


cdef int _index(object number) except? -1:
    # Cython's own conversion would make 1.5 a 1.
    return PyNumber_Index(number)


cdef int _check_pass_fds(tuple fds) except -1:
    # The same words as CPython's fork_exec has.
    cdef long long last = -1
    for fd in fds:
        if not isinstance(fd, int) or fd < 0 or fd <= last or fd > INT_MAX:
            raise ValueError("bad value(s) in fds_to_keep")
        last = fd
    return 0


cdef int _set_common(
    _Arena arena, spawn_request *request, cwd, bint new_session, int death_signal, int cgroup_fd, bint fresh_signals
) except -1:
    """Set what the ranks of a crew share, and switch off what only a single start can have."""
    request.cwd = NULL if cwd is None else arena.text(cwd)
    request.new_session = new_session
    request.death_signal = death_signal
    request.cgroup_fd = cgroup_fd
    request.guard_fd = -1
    request.close_fds = True
    request.restore_signals = True
    request.fresh_signals = fresh_signals
    request.ignored_signals = spawn_ignored_signals() if fresh_signals else 0
    request.pass_fds = NULL
    request.pass_fds_count = 0
    request.parent_ends[0] = request.parent_ends[1] = request.parent_ends[2] = -1
    request.process_group = -1
    request.umask = -1
    request.set_gid = request.set_uid = False
    request.groups = NULL
    request.groups_count = -1
    return 0


cdef int _set_ids(_Arena arena, spawn_request *request, gid, groups, uid) except -1:
    request.set_gid = gid is not None
    request.gid = 0 if gid is None else gid
    request.set_uid = uid is not None
    request.uid = 0 if uid is None else uid
    if groups is not None:
        # The same words as CPython's fork_exec has.
        if len(groups) > 65536:
            raise ValueError("too many extra_groups")
        try:
            request.groups = <const gid_t *>arena.ints(groups)
        except OverflowError:
            raise ValueError("invalid group id") from None
        request.groups_count = len(groups)
    return 0


cdef int _set_own(
    _Arena arena, spawn_request *request, streams, bytes cpu_mask, int mem_mode, bytes node_mask, bint binding_required
) except -1:
    """Set what each rank has of its own, except command and environment. The caller must keep the masks alive."""
    cdef int i
    for i in range(3):
        _set_stream(arena, &request.streams[i], streams[i])
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
    return 0


cdef object _told(object owner, spawn_result *result, int outcome):
    """Give a started process to its owner. Returns what spawn() returns."""
    if outcome == SPAWN_DECLINED:
        return None
    if outcome == SPAWN_STARTED:
        owner.pid = result.pid
        owner._child_created = True
        owner._pidfd = None if result.pidfd < 0 else Pidfd(result.pidfd)
        owner._executed_ns = result.executed_ns
        if not result.affinity_error and not result.mempolicy_error:
            return ALL_DONE
    return result.step, result.error, result.affinity_error, result.mempolicy_error


def spawn(
    owner, argv, executables, env, cwd, streams, parent_ends, tuple pass_fds, bint close_fds, bint restore_signals,
    bint new_session, process_group, gid, groups, uid, umask, bytes cpu_mask, int mem_mode, bytes node_mask,
    bint binding_required, int death_signal, int cgroup_fd, bint fresh_signals, spawn_mechanism mechanism,
):
    """Start one process for ``owner``. The other arguments are fields of struct spawn_request in csrc/spawn.h.

    Args:
        owner: has the attributes pid, _pidfd (a Pidfd or None), _executed_ns (of CLOCK_MONOTONIC) and _child_created,
            which this function sets when the process was started. A signal handler that raises, such as Ctrl-C's, runs
            as soon as this call returns, and must find an owner to clean up.
        argv, executables: iterables of what os.fsencode() takes; executables are tried in order.
        env: a mapping of what os.fsencode() takes, or None for the caller's environment.
        cwd: what os.fsencode() takes, or None for the caller's.
        streams: three, each a descriptor, -1 to inherit, SAME_AS_STDOUT, or (path, flags of open(2)).
        parent_ends: three descriptors, -1 for none.
        pass_fds: descriptors in ascending order.
        process_group, umask: -1 leaves them unchanged; so does None for gid, groups, uid, cpu_mask and node_mask.
        cpu_mask, node_mask: of pack_ids().
        fresh_signals: start with an empty signal mask, and with default actions except for an ignored SIGHUP.
        mechanism: CLONE or POSIX_SPAWN.

    Returns:
        None if the mechanism cannot express the request. Else (step, errno of the step, errno of a refused affinity,
        errno of a refused memory policy), where step is an index of STEP_NAMES, and 0 if the program was executed.
        ALL_DONE itself stands for four zeros.

    Raises:
        TypeError, ValueError: an argument cannot be encoded; as subprocess raises them.
    """
    cdef spawn_request request
    cdef spawn_result result
    cdef _Arena arena = _Arena()
    cdef size_t variables
    cdef int i, outcome

    request.argv = arena.texts(argv)
    request.executables = <const char **>arena.texts(executables)
    request.envp = arena.environment(env, &variables)
    _set_common(arena, &request, cwd, new_session, death_signal, cgroup_fd, fresh_signals)
    for i in range(3):
        request.parent_ends[i] = parent_ends[i]
    _check_pass_fds(pass_fds)
    request.pass_fds = <const int *>arena.ints(pass_fds)
    request.pass_fds_count = len(pass_fds)
    request.close_fds = close_fds
    request.restore_signals = restore_signals
    request.process_group = _index(process_group)
    request.umask = _index(umask)
    _set_ids(arena, &request, gid, groups, uid)
    _set_own(arena, &request, streams, cpu_mask, mem_mode, node_mask, binding_required)

    with nogil:
        outcome = c_spawn(&request, &result, mechanism)
    return _told(owner, &result, outcome)


include "_crew.pxi"
include "_bottom.pxi"
include "_fork.pxi"
include "_end.pxi"
