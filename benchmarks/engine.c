/* The floor with what the engine promises: csrc/ called from C, without Python.
 *
 *   engine one   CPU  NODE PROGRAM       [ROUNDS]
 *   engine ranks CPUS NODE PROGRAM RANKS [ROUNDS]
 *   engine ends  CPUS NODE PROGRAM RANKS [ROUNDS]
 *
 * one: as floor's clone, with what Popen(binding=) promises beside: a pidfd, no descriptor inherited by accident, signal
 * handlers that cannot run in the child, a binding that is read back.
 * ranks: as floor's crew, with what launch() promises beside: they die with this process, their ends are seen without
 * reaping them, nobody is left in their sessions, what each used is known.
 * ends: as the program ends, of RANKS that sleep (PROGRAM is sleep): all in their sessions are signalled, and then as
 * above. Their start is not timed.
 * A NODE of -1 leaves the memory policy alone, and CPUS that begin with "-" (such as "-0,1") the affinity of the ranks, too.
 *
 * Prints nanoseconds as floor.c does, and takes numbers of rounds from stdin as it does.
 */

#define _GNU_SOURCE
#include "end.h"
#include "spawn.h"

#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define MPOL_BIND_MODE 2 /* MPOL_BIND of <numaif.h> */
#define MOST_CPUS 4096
#define WORD_BITS (8 * sizeof(unsigned long))
#define WAIT_NS 1000000000

extern char **environ;

struct mask {
    unsigned long words[MOST_CPUS / WORD_BITS];
};

struct job {
    char *argv[3];
    const char *executables[2];
    struct mask *cpus; /* one for each place; NULL leaves the affinity and the memory policy alone */
    long places;
    unsigned long node; /* the mask */
    bool has_node;
    size_t ranks;
    struct spawn_request *requests;
    struct spawn_result *results;
    atomic_int *outcomes;
    struct end_rank *ends;
    pid_t *pids;
};

static int64_t
clock_ns(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (int64_t)time.tv_sec * 1000000000 + time.tv_nsec;
}

static _Noreturn void
give_up(const char *what, int error)
{
    fprintf(stderr, "engine: %s: %s\n", what, strerror(error));
    exit(1);
}

static struct spawn_request
request_of(const struct job *job, size_t rank)
{
    struct spawn_request request = {
        .executables = job->executables,
        .argv = job->argv,
        .envp = environ,
        .parent_ends = {-1, -1, -1},
        .close_fds = true,
        .restore_signals = true,
        .new_session = true,
        SPAWN_NOTHING_SPECIAL,
        .binding_required = true,
    };
    for (int i = 0; i < 3; i++) {
        request.streams[i].fd = STREAM_INHERIT;
    }
    if (job->cpus) {
        request.cpu_mask = job->cpus[(long)rank % job->places].words;
        request.cpu_mask_bytes = sizeof job->cpus->words;
    }
    if (job->cpus && job->has_node) {
        request.mem_mode = MPOL_BIND_MODE;
        request.node_mask = &job->node;
        request.node_mask_bits = WORD_BITS;
    }
    return request;
}

static int64_t
one_round(struct job *job)
{
    int64_t began = clock_ns();
    int status;
    struct spawn_request request = request_of(job, 0);
    struct spawn_result result;
    if (spawn(&request, &result, SPAWN_CLONE) != SPAWN_STARTED) {
        give_up("spawn", result.error);
    }
    while (waitpid(result.pid, &status, 0) < 0 && errno == EINTR) {
    }
    int64_t took = clock_ns() - began;
    close(result.pidfd);
    return took;
}

static int
by_number(const void *one, const void *other)
{
    return (*(const pid_t *)one > *(const pid_t *)other) - (*(const pid_t *)one < *(const pid_t *)other);
}

static void
start_all(struct job *job)
{
    uint64_t ignored = spawn_ignored_signals();
    struct spawn_crew crew = {
        .requests = job->requests,
        .results = job->results,
        .outcomes = job->outcomes,
        .count = job->ranks,
        .workers = job->places > 1 ? 2 * (unsigned int)job->places : 1, /* as _start/crew.py has it */
        .mechanism = SPAWN_CLONE,
    };
    for (size_t i = 0; i < job->ranks; i++) {
        job->requests[i] = request_of(job, i);
        job->requests[i].fresh_signals = true;
        job->requests[i].ignored_signals = ignored;
        job->requests[i].death_signal = SIGKILL;
        job->outcomes[i] = SPAWN_NOT_TRIED;
    }
    spawn_many(&crew);
    for (size_t i = 0; i < job->ranks; i++) {
        if (job->outcomes[i] != SPAWN_STARTED) {
            give_up("spawn_many", job->results[i].error);
        }
        job->ends[i] = (struct end_rank){.pid = job->results[i].pid, .pidfd = job->results[i].pidfd};
        job->pids[i] = job->results[i].pid;
    }
    qsort(job->pids, job->ranks, sizeof *job->pids, by_number);
}

