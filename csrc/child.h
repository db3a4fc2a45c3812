/* Between clone.c, which makes the child, and child.c, which is the child. */
#ifndef RANKSPAWN_CHILD_H
#define RANKSPAWN_CHILD_H

#include "spawn.h"

struct child_start {
    const struct spawn_request *request;
    struct spawn_result *result; /* in memory that parent and child share */
    uint64_t signal_mask;        /* the mask that the program starts with, as rt_sigprocmask(2) takes it */
    const int *pidfd;            /* the number of the child's own pidfd in the parent's table, or -1 */
    pid_t parent;                /* the caller's pid, for the check after PR_SET_PDEATHSIG */
    int cgroup_procs; /* that file of the cgroup, open for writing, where clone3 could not place the child; else -1 */
    bool handlers_are_clear; /* clone3 has set every handler to the default action */
    bool shares_fds;         /* the descriptor table is still the parent's (CLONE_FILES) */
    int highest_kept;        /* the highest descriptor that the child needs */
    int keep_below;          /* for a forked child (fork.c): descriptors below this number stay open for its program */
};

/* Do what a rank does before its program runs. Returns when all steps are done; a failed step ends the process. */
void child_steps(const struct child_start *start);

/* All that the child does until the program runs. It never returns; clone(2) requires the type. */
int child_main(void *start);

#endif
