/* The floor under every launcher: what the kernel takes to start bound processes, and to reap them.
 *
 *   floor clone       CPU  NODE PROGRAM [ROUNDS]
 *   floor posix_spawn CPU  NODE PROGRAM [ROUNDS]
 *   floor crew        CPUS NODE PROGRAM RANKS THREADS [ROUNDS]
 *   floor homing      CPUS NODE PROGRAM RANKS THREADS [ROUNDS]
 *   floor unbound     CPUS NODE PROGRAM RANKS THREADS [ROUNDS]
 *
 * clone: clone(CLONE_VM|CLONE_VFORK), and in the child setsid, sched_setaffinity to CPU, set_mempolicy(MPOL_BIND) to
 * NODE, execve; waitpid in the parent. A NODE of -1 leaves the memory policy alone.
 * posix_spawn: libc's, with POSIX_SPAWN_SETSID; it binds nothing.
 * The floor itself runs on CPU too, so that no move between cores is measured.
 *
 * crew: RANKS of them, each as in clone and bound to one of CPUS ("0,1") in turn, started by THREADS threads, of which
 * the main one is one and the others are made for the round; then each is reaped. The floor itself runs on all of CPUS.
 * homing: the same, but each thread binds itself to one of CPUS and takes the ranks of that CPU: there are at least as
 * many THREADS as CPUS.
 * unbound: as crew, but the ranks are not bound, and NODE does not count.
 *
 * Prints the nanoseconds of each round, a line of them for ROUNDS rounds. Without ROUNDS it reads numbers of rounds
 * from stdin, one a line, and answers each with its line: so the harness can time it in turns with others, in short
 * blocks.
 */

#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <spawn.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define MPOL_BIND_MODE 2 /* MPOL_BIND of <numaif.h>, which would need libnuma's header */
#define MASK_BITS 4096
#define WORD_BITS (8 * sizeof(unsigned long))
#define STACK_BYTES (64 * 1024)
#define MOST_THREADS 256

struct job {
    char *argv[2];
    size_t cpus_size; /* 0 leaves the affinity alone */
    unsigned long cpus[MASK_BITS / WORD_BITS];
    unsigned long nodes[MASK_BITS / WORD_BITS];
    unsigned long maxnode;       /* 0 leaves the memory policy alone */
    const char *volatile failed; /* the call that failed in the child, which shares this memory */
    volatile int error;
};

typedef pid_t starter(struct job *);

extern char **environ;

static int
child(void *argument)
{
    struct job *job = argument;

    job->failed = "setsid";
    if (setsid() < 0)
        goto fail;
    job->failed = "sched_setaffinity";
    if (job->cpus_size && syscall(SYS_sched_setaffinity, 0, job->cpus_size, job->cpus) < 0)
        goto fail;
    job->failed = "set_mempolicy";
    if (job->maxnode && syscall(SYS_set_mempolicy, MPOL_BIND_MODE, job->nodes, job->maxnode) < 0)
        goto fail;
    job->failed = NULL;
    execve(job->argv[0], job->argv, environ);
    job->failed = "execve";
fail:
    job->error = errno;
    _exit(127);
}

static pid_t
start_clone(struct job *job)
{
    char child_stack[STACK_BYTES] __attribute__((aligned(16)));

    return clone(child, child_stack + sizeof child_stack, CLONE_VM | CLONE_VFORK | SIGCHLD, job);
}

static pid_t
start_posix_spawn(struct job *job)
{
    static posix_spawnattr_t attributes;
    static int ready;
    pid_t pid;

    if (!ready) {
        posix_spawnattr_init(&attributes);
        posix_spawnattr_setflags(&attributes, POSIX_SPAWN_SETSID);
        ready = 1;
    }
    int error = posix_spawn(&pid, job->argv[0], NULL, &attributes, job->argv, environ);
    if (error) {
        job->failed = "posix_spawn";
        job->error = error;
        return -1;
    }
    return pid;
}

static int64_t
now(void)
{
    struct timespec time;

    clock_gettime(CLOCK_MONOTONIC, &time);
    return (int64_t)time.tv_sec * 1000000000 + time.tv_nsec;
}

static _Noreturn void
give_up(const struct job *job, int status)
{
    fprintf(stderr, "floor: %s: %s (status %d)\n", job->failed ? job->failed : "clone",
            strerror(job->failed ? job->error : errno), status);
    exit(1);
}

static int
reap(pid_t pid)
{
    int status = 0;

    while (waitpid(pid, &status, 0) < 0 && errno == EINTR)
        ;
    return status;
}

static int64_t
one_round(struct job *job, starter *start)
{
    int64_t began = now();
    pid_t pid = start(job);
    int status = pid > 0 ? reap(pid) : 0;
    int64_t ended = now();

    if (pid < 0 || job->failed || status)
        give_up(job, status);
    return ended - began;
}

struct crew {
    struct job *jobs; /* one for each rank */
    pid_t *pids;
    long ranks, threads, cpus;
    bool homing;
    atomic_long next[MASK_BITS]; /* the next rank of each CPU; without homing, the first is the next of all */
    atomic_long thread;
};

static void *
work(void *argument)
{
    struct crew *crew = argument;
    long lane = crew->homing ? atomic_fetch_add(&crew->thread, 1) % crew->cpus : 0;
    long stride = crew->homing ? crew->cpus : 1;

    if (crew->homing && syscall(SYS_sched_setaffinity, 0, crew->jobs[lane].cpus_size, crew->jobs[lane].cpus) < 0)
        give_up(&(struct job){.failed = "sched_setaffinity", .error = errno}, 0);
    for (;;) {
        long rank = lane + stride * atomic_fetch_add(&crew->next[lane], 1);
        if (rank >= crew->ranks)
            return NULL;
        crew->pids[rank] = start_clone(&crew->jobs[rank]);
    }
}

