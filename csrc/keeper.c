/* A thread that lives as long as the child it makes.
 *
 * PR_SET_PDEATHSIG fires when the *thread* that made the child ends, not the process. A child with a death signal is
 * therefore made by the main thread, which ends with the process, or by a thread of its own: made by the calling thread,
 * so that the child inherits the caller's affinity, memory policy, credentials and namespaces through it, and ended only
 * after the child. Threads of a pool would be cheaper and would give the child the inheritance of a stranger.
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "spawn.h"

#ifdef __linux__

#include <errno.h>
#include <pthread.h>
#include <semaphore.h>
#include <signal.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

/* On the caller's stack: the keeper does not touch it after the post. */
struct errand {
    const struct spawn_request *request;
    struct spawn_result *result;
    uint64_t child_mask;
    int outcome;
    sem_t done;
};

static void *
keeper_main(void *argument)
{
    struct errand *errand = argument;
    pthread_setname_np(pthread_self(), "rankspawn");
    errand->outcome = spawn_by_clone(errand->request, errand->result, &errand->child_mask);
    bool started = errand->outcome == SPAWN_STARTED;
    pid_t child = errand->result->pid;
    sem_post(&errand->done);
    if (started) {
        /* WNOWAIT leaves the child to its owner. ECHILD: the owner has reaped it. */
        siginfo_t ended;
        while (waitid(P_PID, (id_t)child, &ended, WEXITED | WNOWAIT) < 0 && errno == EINTR) {
        }
    }
    return NULL;
}

int
spawn_by_keeper(const struct spawn_request *request, struct spawn_result *result)
{
    struct errand errand = {.request = request, .result = result};
    pthread_t keeper;
    pthread_attr_t attributes;
    uint64_t all = ~(uint64_t)0;
    sem_init(&errand.done, 0, 0);
    pthread_attr_init(&attributes);
    pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
    /* The keeper inherits a full mask: it never runs the program's handlers. */
    syscall(SYS_rt_sigprocmask, SIG_SETMASK, &all, &errand.child_mask, sizeof all);
    int error = pthread_create(&keeper, &attributes, keeper_main, &errand);
    syscall(SYS_rt_sigprocmask, SIG_SETMASK, &errand.child_mask, NULL, sizeof all);
    pthread_attr_destroy(&attributes);
    if (error) {
        memset(result, 0, sizeof *result);
        result->pidfd = -1;
        result->step = STEP_THREAD;
        result->error = error;
    } else {
        while (sem_wait(&errand.done) < 0 && errno == EINTR) {
        }
    }
    sem_destroy(&errand.done);
    return error ? SPAWN_FAILED : errand.outcome;
}

#endif
