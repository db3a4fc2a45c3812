/* The child half: everything between clone and execve.
 *
 * The child runs in the parent's memory (CLONE_VM) while the thread that called clone is suspended (CLONE_VFORK) and
 * the parent's other threads run on. The hazards, and what solves each:
 *
 *  1. Another thread of the parent may hold a lock: the child calls no malloc, no stdio, nothing of libc but thin
 *     wrappers of system calls. A test runs `nm -u` on this file's object against a list.
 *  2. Lazy binding runs the dynamic linker at the first call of a symbol: the extension is linked with -z now.
 *  3. A signal handler must not run here, because it would run in the parent's memory. The parent blocks every signal
 *     (SIGCHLD only where clone3 cannot clear its handler). clone3 sets all handlers to the default action, or else
 *     this file does so one by one, which costs 15 us. Only then, just before execve, is the mask restored. SIG_IGN
 *     stays, because a program inherits it.
 *  4. The child writes into the parent's memory: it writes only *result, this stack, and errno of the suspended thread,
 *     which that thread does not read.
 *  5. libc's set*id functions signal all threads of the process, which here are the *parent's*: the child makes the raw
 *     system calls, which change one thread. A change of credentials also makes the owner of the shared memory
 *     undumpable, and gives a less privileged process access to it: clone.c starts requests with ids without CLONE_VM.
 *  6. With CLONE_FILES the descriptor table is the parent's until close_range(CLOSE_RANGE_UNSHARE) has made a copy of
 *     what is kept: before that the child opens, duplicates and closes nothing.
 *  7. A change of ids clears the death signal, so the child sets it after the ids. If the parent died before that, the
 *     signal would never fire, so the child calls getppid afterwards.
 *  8. The stack is small and has no guard page: no recursion, no large frame (-Wframe-larger-than).
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "child.h"

#ifdef __linux__

#include "granted.h"
#include "numa_shim.h"
#include "search/kernel.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#ifndef CLOSE_RANGE_UNSHARE
#define CLOSE_RANGE_UNSHARE (1U << 1)
#endif
#ifndef SYS_close_range
#define SYS_close_range 436
#endif

enum { FIRST_AFTER_STDIO = 3, KERNEL_SIGNALS = 64, MOST_NUMBERS = 1 << 20 };

/* struct sigaction as rt_sigaction(2) takes it on x86-64, AArch64, POWER, RISC-V and s390: the handler comes first, and
 * all zeros is the default action. libc's sigaction would refuse the two signals that it keeps for itself. */
struct kernel_sigaction {
    void *handler;
    unsigned long rest[7];
};

static _Noreturn void
fail(const struct child_start *start, enum spawn_step step)
{
    start->result->error = errno;
    start->result->step = step;
    _exit(127);
}

/* A step of the binding was refused. If the binding is required, the start fails; else errno is recorded. */
static void
refused(const struct child_start *start, enum spawn_step step, int *error)
{
    if (start->request->binding_required) {
        fail(start, step);
    }
    *error = errno;
}

static void
join_cgroup(const struct child_start *start)
{
    /* "0" stands for the process that writes. */
    if (start->cgroup_procs >= 0 && syscall(SYS_write, start->cgroup_procs, "0", 1) != 1) {
        fail(start, STEP_CGROUP);
    }
}

static void
set_session(const struct child_start *start)
{
    const struct spawn_request *request = start->request;
    if (request->new_session && syscall(SYS_setsid) < 0) {
        fail(start, STEP_SETSID);
    }
    if (request->process_group >= 0 && syscall(SYS_setpgid, 0, request->process_group) < 0) {
        fail(start, STEP_SETPGID);
    }
}

