/* Which processes there are, by the numbers of the guard's own PID namespace. */
#ifndef RANKSPAWN_GUARD_PROCESSES_H
#define RANKSPAWN_GUARD_PROCESSES_H

#include "kernel.h"

struct process {
    pid_t pid;
    pid_t shown; /* its folder in /proc; 0: /proc does not show it */
};

/* What /proc is: see processes_list. */
enum procfs { PROCFS_OWN, PROCFS_OUTER, PROCFS_NONE };

struct processes {
    struct process *all;
    size_t count, room;
    enum procfs procfs;
};

/* List the processes that there are, in the order in which /proc shows them.
 *
 * A procfs of an outer PID namespace (unshare --pid without --mount-proc) shows other numbers; the line NSpid of
 * /proc/N/status has the own one beside them (Linux 4.1). It is only a place to look for numbers: whoever uses one asks
 * the kernel by that number who it is, and a process of a sibling namespace, for which the line has a number too, is
 * found out. Where there is no procfs that shows the guard itself, every number that a process can have is listed. */
void processes_list(struct processes *processes);

/* The session of a process; -ESRCH: it is no more. A security module may refuse getsid(2): /proc says it, too. */
long process_session(const struct process *process);

/* Whether all of its threads have ended, by /proc. What cannot be read has not. */
bool process_has_ended(const struct process *process);

/* When it was started, in clock ticks since the machine was; -1 where that cannot be read. */
int64_t process_start(const struct process *process);

/* The present moment in the same units. */
int64_t ticks_now(void);

#endif
