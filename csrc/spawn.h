/* The contract of the engine: one request in, one result out.
 *
 * The caller owns every pointer in the request and keeps it alive until spawn() returns; nothing is copied.
 * Nothing here knows Python. All functions may be called from any number of threads at once.
 *
 * Each of these files uses only files below it:
 *
 *   end.c        how many ranks ended; reaps and signals them (end.h; Linux)
 *   members.c    what is left in their sessions, by search/, which the guard's program shares
 *   crew.c       spawn() and spawn_many(): the threads that start ranks, and the keepers that death signals need
 *   spawn.c      which mechanism a start takes; masks, the caller's memory policy, signals by pidfd
 *   fork.c       a warm start: forks ranks from a template, as children of the launcher
 *   title.c      the command that ps(1) shows of a forked rank
 *   clone.c      Linux's mechanism
 *   clone3.c     its system call
 *   child.c      what its child does until execve
 *   posix.c      the portable mechanism, posix_spawn(3)
 *   arena.c      memory for requests
 *   environ.c    a copy of the caller's environment
 *   granted.h    what the kernel granted of a binding
 *   numa_shim.h  libnuma, or the two system calls that are needed of it
 */
#ifndef RANKSPAWN_SPAWN_H
#define RANKSPAWN_SPAWN_H

#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

/* Where a start can fail, in the order of the steps. STEP_NAMES in _spawn.pyx has their names for messages. */
enum spawn_step {
    STEP_NONE = 0,
    STEP_THREAD,    /* pthread_create of the thread that a death signal is tied to */
    STEP_CLONE,     /* clone, clone3, posix_spawn */
    STEP_CGROUP,    /* the cgroup's cgroup.procs */
    STEP_SETSID,    /* setsid(2) */
    STEP_SETPGID,   /* setpgid(2) */
    STEP_GUARD,     /* the write of the child's pid to guard_fd */
    STEP_AFFINITY,  /* sched_setaffinity(2) */
    STEP_MEMPOLICY, /* set_mempolicy(2) */
    STEP_CHDIR,     /* chdir(2) */
    STEP_UNSHARE,   /* close_range(CLOSE_RANGE_UNSHARE): never reported, because the parent tries again without it */
    STEP_PASS_FDS,  /* clearing FD_CLOEXEC of a descriptor in pass_fds */
    STEP_STDIN,     /* opening or duplicating stream 0; those of streams 1 and 2 follow it */
    STEP_STDOUT,
    STEP_STDERR,
    STEP_SETGROUPS, /* setgroups(2) */
    STEP_SETREGID,  /* setregid(2) */
    STEP_SETREUID,  /* setreuid(2) */
    STEP_DEATHSIG,  /* prctl(PR_SET_PDEATHSIG) */
    STEP_EXEC,      /* execve(2) of every candidate */
    STEP_COUNT
};

enum spawn_mechanism { SPAWN_CLONE = 1, SPAWN_POSIX = 2 };

/* What spawn() and its mechanisms return. */
enum spawn_outcome {
    SPAWN_STARTED = 0,
    SPAWN_FAILED = 1,    /* result.step and result.error say where and why; no child is left */
    SPAWN_DECLINED = 2,  /* the mechanism cannot express the request; nothing was done */
    SPAWN_NOT_TRIED = 3, /* a rank of a crew that no thread has taken */
    SPAWN_UNDER_WAY = 4  /* a rank of a crew that a thread is starting */
};

enum { STREAM_INHERIT = -1, STREAM_SAME_AS_STDOUT = -2 };

/* One standard stream of the child: a path to open (in the child, after it went to `cwd`) where `path` is set, else a
 * descriptor or a STREAM_ constant. */
struct spawn_stream {
    const char *path;
    int open_flags; /* as open(2) takes them; files are created with mode 0666 less the umask */
    int fd;
};

struct spawn_request {
    const char *const *executables; /* candidates in order, NULL at the end; at least one */
    char *const *argv;
    char *const *envp;
    const char *cwd; /* NULL: the caller's */

    struct spawn_stream streams[3];
    int parent_ends[3];  /* the caller's pipe ends, closed in the child; -1 for none */
    const int *pass_fds; /* ascending */
    size_t pass_fds_count;
    bool close_fds;

    bool restore_signals;     /* SIGPIPE and SIGXFSZ back to their default action */
    bool fresh_signals;       /* an empty signal mask, and the default action for `ignored_signals` */
    uint64_t ignored_signals; /* of spawn_ignored_signals(), taken once for many starts: bit N-1 is signal N */
    bool new_session;
    pid_t process_group; /* -1: unchanged */

    int umask; /* -1: unchanged */
    bool set_gid, set_uid;
    gid_t gid;
    uid_t uid;
    const gid_t *groups;
    ssize_t groups_count; /* -1: unchanged */

    const unsigned long *cpu_mask; /* NULL: unchanged */
    size_t cpu_mask_bytes;
    int mem_mode;                   /* MPOL_*; -1: unchanged */
    const unsigned long *node_mask; /* NULL for modes without nodes */
    unsigned long node_mask_bits;
    bool binding_required; /* false: a refused affinity or policy is recorded, and the child continues */

    int death_signal; /* 0: none */
    int cgroup_fd;    /* a directory of a cgroup v2; -1: none */
    int guard_fd;     /* a pipe that the child writes a spawn_registration to once it leads its session; -1: none */
};

/* For the initializer of a struct spawn_request: the fields that are not zero in a request for nothing special. */
#define SPAWN_NOTHING_SPECIAL                                                                                          \
    .process_group = -1, .umask = -1, .groups_count = -1, .mem_mode = -1, .cgroup_fd = -1, .guard_fd = -1

