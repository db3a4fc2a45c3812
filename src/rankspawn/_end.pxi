# Marshals the ends of ranks to csrc/end.h and back. _spawn.pyx includes it, on Linux only (HAS_ENDS).
# src/rankspawn/_end/without.py has all these functions in Python, and documents them.

HAS_ENDS = bool(RANKSPAWN_HAS_ENDS)


cdef class _Ends:
    """The ranks in C's form. It keeps their pidfds open, even if other threads release them meanwhile."""

    cdef _Arena arena
    cdef end_rank *all
    cdef size_t count
    cdef list pidfds

    def __cinit__(self, ranks):
        cdef end_rank *one
        cdef tuple fixed = tuple(ranks)
        self.arena = _Arena()
        self.all = <end_rank *>self.arena.take((len(fixed) + 1) * sizeof(end_rank))
        self.pidfds = []
        for rank in fixed:
            one = &self.all[self.count]
            pidfd = rank._pidfd
            self.pidfds.append(pidfd)
            one.pid = rank.pid
            one.pidfd = -1 if pidfd is None else pidfd.fd
            one.error = 0
            self.count += 1

    cdef object status(self, size_t number):
        cdef end_state state = self.all[number].state
        return None if state == END_RUNS else -1 if state == END_REAPED else self.all[number].status


def look(ranks):
    cdef _Ends ends = _Ends(ranks)
    cdef size_t number
    with nogil:
        end_look(ends.all, ends.count)
    return [ends.status(number) for number in range(ends.count)]


def await_ends(ranks, double seconds):
    cdef _Ends ends = _Ends(ranks)
    with nogil:
        end_wait(ends.all, ends.count, <int64_t>(seconds * 1e9))


def collect(ranks):
    cdef _Ends ends = _Ends(ranks)
    cdef size_t number
    with nogil:
        end_collect(ends.all, ends.count)
    return [(ends.status(number), _usage(&ends.all[number])) for number in range(ends.count)]


cdef tuple _usage(end_rank *rank):
    cdef long *fields = rank.usage
    cdef int i
    if rank.state != END_ENDED:
        return ()
    return (
        fields[0] + 1e-6 * fields[1], fields[2] + 1e-6 * fields[3], *[fields[i] for i in range(4, END_USAGE_FIELDS)],
    )


def signal_groups(ranks, signals):
    cdef _Ends ends = _Ends(ranks)
    cdef _Arena arena = _Arena()
    cdef size_t number, signal_count = len(signals)
    cdef const int *sent = <const int *>arena.ints(signals)
    with nogil:
        end_signal(ends.all, ends.count, sent, signal_count)
    return [ends.all[number].pid for number in range(ends.count) if ends.all[number].error]


cdef class _Sessions:
    """Sessions and their processes in C's form."""

    cdef _Arena arena
    cdef end_sessions all

    def __cinit__(self, sessions, ended):
        self.arena = _Arena()
        numbers, zombies = sorted(sessions), sorted(ended)
        self.all.numbers = <const pid_t *>self.arena.ints(numbers)
        self.all.count = len(numbers)
        self.all.zombies = <const pid_t *>self.arena.ints(zombies)
        self.all.zombie_count = len(zombies)

    def __dealloc__(self):
        free(self.all.found)


def kill_groups(sessions):
    cdef _Sessions those = _Sessions(sessions, ())
    with nogil:
        end_kill_groups(&those.all)


def members(sessions, ended, bint kill):
    cdef _Sessions those = _Sessions(sessions, ended)
    cdef size_t i
    with nogil:
        end_search(&those.all, kill)
    if those.all.lacks_memory:
        raise MemoryError()
    return {those.all.found[i].pid: those.all.found[i].session for i in range(those.all.found_count)}


def are_empty(sessions, ended):
    cdef _Sessions those = _Sessions(sessions, ended)
    cdef bint empty
    with nogil:
        empty = end_are_empty(&those.all)
    return empty


def kill_found(found, double pause):
    cdef _Arena arena = _Arena()
    cdef end_sessions all
    cdef size_t count = 0
    memset(&all, 0, sizeof(all))
    all.found = <end_member *>arena.take((len(found) + 1) * sizeof(end_member))
    for pid, session in found.items():
        all.found[count].pid = pid
        all.found[count].session = session
        count += 1
    all.found_count = count
    with nogil:
        end_kill_found(&all, <int64_t>(pause * 1e9))


def signal_members(sessions, signals, bint groups):
    cdef _Sessions those = _Sessions(sessions, ())
    cdef size_t count = len(signals)
    cdef const int *sent = <const int *>those.arena.ints(signals)
    with nogil:
        end_signal_members(&those.all, sent, count, groups)
