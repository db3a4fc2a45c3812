/* Many starts in one call, by threads that take the next rank from a counter; and a thread that outlives its children.
 *
 * The calling thread makes the crew's threads, so that the children inherit its affinity, memory policy, credentials and
 * namespaces through them. Threads of a pool would be cheaper and would give the children the inheritance of a stranger.
 *
 * PR_SET_PDEATHSIG fires when the *thread* that made the child ends, not the process. A child with a death signal is
 * therefore made by the main thread, which ends with the process, or by a keeper: a thread of the crew that stays, after
 * the call has returned, until all the children that it made have ended. A start that is alone and comes from another
 * thread has a crew of one keeper.
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "spawn.h"

#include <errno.h>
#include <pthread.h>
#include <semaphore.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#ifdef __linux__
#include <sys/syscall.h>
#endif

enum { MOST_HELPERS = 64 };

/* One call: on the caller's stack. */
struct shift {
    struct spawn_crew *crew;
    sigset_t child_mask; /* the caller's: what the ranks start with */
    sem_t done;          /* posted by each keeper, which does not touch the shift afterwards */
};

/* What a keeper has of its own, since it outlives the call. */
struct keeper {
    struct shift *shift;
    size_t count;
    pid_t children[];
};

static void
work(struct shift *shift, struct keeper *keeper)
{
    struct spawn_crew *crew = shift->crew;
    while (!atomic_load(&crew->failed)) {
        size_t rank = atomic_fetch_add(&crew->next, 1);
        if (rank >= crew->count) {
            break;
        }
        if (crew->outcomes[rank] == SPAWN_STARTED) {
            continue;
        }
        struct spawn_result *result = &crew->results[rank];
        int outcome = spawn_by(crew->mechanism, &crew->requests[rank], result, &shift->child_mask);
        crew->outcomes[rank] = outcome;
        if (outcome == SPAWN_FAILED) {
            atomic_store(&crew->failed, true);
        } else if (outcome == SPAWN_STARTED) {
            atomic_fetch_add(&crew->started, 1);
            if (keeper) {
                keeper->children[keeper->count++] = result->pid;
            }
        }
    }
}

static void
set_name(void)
{
#ifdef __linux__
    pthread_setname_np(pthread_self(), "rankspawn");
#endif
}

static void *
helper_main(void *argument)
{
    set_name();
    work(argument, NULL);
    return NULL;
}

static void *
keeper_main(void *argument)
{
    struct keeper *keeper = argument;
    set_name();
    work(keeper->shift, keeper);
    sem_post(&keeper->shift->done);
    /* The youngest first: of those that have ended meanwhile, none wakes this thread. WNOWAIT leaves a child to its
     * owner. ECHILD: the owner has reaped it; had the number been given to another child since, the keeper would only
     * stay longer. */
    while (keeper->count > 0) {
        siginfo_t ended;
        pid_t child = keeper->children[--keeper->count];
        while (waitid(P_PID, (id_t)child, &ended, WEXITED | WNOWAIT) < 0 && errno == EINTR) {
        }
    }
    free(keeper);
    return NULL;
}

/* Make one thread more. Returns an errno. */
static int
hire(struct shift *shift, pthread_t *helper, bool keeps)
{
    if (!keeps) {
        return pthread_create(helper, NULL, helper_main, shift);
    }
    struct keeper *keeper = malloc(sizeof *keeper + shift->crew->count * sizeof keeper->children[0]);
    if (!keeper) {
        return ENOMEM;
    }
    keeper->shift = shift;
    keeper->count = 0;
    pthread_attr_t attributes;
    pthread_attr_init(&attributes);
    pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
    int error = pthread_create(helper, &attributes, keeper_main, keeper);
    pthread_attr_destroy(&attributes);
    if (error) {
        free(keeper);
    }
    return error;
}

static bool
on_main_thread(void)
{
#ifdef __linux__
    return syscall(SYS_gettid) == getpid();
#else
    return true;
#endif
}

static void
fail_without_threads(struct spawn_crew *crew, int error)
{
    for (size_t rank = 0; rank < crew->count; rank++) {
        if (crew->outcomes[rank] != SPAWN_STARTED) {
            crew->results[rank] = (struct spawn_result){.pidfd = -1, .step = STEP_THREAD, .error = error};
            crew->outcomes[rank] = SPAWN_FAILED;
            return;
        }
    }
}

void
spawn_many(struct spawn_crew *crew)
{
    struct shift shift = {.crew = crew};
    pthread_t helpers[MOST_HELPERS];
    unsigned int hired = 0;
    int error = 0;
    bool keeps = false;
    for (size_t rank = 0; rank < crew->count; rank++) {
        keeps = keeps || (crew->mechanism == SPAWN_CLONE && crew->requests[rank].death_signal);
    }
    bool caller_works = !keeps || on_main_thread();
    unsigned int wanted = crew->workers - caller_works;
    wanted = wanted < MOST_HELPERS ? wanted : MOST_HELPERS;

    atomic_store(&crew->next, 0);
    atomic_store(&crew->failed, false);
    sem_init(&shift.done, 0, 0);
    /* The threads inherit a full mask: they never run the program's handlers. Not the raw call: libc needs its two
     * signals in every thread, or the program's next setuid(3) would wait for a keeper's end. */
    sigset_t all;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &shift.child_mask);
    while (hired < wanted && !(error = hire(&shift, &helpers[hired], keeps))) {
        hired++;
    }
    pthread_sigmask(SIG_SETMASK, &shift.child_mask, NULL);

    if (caller_works) {
        work(&shift, NULL);
    } else if (!hired) {
        fail_without_threads(crew, error);
    }
    for (unsigned int i = 0; i < hired; i++) {
        if (!keeps) {
            pthread_join(helpers[i], NULL);
            continue;
        }
        while (sem_wait(&shift.done) < 0 && errno == EINTR) {
        }
    }
    sem_destroy(&shift.done);
}

size_t
spawn_many_started(struct spawn_crew *crew)
{
    return atomic_load(&crew->started);
}
