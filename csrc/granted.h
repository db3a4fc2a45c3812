/* What the kernel granted of a binding. It silently leaves out CPUs and nodes that the cpuset does not allow or that
 * are offline, and nodes without memory: sched_setaffinity(2), set_mempolicy(2). These functions look at the calling
 * thread. If the system refuses the look, all counts as granted. */
#ifndef RANKSPAWN_GRANTED_H
#define RANKSPAWN_GRANTED_H

#ifdef __linux__

#include <limits.h>
#include <stdbool.h>
#include <stddef.h>
#include <sys/syscall.h>
#include <unistd.h>

/* The errno for a mask that was granted in part; neither system call has it. */
#define GRANTED_IN_PART ERANGE

enum { MOST_CPUS = 8192, MOST_NODES = 1024, BITS_OF_WORD = sizeof(unsigned long) * CHAR_BIT }; /* no kernel has more */

/* Whether `asked` has a bit that `granted` lacks; words of `asked` from `granted_words` on are not granted. */
static inline bool
lacks_some(const unsigned long *granted, size_t granted_words, const unsigned long *asked, size_t asked_words)
{
    for (size_t i = 0; i < asked_words; i++) {
        if (asked[i] & ~(i < granted_words ? granted[i] : 0)) {
            return true;
        }
    }
    return false;
}

static inline bool
cpus_are_granted_in_part(const unsigned long *asked, size_t asked_bytes)
{
    unsigned long now[MOST_CPUS / BITS_OF_WORD];
    long bytes = syscall(SYS_sched_getaffinity, 0, sizeof now, now);
    return bytes > 0 && lacks_some(now, (size_t)bytes / sizeof *now, asked, asked_bytes / sizeof *asked);
}

static inline bool
nodes_are_granted_in_part(const unsigned long *asked, size_t asked_words)
{
    unsigned long now[MOST_NODES / BITS_OF_WORD];
    /* The kernel reads one bit less than the given number. */
    return syscall(SYS_get_mempolicy, NULL, now, MOST_NODES + 1UL, NULL, 0UL) == 0 &&
           lacks_some(now, sizeof now / sizeof *now, asked, asked_words);
}

#endif
#endif