/* See all end, look for what they have left, and reap them. */
static void
end_all(struct job *job)
{
    struct end_sessions sessions = {
        .numbers = job->pids, .zombies = job->pids, .count = job->ranks, .zombie_count = job->ranks};
    size_t running;
    do {
        end_wait(job->ends, job->ranks, WAIT_NS);
        end_look(job->ends, job->ranks);
        running = 0;
        for (size_t i = 0; i < job->ranks; i++) {
            running += job->ends[i].state == END_RUNS;
        }
    } while (running > 0);
    end_signal(job->ends, job->ranks, &(const int){SIGKILL}, 1);
    if (!end_are_empty(&sessions)) {
        give_up("end_are_empty", EEXIST);
    }
    free(sessions.found);
    end_collect(job->ends, job->ranks);
}

static void
close_all(const struct job *job)
{
    for (size_t i = 0; i < job->ranks; i++) {
        close(job->ends[i].pidfd);
    }
}

static int64_t
ranks_round(struct job *job)
{
    int64_t began = clock_ns();
    start_all(job);
    end_all(job);
    close_all(job);
    return clock_ns() - began;
}

static int64_t
ends_round(struct job *job)
{
    static const int signals[] = {SIGTERM, SIGCONT};
    struct end_sessions sessions = {.numbers = job->pids, .count = job->ranks};
    start_all(job);
    usleep(100000); /* the programs get time to start, because the end of programs that sleep is what is timed */
    int64_t began = clock_ns();
    end_signal(job->ends, job->ranks, signals, 2);
    end_signal_members(&sessions, signals, 2, false);
    free(sessions.found);
    end_all(job);
    int64_t took = clock_ns() - began;
    close_all(job);
    return took;
}

static void
measure(struct job *job, int64_t round_of(struct job *), long rounds)
{
    for (long round = 0; round < rounds; round++) {
        printf(round ? " %lld" : "%lld", (long long)round_of(job));
    }
    putchar('\n');
    fflush(stdout);
}

/* Read the list of CPUs in `text`, a mask for each. Returns how many there are, or 0 when it is not such a list. */
static long
parse_cpus(const char *text, struct mask *masks)
{
    long count = 0;
    char *end;
    do {
        long cpu = strtol(text, &end, 10);
        if (end == text || cpu < 0 || cpu >= MOST_CPUS || count == MOST_CPUS) {
            return 0;
        }
        masks[count++].words[(size_t)cpu / WORD_BITS] |= 1ul << ((size_t)cpu % WORD_BITS);
        text = end + 1;
    } while (*end == ',');
    return *end ? 0 : count;
}

/* The caller itself runs on these CPUs, as the floor does. */
static void
run_on(const struct mask *masks, long count)
{
    struct mask all = {{0}};
    for (long i = 0; i < count; i++) {
        for (size_t word = 0; word < MOST_CPUS / WORD_BITS; word++) {
            all.words[word] |= masks[i].words[word];
        }
    }
    if (syscall(SYS_sched_setaffinity, 0, sizeof all, &all) < 0) {
        give_up("sched_setaffinity", errno);
    }
}

int
main(int argc, char **argv)
{
    static struct mask masks[MOST_CPUS];
    bool one = argc > 1 && strcmp(argv[1], "one") == 0, ends = argc > 1 && strcmp(argv[1], "ends") == 0;
    int most = one ? 6 : 7;
    if (argc < most - 1 || argc > most || (!one && !ends && strcmp(argv[1], "ranks") != 0)) {
        fprintf(stderr, "usage: engine one CPU NODE PROGRAM [ROUNDS]\n"
                        "       engine ranks|ends CPUS NODE PROGRAM RANKS [ROUNDS]\n");
        return 2;
    }
    bool unbound = argv[2][0] == '-';
    long node = strtol(argv[3], NULL, 10), count = parse_cpus(argv[2] + unbound, masks);
    long ranks = one ? 1 : strtol(argv[5], NULL, 10);
    if (!count || node >= (long)WORD_BITS || ranks < 1) {
        fprintf(stderr, "engine: no CPUs %s, node %ld or ranks %ld\n", argv[2], node, ranks);
        return 2;
    }
    run_on(masks, count);
    struct rlimit files; /* a pidfd for each rank */
    getrlimit(RLIMIT_NOFILE, &files);
    files.rlim_cur = files.rlim_max;
    setrlimit(RLIMIT_NOFILE, &files);
    struct job job = {
        .argv = {argv[4], ends ? "120" : NULL, NULL},
        .executables = {argv[4], NULL},
        .cpus = unbound ? NULL : masks,
        .places = count,
        .node = node < 0 ? 0 : 1ul << node,
        .has_node = node >= 0,
        .ranks = (size_t)ranks,
        .requests = calloc((size_t)ranks, sizeof *job.requests),
        .results = calloc((size_t)ranks, sizeof *job.results),
        .outcomes = calloc((size_t)ranks, sizeof *job.outcomes),
        .ends = calloc((size_t)ranks, sizeof *job.ends),
        .pids = calloc((size_t)ranks, sizeof *job.pids),
    };
    if (!job.requests || !job.results || !job.outcomes || !job.ends || !job.pids) {
        give_up("calloc", ENOMEM);
    }
    int64_t (*round_of)(struct job *) = one ? one_round : ends ? ends_round : ranks_round;
    if (argc == most) {
        measure(&job, round_of, strtol(argv[argc - 1], NULL, 10));
        return 0;
    }
    char line[32];
    while (fgets(line, sizeof line, stdin)) {
        measure(&job, round_of, strtol(line, NULL, 10));
    }
    return 0;
}
