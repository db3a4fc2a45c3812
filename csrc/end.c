/* The ends of ranks; see end.h. members.c has their sessions.
 *
 * A number may be another process's as soon as other code has reaped the rank. So these functions wait for and signal a
 * rank by its pidfd if the kernel can (Linux 5.4, for groups 6.9), and else only while a look shows it as unreaped.
 */
#ifdef __linux__
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "end.h"

#include "search/kernel.h"
#include "spawn.h"

#include <errno.h>
#include <signal.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum {
    BY_PIDFD = 3,       /* P_PIDFD, which older C libraries do not name */
    CORE_DUMPED = 0x80, /* in a status of waitpid(2) */
};

/* waitid(2) as the kernel has it: the C library's gives no usage. Returns 0 or an errno. */
static int
wait_for_rank(struct end_rank *rank, siginfo_t *ended, int options)
{
    long done = -1;
    ended->si_pid = 0;
    if (rank->pidfd >= 0) {
        done = syscall(SYS_waitid, BY_PIDFD, rank->pidfd, ended, options, rank->usage);
    }
    if (rank->pidfd < 0 || (done < 0 && errno == EINVAL)) {
        done = syscall(SYS_waitid, P_PID, rank->pid, ended, options, rank->usage);
    }
    return done < 0 ? errno : 0;
}

static void
see(struct end_rank *rank, int options)
{
    siginfo_t ended;
    int error = wait_for_rank(rank, &ended, WEXITED | WNOHANG | options);
    if (error || !ended.si_pid) {
        rank->state = error == ECHILD ? END_REAPED : END_RUNS;
        return;
    }
    rank->state = END_ENDED;
    rank->status = ended.si_code == CLD_EXITED ? (ended.si_status & 0xff) << 8
                                               : ended.si_status | (ended.si_code == CLD_DUMPED ? CORE_DUMPED : 0);
}

void
end_look(struct end_rank *ranks, size_t count)
{
    for (size_t i = 0; i < count; i++) {
        see(&ranks[i], WNOWAIT);
    }
}

void
end_wait(const struct end_rank *ranks, size_t count, int64_t pause)
{
    int64_t until = now(CLOCK_MONOTONIC) + pause;
    for (size_t i = 0; i < count; i++) {
        if (ranks[i].pidfd >= 0 && !wait_for(ranks[i].pidfd, POLLIN, until - now(CLOCK_MONOTONIC))) {
            return;
        }
    }
}

void
end_collect(struct end_rank *ranks, size_t count)
{
    for (size_t i = 0; i < count; i++) {
        see(&ranks[i], 0);
    }
}

/* Returns 0, ESRCH if there is no process to signal, or EPERM. */
static int
signal_group(struct end_rank *rank, int sig)
{
    int error = rank->pidfd < 0 ? ENOSYS : spawn_pidfd_signal(rank->pidfd, sig, true);
    if (error == 0 || error == ESRCH) {
        return error;
    }
    see(rank, WNOWAIT);
    if (rank->state == END_REAPED) {
        return error == EPERM ? EPERM : ESRCH;
    }
    return kill(-rank->pid, sig) < 0 ? errno : 0;
}

void
end_signal(struct end_rank *ranks, size_t count, const int *signals, size_t signal_count)
{
    for (size_t i = 0; i < count; i++) {
        for (size_t at = 0; at < signal_count; at++) {
            if (signal_group(&ranks[i], signals[at]) == EPERM) {
                ranks[i].error = EPERM;
            }
        }
    }
}
#endif
