/* Many starts in one call, by threads; and threads that outlive the children that they made.
 *
 * The calling thread makes the crew's threads, so that the children inherit its memory policy, credentials, namespaces
 * and, where they are not bound, its affinity. Threads of a pool would be cheaper, but the children would inherit what
 * the pool's threads have.
 *
 * A thread binds itself to the CPUs of a rank before it makes it, and prefers ranks whose CPUs it is on. A child that
 * is made elsewhere moves to its CPUs in mid-start and wakes its parent across CPUs, which takes half as long again.
 *
 * PR_SET_PDEATHSIG fires when the *thread* that made the child ends, not the process. A child with a death signal is
 * therefore made by the main thread, which ends with the process, or by a keeper: a thread of the crew that stays,
 * after the call has returned, until all the children that it made have ended. A single start that another thread asks
 * for is a crew of one keeper.
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "spawn.h"

#include <errno.h>
#include <limits.h>
#include <pthread.h>
#include <stdlib.h>
#include <sys/wait.h>
#include <unistd.h>

#ifdef __linux__
#include <sys/syscall.h>
#endif

enum { MOST_WORKERS = 64, MOST_CPUS = 8192 };

/* A place is a set of CPUs: a request's cpu_mask, compared as a pointer. NULL is the caller's own CPUs. */
typedef const unsigned long *place_t;

/* One call of spawn_many. It lies on the caller's stack. */
struct shift {
    struct spawn_crew *crew;
    sigset_t child_mask; /* the caller's, which the ranks start with */
    bool moves;          /* the threads bind themselves to the ranks' CPUs */
    unsigned long callers_cpus[MOST_CPUS / (sizeof(unsigned long) * CHAR_BIT)];
    size_t callers_cpus_bytes;
    unsigned int workers;
    place_t _Atomic places[MOST_WORKERS]; /* the place where each worker is, or is about to go */
    atomic_bool failed;
    pthread_mutex_t lock; /* for the next two; a semaphore would do, but macOS has only named ones */
    pthread_cond_t done;  /* signalled by the last keeper when it has made its ranks and is done with the shift */
    unsigned int keepers; /* keepers that may still make ranks */
};

/* A thread of the crew. It frees this itself, because a keeper outlives the call. */
struct worker {
    struct shift *shift;
    unsigned int number;
    bool keeps;
    size_t count;
    pid_t children[]; /* `count` of them: the children that a keeper has made */
};

/* Take a rank for the calling thread. Returns false when another thread has it. */
static bool
claim(struct spawn_crew *crew, size_t rank)
{
    int expected = SPAWN_NOT_TRIED;
    return atomic_load(&crew->outcomes[rank]) == expected &&
           atomic_compare_exchange_strong(&crew->outcomes[rank], &expected, SPAWN_UNDER_WAY);
}

/* The next rank: of those that no thread has taken, the first whose place has the fewest threads. */
static size_t
least_crowded(struct shift *shift)
{
    struct spawn_crew *crew = shift->crew;
    size_t best = crew->count;
    unsigned int fewest = UINT_MAX;
    for (size_t rank = 0; rank < crew->count && fewest > 0; rank++) {
        unsigned int crowd = 0;
        if (atomic_load(&crew->outcomes[rank]) != SPAWN_NOT_TRIED) {
            continue;
        }
        for (unsigned int i = 0; i < shift->workers; i++) {
            crowd += atomic_load(&shift->places[i]) == crew->requests[rank].cpu_mask;
        }
        if (crowd < fewest) {
            fewest = crowd;
            best = rank;
        }
    }
    return best;
}

/* Claim the next rank for a worker whose last one was `rank`. Returns crew->count if none is left. */
static size_t
take(const struct worker *worker, size_t rank)
{
    struct shift *shift = worker->shift;
    struct spawn_crew *crew = shift->crew;
    place_t here = atomic_load(&shift->places[worker->number]);
    for (; rank < crew->count; rank++) {
        if (crew->requests[rank].cpu_mask == here && claim(crew, rank)) {
            return rank;
        }
    }
    while ((rank = least_crowded(shift)) < crew->count) {
        atomic_store(&shift->places[worker->number], crew->requests[rank].cpu_mask);
        if (claim(crew, rank)) {
            break;
        }
    }
    return rank;
}

