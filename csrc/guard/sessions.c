/* The sessions of a group's ranks; see sessions.h.
 *
 * The hazards, and what solves each:
 *
 *  1. A session cannot be signalled as a process group can. So the guard looks for its members among all processes
 *     and signals them one by one, again and again, until a look finds none.
 *  2. A look that finds no member proves nothing if a process ended during it, because that process may have forked
 *     after the list was made. Then there is another look.
 *  3. A session's number is taken for as long as the session has a member, zombies included (free_pid in the kernel's
 *     kernel/pid.c). Afterwards it can become the number of a stranger's session. So each session has a witness, a pidfd
 *     of a member that lives. The first is the leader. When a witness ends, another member takes its place; where there
 *     is none, the session is forgotten. Between the two are milliseconds.
 *  4. In those milliseconds, or before the guard is up, while somebody has stopped it, or for 100 ms where the kernel has
 *     no pidfd_open, a number can come again: then the process of that number, which leads the stranger's session, is
 *     younger than the registration of ours. A rank's own leader never is.
 *  5. A number of a process can come again between a look at it and a signal to it: the signal goes to a pidfd, whose
 *     session is looked at when it is open. Linux before 5.3 has no pidfd_open.
 *  6. A member that cannot be killed (another user's, or in uninterruptible sleep) stays until it ends: the caller
 *     says how long to try.
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "sessions.h"

#include <errno.h>
#include <time.h>

enum { MOST_LOOKS = 100 }; /* where thousands of processes come and go, one ends during every look */

/* Between two rounds of signals: the time in which a killed process ends, and one that has much memory to free. */
enum { FIRST_PAUSE = 1 * NANOSECONDS_IN_MS, LONGEST_PAUSE = 100 * NANOSECONDS_IN_MS };

/* The processes that had ended when a look came to them, or did not exist: they cannot fork. */
struct ended {
    pid_t *all;
    size_t count, room;
};

/* ---- the table ----------------------------------------------------------------------------------------------------*/

/* Where the session of this number is, or would be. */
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
    }
}

static bool
has_ended(int pidfd)
{
    return wait_for(pidfd, POLLIN, 0);
}

/* Forget the sessions without a member in the last look, and those whose number a stranger's session has. */
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

static bool
was_ended(const struct ended *ended, size_t count, pid_t pid)
{
    for (size_t i = 0; i < count; i++) {
        if (ended->all[i] == pid) {
            return true;
        }
    }
    return false;
}

static void
note_ended(struct ended *ended, pid_t pid)
{
    if (make_room((void **)&ended->all, &ended->room, ended->count, sizeof *ended->all)) {
        ended->all[ended->count++] = pid;
    }
}

/* Mark the sessions without a witness whose number another process has now. */
static void
mark_strangers(struct sessions *sessions)
{
    for (size_t i = 0; i < sessions->count; i++) {
        struct session *session = &sessions->all[i];
        if (session->witness < 0) {
            const struct process leader = process_numbered(sessions->processes.procfs, session->number);
            session->is_strangers = process_start(&leader) > session->registered;
        }
    }
}

/* Look at a member, kill it if asked to, and make it the witness of a session without one. Returns false when it has
 * ended. */
static bool
meet(struct sessions *sessions, struct session *session, const struct process *process, bool kills)
{
    int pidfd = (int)pidfd_of(process->pid);
    if (pidfd == -ESRCH || pidfd == -EINVAL || pidfd == -ENOENT) {
        return false; /* it has ended, or is a thread: without /proc these are listed, too */
    }
    if (pidfd < 0) {
        if (kills) {
            signal_to(process->pid, SIGKILL);
        }
        session->is_found = session->is_found || !process_has_ended(process);
        return !process_has_ended(process);
    }
    if (process_session(process) != session->number) {
        close_fd(pidfd);
        return false;
    }
    if (kills && signal_by(pidfd, SIGKILL) < 0) {
        signal_to(process->pid, SIGKILL); /* a seccomp profile refuses the call; or it is another user's: so is this */
    }
    bool lives = !has_ended(pidfd);
    session->is_found = session->is_found || lives;
    if (lives && session->witness < 0 && epoll_watch(sessions->epoll, pidfd, (uint64_t)session->number) == 0) {
        session->witness = pidfd;
    } else {
        close_fd(pidfd);
    }
    return lives;
}

/* Look at all processes once, the youngest first, which are listed last: a process that forks and ends again and
 * again is met in time. Returns whether a process has ended during this look that the one before had not noted. */
static bool
look(struct sessions *sessions, struct ended *ended, bool kills)
{
    size_t before = ended->count;
    bool was_disturbed = false;
    processes_list(&sessions->processes);
    mark_strangers(sessions);
    for (size_t i = sessions->processes.count; i-- > 0;) {
        const struct process *process = &sessions->processes.all[i];
        long number = process_session(process);
        struct session *session = find(sessions, number);
        if (number != -ESRCH && (!session || session->is_strangers || (session->witness >= 0 && !kills))) {
            continue;
        }
        if (number == -ESRCH || !meet(sessions, session, process, kills)) {
            was_disturbed = was_disturbed || !was_ended(ended, before, process->pid);
            note_ended(ended, process->pid);
        }
    }
    /* What this look has noted takes the place of what the one before had. */
    for (size_t i = before; i < ended->count; i++) {
        ended->all[i - before] = ended->all[i];
    }
    ended->count -= before;
    return was_disturbed;
}

/* Look until no more members can be found, and forget the sessions without members. */
static void
look_through(struct sessions *sessions, struct ended *ended, bool kills)
{
    for (int i = 0; i < MOST_LOOKS; i++) {
        bool all_found = true;
        for (size_t at = 0; at < sessions->count; at++) {
            struct session *session = &sessions->all[at];
            session->is_strangers = false;
            session->is_found = session->witness >= 0;
        }
        bool was_disturbed = look(sessions, ended, kills);
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
        return true; /* 0 and 1 are no rank's: to kill(2) they mean this process's own group, and everybody */
    }
    if (!make_room((void **)&sessions->all, &sessions->room, sessions->count, sizeof *sessions->all)) {
        return false;
    }
    size_t at = place_of(sessions, number);
    for (size_t i = sessions->count++; i > at; i--) {
        sessions->all[i] = sessions->all[i - 1];
    }
    sessions->all[at] = (struct session){.number = number, .witness = -1, .registered = registered};
    const struct process leader = process_numbered(sessions->processes.procfs, number);
    if (process_start(&leader) <= registered) {
        meet(sessions, &sessions->all[at], &leader, false);
    }
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
    static struct ended ended;
    bool all_witnessed = true;
    for (size_t i = 0; i < sessions->count && all_witnessed; i++) {
        all_witnessed = sessions->all[i].witness >= 0;
    }
    if (all_witnessed) {
        return true;
    }
    ended.count = 0;
    look_through(sessions, &ended, false);
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

/* Wait for the ends of the witnesses, for `pause` nanoseconds at most. */
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
    static struct ended ended;
    ended.count = 0;
    for (int64_t pause = FIRST_PAUSE; sessions->count > 0;
         pause = 2 * pause < LONGEST_PAUSE ? 2 * pause : LONGEST_PAUSE) {
        kill_at_once(sessions);
        look_through(sessions, &ended, true);
        int64_t left = until - now(CLOCK_MONOTONIC);
        if (left <= 0) {
            break;
        }
        wait_for_ends(sessions, pause < left ? pause : left);
    }
    return sessions->count == 0;
}
