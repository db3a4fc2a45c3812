/* The floor under every end of a job: what a bare loop of kill and wait takes for processes that a signal ends.
 *
 *   ends RANKS [ROUNDS]
 *
 * Starts RANKS children, each in a session of its own, that sleep until SIGTERM ends them; then, timed, signals the
 * group of each and reaps each. Prints nanoseconds as floor.c does, and takes numbers of rounds from stdin as it does.
 */

#define _GNU_SOURCE
#include <errno.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static int64_t
now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (int64_t)time.tv_sec * 1000000000 + time.tv_nsec;
}

static _Noreturn void
give_up(const char *what)
{
    fprintf(stderr, "ends: %s: %s\n", what, strerror(errno));
    exit(1);
}

static void
start(pid_t *pids, long ranks)
{
    int ready[2];
    char byte;

    if (pipe(ready) < 0)
        give_up("pipe");
    for (long rank = 0; rank < ranks; rank++) {
        pids[rank] = fork();
        if (pids[rank] < 0)
            give_up("fork");
        if (pids[rank] == 0) {
            setsid();
            if (write(ready[1], "", 1) != 1)
                _exit(1);
            execlp("sleep", "sleep", "120", NULL);
            _exit(127);
        }
    }
    for (long rank = 0; rank < ranks; rank++)
        if (read(ready[0], &byte, 1) != 1)
            give_up("read");
    close(ready[0]);
    close(ready[1]);
    /* The programs get time to start, because the end of programs that sleep is what is timed. */
    nanosleep(&(struct timespec){.tv_nsec = 100000000}, NULL);
}

static int64_t
end(const pid_t *pids, long ranks)
{
    int64_t began = now();
    for (long rank = 0; rank < ranks; rank++)
        if (kill(-pids[rank], SIGTERM) < 0)
            give_up("kill");
    for (long rank = 0; rank < ranks; rank++) {
        int status;
        while (waitpid(pids[rank], &status, 0) < 0)
            if (errno != EINTR)
                give_up("waitpid");
    }
    return now() - began;
}

static void
measure(pid_t *pids, long ranks, long rounds)
{
    for (long round = 0; round < rounds; round++) {
        start(pids, ranks);
        printf(round ? " %lld" : "%lld", (long long)end(pids, ranks));
    }
    putchar('\n');
    fflush(stdout);
}

int
main(int argc, char **argv)
{
    long ranks = argc > 1 ? strtol(argv[1], NULL, 10) : 0;
    pid_t *pids = ranks > 0 ? calloc((size_t)ranks, sizeof *pids) : NULL;
    char line[32];

    if (!pids || argc > 3) {
        fprintf(stderr, "usage: ends RANKS [ROUNDS]\n");
        return 2;
    }
    if (argc == 3) {
        measure(pids, ranks, strtol(argv[2], NULL, 10));
        return 0;
    }
    while (fgets(line, sizeof line, stdin))
        measure(pids, ranks, strtol(line, NULL, 10));
    return 0;
}
