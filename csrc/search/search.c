/* A look at all processes; see search.h.
 *
 * The hazards, and what solves each:
 *
 *  1. A session cannot be signalled as a process group can. So a search looks for its members among all processes and
 *     signals them one by one, again and again, until a look finds none.
 *  2. A look that finds no member proves nothing if a process ended during it, because that process may have forked
 *     after the list was made. Then there is another look.
 *  3. A pid can be reused between a look at the process and a signal to it. So the signal goes to a pidfd, and the
 *     session is looked at once the pidfd is open. Linux before 5.3 has no pidfd_open.
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "search.h"

#include <errno.h>

enum { MOST_LOOKS = 100, MOST_LOOKS_WITHOUT_PROCFS = 3 };

int
most_looks(const struct search *search)
{
    enum procfs procfs = search->processes.procfs;
    return procfs == PROCFS_SHUT ? 1 : procfs == PROCFS_NONE ? MOST_LOOKS_WITHOUT_PROCFS : MOST_LOOKS;
}

static bool
was_ended(const struct search *search, size_t count, pid_t pid)
{
    for (size_t i = 0; i < count; i++) {
        if (search->ended[i] == pid) {
            return true;
        }
    }
    return false;
}

static void
note_ended(struct search *search, pid_t pid)
{
    if (make_room((void **)&search->ended, &search->ended_room, search->ended_count, sizeof *search->ended)) {
        search->ended[search->ended_count++] = pid;
    }
}

bool
search_listed(struct search *search, search_question *wants, search_question *meet, void *context)
{
    size_t before = search->ended_count;
    bool was_disturbed = false;
    search->is_blind = false;
    for (size_t i = search->processes.count; i-- > 0;) {
        const struct process *process = &search->processes.all[i];
        long session = process_session(process);
        if (session < 0 && session != -ESRCH) {
            search->is_blind = true;
            continue;
        }
        if (session >= 0 && !wants(context, process, session)) {
            continue;
        }
        if (session == -ESRCH || !meet(context, process, session)) {
            was_disturbed = was_disturbed || !was_ended(search, before, process->pid);
            note_ended(search, process->pid);
        }
    }
    /* The notes of this look replace those of the one before. */
    for (size_t i = before; i < search->ended_count; i++) {
        search->ended[i - before] = search->ended[i];
    }
    search->ended_count -= before;
    return was_disturbed;
}

void
member_signal(const struct process *process, int pidfd, int sig)
{
    long said = pidfd < 0 ? -ENOSYS : signal_by(pidfd, sig);
    /* Another error: a seccomp profile refuses the call; or the process is another user's, and kill(2) fails, too. */
    if (said < 0 && said != -ESRCH) {
        signal_to(process->pid, sig);
    }
}

bool
member_lives(const struct process *process, long session, bool kills, int *pidfd)
{
    int opened = (int)pidfd_of(process->pid);
    *pidfd = -1;
    if (opened == -ESRCH || opened == -EINVAL || opened == -ENOENT) {
        return false; /* it has ended, or is a thread: without /proc these are listed, too */
    }
    if (opened < 0) {
        if (kills) {
            member_signal(process, -1, SIGKILL);
        }
        return !process_has_ended(process);
    }
    if (process_session(process) != session) {
        close_fd(opened);
        return false;
    }
    if (kills) {
        member_signal(process, opened, SIGKILL);
    }
    *pidfd = opened;
    return !wait_for(opened, POLLIN, 0);
}
