/* The sessions of a group's ranks; see sessions.h.
 *
 * The hazards, and what solves each:
 *
 *  1. Those of every look at all processes: see search/search.c.
 *  2. A session's number is taken for as long as the session has a member, zombies included (free_pid in the kernel's
 *     kernel/pid.c). Afterwards it can become the number of a stranger's session. So each session has a witness, a
 *     pidfd of a living member. The first is the leader. When a witness ends, another member takes its place; if there
 *     is none, the session is forgotten. Between the two are milliseconds.
 *  3. A number can be reused in those milliseconds, before the guard is up, while it is stopped, or for 100 ms if the
 *     kernel has no pidfd_open. Then the process of that number, which leads the stranger's session, is younger than
 *     the registration of ours. A rank's own leader never is.
 *  4. A member that cannot be killed (another user's, or in uninterruptible sleep) stays until it ends: the caller
 *     says how long to try.
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "sessions.h"

#include <errno.h>
#include <time.h>

/* Between two rounds of signals: the time in which a killed process ends, and one that has much memory to free. */
enum { FIRST_PAUSE = 1 * NANOSECONDS_IN_MS, LONGEST_PAUSE = 100 * NANOSECONDS_IN_MS };

/* ---- the table ----------------------------------------------------------------------------------------------------*/

