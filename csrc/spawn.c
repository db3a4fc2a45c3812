/* What does not depend on the mechanism: chooses the mechanism of a start, and helps callers beside a start. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "spawn.h"
#include "granted.h"
#include "numa_shim.h"

#include <errno.h>
#include <time.h>
#include <unistd.h>

#ifdef __linux__
#include <sys/syscall.h>
#ifndef SYS_pidfd_send_signal
#define SYS_pidfd_send_signal 424
#endif
#endif

enum { SIGNAL_PROCESS_GROUP = 1 << 2 }; /* PIDFD_SIGNAL_PROCESS_GROUP, Linux 6.9 */

int
spawn_by(enum spawn_mechanism mechanism, const struct spawn_request *request, struct spawn_result *result,
         const sigset_t *child_mask)
{
    int outcome = mechanism == SPAWN_POSIX ? spawn_by_posix(request, result, child_mask)
                                           : spawn_by_clone(request, result, child_mask);
    if (outcome == SPAWN_STARTED) {
        struct timespec now;
        clock_gettime(CLOCK_MONOTONIC, &now);
        result->executed_ns = (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
    }
    return outcome;
}

int
spawn_pidfd_signal(int pidfd, int sig, bool group)
{
#ifdef __linux__
    unsigned long flags = group ? SIGNAL_PROCESS_GROUP : 0;
    return syscall(SYS_pidfd_send_signal, pidfd, sig, NULL, flags) < 0 ? errno : 0;
#else
    (void)pidfd, (void)sig, (void)group;
    return ENOSYS;
#endif
}

uint64_t
spawn_ignored_signals(void)
{
    enum { SIGNALS = 64 };
    uint64_t ignored = 0;
    for (int sig = 1; sig <= SIGNALS && sig < NSIG; sig++) {
        struct sigaction action;
        if (sig != SIGHUP && sigaction(sig, NULL, &action) == 0 && action.sa_handler == SIG_IGN) {
            ignored |= (uint64_t)1 << (sig - 1);
        }
    }
    return ignored;
}

void
spawn_mask_set(unsigned long *mask, unsigned long bits, unsigned int id)
{
    struct bitmask whole = {bits, mask};
    numa_bitmask_setbit(&whole, id);
}

int
spawn_set_mempolicy(int mode, const unsigned long *nodes, unsigned long bits)
{
#if defined(RANKSPAWN_HAVE_LIBNUMA) || defined(SYS_set_mempolicy)
    /* The kernel reads one bit less than the given number, as in child.c. */
    if (set_mempolicy(mode, nodes, nodes ? bits + 1 : 0) < 0) {
        return errno;
    }
    return nodes && nodes_are_granted_in_part(nodes, bits / BITS_OF_WORD) ? GRANTED_IN_PART : 0;
#else
    (void)mode, (void)nodes, (void)bits;
    return ENOSYS;
#endif
}

bool
spawn_has_libnuma(void)
{
#ifdef RANKSPAWN_HAVE_LIBNUMA
    return true;
#else
    return false;
#endif
}
