/* The floor under every launcher: what the kernel takes to start one bound process, and to reap it.
 *
 *   floor clone       CPU NODE PROGRAM [ROUNDS]
 *   floor posix_spawn CPU NODE PROGRAM [ROUNDS]
 *
 * clone: clone(CLONE_VM|CLONE_VFORK), and in the child setsid, sched_setaffinity to CPU, set_mempolicy(MPOL_BIND) to
 * NODE, execve; waitpid in the parent. A NODE of -1 leaves the memory policy alone.
 * posix_spawn: libc's, with POSIX_SPAWN_SETSID; it binds nothing.
 * The floor itself runs on CPU too, so that no move between cores is measured.
 *
 * Prints the nanoseconds of each round, a line of them for ROUNDS rounds. Without ROUNDS it reads numbers of rounds from
 * stdin, one a line, and answers each with its line: so the harness can time it in turns with others, in short blocks.
 */

#define _GNU_SOURCE
#include <errno.h>
#include <sched.h>
#include <signal.h>
#include <spawn.h>
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

struct job {
    char *argv[2];
    size_t cpus_size;
    unsigned long cpus[MASK_BITS / WORD_BITS];
    unsigned long nodes[MASK_BITS / WORD_BITS];
    unsigned long maxnode;       /* 0 leaves the memory policy alone */
    const char *volatile failed; /* the call that failed in the child, which shares this memory */
    volatile int error;
};

typedef pid_t starter(struct job *);

static char child_stack[64 * 1024] __attribute__((aligned(16)));
extern char **environ;

static int
child(void *argument)
{
    struct job *job = argument;

    job->failed = "setsid";
    if (setsid() < 0)
        goto fail;
    job->failed = "sched_setaffinity";
    if (syscall(SYS_sched_setaffinity, 0, job->cpus_size, job->cpus) < 0)
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

static void
measure(struct job *job, starter *start, long rounds)
{
    for (long round = 0; round < rounds; round++) {
        int status = 0;
        int64_t began = now();
        pid_t pid = start(job);
        if (pid > 0)
            while (waitpid(pid, &status, 0) < 0 && errno == EINTR)
                ;
        int64_t ended = now();
        if (pid < 0 || job->failed || status) {
            fprintf(stderr, "floor: %s: %s (status %d)\n", job->failed ? job->failed : "clone",
                    strerror(job->failed ? job->error : errno), status);
            exit(1);
        }
        printf(round ? " %lld" : "%lld", (long long)(ended - began));
    }
    putchar('\n');
    fflush(stdout);
}

static void
set_bit(unsigned long *mask, long bit)
{
    mask[(size_t)bit / WORD_BITS] |= 1ul << ((size_t)bit % WORD_BITS);
}

int
main(int argc, char **argv)
{
    if (argc < 5 || argc > 6 || (strcmp(argv[1], "clone") != 0 && strcmp(argv[1], "posix_spawn") != 0)) {
        fprintf(stderr, "usage: floor clone|posix_spawn CPU NODE PROGRAM [ROUNDS]\n");
        return 2;
    }
    starter *start = strcmp(argv[1], "clone") == 0 ? start_clone : start_posix_spawn;
    long cpu = strtol(argv[2], NULL, 10), node = strtol(argv[3], NULL, 10);
    if (cpu < 0 || cpu >= MASK_BITS || node >= MASK_BITS) {
        fprintf(stderr, "floor: no CPU %ld or node %ld\n", cpu, node);
        return 2;
    }
    struct job job = {.argv = {argv[4], NULL}};
    set_bit(job.cpus, cpu);
    job.cpus_size = ((size_t)cpu / WORD_BITS + 1) * sizeof *job.cpus;
    if (node >= 0) {
        set_bit(job.nodes, node);
        job.maxnode = (unsigned long)node + 2; /* the kernel counts one more than the bits it reads */
    }
    if (syscall(SYS_sched_setaffinity, 0, job.cpus_size, job.cpus) < 0) {
        fprintf(stderr, "floor: sched_setaffinity to CPU %ld: %s\n", cpu, strerror(errno));
        return 1;
    }

    if (argc == 6) {
        measure(&job, start, strtol(argv[5], NULL, 10));
        return 0;
    }
    char line[32];
    while (fgets(line, sizeof line, stdin))
        measure(&job, start, strtol(line, NULL, 10));
    return 0;
}
