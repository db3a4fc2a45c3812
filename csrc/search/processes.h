/* Which processes there are, by the numbers of our own PID namespace. */
#ifndef RANKSPAWN_SEARCH_PROCESSES_H
#define RANKSPAWN_SEARCH_PROCESSES_H

#include "kernel.h"

struct process {
    pid_t pid;
    pid_t shown; /* its folder in /proc; 0: not known */
};

/* What /proc is: see processes_list. */
enum procfs {
    PROCFS_OWN,
    PROCFS_OUTER,
    PROCFS_NONE,
    PROCFS_SHUT, /* no descriptor is free to read it */
};

/* Numbers, in ascending order. */
struct pids {
    const pid_t *all;
    size_t count;
};

struct processes {
    struct process *all;
    size_t count, room;
    enum procfs procfs;
    bool is_whole; /* memory sufficed for the list, and /proc was read to its end */
};

/* Find out what /proc is, before anything else. */
void processes_begin(struct processes *processes);

/* List the processes that there are, in the order in which /proc shows them.
 *
 * A procfs of an outer PID namespace (unshare --pid without --mount-proc) shows other numbers; the line NSpid of
 * /proc/N/status has the own one beside them (Linux 4.1). That number may be one of a process in a sibling namespace,
 * so the user of it asks the kernel for its session. Where no procfs shows this process itself, or none can be read,
 * every number that a process can have is listed.
 *
 * known: processes that exist, as far as the caller knows, in ascending order. The list does not depend on them. Where
 * their numbers lie close together, as those of ranks do that were started at once, the kernel is asked for each number
 * in between, and that part of /proc is not read: to show a process for the first time takes /proc some 4 us, and a few
 * more when the process is reaped; to ask for a number takes 0.3 us. */
void processes_list(struct processes *processes, struct pids known);

/* A process by its number. In a procfs of an outer PID namespace, the kernel gives its number there by its pidfd:
 * in the line Pid of /proc/self/fdinfo/N (Linux 5.3). */
struct process process_numbered(enum procfs procfs, pid_t pid);

/* The session and the process group of a process; -ESRCH: it has ended. A security module may refuse getsid(2) and
 * getpgid(2): /proc says it, too. */
long process_session(const struct process *process);
long process_group(const struct process *process);

/* Whether all of its threads have ended, by /proc; or whether it has been reaped. */
bool process_has_ended(const struct process *process);

/* When it was started, in clock ticks since the machine started; -1 if that cannot be read. */
int64_t process_start(const struct process *process);

/* A moment of CLOCK_BOOTTIME, in nanoseconds, in the same units. */
int64_t ticks_of(int64_t nanoseconds);

#endif
