/* A look at all processes for the members of some sessions. The engine and the guard share it. */
#ifndef RANKSPAWN_SEARCH_SEARCH_H
#define RANKSPAWN_SEARCH_SEARCH_H

#include "processes.h"

struct search {
    struct processes processes;
    pid_t *ended; /* they had ended at the last look, or did not exist: they cannot fork */
    size_t ended_count, ended_room;
    bool is_blind; /* at the last look, a process's session could not be found out */
};

/* The caller's function for a process of that session, with a context of the caller's own. */
typedef bool search_question(void *context, const struct process *process, long session);

/* The most looks of a search: among thousands of short-lived processes, one ends during every look. Without a procfs to
 * list them, a look takes a third of a second. */
int most_looks(const struct search *search);

/* Look once at the processes that processes_list() has listed, the youngest first, which are listed last: a process
 * that forks and ends again and again is met in time. Returns whether a process has ended during this look that the one
 * before had not noted: it may have forked after the list was made, and there should be another look.
 *
 * wants: whether to meet the process. meet: do with it what the caller wants; false: it has ended. */
bool search_listed(struct search *search, search_question *wants, search_question *meet, void *context);

/* Signal a process by its pidfd, or by its number if that is refused. pidfd: -1 for none. */
void member_signal(const struct process *process, int pidfd, int sig);

/* Look at a member of a session, and send it SIGKILL if asked to. Returns whether it lives. *pidfd becomes its pidfd,
 * which the caller closes, or -1 where it has ended or the kernel has no pidfds. */
bool member_lives(const struct process *process, long session, bool kills, int *pidfd);

#endif