/* Bind the calling thread to the CPUs of a rank, or, where it has none, to the caller's. */
static void
go_to(const struct shift *shift, const struct spawn_request *request)
{
#ifdef __linux__
    /* If the kernel refuses, the child will report that. This thread goes back to the caller's CPUs, so that the
     * child is not made on the CPUs of the rank before it. */
    if (!request->cpu_mask || syscall(SYS_sched_setaffinity, 0, request->cpu_mask_bytes, request->cpu_mask) < 0) {
        syscall(SYS_sched_setaffinity, 0, shift->callers_cpus_bytes, shift->callers_cpus);
    }
#else
    (void)shift, (void)request;
#endif
}

static void
work(struct worker *worker)
{
    struct shift *shift = worker->shift;
    struct spawn_crew *crew = shift->crew;
    place_t here = NULL;
    size_t rank = 0;
    while (!atomic_load(&shift->failed) && (rank = take(worker, rank)) < crew->count) {
        const struct spawn_request *request = &crew->requests[rank];
        struct spawn_result *result = &crew->results[rank];
        if (shift->moves && request->cpu_mask != here) {
            here = request->cpu_mask;
            go_to(shift, request);
        }
        int outcome = spawn_by(crew->mechanism, request, result, &shift->child_mask);
        atomic_store(&crew->outcomes[rank], outcome);
        if (outcome == SPAWN_FAILED) {
            atomic_store(&shift->failed, true);
        } else if (outcome == SPAWN_STARTED) {
            atomic_fetch_add(&crew->started, 1);
            if (worker->keeps) {
                worker->children[worker->count++] = result->pid;
            }
        }
    }
}

/* Stay until all children have ended. */
static void
keep(struct worker *keeper)
{
    /* The program may have begun to catch SIGCHLD since not_for_workers looked. */
    sigset_t late;
    sigemptyset(&late);
    sigaddset(&late, SIGCHLD);
    pthread_sigmask(SIG_BLOCK, &late, NULL);
    /* This thread waits for the youngest first, so that children that end meanwhile do not wake it one by one. WNOWAIT
     * leaves a child for its owner to reap. ECHILD: the owner has reaped it. If another child has that pid by now, the
     * keeper stays until that one ends. */
    while (keeper->count > 0) {
        siginfo_t ended;
        pid_t child = keeper->children[--keeper->count];
        while (waitid(P_PID, (id_t)child, &ended, WEXITED | WNOWAIT) < 0 && errno == EINTR) {
        }
    }
}

/* A keeper has no more ranks to make: the call may return. */
static void
leave(struct shift *shift)
{
    pthread_mutex_lock(&shift->lock);
    if (--shift->keepers == 0) {
        pthread_cond_signal(&shift->done);
    }
    pthread_mutex_unlock(&shift->lock);
}

static void *
worker_main(void *argument)
{
    struct worker *worker = argument;
#ifdef __linux__
    pthread_setname_np(pthread_self(), "rankspawn");
#endif
    work(worker);
    if (worker->keeps) {
        leave(worker->shift);
        keep(worker);
    }
    free(worker);
    return NULL;
}

/* Make a thread. Returns 0 or an errno. */
static int
hire(struct shift *shift, unsigned int number, bool keeps, pthread_t *thread)
{
    struct worker *worker = malloc(sizeof *worker + (keeps ? shift->crew->count * sizeof worker->children[0] : 0));
    if (!worker) {
        return ENOMEM;
    }
    *worker = (struct worker){.shift = shift, .number = number, .keeps = keeps};
    pthread_attr_t attributes;
    pthread_attr_init(&attributes);
    pthread_attr_setdetachstate(&attributes, keeps ? PTHREAD_CREATE_DETACHED : PTHREAD_CREATE_JOINABLE);
    int error = pthread_create(thread, &attributes, worker_main, worker);
    pthread_attr_destroy(&attributes);
    if (error) {
        free(worker);
    }
    return error;
}

/* The signals that the crew's threads block, so that they never run the program's handlers. libc's own two are left
 * out, because the program's next setuid(3) would wait until a keeper ends. SIGCHLD is left out where the program does
 * not catch it: the kernel tells the thread that made a child of its end, and if that thread blocked the signal, the
 * kernel would wake another thread to ignore it. */
static sigset_t
not_for_workers(void)
{
    sigset_t signals;
    struct sigaction action;
    sigfillset(&signals);
    if (sigaction(SIGCHLD, NULL, &action) == 0 && (action.sa_handler == SIG_DFL || action.sa_handler == SIG_IGN)) {
        sigdelset(&signals, SIGCHLD);
    }
    return signals;
}

