"""What _spawn.pyx uses of C, the interpreter's and csrc's. Declarations only: csrc/*.h say what each name means."""

from libc.stdint cimport int64_t, uint64_t
from posix.types cimport gid_t, pid_t, uid_t


cdef extern from "Python.h":
    int PyUnicode_FSConverter(object text, void *encoded) except 0
    bint PyUnicode_IS_ASCII(object text)
    bint PyUnicode_Check(object text)
    object PyNumber_Index(object number)
    void *PyUnicode_DATA(object text)
    Py_ssize_t PyUnicode_GET_LENGTH(object text)
    void Py_DECREF(object)


cdef extern from "spawn.h" nogil:
    ctypedef int atomic_int

    cdef enum:
        STEP_NONE
        STEP_COUNT
        STREAM_INHERIT
        STREAM_SAME_AS_STDOUT

    cdef enum spawn_outcome:
        SPAWN_STARTED
        SPAWN_DECLINED
        SPAWN_NOT_TRIED

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
        bint fresh_signals
        uint64_t ignored_signals
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
        int guard_fd

    cdef struct spawn_result:
        pid_t pid
        int pidfd
        int pidfd_error
        int step
        int error
        int affinity_error
        int mempolicy_error
        int64_t executed_ns

    cdef struct spawn_crew:
        const spawn_request *requests
        spawn_result *results
        atomic_int *outcomes
        size_t count
        unsigned int workers
        spawn_mechanism mechanism

    int c_spawn "spawn"(const spawn_request *, spawn_result *, spawn_mechanism)
    void c_spawn_many "spawn_many"(spawn_crew *)
    size_t spawn_many_started(spawn_crew *)
    int spawn_clone_is_honoured()
    int spawn_pidfd_signal(int pidfd, int sig, bint group)
    uint64_t spawn_ignored_signals()
    void spawn_mask_set(unsigned long *mask, unsigned long bits, unsigned int bit)
    int spawn_set_mempolicy(int mode, const unsigned long *nodes, unsigned long bits)
    bint spawn_has_libnuma()


cdef extern from "end.h":
    """
    #ifdef __linux__
    #define RANKSPAWN_HAS_ENDS 1
    #else
    #define RANKSPAWN_HAS_ENDS 0
    #endif
    """
    bint RANKSPAWN_HAS_ENDS
    enum:
        END_USAGE_FIELDS

    cdef enum end_state:
        END_RUNS
        END_ENDED
        END_REAPED

    cdef struct end_rank:
        pid_t pid
        int pidfd
        end_state state
        int status
        int error
        long usage[18]

    cdef struct end_member:
        pid_t pid
        pid_t session

    cdef struct end_sessions:
        const pid_t *numbers
        const pid_t *zombies
        size_t count
        size_t zombie_count
        end_member *found
        size_t found_count
        bint lacks_memory

    void end_look(end_rank *ranks, size_t count) nogil
    void end_wait(const end_rank *ranks, size_t count, int64_t pause) nogil
    void end_collect(end_rank *ranks, size_t count) nogil
    void end_signal(end_rank *ranks, size_t count, const int *signals, size_t signal_count) nogil
    void end_kill_groups(const end_sessions *sessions) nogil
    bint end_search(end_sessions *sessions, bint kills) nogil
    bint end_are_empty(end_sessions *sessions) nogil
    void end_kill_found(const end_sessions *sessions, int64_t pause) nogil
    void end_signal_members(end_sessions *sessions, const int *signals, size_t count, bint groups) nogil


cdef extern from "arena.h":
    cdef struct arena:
        pass

    void *arena_take(arena *memory, size_t size)
    void arena_free(arena *memory)


cdef extern from "environ.h":
    cdef struct environment:
        char **variables
        size_t count

    cdef enum:
        ENVIRONMENT_NUMBER_ROOM

    Py_ssize_t environment_index(char **variables, size_t count, const char *pair)
    void environment_number(char *pair, const char *name, size_t size, uint64_t number)


cdef extern from *:
    """
    #include "environ.h"

    static int rankspawn_copy_environment(PyObject *unused, void *copy)
    {
        (void)unused;
        *(struct environment *)copy = environment_copy();
        return 0; /* to the collector: no more objects */
    }

    /* No other thread may run Python during the copy, because a change of os.environ moves the table, and in musl
     * frees the strings, too. The GIL prevents that. Without the GIL the garbage collector's visit of all objects does:
     * it stops the interpreter's other threads meanwhile. This visit ends at the first object. */
    static struct environment rankspawn_callers_environment(void)
    {
        struct environment copy = {NULL, 0};
    #ifdef Py_GIL_DISABLED
        PyUnstable_GC_VisitObjects(rankspawn_copy_environment, &copy);
    #else
        rankspawn_copy_environment(NULL, &copy);
    #endif
        return copy;
    }
    """
    environment rankspawn_callers_environment()
