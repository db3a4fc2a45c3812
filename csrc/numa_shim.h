/* libnuma if the build found its headers; else the same two system calls, made here. The behaviour is the same. */
#ifndef RANKSPAWN_NUMA_SHIM_H
#define RANKSPAWN_NUMA_SHIM_H

#ifdef RANKSPAWN_HAVE_LIBNUMA
#include <numa.h>
#include <numaif.h>
#else

#include <limits.h>
#include <unistd.h>

#ifdef __linux__
#include <sys/syscall.h>
#endif

struct bitmask {
    unsigned long size; /* bits */
    unsigned long *maskp;
};

static inline struct bitmask *
numa_bitmask_setbit(struct bitmask *mask, unsigned int bit)
{
    if (bit < mask->size) {
        const unsigned int word = sizeof(unsigned long) * CHAR_BIT;
        mask->maskp[bit / word] |= 1UL << (bit % word);
    }
    return mask;
}

#ifdef SYS_set_mempolicy
static inline long
set_mempolicy(int mode, const unsigned long *nodes, unsigned long maxnode)
{
    return syscall(SYS_set_mempolicy, mode, nodes, maxnode);
}
#endif

#endif
#endif