/* The index in the table where the session of this number is, or would be. */
static size_t
place_of(const struct sessions *sessions, pid_t number)
{
    size_t low = 0, high = sessions->count;
    while (low < high) {
        size_t middle = low + (high - low) / 2;
        if (sessions->all[middle].number < number) {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    return low;
}

static struct session *
find(const struct sessions *sessions, long number)
{
    size_t at = number > 0 ? place_of(sessions, (pid_t)number) : sessions->count;
    return at < sessions->count && sessions->all[at].number == number ? &sessions->all[at] : NULL;
}

static void
drop_witness(struct session *session)
{
    if (session->witness >= 0) {
        close_fd(session->witness);
        session->witness = -1;
        session->leader_ended = session->leader_ended || session->is_leader;
    }
}

static bool
has_ended(int pidfd)
{
    return wait_for(pidfd, POLLIN, 0);
}

/* Forget the sessions without a member in the last look, and those whose number belongs to a stranger's session. */
static void
forget(struct sessions *sessions)
{
    size_t kept = 0;
    for (size_t i = 0; i < sessions->count; i++) {
        struct session *session = &sessions->all[i];
        if (session->witness >= 0 || (session->is_found && !session->is_strangers)) {
            sessions->all[kept++] = *session;
        }
    }
    sessions->count = kept;
}

/* ---- a look -------------------------------------------------------------------------------------------------------*/

/* Whether another process has the number of a session now. A witness proves that none has. */
static bool
is_strangers(const struct sessions *sessions, struct session *session)
{
    if (session->witness < 0 && !session->is_checked) {
        const struct process leader = process_numbered(sessions->search.processes.procfs, session->number);
        session->is_strangers = process_start(&leader) > session->registered;
        session->is_checked = true;
    }
    return session->is_strangers;
}

/* Look at a member, kill it if asked to, and make it the witness of a session without one. A stranger's is left alone.
 * Returns false when it has ended. */
static bool
meet(struct sessions *sessions, struct session *session, const struct process *process, bool kills)
{
    int pidfd;
    bool lives = member_lives(process, session->number, false, &pidfd);
    bool is_ours = lives && !is_strangers(sessions, session);
    if (is_ours && kills) {
        member_signal(process, pidfd, SIGKILL);
        lives = is_ours = pidfd < 0 ? !process_has_ended(process) : !has_ended(pidfd);
    }
    session->is_found = session->is_found || is_ours;
    if (pidfd < 0) {
        return lives;
    }
    if (is_ours && session->witness < 0 && epoll_watch(sessions->epoll, pidfd, (uint64_t)session->number) == 0) {
        session->witness = pidfd;
        session->is_leader = process->pid == session->number;
    } else {
        close_fd(pidfd);
    }
    return lives;
}

struct looker {
    struct sessions *sessions;
    bool kills;
};

static bool
wants(void *context, const struct process *process, long number)
{
    const struct looker *looker = context;
    const struct session *session = find(looker->sessions, number);
    bool is_ended_leader = session && session->leader_ended && process->pid == number;
    return session && !session->is_strangers && !is_ended_leader && (session->witness < 0 || looker->kills);
}

static bool
meet_one(void *context, const struct process *process, long number)
{
    const struct looker *looker = context;
    return meet(looker->sessions, find(looker->sessions, number), process, looker->kills);
}

/* Look at all processes once. Returns whether one has ended during this look that the one before had not noted. */
static bool
look(struct sessions *sessions, bool kills)
{
    struct looker looker = {sessions, kills};
    size_t count = 0;
    while (count < sessions->count &&
           make_room((void **)&sessions->numbers, &sessions->numbers_room, count, sizeof *sessions->numbers)) {
        sessions->numbers[count] = sessions->all[count].number;
        count++;
    }
    processes_list(&sessions->search.processes, (struct pids){sessions->numbers, count});
    return search_listed(&sessions->search, wants, meet_one, &looker);
}

/* Look until no more members can be found, and forget the sessions without members. */
static void
look_through(struct sessions *sessions, bool kills)
{
    for (int i = 0; i < most_looks(&sessions->search); i++) {
        bool all_found = true;
        for (size_t at = 0; at < sessions->count; at++) {
            struct session *session = &sessions->all[at];
            session->is_checked = session->is_strangers = false;
            session->is_found = session->witness >= 0;
        }
        bool was_disturbed = look(sessions, kills);
        for (size_t at = 0; at < sessions->count; at++) {
            all_found = all_found && (sessions->all[at].is_found || sessions->all[at].is_strangers);
        }
        if (all_found || !was_disturbed) {
            break;
        }
    }
    forget(sessions);
}

/* ---- what the guard asks for --------------------------------------------------------------------------------------*/

bool
sessions_add(struct sessions *sessions, pid_t number, int64_t registered)
{
    if (number <= 1 || find(sessions, number)) {
        return true; /* no rank has 0 or 1: to kill(2) they mean this process's own group, and every process */
    }
    if (!make_room((void **)&sessions->all, &sessions->room, sessions->count, sizeof *sessions->all)) {
        return false;
    }
    size_t at = place_of(sessions, number);
    for (size_t i = sessions->count++; i > at; i--) {
        sessions->all[i] = sessions->all[i - 1];
    }
    sessions->all[at] = (struct session){.number = number, .witness = -1, .registered = registered};
    const struct process leader = process_numbered(sessions->search.processes.procfs, number);
    sessions->all[at].leader_ended = !meet(sessions, &sessions->all[at], &leader, false);
    return true;
}

void
sessions_lose_witness(struct sessions *sessions, pid_t number)
{
    struct session *session = find(sessions, number);
    if (session) {
        drop_witness(session);
    }
}

bool
sessions_renew(struct sessions *sessions)
{
    bool all_witnessed = true;
    for (size_t i = 0; i < sessions->count && all_witnessed; i++) {
        all_witnessed = sessions->all[i].witness >= 0;
    }
    if (all_witnessed) {
        return true;
    }
    sessions->search.ended_count = 0;
    look_through(sessions, false);
    for (size_t i = 0; i < sessions->count; i++) {
        if (sessions->all[i].witness < 0) {
            return false;
        }
    }
    return true;
}

/* Kill without a look: the witnesses, and with each the whole process group of its session's leader at once. A fork
 * that is under way in the group fails then. */
static void
kill_at_once(struct sessions *sessions)
{
    for (size_t i = 0; i < sessions->count; i++) {
        struct session *session = &sessions->all[i];
        if (session->witness >= 0 && has_ended(session->witness)) {
            drop_witness(session);
        }
        if (session->witness >= 0) {
            signal_to(-session->number, SIGKILL);
            signal_by(session->witness, SIGKILL);
        }
    }
}

/* Wait for the ends of the witnesses, at most `pause` nanoseconds. */
static void
wait_for_ends(struct sessions *sessions, int64_t pause)
{
    int64_t until = now(CLOCK_MONOTONIC) + pause;
    for (size_t i = 0; i < sessions->count; i++) {
        struct session *session = &sessions->all[i];
        int64_t left = until - now(CLOCK_MONOTONIC);
        if (session->witness < 0) {
            wait_for(-1, 0, left);
        } else if (wait_for(session->witness, POLLIN, left)) {
            drop_witness(session);
        }
    }
}

bool
sessions_end(struct sessions *sessions, int64_t until)
{
    sessions->search.ended_count = 0;
    for (int64_t pause = FIRST_PAUSE; sessions->count > 0;
         pause = 2 * pause < LONGEST_PAUSE ? 2 * pause : LONGEST_PAUSE) {
        kill_at_once(sessions);
        look_through(sessions, true);
        int64_t left = until - now(CLOCK_MONOTONIC);
        if (left <= 0) {
            break;
        }
        wait_for_ends(sessions, pause < left ? pause : left);
    }
    return sessions->count == 0;
}