/* Make as many of the crew's threads as possible, and wait until they have started the ranks. Returns how many there
 * were; *error says why there were no more. */
static unsigned int
work_together(struct shift *shift, bool keeps, int *error)
{
    pthread_t threads[MOST_WORKERS];
    unsigned int hired = 0;
    sigset_t blocked = not_for_workers();
    pthread_mutex_init(&shift->lock, NULL);
    pthread_cond_init(&shift->done, NULL);
    pthread_sigmask(SIG_BLOCK, &blocked, NULL);
    pthread_mutex_lock(&shift->lock);
    while (hired < shift->workers && !(*error = hire(shift, hired, keeps, &threads[hired]))) {
        hired++;
    }
    pthread_sigmask(SIG_SETMASK, &shift->child_mask, NULL);
    shift->keepers = keeps ? hired : 0;
    while (shift->keepers > 0) {
        pthread_cond_wait(&shift->done, &shift->lock);
    }
    pthread_mutex_unlock(&shift->lock);
    for (unsigned int i = 0; i < hired && !keeps; i++) {
        pthread_join(threads[i], NULL);
    }
    pthread_cond_destroy(&shift->done);
    pthread_mutex_destroy(&shift->lock);
    return hired;
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

/* No thread could be made, and the caller's thread may not do the work, so the first unstarted rank fails. */
static void
fail_without_threads(struct spawn_crew *crew, int error)
{
    size_t rank = 0;
    while (rank < crew->count && !claim(crew, rank)) {
        rank++;
    }
    if (rank < crew->count) {
        crew->results[rank] = (struct spawn_result){.pidfd = -1, .step = STEP_THREAD, .error = error};
        atomic_store(&crew->outcomes[rank], SPAWN_FAILED);
    }
}

/* Note the caller's CPUs. Returns whether that was possible: threads may leave them only if they can come back. */
static bool
know_own_place(struct shift *shift)
{
#ifdef __linux__
    long bytes = syscall(SYS_sched_getaffinity, 0, sizeof shift->callers_cpus, shift->callers_cpus);
    shift->callers_cpus_bytes = bytes > 0 ? (size_t)bytes : 0;
#endif
    return shift->callers_cpus_bytes > 0;
}

void
spawn_many(struct spawn_crew *crew)
{
    static const unsigned long nowhere; /* a place that no rank has */
    struct shift shift = {.crew = crew, .workers = crew->workers < MOST_WORKERS ? crew->workers : MOST_WORKERS};
    bool keeps = false;
    unsigned int hired = 0;
    int error = 0;
    for (size_t rank = 0; rank < crew->count; rank++) {
        keeps = keeps || (crew->mechanism == SPAWN_CLONE && crew->requests[rank].death_signal);
        if (atomic_load(&crew->outcomes[rank]) == SPAWN_DECLINED) {
            atomic_store(&crew->outcomes[rank], SPAWN_NOT_TRIED);
        }
    }
    for (unsigned int i = 0; i < shift.workers; i++) {
        atomic_store(&shift.places[i], &nowhere);
    }
    pthread_sigmask(SIG_SETMASK, NULL, &shift.child_mask);
    /* A single start needs no other thread. The caller's own is never bound to a rank's CPUs. */
    bool caller_may_work = !keeps || on_main_thread();
    if (shift.workers > 1 || !caller_may_work) {
        shift.moves = shift.workers > 1 && know_own_place(&shift);
        hired = work_together(&shift, keeps, &error);
    }
    if (!hired && caller_may_work) {
        shift.moves = false;
        work(&(struct worker){.shift = &shift});
    } else if (!hired) {
        fail_without_threads(crew, error);
    }
}

int
spawn(const struct spawn_request *request, struct spawn_result *result, enum spawn_mechanism mechanism)
{
    if (!request->death_signal) {
        return spawn_by(mechanism, request, result, NULL);
    }
    /* A death signal needs a thread that outlives the child. */
    atomic_int outcome = SPAWN_NOT_TRIED;
    struct spawn_crew alone = {.requests = request, .results = result, .outcomes = &outcome, .count = 1, .workers = 1};
    alone.mechanism = mechanism;
    spawn_many(&alone);
    return outcome;
}

size_t
spawn_many_started(struct spawn_crew *crew)
{
    return atomic_load(&crew->started);
}
