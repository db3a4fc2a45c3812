/* Linux's mechanism: clone3(2), or else clone(2), of a child that runs in the parent's memory (child.c).
 *
 * Signals are blocked while there is a child. If the kernel refuses a part of a clone, that part is left out, and there
 * is another try: a refused clone has had no side effect. A child that failed is reaped.
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "spawn.h"

#ifdef __linux__

#include "child.h"
#include "clone3.h"

#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#ifndef CLONE_PIDFD
#define CLONE_PIDFD 0x00001000
#endif
#ifndef CLONE_CLEAR_SIGHAND
#define CLONE_CLEAR_SIGHAND 0x100000000ULL
#endif
#ifndef CLONE_INTO_CGROUP
#define CLONE_INTO_CGROUP 0x200000000ULL
#endif

/* child.c's deepest path takes under 2 KiB without optimisation; instrumented builds take several times as much. The
 * child's stack lies on the caller's, which may be small. */
enum { CHILD_STACK_BYTES = 16 * 1024 };

/* What the next clone asks for. It does not ask again for what the kernel refused. */
struct attempt {
    struct child_start start;
    bool shares_memory;
    bool wants_pidfd;
    bool uses_clone3; /* clone3 clears the handlers and places the child in its cgroup */
};

/* Make the child. Returns its pid, or -1 with errno. The child's stack may lie in this function's frame, because the
 * caller is suspended until the child has executed or ended; a child without CLONE_VM has its own copy. */
static pid_t
clone_once(struct attempt *attempt, int *pidfd)
{
    _Alignas(16) char stack[CHILD_STACK_BYTES];
    unsigned int flags = CLONE_VFORK;
    flags |= attempt->shares_memory ? CLONE_VM : 0U;
    flags |= attempt->start.shares_fds ? CLONE_FILES : 0U;
    flags |= attempt->wants_pidfd ? CLONE_PIDFD : 0U;
    *pidfd = -1;
    attempt->start.pidfd = pidfd;
    attempt->start.handlers_are_clear = attempt->uses_clone3;
    if (attempt->uses_clone3) {
        int cgroup = attempt->start.request->cgroup_fd;
        struct clone3_args args = {
            .flags = flags | CLONE_CLEAR_SIGHAND | (cgroup >= 0 ? CLONE_INTO_CGROUP : 0),
            .pidfd = (uint64_t)(uintptr_t)pidfd,
            .exit_signal = SIGCHLD,
            .stack = (uint64_t)(uintptr_t)stack,
            .stack_size = sizeof stack,
            .cgroup = cgroup >= 0 ? (uint64_t)cgroup : 0,
        };
        long pid = clone3_to_child(&args, &attempt->start);
        if (pid < 0) {
            errno = (int)-pid;
            return -1;
        }
        return (pid_t)pid;
    }
    return clone(child_main, stack + sizeof stack, (int)flags | SIGCHLD, &attempt->start, pidfd, NULL, NULL);
}

/* Continue without clone3: the child clears its handlers and joins its cgroup itself. Returns false, with errno, if
 * the cgroup's file cannot be opened for that. */
static bool
leave_clone3(struct attempt *attempt)
{
    uint64_t all = ~(uint64_t)0;
    syscall(SYS_rt_sigprocmask, SIG_SETMASK, &all, NULL, sizeof all);
    int cgroup = attempt->start.request->cgroup_fd;
    attempt->uses_clone3 = false;
    if (cgroup >= 0) {
        attempt->start.cgroup_procs = openat(cgroup, "cgroup.procs", O_WRONLY | O_CLOEXEC);
    }
    return cgroup < 0 || attempt->start.cgroup_procs >= 0;
}

/* The kernel refused to clone, with errno. Returns STEP_NONE if there is to be another attempt; else the step at which
 * the start failed, with errno. */
static enum spawn_step
after_refusal(struct attempt *attempt, struct spawn_result *result)
{
    int error = errno;
    bool no_descriptors = error == EMFILE || error == ENFILE;
    if (error == EAGAIN || error == ENOMEM) {
        return STEP_CLONE;
    }
    if (attempt->uses_clone3 && !no_descriptors) {
        /* The kernel is old, a seccomp profile refuses clone3 (by ENOSYS or EPERM), or the cgroup refuses the child. A
         * cgroup then refuses to be written to as well, and that error says why. */
        return leave_clone3(attempt) ? STEP_NONE : STEP_CGROUP;
    }
    if (attempt->wants_pidfd) {
        attempt->wants_pidfd = false;
        result->pidfd_error = error;
        return STEP_NONE;
    }
    return STEP_CLONE;
}

static void
reap(pid_t pid, int pidfd)
{
    /* ECHILD: the caller ignores SIGCHLD, or another of its threads waited for any child. */
    while (waitpid(pid, NULL, __WALL) < 0 && errno == EINTR) {
    }
    if (pidfd >= 0) {
        close(pidfd);
    }
}