static int64_t
crew_round(struct crew *crew)
{
    pthread_t helpers[MOST_THREADS];
    int64_t began = now();

    memset(crew->next, 0, sizeof crew->next[0] * (size_t)crew->cpus);
    crew->thread = 0;
    /* With homing the main thread only waits, because it must not be bound. */
    for (long i = crew->homing ? 0 : 1; i < crew->threads; i++)
        if (pthread_create(&helpers[i], NULL, work, crew))
            give_up(&(struct job){.failed = "pthread_create", .error = EAGAIN}, 0);
    if (!crew->homing)
        work(crew);
    for (long i = crew->homing ? 0 : 1; i < crew->threads; i++)
        pthread_join(helpers[i], NULL);
    for (long rank = 0; rank < crew->ranks; rank++) {
        int status = crew->pids[rank] > 0 ? reap(crew->pids[rank]) : 0;
        if (crew->pids[rank] < 0 || crew->jobs[rank].failed || status)
            give_up(&crew->jobs[rank], status);
    }
    return now() - began;
}

static void
measure(struct crew *crew, struct job *job, starter *start, long rounds)
{
    for (long round = 0; round < rounds; round++)
        printf(round ? " %lld" : "%lld", (long long)(crew->ranks ? crew_round(crew) : one_round(job, start)));
    putchar('\n');
    fflush(stdout);
}

static void
set_bit(unsigned long *mask, long bit)
{
    mask[(size_t)bit / WORD_BITS] |= 1ul << ((size_t)bit % WORD_BITS);
}

static size_t
mask_bytes(long highest)
{
    return ((size_t)highest / WORD_BITS + 1) * sizeof(unsigned long);
}

/* Read the list of CPUs in `text`. Returns how many there are, or 0 when it is not such a list. */
static long
parse_cpus(const char *text, long *cpus)
{
    long count = 0;
    char *end;

    do {
        cpus[count] = strtol(text, &end, 10);
        if (end == text || cpus[count] < 0 || cpus[count] >= MASK_BITS || ++count == MASK_BITS)
            return 0;
        text = end + 1;
    } while (*end == ',');
    return *end ? 0 : count;
}

static struct job
job_on(long cpu, long node, char *program)
{
    struct job job = {.argv = {program, NULL}};

    set_bit(job.cpus, cpu);
    job.cpus_size = mask_bytes(cpu);
    if (node >= 0) {
        set_bit(job.nodes, node);
        job.maxnode = (unsigned long)node + 2; /* the kernel counts one more than the bits it reads */
    }
    return job;
}

static void
run_on(const long *cpus, long count)
{
    unsigned long mask[MASK_BITS / WORD_BITS] = {0};

    for (long i = 0; i < count; i++)
        set_bit(mask, cpus[i]);
    if (syscall(SYS_sched_setaffinity, 0, sizeof mask, mask) < 0) {
        fprintf(stderr, "floor: sched_setaffinity: %s\n", strerror(errno));
        exit(1);
    }
}

int
main(int argc, char **argv)
{
    static long cpus[MASK_BITS];
    static struct crew crew;
    crew.homing = argc > 1 && strcmp(argv[1], "homing") == 0;
    bool unbound = argc > 1 && strcmp(argv[1], "unbound") == 0;
    bool many = crew.homing || unbound || (argc > 1 && strcmp(argv[1], "crew") == 0);
    int most = many ? 8 : 6;

    if (argc < most - 1 || argc > most ||
        (!many && strcmp(argv[1], "clone") != 0 && strcmp(argv[1], "posix_spawn") != 0)) {
        fprintf(stderr, "usage: floor clone|posix_spawn CPU NODE PROGRAM [ROUNDS]\n"
                        "       floor crew|homing|unbound CPUS NODE PROGRAM RANKS THREADS [ROUNDS]\n");
        return 2;
    }
    starter *start = strcmp(argv[1], "posix_spawn") == 0 ? start_posix_spawn : start_clone;
    long count = parse_cpus(argv[2], cpus), node = strtol(argv[3], NULL, 10);
    if (!count || node >= MASK_BITS) {
        fprintf(stderr, "floor: no CPUs %s or node %ld\n", argv[2], node);
        return 2;
    }
    run_on(cpus, count);
    crew.cpus = count;
    struct job job = job_on(cpus[0], node, argv[4]);
    if (many) {
        crew.ranks = strtol(argv[5], NULL, 10);
        crew.threads = strtol(argv[6], NULL, 10);
        crew.jobs = calloc((size_t)crew.ranks, sizeof *crew.jobs);
        crew.pids = calloc((size_t)crew.ranks, sizeof *crew.pids);
        if (crew.ranks < 1 || crew.threads < (crew.homing ? count : 1) || crew.threads > MOST_THREADS || !crew.jobs ||
            !crew.pids) {
            fprintf(stderr, "floor: no crew of %s ranks and %s threads\n", argv[5], argv[6]);
            return 2;
        }
        for (long rank = 0; rank < crew.ranks; rank++)
            crew.jobs[rank] =
                unbound ? (struct job){.argv = {argv[4], NULL}} : job_on(cpus[rank % count], node, argv[4]);
    }

    if (argc == most) {
        measure(&crew, &job, start, strtol(argv[argc - 1], NULL, 10));
        return 0;
    }
    char line[32];
    while (fgets(line, sizeof line, stdin))
        measure(&crew, &job, start, strtol(line, NULL, 10));
    return 0;
}
