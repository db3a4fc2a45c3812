# cython: language_level=3, freethreading_compatible=True, boundscheck=False, wraparound=False
"""Marshals starts from Python to csrc/spawn.h and back. No policy, no module state.

Everything is converted before the call and the call is made without the GIL: executing from a slow file system
must not stop the program's other threads (cpython#104372).
"""

from cpython.mem cimport PyMem_Free, PyMem_Malloc
from libc.limits cimport CHAR_BIT, INT_MAX
from libc.stdlib cimport free
from libc.string cimport memchr, memcpy, strchr, strerror, strncmp
from posix.types cimport gid_t
from posix.unistd cimport close

SAME_AS_STDOUT = STREAM_SAME_AS_STDOUT
CLONE = SPAWN_CLONE
POSIX_SPAWN = SPAWN_POSIX
HAVE_LIBNUMA = bool(spawn_has_libnuma())

# By enum spawn_step: what an error message calls the step.
STEP_NAMES = (
    "", "pthread_create", "clone", "cgroup.procs", "setsid", "setpgid", "guard", "sched_setaffinity", "set_mempolicy",
    "chdir", "close_range", "pass_fds", "stdin", "stdout", "stderr", "setgroups", "setregid", "setreuid", "prctl",
    "execve",
)
if len(STEP_NAMES) != STEP_COUNT:
    raise ImportError("STEP_NAMES does not match enum spawn_step: rebuild rankspawn")


ALL_DONE = (0, 0, 0, 0)


cdef object _encoded(object part, const char **data, size_t *size):
    """The bytes of text, bytes or a path; they live as long as the object returned does."""
    # Text in ASCII is its own file system encoding; all else goes through os.fsencode's converter, which raises
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
    Py_DECREF(encoded)  # it came through a void *, which Cython does not count
    data[0] = <const char *><char *>encoded
    size[0] = len(<bytes>encoded)
    return encoded


cdef class _Arena:
    """What requests point to: memory that is taken piece by piece, never moves, and is freed as one."""

    cdef char **block  # begins with a pointer to the block before it
    cdef char *unused
    cdef size_t left, block_size
    cdef char **callers  # the caller's environment, a block of its own

    def __cinit__(self):
        self.block_size = 4096

    def __dealloc__(self):
        while self.block is not NULL:
            before = <char **>self.block[0]
            PyMem_Free(self.block)
            self.block = before
        free(self.callers)

    cdef void *take(self, size_t size) except NULL:
        cdef size_t whole = (size + sizeof(void *) - 1) & ~(sizeof(void *) - 1)
        if whole > self.left:
            self.block_size = max(2 * self.block_size, whole + sizeof(void *))
            fresh = <char **>PyMem_Malloc(self.block_size)
            if fresh is NULL:
                raise MemoryError()
            fresh[0] = <char *>self.block
            self.block = fresh
            self.unused = <char *>(fresh + 1)
            self.left = self.block_size - sizeof(void *)
        taken = self.unused
        self.unused += whole
        self.left -= whole
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
        cdef tuple fixed = tuple(parts)  # a list may change while its parts are encoded
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
        """``env`` as execve(2) takes it, and how many variables it has; None is the caller's."""
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
        """A C array of int (descriptors) or gid_t (groups): both are 32 bits wide. OverflowError for what is wider."""
        cdef size_t count = 0
        cdef tuple fixed = tuple(values)
        taken = <unsigned int *>self.take(len(fixed) * sizeof(unsigned int))
        for value in fixed:
            taken[count] = value
            count += 1
        return taken


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
        return spawn_set_mempolicy(mode, NULL, 0)
    return spawn_set_mempolicy(
        mode, <const unsigned long *><const void *><char *>node_mask, len(node_mask) * CHAR_BIT
    )


cdef int _set_stream(_Arena arena, spawn_stream *stream, object target) except -1:
    # A descriptor, one of the two constants, or (path, open flags).
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


cdef int _set_common(
    _Arena arena, spawn_request *request, cwd, bint new_session, int death_signal, int cgroup_fd
) except -1:
    """What the ranks of a crew share; what only a single start can have is set as if nobody had asked for it."""
    request.cwd = NULL if cwd is None else arena.text(cwd)
    request.new_session = new_session
    request.death_signal = death_signal
    request.cgroup_fd = cgroup_fd
    request.guard_fd = -1
    request.close_fds = True
    request.restore_signals = True
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
    """What each rank has of its own, beside its command and its environment. The masks must be kept by the caller."""
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
    """Give a started process to its owner; what there is to say of the start."""
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
    bint binding_required, int death_signal, int cgroup_fd, spawn_mechanism mechanism,
):
    """Start one process for ``owner``; the other arguments are the fields of struct spawn_request.

    A started process is given to its owner here, as pid, _pidfd (a Pidfd or None), _executed_ns (of CLOCK_MONOTONIC)
    and _child_created: a signal handler that raises, such as Ctrl-C's, runs as soon as this call returns, and must find
    an owner to clean up.

    argv, executables: text or bytes. cwd: the same, or None. env: a mapping or None for the caller's. streams: three of
    what _set_stream takes. cpu_mask, node_mask: from pack_ids, or None.

    Returns None when the mechanism cannot express the request, else (step, errno of the step, errno of a refused
    affinity, errno of a refused memory policy); step is an index into STEP_NAMES, 0 when the program was executed.
    ALL_DONE itself stands for four zeros.

    Raises TypeError and ValueError as subprocess does for arguments that cannot be passed on.
    """
    cdef spawn_request request
    cdef spawn_result result
    cdef _Arena arena = _Arena()
    cdef size_t variables
    cdef int i, outcome

    request.argv = arena.texts(argv)
    request.executables = <const char **>arena.texts(executables)
    request.envp = arena.environment(env, &variables)
    _set_common(arena, &request, cwd, new_session, death_signal, cgroup_fd)
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