static void
tell_guard(const struct child_start *start)
{
    int guard = start->request->guard_fd;
    if (guard >= 0) {
        struct {
            long seconds, nanoseconds;
        } now = {0, 0}; /* struct timespec as this system call reads it; libc's may be wider */
        syscall(SYS_clock_gettime, CLOCK_BOOTTIME, &now);
        struct spawn_registration own = {
            .written_ns = (int64_t)now.seconds * 1000000000 + now.nanoseconds,
            .pid = (int32_t)syscall(SYS_getpid),
        };
        /* Fewer bytes than PIPE_BUF: a pipe takes all of them or none. */
        if (syscall(SYS_write, guard, &own, sizeof own) != sizeof own) {
            fail(start, STEP_GUARD);
        }
    }
}

static void
reset_handlers(const struct child_start *start)
{
    static const struct kernel_sigaction by_default;
    for (int sig = 1; sig <= KERNEL_SIGNALS && !start->handlers_are_clear; sig++) {
        struct kernel_sigaction now;
        if (syscall(SYS_rt_sigaction, sig, NULL, &now, sizeof(uint64_t)) == 0 && now.handler != (void *)SIG_DFL &&
            now.handler != (void *)SIG_IGN) {
            syscall(SYS_rt_sigaction, sig, &by_default, NULL, sizeof(uint64_t));
        }
    }
    for (uint64_t sig = 1, left = start->request->fresh_signals ? start->request->ignored_signals : 0; left; sig++) {
        if (left & 1) {
            syscall(SYS_rt_sigaction, sig, &by_default, NULL, sizeof(uint64_t));
        }
        left >>= 1;
    }
    if (start->request->restore_signals) {
        syscall(SYS_rt_sigaction, SIGPIPE, &by_default, NULL, sizeof(uint64_t));
        syscall(SYS_rt_sigaction, SIGXFSZ, &by_default, NULL, sizeof(uint64_t));
    }
}

static void
bind_to(const struct child_start *start)
{
    const struct spawn_request *request = start->request;
    if (request->cpu_mask) {
        long failed = syscall(SYS_sched_setaffinity, 0, request->cpu_mask_bytes, request->cpu_mask);
        if (!failed && cpus_are_granted_in_part(request->cpu_mask, request->cpu_mask_bytes)) {
            errno = GRANTED_IN_PART;
            failed = -1;
        }
        if (failed) {
            refused(start, STEP_AFFINITY, &start->result->affinity_error);
        }
    }
    if (request->mem_mode >= 0) {
        /* The kernel reads one bit less than the given number (get_nodes in mm/mempolicy.c). */
        unsigned long maxnode = request->node_mask ? request->node_mask_bits + 1 : 0;
        long failed = set_mempolicy(request->mem_mode, request->node_mask, maxnode);
        if (!failed && request->node_mask &&
            nodes_are_granted_in_part(request->node_mask, request->node_mask_bits / BITS_OF_WORD)) {
            errno = GRANTED_IN_PART;
            failed = -1;
        }
        if (failed) {
            refused(start, STEP_MEMPOLICY, &start->result->mempolicy_error);
        }
    }
}

/* Close what /proc/self/fd lists in lowest..highest. If it cannot be read, close every number that could be open. */
static void
close_listed(unsigned int lowest, unsigned int highest)
{
    _Alignas(8) char entries[1024];
    long bytes;
    int list = (int)syscall(SYS_openat, AT_FDCWD, "/proc/self/fd", O_RDONLY | O_DIRECTORY | O_CLOEXEC, 0);
    if (list < 0) {
        /* There is no /proc, or no free number. A descriptor may lie above the soft limit, which may have been lowered
         * since it was opened, but seldom above the hard one, and not above fs.nr_open's default. */
        struct rlimit limit = {MOST_NUMBERS, MOST_NUMBERS};
        syscall(SYS_prlimit64, 0, RLIMIT_NOFILE, NULL, &limit);
        unsigned long end = limit.rlim_max < MOST_NUMBERS ? limit.rlim_max : MOST_NUMBERS;
        for (unsigned long fd = lowest; fd < end && fd <= highest; fd++) {
            syscall(SYS_close, fd);
        }
        return;
    }
    while ((bytes = syscall(SYS_getdents64, list, entries, sizeof entries)) > 0) {
        for (long at = 0; at < bytes;) {
            const struct entry *entry = (const struct entry *)(const void *)(entries + at);
            unsigned int fd = 0;
            at += entry->length;
            if (entry->name[0] < '0' || entry->name[0] > '9') {
                continue;
            }
            for (const char *digit = entry->name; *digit; digit++) {
                fd = fd * 10 + (unsigned int)(*digit - '0');
            }
            if (fd >= lowest && fd <= highest && fd != (unsigned int)list) {
                syscall(SYS_close, fd);
            }
        }
    }
    syscall(SYS_close, list);
}

