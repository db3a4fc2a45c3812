/* The sessions of a group's ranks: which numbers are still theirs, and how all their members are killed. */
#ifndef RANKSPAWN_GUARD_SESSIONS_H
#define RANKSPAWN_GUARD_SESSIONS_H

#include "search/search.h"

struct session {
    pid_t number;
    int witness;        /* a pidfd of a member that had not ended when it was last looked at; -1: none */
    int64_t registered; /* in clock ticks since the machine was started: its leader is not younger */
    bool is_found;      /* the look that is under way has found a member that lives */
    bool is_strangers;  /* the number belongs to another session now */
};

struct sessions {
    struct session *all; /* by ascending number */
    size_t count, room;
    int epoll; /* where witnesses are watched; the event's data is the session's number */
    struct search search;
};

/* A rank has registered, at that clock tick. Returns false where there is no memory for it. */
bool sessions_add(struct sessions *sessions, pid_t number, int64_t registered);

/* The witness of a session has ended. */
void sessions_lose_witness(struct sessions *sessions, pid_t number);

/* Look for a witness for each session that has none, and forget the sessions without members. Returns whether
 * every session that is left has a witness. */
bool sessions_renew(struct sessions *sessions);

/* Kill all members, again and again, until none is left or that moment (CLOCK_MONOTONIC) has come. Returns whether
 * none is left. A session without members is forgotten at once, because a stranger may get its number. */
bool sessions_end(struct sessions *sessions, int64_t until);

#endif