static int
attempt_all(struct attempt *attempt, struct spawn_result *result)
{
    struct spawn_result *shown = attempt->start.result;
    for (;;) {
        int pidfd;
        *shown = (struct spawn_result){.step = STEP_NONE};
        pid_t pid = clone_once(attempt, &pidfd);
        if (pid < 0) {
            result->step = after_refusal(attempt, result);
            if (result->step == STEP_NONE) {
                continue;
            }
            result->error = errno;
            return SPAWN_FAILED;
        }
        if (shown->step == STEP_UNSHARE) {
            reap(pid, pidfd);
            attempt->start.shares_fds = false;
            continue;
        }
        result->step = shown->step;
        result->error = shown->error;
        result->affinity_error = shown->affinity_error;
        result->mempolicy_error = shown->mempolicy_error;
        if (shown->step != STEP_NONE) {
            reap(pid, pidfd);
            return SPAWN_FAILED;
        }
        result->pid = pid;
        result->pidfd = pidfd;
        return SPAWN_STARTED;
    }
}

static int
highest_kept(const struct spawn_request *request)
{
    int highest = STDERR_FILENO;
    for (int i = 0; i < 3; i++) {
        highest = request->streams[i].fd > highest ? request->streams[i].fd : highest;
    }
    if (request->pass_fds_count && request->pass_fds[request->pass_fds_count - 1] > highest) {
        highest = request->pass_fds[request->pass_fds_count - 1];
    }
    return highest;
}

int
spawn_by_clone(const struct spawn_request *request, struct spawn_result *result, const sigset_t *child_mask)
{
    memset(result, 0, sizeof *result);
    result->pidfd = -1;
    /* A child that changes its ids does not share memory (hazard 5 in child.c): its report needs a shared page. */
    bool changes_ids = request->set_uid || request->set_gid || request->groups_count >= 0;
    struct spawn_result own = {0}, *shown = &own;
    if (changes_ids) {
        shown = mmap(NULL, sizeof *shown, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
        if (shown == MAP_FAILED) {
            result->step = STEP_CLONE;
            result->error = errno;
            return SPAWN_FAILED;
        }
    }
    struct attempt attempt = {
        .start = {.request = request,
                  .result = shown,
                  .parent = getpid(),
                  .cgroup_procs = -1,
                  /* Without shared memory the child would not know which number its own pidfd has in a shared table. */
                  .shares_fds = request->close_fds && !changes_ids,
                  .highest_kept = highest_kept(request)},
        .shares_memory = !changes_ids,
        .wants_pidfd = true,
        .uses_clone3 = true,
    };
    /* The raw system call, because libc's leaves out the two signals that libc keeps for itself. SIGCHLD stays as it is
     * as long as clone3 clears the child's handlers: not_for_workers in crew.c says why. */
    uint64_t blocked = ~((uint64_t)1 << (SIGCHLD - 1)), before = 0;
    syscall(SYS_rt_sigprocmask, SIG_BLOCK, &blocked, &before, sizeof blocked);
    attempt.start.signal_mask = before;
    if (child_mask) {
        /* The kernel's mask is the first bytes of libc's. */
        memcpy(&attempt.start.signal_mask, child_mask, sizeof attempt.start.signal_mask);
    }
    if (request->fresh_signals) {
        attempt.start.signal_mask = 0;
    }
    int outcome = attempt_all(&attempt, result);
    syscall(SYS_rt_sigprocmask, SIG_SETMASK, &before, NULL, sizeof before);
    if (attempt.start.cgroup_procs >= 0) {
        close(attempt.start.cgroup_procs);
    }
    if (changes_ids) {
        munmap(shown, sizeof *shown);
    }
    return outcome;
}

static int
tell_and_exit(void *told)
{
    *(volatile int *)told = 1;
    _exit(0);
}

int
spawn_clone_is_honoured(void)
{
    _Alignas(16) char stack[CHILD_STACK_BYTES];
    volatile int told = 0;
    uint64_t all = ~(uint64_t)0, before = 0;
    syscall(SYS_rt_sigprocmask, SIG_SETMASK, &all, &before, sizeof all);
    pid_t pid = clone(tell_and_exit, stack + sizeof stack, CLONE_VM | CLONE_VFORK | SIGCHLD, (void *)&told);
    /* `told` is read before the wait, because CLONE_VFORK promises that the child has ended by now. */
    int honoured = pid < 0 ? -errno : told;
    if (pid > 0) {
        reap(pid, -1);
    }
    syscall(SYS_rt_sigprocmask, SIG_SETMASK, &before, NULL, sizeof before);
    return honoured;
}

#else

int
spawn_by_clone(const struct spawn_request *request, struct spawn_result *result, const sigset_t *child_mask)
{
    (void)request, (void)result, (void)child_mask;
    return SPAWN_DECLINED;
}

int
spawn_clone_is_honoured(void)
{
    return 0;
}

#endif