cdef class Crew:
    """Ranks that are started in one call, by several threads. add() each, then run(); any thread may call started().

    count: how many there will be. env: the environment that they share, a mapping, or None for the caller's. The other
    arguments are fields of struct spawn_request.
    """

    cdef _Arena arena
    cdef spawn_request common
    cdef spawn_request *requests
    cdef spawn_crew crew
    cdef size_t room, variables
    cdef dict places, masks
    cdef list owners
    cdef object argv, executables  # the last that were encoded

    def __cinit__(self, size_t count, env, cwd, bint new_session, int death_signal, int cgroup_fd, int guard_fd):
        self.arena = _Arena()
        self.owners = []
        self.places = {}
        self.masks = {}
        self.room = count
        self.requests = <spawn_request *>self.arena.take(count * sizeof(spawn_request))
        self.crew.requests = self.requests
        self.crew.results = <spawn_result *>self.arena.take(count * sizeof(spawn_result))
        self.crew.outcomes = <atomic_int *>self.arena.take(count * sizeof(atomic_int))
        self.common.envp = self.arena.environment(env, &self.variables)
        _set_common(self.arena, &self.common, cwd, new_session, death_signal, cgroup_fd)
        self.common.guard_fd = guard_fd

    def add(
        self, owner, argv, executables, env, streams, bytes cpu_mask, int mem_mode, bytes node_mask,
        bint binding_required,
    ):
        """The next rank: as for spawn(); ``env`` is what it has beside or instead of the shared variables."""
        cdef size_t rank = self.crew.count
        cdef spawn_request *request = &self.requests[rank]
        if rank == self.room:
            raise IndexError("more ranks than there is room for")
        if argv is not self.argv:
            self.common.argv = self.arena.texts(argv)
            self.argv = argv
        if executables is not self.executables:
            self.common.executables = <const char **>self.arena.texts(executables)
            self.executables = executables
        request[0] = self.common
        if env:
            request.envp = self.with_own(env)
        _set_own(self.arena, request, streams, self.kept(cpu_mask), mem_mode, self.kept(node_mask), binding_required)
        self.crew.outcomes[rank] = SPAWN_NOT_TRIED
        self.owners.append(owner)
        self.crew.count += 1

    cdef bytes kept(self, bytes mask):
        """The first mask that was like ``mask``: ranks for the same CPUs have the same pointer."""
        return None if mask is None else <bytes>self.masks.setdefault(mask, mask)

    cdef char **with_own(self, env) except NULL:
        cdef size_t count = self.variables, room = count + len(env)
        taken = <char **>self.arena.take((room + 1) * sizeof(char *))
        memcpy(taken, self.common.envp, count * sizeof(char *))
        for name, value in env.items():
            pair = self.arena.pair(name, value)
            place = self.places.get(name)
            if place is None:
                place = self.places[name] = self.place_of(pair)
            if place >= 0:
                taken[<size_t>place] = pair
            elif count == room:
                raise RuntimeError("the environment changed size while it was read")
            else:
                taken[count] = pair
                count += 1
        taken[count] = NULL
        return taken

    cdef Py_ssize_t place_of(self, const char *pair):
        """Where the shared variable of the same name is, or -1."""
        cdef size_t i, size = strchr(pair, c'=') - pair + 1
        for i in range(self.variables):
            if strncmp(self.common.envp[i], pair, size) == 0:
                return i
        return -1

    def run(self, spawn_mechanism mechanism, unsigned int workers):
        """Start those that are not started yet, by ``workers`` threads, of which this one may be one.

        Each started process is given to its owner, as by spawn(). Returns what there is to say of the others, and of
        those with refused steps: a list of (rank, what spawn() returns), in rank order. After the first failure no
        other start is begun, and those that are not are left out.
        """
        cdef size_t rank
        self.crew.mechanism = mechanism
        self.crew.workers = workers
        with nogil:
            c_spawn_many(&self.crew)
        said = []
        for rank in range(self.crew.count):
            owner = self.owners[rank]
            if owner is None or self.crew.outcomes[rank] == SPAWN_NOT_TRIED:
                continue
            told = _told(owner, &self.crew.results[rank], self.crew.outcomes[rank])
            if told is not ALL_DONE:
                said.append((rank, told))
            if self.crew.outcomes[rank] == SPAWN_STARTED:
                self.owners[rank] = None
        return said

    def started(self):
        """How many are started so far. Any thread may ask while run() is under way."""
        return spawn_many_started(&self.crew)
