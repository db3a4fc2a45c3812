/* The end of many ranks at once: see how they ended, signal their groups, search their sessions. Linux only; elsewhere
 * Python does it (src/rankspawn/_end/without.py), where every function is explained. */
#ifndef RANKSPAWN_END_H
#define RANKSPAWN_END_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

enum end_state {
    END_RUNS,
    END_ENDED,
    END_REAPED, /* by other code: its status is lost, and its number may be another process's */
};

/* What wait4(2) returns as struct rusage. The kernel counts in longs on every machine. */
enum { END_USAGE_FIELDS = 18 };

struct end_rank {
    pid_t pid;
    int pidfd; /* -1: none */
    enum end_state state;
    int status; /* END_ENDED: as waitpid(2) gives it */
    int error;  /* end_signal: EPERM, or 0 */
    long usage[END_USAGE_FIELDS];
};

struct end_member {
    pid_t pid, session;
};

/* Sessions whose numbers are still their own, and their living members. The caller owns the two sets, in ascending
 * order. */
struct end_sessions {
    const pid_t *numbers, *zombies; /* zombies: leaders that have ended */
    size_t count, zombie_count;
    struct end_member *found;
    size_t found_count, found_room;
    bool lacks_memory;
};

/* See how each rank has ended, without reaping it. */
void end_look(struct end_rank *ranks, size_t count);

/* Wait until all ranks that have a pidfd have ended, at most so many nanoseconds; a signal ends the wait. */
void end_wait(const struct end_rank *ranks, size_t count, int64_t pause);

/* Reap each rank that has ended, and get what it used. */
void end_collect(struct end_rank *ranks, size_t count);

/* Send these signals to the process group of each rank: by its pidfd, or by its number while that is its own. */
void end_signal(struct end_rank *ranks, size_t count, const int *signals, size_t signal_count);

/* Send SIGKILL to the process groups of these sessions' leaders. */
void end_kill_groups(const struct end_sessions *sessions);

/* Find the living members, and send SIGKILL to each if asked to. Returns whether it is certain that no other was missed. */
bool end_search(struct end_sessions *sessions, bool kills);

/* Whether these sessions certainly have no living member, except those that procfs hides from this user (hidepid). It is
 * harmless if other code has reaped a leader meanwhile, because nothing is signalled. */
bool end_are_empty(struct end_sessions *sessions);

/* Send SIGKILL to the members found, and wait for their end, at most so many nanoseconds. */
void end_kill_found(const struct end_sessions *sessions, int64_t pause);

/* Signal all members except the leaders; those in the leaders' process groups only if asked to. */
void end_signal_members(struct end_sessions *sessions, const int *signals, size_t count, bool groups);

#ifndef __linux__
/* _spawn.pyx calls none of them there. */
#define end_look(ranks, count) ((void)(ranks), (void)(count))
#define end_wait(ranks, count, pause) ((void)(ranks), (void)(count))
#define end_collect(ranks, count) ((void)(ranks), (void)(count))
#define end_signal(ranks, count, signals, signal_count) ((void)(ranks), (void)(signals), (void)(signal_count))
#define end_kill_groups(sessions) ((void)(sessions))
#define end_search(sessions, kills) ((void)(sessions), (void)(kills), false)
#define end_are_empty(sessions) ((void)(sessions), false)
#define end_kill_found(sessions, pause) ((void)(sessions), (void)(pause))
#define end_signal_members(sessions, signals, count, groups) ((void)(sessions), (void)(signals))
#endif

#endif
