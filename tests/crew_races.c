/* Starts crews from several threads at once, for ThreadSanitizer to watch: ranks with and without a death signal, bound
 * and not bound, and some that cannot start; and ends them. Prints each wrong outcome; the status is 0 when there is none.
 *
 *   crew_races CPU PROGRAM
 *
 * The child half is built without the sanitizer, because the child would change the sanitizer's state in the parent's
 * memory. It calls leave_at_once instead of _exit, which the sanitizer would take for the end of the parent.
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "end.h"
#include "spawn.h"

#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

enum { LAUNCHERS = 4, ROUNDS = 6, RANKS = 24 };

extern char **environ;

_Noreturn void leave_at_once(int status);

__attribute__((no_sanitize("thread"))) void
leave_at_once(int status)
{
    syscall(SYS_exit_group, status);
    __builtin_unreachable();
}

static const char *program[2], *missing[2] = {"/no/such/program", NULL};
static char *argv_of_all[2];
static unsigned long masks[2][64]; /* of the same CPU: crew.c takes two pointers for two places */
static atomic_int wrong;

static void
fill(struct spawn_request *request, size_t rank, int kind)
{
    *request = (struct spawn_request){
        .executables = program,
        .argv = argv_of_all,
        .envp = environ,
        .close_fds = true,
        .new_session = true,
        SPAWN_NOTHING_SPECIAL,
        .death_signal = kind & 1 ? SIGKILL : 0,
    };
    for (int i = 0; i < 3; i++) {
        request->streams[i].fd = request->parent_ends[i] = -1;
    }
    if (kind & 2 && rank % 3) {
        request->cpu_mask = masks[rank % 2];
        request->cpu_mask_bytes = sizeof masks[0];
    }
    if (kind & 4 && rank == RANKS / 2) {
        request->executables = missing;
    }
}

static void *
watch(void *crew)
{
    while (spawn_many_started(crew) < RANKS / 4) {
        usleep(100);
    }
    return NULL;
}

/* End ranks as a group does: seen, searched for what they have left, reaped. */
static void
end(struct end_rank *ranks, size_t count, int kind)
{
    pid_t numbers[RANKS];
    struct end_sessions sessions = {.numbers = numbers};
    for (size_t i = 0; i < count; i++) {
        siginfo_t ended;
        while (waitid(P_PID, (id_t)ranks[i].pid, &ended, WEXITED | WNOWAIT) < 0 && errno == EINTR) {
        }
    }
    end_wait(ranks, count, 1000000000);
    end_look(ranks, count);
    end_signal(ranks, count, (const int[]){SIGCONT}, 1);
    for (size_t i = 0; i < count; i++) {
        size_t at = sessions.count++;
        for (; at > 0 && numbers[at - 1] > ranks[i].pid; at--) {
            numbers[at] = numbers[at - 1];
        }
        numbers[at] = ranks[i].pid;
    }
    sessions.zombies = numbers;
    sessions.zombie_count = sessions.count;
    if (!end_are_empty(&sessions)) {
        printf("sessions of kind %d: not certainly empty\n", kind);
        wrong++;
    }
    end_kill_groups(&sessions);
    end_search(&sessions, true);
    end_collect(ranks, count);
    for (size_t i = 0; i < count; i++) {
        if (ranks[i].state != END_ENDED || ranks[i].status || sessions.found_count) {
            printf("rank %zu of kind %d: state %d, status %d\n", i, kind, (int)ranks[i].state, ranks[i].status);
            wrong++;
        }
        if (ranks[i].pidfd >= 0) {
            close(ranks[i].pidfd);
        }
    }
    free(sessions.found);
}

static void
run(int kind)
{
    struct spawn_request requests[RANKS];
    struct spawn_result results[RANKS];
    atomic_int outcomes[RANKS];
    struct spawn_crew crew = {.requests = requests, .results = results, .outcomes = outcomes, .count = RANKS};
    crew.workers = 4;
    crew.mechanism = kind == 8 ? SPAWN_POSIX : SPAWN_CLONE;
    for (size_t rank = 0; rank < RANKS; rank++) {
        fill(&requests[rank], rank, kind);
        outcomes[rank] = SPAWN_NOT_TRIED;
    }
    pthread_t watcher;
    bool watched = !(kind & 4) && pthread_create(&watcher, NULL, watch, &crew) == 0;
    spawn_many(&crew);
    size_t started = 0, failed = 0;
    struct end_rank ranks[RANKS];
    for (size_t rank = 0; rank < RANKS; rank++) {
        failed += outcomes[rank] == SPAWN_FAILED;
        if (outcomes[rank] == SPAWN_STARTED) {
            ranks[started++] = (struct end_rank){.pid = results[rank].pid, .pidfd = results[rank].pidfd};
        }
    }
    end(ranks, started, kind);
    if (watched) {
        pthread_join(watcher, NULL);
    }
    if (started != spawn_many_started(&crew) || failed != (kind & 4 ? 1 : 0) || (!failed && started != RANKS)) {
        printf("kind %d: %zu started, %zu failed\n", kind, started, failed);
        wrong++;
    }
}

static void *
launch(void *number)
{
    for (int round = 0; round < ROUNDS; round++) {
        run((int)((size_t)number + (size_t)round) % 9);
    }
    return NULL;
}

int
main(int argc, char **argv)
{
    if (argc != 3) {
        return 2;
    }
    long cpu = strtol(argv[1], NULL, 10);
    for (int i = 0; i < 2; i++) {
        spawn_mask_set(masks[i], 8 * sizeof masks[i], (unsigned int)cpu);
    }
    argv_of_all[0] = argv[2];
    program[0] = argv[2];
    pthread_t launchers[LAUNCHERS];
    for (size_t i = 0; i < LAUNCHERS; i++) {
        pthread_create(&launchers[i], NULL, launch, (void *)i);
    }
    for (size_t i = 0; i < LAUNCHERS; i++) {
        pthread_join(launchers[i], NULL);
    }
    return wrong != 0;
}