/* What a guard reads. A process that has this pid and was started later is another one. Pid 0 asks the guard to end
 * what the ranks left behind: the launcher has started its last rank, and all have ended. */
struct spawn_registration {
    int64_t written_ns; /* CLOCK_BOOTTIME */
    int32_t pid;
    int32_t unused;
};

struct spawn_result {
    pid_t pid;
    int pidfd; /* close-on-exec; -1 where there is none, and pidfd_error says why */
    int pidfd_error;
    int step;            /* enum spawn_step; STEP_NONE when the program was executed */
    int error;           /* errno of that step */
    int affinity_error;  /* errno of a refused sched_setaffinity(2) that was optional; 0: done, or not asked for;
                          * ERANGE: only some of the CPUs were granted (granted.h) */
    int mempolicy_error; /* the same of set_mempolicy(2) */
    int64_t executed_ns; /* CLOCK_MONOTONIC just after the execve of the program */
};

/* Start a process by one mechanism. Returns an enum spawn_outcome. */
int spawn(const struct spawn_request *request, struct spawn_result *result, enum spawn_mechanism mechanism);

/* As spawn(), but a death signal is tied to the calling thread, even where that is not the main thread; and the child
 * starts with `child_mask`, or with the caller's signal mask where that is NULL. */
int spawn_by(enum spawn_mechanism mechanism, const struct spawn_request *request, struct spawn_result *result,
             const sigset_t *child_mask);
int spawn_by_clone(const struct spawn_request *request, struct spawn_result *result, const sigset_t *child_mask);
int spawn_by_posix(const struct spawn_request *request, struct spawn_result *result, const sigset_t *child_mask);

/* Many starts in one call: crew.c says how. The arrays have `count` elements, one for each rank. */
struct spawn_crew {
    const struct spawn_request *requests; /* those for the same CPUs should have the same pointer as cpu_mask */
    struct spawn_result *results;
    atomic_int *outcomes; /* enum spawn_outcome; a rank that is already SPAWN_STARTED or SPAWN_FAILED is skipped */
    size_t count;
    unsigned int workers; /* threads that start ranks; at least 1 */
    enum spawn_mechanism mechanism;
    atomic_size_t started; /* how many ranks are started so far; other threads may read it during the call */
};

/* Start the ranks of a crew. After the first failure no other start begins; outcomes[] says what became of each. */
void spawn_many(struct spawn_crew *crew);

/* crew->started, for callers that cannot read an atomic, as Cython cannot. */
size_t spawn_many_started(struct spawn_crew *crew);

/* Fork a rank from this process, a template with one thread (fork.c). `result` lies in memory that is shared with the
 * launcher. The child takes the steps of `request`, keeps the descriptors below `keep_below`, and returns 0, with its
 * signals blocked. The template gets the child's pid, or -1 if there is no child: result->step and error say why.
 *
 * With `sibling` the rank becomes a child of this process's own parent. */
pid_t spawn_fork(const struct spawn_request *request, struct spawn_result *result, int keep_below, bool sibling);

/* The launcher's half: turn `result`, a copy of what spawn_fork() left, into one like spawn()'s. Reaps a rank that
 * failed. Returns an enum spawn_outcome; SPAWN_NOT_TRIED if the template did not try this rank. */
int spawn_adopt(struct spawn_result *result);

/* Set an empty signal mask for the calling thread, libc's own two signals included. */
void spawn_unblock_signals(void);

/* Make this process a subreaper or not (PR_SET_CHILD_SUBREAPER). Returns what it was, or a negative errno. */
int spawn_set_subreaper(bool on);
bool spawn_is_subreaper(void);

/* Have the kernel send SIGKILL to this process when its parent thread ends. Returns 0 or an errno. */
int spawn_die_with_parent(void);

/* Have ps(1) and /proc/PID show this command and environment of the calling process (PR_SET_MM_MAP). Returns 0 or an
 * errno. */
int spawn_show_command(char *const *argv, char *const *envp);

/* Have the kernel back a part of this process's memory with huge pages (MADV_COLLAPSE). Returns 0 or an errno. */
int spawn_collapse_pages(size_t address, size_t length);

/* Test with a child whether clone(CLONE_VM | CLONE_VFORK) shares memory and suspends the caller (QEMU's user mode and
 * WSL1 make it a fork). Returns 1 or 0, or a negative errno if no child could be made. */
int spawn_clone_is_honoured(void);

/* Signal the process behind `pidfd`, or, with `group`, the process group that it leads or led (Linux 6.9).
 * Returns 0 or an errno; EINVAL if the kernel does not know the flag, ENOSYS if it has no pidfds. */
int spawn_pidfd_signal(int pidfd, int sig, bool group);

/* The signals that this process ignores but a rank must not: all except SIGHUP, which nohup(1) ignores for the whole
 * job on purpose. Bit N-1 is signal N. */
uint64_t spawn_ignored_signals(void);

/* Set bit `id` in a mask of `bits` bits. */
void spawn_mask_set(unsigned long *mask, unsigned long bits, unsigned int id);

/* set_mempolicy(2) for the calling thread; `nodes` is a mask of `bits` bits, or NULL for a mode without nodes. Returns
 * 0 or an errno; ENOSYS if the system has no memory policies, ERANGE if only some of the nodes were granted. */
int spawn_set_mempolicy(int mode, const unsigned long *nodes, unsigned long bits);

/* Whether this build is linked with libnuma, or makes its two calls itself (numa_shim.h). */
bool spawn_has_libnuma(void);

#endif
