/* Finds, signals and kills the members of ranks' sessions; see end.h and search/search.c.
 *
 * A session's number is taken for as long as its leader has not been reaped, or another member exists. The caller
 * ensures that the numbers are still those of the ranks' sessions.
 */
#ifdef __linux__
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "end.h"

#include "search/search.h"

#include <stdlib.h>
#include <time.h>

struct looker {
    struct end_sessions *sessions;
    bool kills;
};

static bool
is_in(const pid_t *numbers, size_t count, long number)
{
    size_t low = 0, high = count;
    while (low < high) {
        size_t middle = low + (high - low) / 2;
        if (numbers[middle] < number) {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    return low < count && numbers[low] == number;
}

static void
add(struct end_sessions *sessions, pid_t pid, pid_t session)
{
    if (make_room((void **)&sessions->found, &sessions->found_room, sessions->found_count, sizeof *sessions->found)) {
        sessions->found[sessions->found_count++] = (struct end_member){pid, session};
    } else {
        sessions->lacks_memory = true;
    }
}

static void
let_go(struct search *search)
{
    free(search->ended);
    free(search->processes.all);
}

/* ---- the search ---------------------------------------------------------------------------------------------------*/

static bool
wants(void *context, const struct process *process, long session)
{
    const struct end_sessions *sessions = ((const struct looker *)context)->sessions;
    bool is_zombie = process->pid == session && is_in(sessions->zombies, sessions->zombie_count, process->pid);
    return is_in(sessions->numbers, sessions->count, session) && !is_zombie;
}

static bool
meet(void *context, const struct process *process, long session)
{
    const struct looker *looker = context;
    int pidfd;
    bool lives = member_lives(process, session, looker->kills, &pidfd);
    if (pidfd >= 0) {
        close_fd(pidfd);
    }
    if (lives) {
        add(looker->sessions, process->pid, (pid_t)session);
    }
    return lives;
}

bool
end_search(struct end_sessions *sessions, bool kills)
{
    struct search search = {.ended = NULL};
    struct looker looker = {sessions, kills};
    bool is_undecided;
    int looks = 0;
    do {
        sessions->found_count = 0;
        processes_list(&search.processes, (struct pids){sessions->zombies, sessions->zombie_count});
        is_undecided = search_listed(&search, wants, meet, &looker) && sessions->found_count == 0;
    } while (is_undecided && ++looks < most_looks(&search));
    let_go(&search);
    return !is_undecided && !search.is_blind && search.processes.is_whole && search.processes.procfs < PROCFS_NONE &&
           !sessions->lacks_memory;
}

bool
end_are_empty(struct end_sessions *sessions)
{
    return end_search(sessions, false) && sessions->found_count == 0;
}

/* ---- killed -------------------------------------------------------------------------------------------------------*/

void
end_kill_groups(const struct end_sessions *sessions)
{
    for (size_t i = 0; i < sessions->count; i++) {
        signal_to(-sessions->numbers[i], SIGKILL);
    }
}

void
end_kill_found(const struct end_sessions *sessions, int64_t pause)
{
    int64_t until = now(CLOCK_MONOTONIC) + pause;
    int *pidfds = calloc(sessions->found_count + 1, sizeof *pidfds);
    bool is_blind = !pidfds;
    struct processes processes = {.count = 0};
    processes_begin(&processes);
    for (size_t i = 0; pidfds && i < sessions->found_count; i++) {
        const struct process member = process_numbered(processes.procfs, sessions->found[i].pid);
        bool lives = member_lives(&member, sessions->found[i].session, true, &pidfds[i]);
        is_blind = is_blind || (lives && pidfds[i] < 0);
    }
    for (size_t i = 0; pidfds && i < sessions->found_count; i++) {
        if (pidfds[i] >= 0) {
            wait_for(pidfds[i], POLLIN, until - now(CLOCK_MONOTONIC));
            close_fd(pidfds[i]);
        }
    }
    if (is_blind) {
        wait_for(-1, 0, until - now(CLOCK_MONOTONIC));
    }
    free(pidfds);
}

/* ---- signalled ----------------------------------------------------------------------------------------------------*/

struct teller {
    struct end_sessions *sessions; /* its members found are those that were already signalled */
    const int *signals;
    size_t count;
    bool groups;
};

static bool
was_told(const struct end_sessions *sessions, pid_t pid)
{
    for (size_t i = 0; i < sessions->found_count; i++) {
        if (sessions->found[i].pid == pid) {
            return true;
        }
    }
    return false;
}

static bool
is_to_be_told(void *context, const struct process *process, long session)
{
    const struct teller *teller = context;
    return is_in(teller->sessions->numbers, teller->sessions->count, session) && process->pid != session &&
           (teller->groups || process_group(process) != session) && !was_told(teller->sessions, process->pid);
}

static bool
tell(void *context, const struct process *process, long session)
{
    const struct teller *teller = context;
    int pidfd = (int)pidfd_of(process->pid);
    add(teller->sessions, process->pid, (pid_t)session);
    /* The pidfd is of this member, or of one that has ended since, which gets nothing. */
    for (size_t i = 0; process_session(process) == session && i < teller->count; i++) {
        member_signal(process, pidfd, teller->signals[i]);
    }
    if (pidfd >= 0) {
        close_fd(pidfd);
    }
    return true;
}

void
end_signal_members(struct end_sessions *sessions, const int *signals, size_t count, bool groups)
{
    struct search search = {.ended = NULL};
    struct teller teller = {sessions, signals, count, groups};
    bool stops = false;
    for (size_t i = 0; i < count; i++) {
        stops = stops || signals[i] == SIGSTOP;
    }
    size_t told;
    sessions->found_count = 0;
    do {
        told = sessions->found_count;
        processes_list(&search.processes, (struct pids){sessions->numbers, sessions->count});
        search_listed(&search, is_to_be_told, tell, &teller);
    } while (stops && sessions->found_count > told && !sessions->lacks_memory);
    let_go(&search);
}
#endif
