/* A warm start: a rank that is forked from a template instead of executed.
 *
 * The template is a child of the launcher that has imported what its ranks need. It has one thread, and came from a
 * fork(3) of libc's, so that what libraries do at a fork has been done. It makes each rank by a system call of its own,
 * with CLONE_PARENT: the rank's parent is the launcher, as for an executed rank. libc's fork cannot do that, so this
 * file does what libc's fork does for a process with one thread: the kernel writes the child's thread id where
 * libc keeps it, and the list of robust mutexes is registered again. No lock can be held by another thread.
 *
 * The rank takes the steps of child.c in its own copy of the memory. Its result lies in memory that the launcher has
 * mapped, too. The kernel writes the rank's pid there before the rank runs. So the launcher knows every rank, even if
 * the template is killed in the middle.
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "spawn.h"

#include <errno.h>

#ifdef __linux__

#include "child.h"
#include "clone3.h"

#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#ifndef CLONE_INTO_CGROUP
#define CLONE_INTO_CGROUP 0x200000000ULL
#endif
#ifndef PR_GET_TID_ADDRESS
#define PR_GET_TID_ADDRESS 40
#endif
#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE 25
#endif
#ifndef SYS_clone3
#define SYS_clone3 435
#endif
#ifndef SYS_pidfd_open
#define SYS_pidfd_open 434
#endif

/* What libc's fork takes from its own thread descriptor, asked from the kernel. */
struct libc_thread {
    int *tid;
    void *robust_list;
    size_t robust_list_bytes;
};

static bool
know_libc_thread(struct libc_thread *thread)
{
    return prctl(PR_GET_TID_ADDRESS, &thread->tid, 0, 0, 0) == 0 && thread->tid &&
           syscall(SYS_get_robust_list, 0, &thread->robust_list, &thread->robust_list_bytes) == 0;
}

/* A child's exit signal is that of the process whose sibling it becomes, and may not be given with CLONE_PARENT. */
static long
clone_by_clone3(const struct libc_thread *thread, struct spawn_result *result, int cgroup, bool sibling)
{
    struct clone3_args args = {
        .flags = CLONE_CHILD_SETTID | CLONE_CHILD_CLEARTID | CLONE_PARENT_SETTID | (sibling ? CLONE_PARENT : 0) |
                 (cgroup >= 0 ? CLONE_INTO_CGROUP : 0),
        .child_tid = (uint64_t)(uintptr_t)thread->tid,
        .parent_tid = (uint64_t)(uintptr_t)&result->pid,
        .exit_signal = sibling ? 0 : SIGCHLD,
        .cgroup = cgroup >= 0 ? (uint64_t)cgroup : 0,
    };
    return syscall(SYS_clone3, &args, sizeof args);
}

static long
clone_by_clone(const struct libc_thread *thread, struct spawn_result *result, bool sibling)
{
    unsigned long flags = CLONE_CHILD_SETTID | CLONE_CHILD_CLEARTID | CLONE_PARENT_SETTID;
    flags |= sibling ? CLONE_PARENT : SIGCHLD;
#if defined(__x86_64__)
    return syscall(SYS_clone, flags, NULL, &result->pid, thread->tid, 0);
#elif defined(__s390__)
    return syscall(SYS_clone, NULL, flags, &result->pid, thread->tid, 0);
#else
    return syscall(SYS_clone, flags, NULL, &result->pid, 0, thread->tid);
#endif
}

/* clone3, or else clone, as clone.c does it: a refused clone has had no side effect. */
static long
clone_rank(struct child_start *start, const struct libc_thread *thread, bool sibling)
{
    int cgroup = start->request->cgroup_fd;
    long pid = clone_by_clone3(thread, start->result, cgroup, sibling);
    if (pid >= 0 || errno == EAGAIN || errno == ENOMEM || errno == EMFILE || errno == ENFILE) {
        return pid;
    }
    if (cgroup >= 0) {
        start->cgroup_procs = openat(cgroup, "cgroup.procs", O_WRONLY | O_CLOEXEC);
        if (start->cgroup_procs < 0) {
            start->result->step = STEP_CGROUP;
            return -1;
        }
    }
    pid = clone_by_clone(thread, start->result, sibling);
    if (pid && start->cgroup_procs >= 0) {
        close(start->cgroup_procs);
    }
    return pid;
}

