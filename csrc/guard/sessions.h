/* The sessions of a group's ranks: knows which numbers are still theirs, and kills all their members. */
#ifndef RANKSPAWN_GUARD_SESSIONS_H
#define RANKSPAWN_GUARD_SESSIONS_H

#include "search/search.h"

struct session {
    pid_t number;
    int witness;        /* a pidfd of a member that had not ended when it was last looked at; -1: none */
    int64_t registered; /* in clock ticks since the machine was started: its leader is not younger */
    bool is_leader;     /* the witness is the leader */
    bool leader_ended;  /* its leader is a zombie or was reaped: another process of its number is no member */
    bool is_found;      /* the present look has found a living member */
    bool is_checked;    /* the present look knows whose the number is */
    bool is_strangers;  /* the number belongs to another session now */
};

struct sessions {
    struct session *all; /* by ascending number */
    size_t count, room;
    pid_t *numbers; /* those of `all`, for a look */
    size_t numbers_room;
    int epoll; /* where witnesses are watched; the event's data is the session's number */
    struct search search;
};

/* Note that a rank has registered, at that clock tick. Returns false if there is no memory for it. */
bool sessions_add(struct sessions *sessions, pid_t number, int64_t registered);

/* Note that the witness of a session has ended. */
void sessions_lose_witness(struct sessions *sessions, pid_t number);

/* Look for a witness for each session that has none, and forget the sessions without members. Returns whether
 * every session that is left has a witness. */
bool sessions_renew(struct sessions *sessions);

/* Kill all members, again and again, until none is left or until that moment (CLOCK_MONOTONIC). Returns whether
 * none is left. A session without members is forgotten at once, because a stranger may get its number. */
bool sessions_end(struct sessions *sessions, int64_t until);

#endif