static void
close_span(unsigned int lowest, unsigned int highest)
{
    if (lowest <= highest && syscall(SYS_close_range, lowest, highest, 0) < 0) {
        close_listed(lowest, highest);
    }
}

/* Close every descriptor after stderr that is not passed on. What the child opened itself is close-on-exec. */
static void
close_others(const struct child_start *start)
{
    const struct spawn_request *request = start->request;
    unsigned int from = start->keep_below > FIRST_AFTER_STDIO ? (unsigned int)start->keep_below : FIRST_AFTER_STDIO;
    for (size_t i = 0; i < request->pass_fds_count; i++) {
        unsigned int kept = (unsigned int)request->pass_fds[i];
        if (kept >= from) {
            if (kept > from) {
                close_span(from, kept - 1);
            }
            from = kept + 1;
        }
    }
    /* After the unshare nothing is open above the highest kept but what the child opened itself. */
    close_span(from, start->shares_fds ? (unsigned int)start->highest_kept : ~0U);
}

/* In the shared table the child's pidfd has a number that was free. For the caller, that descriptor is closed. */
static bool
is_own_pidfd(const struct child_start *start, int fd)
{
    return start->shares_fds && fd >= 0 && fd == *start->pidfd;
}

/* Have the program inherit a descriptor. */
static int
keep_over_exec(int fd)
{
    long flags = syscall(SYS_fcntl, fd, F_GETFD, 0);
    if (flags < 0) {
        return -1;
    }
    return flags & FD_CLOEXEC ? (int)syscall(SYS_fcntl, fd, F_SETFD, flags & ~FD_CLOEXEC) : 0;
}

static void
place_streams(const struct child_start *start)
{
    const struct spawn_request *request = start->request;
    int source[3];
    for (int i = 0; i < 3; i++) {
        const struct spawn_stream *stream = &request->streams[i];
        source[i] = stream->fd;
        if (stream->path) {
            source[i] = (int)syscall(SYS_openat, AT_FDCWD, stream->path, stream->open_flags | O_CLOEXEC, 0666);
        } else if (stream->fd == STREAM_SAME_AS_STDOUT) {
            source[i] = source[1] >= 0 ? source[1] : 1;
        } else if (is_own_pidfd(start, stream->fd)) {
            errno = EBADF;
            fail(start, STEP_STDIN + i);
        }
        if (stream->path && source[i] < 0) {
            fail(start, STEP_STDIN + i);
        }
    }
    for (int i = 0; i < 3; i++) {
        /* Streams are placed in ascending order: a source below `i` would be overwritten before it is duplicated. */
        if (source[i] >= 0 && source[i] < i) {
            source[i] = (int)syscall(SYS_fcntl, source[i], F_DUPFD_CLOEXEC, FIRST_AFTER_STDIO);
            if (source[i] < 0) {
                fail(start, STEP_STDIN + i);
            }
        }
    }
    for (int i = 0; i < 3; i++) {
        if (source[i] >= 0 && (source[i] == i ? keep_over_exec(i) : (int)syscall(SYS_dup3, source[i], i, 0)) < 0) {
            fail(start, STEP_STDIN + i);
        }
    }
    for (int i = 0; i < 3 && start->keep_below; i++) {
        /* No execve closes what was opened above. What has come from the caller is closed with the others. */
        if (source[i] >= FIRST_AFTER_STDIO && source[i] < start->keep_below) {
            syscall(SYS_close, source[i]);
        }
    }
}