static void
become_rank(const struct child_start *start, const struct libc_thread *thread)
{
    struct timespec now;
    syscall(SYS_set_robust_list, thread->robust_list, thread->robust_list_bytes);
    child_steps(start);
    clock_gettime(CLOCK_MONOTONIC, &now);
    start->result->executed_ns = (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

pid_t
spawn_fork(const struct spawn_request *request, struct spawn_result *result, int keep_below, bool sibling)
{
    struct libc_thread thread;
    struct child_start start = {
        .request = request,
        .result = result,
        .parent = sibling ? getppid() : getpid(),
        .cgroup_procs = -1,
        .keep_below = keep_below,
        /* The handlers are those that the rank's own imports would have set, in memory that is the rank's own. */
        .handlers_are_clear = true,
    };
    uint64_t all = ~(uint64_t)0, before = 0;
    if (!know_libc_thread(&thread)) {
        result->error = errno ? errno : ENOSYS;
        result->step = STEP_CLONE;
        return -1;
    }
    syscall(SYS_rt_sigprocmask, SIG_SETMASK, &all, &before, sizeof all);
    long pid = clone_rank(&start, &thread, sibling);
    if (pid == 0) {
        become_rank(&start, &thread);
        return 0;
    }
    int error = errno;
    syscall(SYS_rt_sigprocmask, SIG_SETMASK, &before, NULL, sizeof before);
    if (pid < 0) {
        result->error = error;
        result->step = result->step ? result->step : STEP_CLONE;
    }
    return (pid_t)pid;
}

int
spawn_adopt(struct spawn_result *result)
{
    result->pidfd = -1;
    if (result->pid <= 0) {
        return result->step ? SPAWN_FAILED : SPAWN_NOT_TRIED;
    }
    if (result->step) {
        while (waitpid(result->pid, NULL, __WALL) < 0 && errno == EINTR) {
        }
        return SPAWN_FAILED;
    }
    /* The rank has not been reaped: no other process can have its pid. */
    result->pidfd = (int)syscall(SYS_pidfd_open, result->pid, 0);
    result->pidfd_error = result->pidfd < 0 ? errno : 0;
    return SPAWN_STARTED;
}

void
spawn_unblock_signals(void)
{
    uint64_t none = 0;
    syscall(SYS_rt_sigprocmask, SIG_SETMASK, &none, NULL, sizeof none);
}

int
spawn_set_subreaper(bool on)
{
    int was = 0;
    if (prctl(PR_GET_CHILD_SUBREAPER, &was, 0, 0, 0) < 0 || prctl(PR_SET_CHILD_SUBREAPER, (long)on, 0, 0, 0) < 0) {
        return -errno;
    }
    return was != 0;
}

bool
spawn_is_subreaper(void)
{
    int is = 0;
    return prctl(PR_GET_CHILD_SUBREAPER, &is, 0, 0, 0) == 0 && is != 0;
}

int
spawn_die_with_parent(void)
{
    return prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0) < 0 ? errno : 0;
}

int
spawn_collapse_pages(size_t address, size_t length)
{
    return syscall(SYS_madvise, address, length, MADV_COLLAPSE) < 0 ? errno : 0;
}

#else

pid_t
spawn_fork(const struct spawn_request *request, struct spawn_result *result, int keep_below, bool sibling)
{
    (void)request, (void)keep_below, (void)sibling;
    result->step = STEP_CLONE;
    result->error = ENOSYS;
    return -1;
}

int
spawn_adopt(struct spawn_result *result)
{
    (void)result;
    return SPAWN_NOT_TRIED;
}

void
spawn_unblock_signals(void)
{
}

int
spawn_set_subreaper(bool on)
{
    (void)on;
    return -ENOSYS;
}

bool
spawn_is_subreaper(void)
{
    return false;
}

int
spawn_die_with_parent(void)
{
    return ENOSYS;
}

int
spawn_collapse_pages(size_t address, size_t length)
{
    (void)address, (void)length;
    return ENOSYS;
}

#endif