static void
place_fds(const struct child_start *start)
{
    const struct spawn_request *request = start->request;
    if (start->shares_fds &&
        syscall(SYS_close_range, (unsigned int)start->highest_kept + 1, ~0U, CLOSE_RANGE_UNSHARE) < 0) {
        fail(start, STEP_UNSHARE);
    }
    for (size_t i = 0; i < request->pass_fds_count; i++) {
        errno = EBADF;
        if (is_own_pidfd(start, request->pass_fds[i]) || keep_over_exec(request->pass_fds[i]) < 0) {
            fail(start, STEP_PASS_FDS);
        }
    }
    for (int i = 0; i < 3; i++) {
        if (request->parent_ends[i] >= 0) {
            syscall(SYS_close, request->parent_ends[i]);
        }
    }
    place_streams(start);
    if (request->close_fds) {
        close_others(start);
    }
}

static void
set_ids(const struct child_start *start)
{
    const struct spawn_request *request = start->request;
    if (request->groups_count >= 0 && syscall(SYS_setgroups, request->groups_count, request->groups) < 0) {
        fail(start, STEP_SETGROUPS);
    }
    if (request->set_gid && syscall(SYS_setregid, request->gid, request->gid) < 0) {
        fail(start, STEP_SETREGID);
    }
    if (request->set_uid && syscall(SYS_setreuid, request->uid, request->uid) < 0) {
        fail(start, STEP_SETREUID);
    }
}

static void
arm_death_signal(const struct child_start *start)
{
    if (!start->request->death_signal) {
        return;
    }
    if (syscall(SYS_prctl, PR_SET_PDEATHSIG, start->request->death_signal, 0, 0, 0) < 0) {
        fail(start, STEP_DEATHSIG);
    }
    /* The parent may have died before this. getppid returns 0 for a parent in an outer PID namespace, which called
     * unshare(CLONE_NEWPID): whether that one has died cannot be seen from here. */
    long parent = syscall(SYS_getppid);
    if (parent != start->parent && parent != 0) {
        _exit(127);
    }
}

static void
execute(const struct child_start *start)
{
    const struct spawn_request *request = start->request;
    int telling = 0;
    for (const char *const *candidate = request->executables; *candidate; candidate++) {
        syscall(SYS_execve, *candidate, request->argv, request->envp);
        /* As execvp(3) and CPython do: the error of a file that is there, if any, says more than that of the last
         * folder, which has no such file. */
        if (errno != ENOENT && errno != ENOTDIR && telling == 0) {
            telling = errno;
        }
    }
    if (telling) {
        errno = telling;
    }
    fail(start, STEP_EXEC);
}

void
child_steps(const struct child_start *start)
{
    const struct spawn_request *request = start->request;
    join_cgroup(start);
    set_session(start);
    tell_guard(start);
    reset_handlers(start);
    bind_to(start);
    /* Before the descriptors: a folder like /proc/self/fd/N needs the caller's table. */
    if (request->cwd && syscall(SYS_chdir, request->cwd) < 0) {
        fail(start, STEP_CHDIR);
    }
    place_fds(start);
    if (request->umask >= 0) {
        syscall(SYS_umask, request->umask);
    }
    set_ids(start);
    arm_death_signal(start);
}

int
child_main(void *argument)
{
    const struct child_start *start = argument;
    child_steps(start);
    syscall(SYS_rt_sigprocmask, SIG_SETMASK, &start->signal_mask, NULL, sizeof(uint64_t));
    execute(start);
    return 127;
}

#endif
