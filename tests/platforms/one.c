/* One process at a time: what it is born with, and how a start fails. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "check.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

enum { MPOL_PREFERRED = 1, MPOL_BIND = 2, MPOL_INTERLEAVE = 3, NOBODY = 65534 };

static void
check_plain(void)
{
    struct start start;
    char *variables[] = {"ENGINE_CHECK=a variable", NULL};
    prepare(&start, "--tell");
    start.request.envp = variables;
    if (born(&start, true)) {
        EXPECT(strcmp(start.born.argument, "an argument") == 0);
        EXPECT(strcmp(start.born.variable, "a variable") == 0);
        EXPECT(start.born.session == getsid(0) && start.born.group == getpgrp());
        EXPECT(memcmp(start.born.cpus, own_cpus, sizeof own_cpus) == 0);
    }
}

static void
check_session(void)
{
    struct start start;
    prepare(&start, "--tell");
    start.request.new_session = true;
    if (born(&start, true)) {
        EXPECT(start.born.session == start.born.pid && start.born.group == start.born.pid);
    }
    prepare(&start, "--tell");
    start.request.process_group = 0;
    if (born(&start, true)) {
        EXPECT(start.born.session == getsid(0) && start.born.group == start.born.pid);
    }
    prepare(&start, "--tell");
    start.request.process_group = getpgrp();
    if (born(&start, false)) {
        EXPECT(start.born.group == getpgrp());
    }
}

static void
check_affinity(void)
{
    for (int cpu = 0; cpu < MASK_BITS; cpu++) {
        struct start start;
        unsigned long mask[MASK_WORDS] = {0};
        if (!has(own_cpus, cpu)) {
            continue;
        }
        prepare(&start, "--tell");
        spawn_mask_set(mask, MASK_BITS, (unsigned int)cpu);
        start.request.cpu_mask = mask;
        start.request.cpu_mask_bytes = sizeof mask;
        if (born(&start, false)) {
            EXPECT(only(start.born.cpus, cpu) && !start.result.affinity_error);
        }
    }
}

static void
check_memory_policy(void)
{
    unsigned long allowed[MASK_WORDS] = {0};
    /* A container's seccomp profile that refuses these calls refuses the engine's, too. MPOL_F_MEMS_ALLOWED is 4. */
    if (syscall(SYS_get_mempolicy, NULL, allowed, (unsigned long)MASK_BITS, NULL, 4UL) < 0 ||
        syscall(SYS_set_mempolicy, 0, NULL, 0UL) < 0) {
        skip(strerror(errno));
        return;
    }
    static const int kinds[] = {MPOL_BIND, MPOL_PREFERRED, MPOL_INTERLEAVE};
    int nodes = 0;
    for (int node = 0; node < MASK_BITS; node++) {
        nodes += has(allowed, node);
        for (size_t i = 0; i < 3 && has(allowed, node); i++) {
            struct start start;
            unsigned long mask[MASK_WORDS] = {0};
            prepare(&start, "--tell");
            spawn_mask_set(mask, MASK_BITS, (unsigned int)node);
            start.request.mem_mode = kinds[i];
            start.request.node_mask = mask;
            start.request.node_mask_bits = MASK_BITS;
            if (born(&start, false)) {
                EXPECT(start.born.memory_mode == kinds[i] && only(start.born.memory_nodes, node));
                EXPECT(start.born.page_node == node);
            }
        }
    }
    if (mode->mechanism == SPAWN_CLONE) {
        printf("%s: memory policies on %d nodes\n", mode->name, nodes);
    }
}

static void
check_binding_granted_in_part(void)
{
    unsigned long mask[MASK_WORDS];
    memcpy(mask, own_cpus, sizeof mask);
    spawn_mask_set(mask, MASK_BITS, MASK_BITS - 1); /* the kernel leaves it out without a word */
    for (int required = 0; required < 2; required++) {
        struct start start;
        prepare(&start, "--tell");
        start.request.cpu_mask = mask;
        start.request.cpu_mask_bytes = sizeof mask;
        start.request.binding_required = required;
        if (required) {
            fails(&start, STEP_AFFINITY, ERANGE);
        } else if (born(&start, false)) {
            EXPECT(start.result.affinity_error == ERANGE);
            EXPECT(memcmp(start.born.cpus, own_cpus, sizeof own_cpus) == 0);
        }
    }
}

static void
check_refused_binding(void)
{
    struct start start;
    unsigned long mask[MASK_WORDS] = {0};
    spawn_mask_set(mask, MASK_BITS, MASK_BITS - 1); /* no machine here has it, as a CPU or as a node */
    for (int required = 0; required < 2; required++) {
        prepare(&start, "--tell");
        start.request.cpu_mask = mask;
        start.request.cpu_mask_bytes = sizeof mask;
        start.request.binding_required = required;
        if (required) {
            fails(&start, STEP_AFFINITY, EINVAL);
        } else if (born(&start, false)) {
            EXPECT(start.result.affinity_error == EINVAL);
            EXPECT(memcmp(start.born.cpus, own_cpus, sizeof own_cpus) == 0);
        }
        prepare(&start, "--tell");
        start.request.mem_mode = MPOL_BIND;
        start.request.node_mask = mask;
        start.request.node_mask_bits = MASK_BITS;
        start.request.binding_required = required;
        int refusal = syscall(SYS_set_mempolicy, MPOL_BIND, mask, (unsigned long)MASK_BITS + 1) < 0 ? errno : 0;
        if (required) {
            fails(&start, STEP_MEMPOLICY, refusal);
        } else if (born(&start, false)) {
            EXPECT(start.result.mempolicy_error == refusal && start.born.memory_mode <= 0);
        }
    }
}

static void
check_streams(void)
{
    struct start start;
    char path[PATH_MAX];
    struct file null = file_at(open("/dev/null", O_RDONLY | O_CLOEXEC));
    int ends[2];
    snprintf(path, sizeof path, "%s/stdout", folder);
    prepare(&start, "--tell");
    start.request.streams[0] = (struct spawn_stream){.path = "/dev/null", .open_flags = O_RDWR};
    start.request.streams[1] = (struct spawn_stream){.path = path, .open_flags = O_WRONLY | O_CREAT | O_TRUNC};
    start.request.streams[2].fd = STREAM_SAME_AS_STDOUT;
    if (born(&start, false)) {
        struct file opened = file_at(open(path, O_RDONLY | O_CLOEXEC));
        EXPECT(same_file(start.born.fds[0], null) && (start.born.fds[0].flags & O_ACCMODE) == O_RDWR);
        EXPECT(same_file(start.born.fds[1], opened) && (start.born.fds[1].flags & O_ACCMODE) == O_WRONLY);
        EXPECT(same_file(start.born.fds[2], opened));
        unlink(path);
    }
    if (!EXPECT(pipe2(ends, O_CLOEXEC) == 0)) {
        return;
    }
    prepare(&start, "--tell");
    start.request.streams[0].fd = ends[0];
    start.request.streams[1].fd = ends[1];
    if (born(&start, true)) {
        EXPECT(same_file(start.born.fds[0], file_at(ends[0])) && same_file(start.born.fds[1], file_at(ends[1])));
        EXPECT(same_file(start.born.fds[2], file_at(2)));
        EXPECT(!start.born.fds[ends[0]].open && !start.born.fds[ends[1]].open);
    }
    prepare(&start, "--tell"); /* two streams that change places */
    start.request.streams[1].fd = 2;
    start.request.streams[2].fd = 1;
    if (born(&start, false)) {
        EXPECT(same_file(start.born.fds[1], file_at(2)) && same_file(start.born.fds[2], file_at(1)));
    }
    for (int fd = 3; fd < MOST_FDS; fd++) {
        close(fd);
    }
}

static void
check_descriptors(void)
{
#ifdef __GLIBC__
    const bool portable = true; /* posix_spawn_file_actions_addclosefrom_np */
#else
    const bool portable = false;
#endif
    static const int numbers[] = {20, 21, 40, 200}, passed[] = {20, 40};
    struct start start;
    for (size_t i = 0; i < 4; i++) {
        EXPECT(dup2(0, numbers[i]) == numbers[i]); /* without O_CLOEXEC */
    }
    EXPECT(fcntl(40, F_SETFD, FD_CLOEXEC) == 0);
    prepare(&start, "--tell");
    if (born(&start, true)) {
        EXPECT(start.born.fds[20].open && start.born.fds[21].open && !start.born.fds[40].open);
        EXPECT(start.born.fds_above == 1);
    }
    for (int passes = 0; passes < 2; passes++) {
        prepare(&start, "--tell");
        start.request.close_fds = true;
        start.request.pass_fds = passed;
        start.request.pass_fds_count = passes ? 2 : 0;
        if (born(&start, portable && !passes)) {
            EXPECT(start.born.fds_above == 0);
            for (int fd = 3; fd < MOST_FDS; fd++) {
                EXPECT(start.born.fds[fd].open == (passes && (fd == 20 || fd == 40)));
            }
        }
    }
    for (size_t i = 0; i < 4; i++) {
        close(numbers[i]);
    }
}

static void
check_folder_and_umask(void)
{
    struct start start;
    prepare(&start, "--tell");
    start.request.cwd = "/";
    start.request.umask = 0137;
    if (born(&start, false)) {
        EXPECT(strcmp(start.born.cwd, "/") == 0 && start.born.umask == 0137);
    }
}

static void
check_ids(void)
{
    struct start start;
    const gid_t groups[] = {12, 34, 56};
    prepare(&start, "--tell");
    start.request.set_uid = start.request.set_gid = true;
    start.request.uid = start.request.gid = NOBODY;
    start.request.groups = groups;
    start.request.groups_count = 3;
    if (geteuid() != 0) {
        fails(&start, STEP_SETGROUPS, EPERM);
    } else if (born(&start, false)) {
        for (int i = 0; i < 3; i++) {
            EXPECT(start.born.uids[i] == NOBODY && start.born.gids[i] == NOBODY && start.born.groups[i] == groups[i]);
        }
        EXPECT(start.born.groups_count == 3 && geteuid() == 0);
    }
}

static uint64_t
bit_of(int sig)
{
    return (uint64_t)1 << (sig - 1);
}

static void
do_nothing(int sig)
{
    (void)sig;
}

static void
check_signals(void)
{
    sigset_t blocked, before;
    uint64_t kept = bit_of(SIGUSR2) | bit_of(SIGRTMIN + 5), pipes = bit_of(SIGPIPE) | bit_of(SIGXFSZ);
    /* glibc's posix_spawn, and make by it, has its children ignore the two signals that glibc keeps for itself. */
    const uint64_t libcs = bit_of(32) | bit_of(33);
    signal(SIGUSR1, do_nothing);
    signal(SIGRTMIN, do_nothing);
    signal(SIGUSR2, SIG_IGN);
    signal(SIGRTMIN + 5, SIG_IGN);
    signal(SIGPIPE, SIG_IGN);
    signal(SIGXFSZ, SIG_IGN);
    sigemptyset(&blocked);
    sigaddset(&blocked, SIGTERM);
    sigaddset(&blocked, SIGRTMIN);
    pthread_sigmask(SIG_SETMASK, &blocked, &before);
    for (int restored = 0; restored < 2; restored++) {
        struct start start;
        prepare(&start, "--tell");
        start.request.restore_signals = restored;
        if (born(&start, true)) {
            EXPECT((start.born.ignored & ~libcs) == (restored ? kept : kept | pipes));
            EXPECT(start.born.blocked == (bit_of(SIGTERM) | bit_of(SIGRTMIN)));
        }
    }
    /* A rank: nothing is blocked, and nothing is ignored but by nohup. */
    for (int nohup = 0; nohup < 2; nohup++) {
        struct start start;
        prepare(&start, "--tell");
        signal(SIGHUP, nohup ? SIG_IGN : do_nothing);
        start.request.restore_signals = start.request.fresh_signals = true;
        start.request.ignored_signals = spawn_ignored_signals();
        EXPECT((start.request.ignored_signals & ~libcs) == (kept | pipes));
        if (born(&start, true)) {
            EXPECT((start.born.ignored & ~libcs) == (nohup ? bit_of(SIGHUP) : 0));
            EXPECT(start.born.blocked == 0);
        }
    }
    pthread_sigmask(SIG_SETMASK, &before, &blocked);
    EXPECT(sigismember(&blocked, SIGTERM) == 1 && sigismember(&blocked, SIGUSR1) == 0);
    for (int sig = 1; sig < SIGRTMAX; sig++) {
        signal(sig, SIG_DFL);
    }
}

static pid_t launcher;
static atomic_int handled, misplaced;

static void
note_where(int sig)
{
    (void)sig;
    atomic_fetch_add(syscall(SYS_getpid) == launcher ? &handled : &misplaced, 1);
}

/* A process sends SIGURG to its whole group again and again, and so to children in the middle of their start. A program
 * that does not catch the signal ignores it. */
static void
check_signal_storm(void)
{
    struct sigaction action = {.sa_handler = note_where, .sa_flags = SA_RESTART};
    launcher = getpid();
    handled = misplaced = 0;
    sigaction(SIGURG, &action, NULL);
    pid_t group = getpgrp(), storm = fork();
    if (storm == 0) {
        signal(SIGURG, SIG_DFL);
        for (;;) {
            kill(-group, SIGURG);
            usleep(500);
        }
    }
    for (int i = 0; i < 20; i++) {
        struct start start;
        prepare(&start, "--tell");
        born(&start, true);
    }
    kill(storm, SIGKILL);
    EXPECT(waitpid(storm, NULL, 0) == storm);
    signal(SIGURG, SIG_DFL);
    EXPECT(handled > 0 && misplaced == 0);
}

static void
check_failures(void)
{
    struct start start;
    const char *nowhere[] = {"/no/such/program", NULL},
               *refused[] = {"/no/such/program", "/dev", "/no/such/program", 0};
    const int closed[] = {63}, cgroup = open(folder, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    prepare(&start, "--tell");
    start.request.executables = nowhere;
    fails(&start, STEP_EXEC, ENOENT);
    prepare(&start, "--tell");
    start.request.executables = refused;
    fails(&start, STEP_EXEC, EACCES);
    prepare(&start, "--tell");
    start.request.streams[1].fd = 63;
    fails(&start, STEP_STDOUT, EBADF);
    prepare(&start, "--tell");
    start.request.streams[0] = (struct spawn_stream){.path = "/no/such/file", .open_flags = O_RDONLY};
    fails(&start, STEP_STDIN, ENOENT);
    prepare(&start, "--tell");
    start.request.cwd = "/no/such/folder";
    fails(&start, STEP_CHDIR, ENOENT);
    prepare(&start, "--tell");
    start.request.process_group = 1 << 30; /* above any pid */
    fails(&start, STEP_SETPGID, EPERM);
    prepare(&start, "--tell");
    start.request.pass_fds = closed;
    start.request.pass_fds_count = 1;
    fails(&start, STEP_PASS_FDS, EBADF);
    prepare(&start, "--tell");
    start.request.groups_count = 1 << 20; /* more than there may be */
    fails(&start, STEP_SETGROUPS, geteuid() == 0 ? EINVAL : EPERM);
    prepare(&start, "--tell");
    start.request.death_signal = 100;
    fails(&start, STEP_DEATHSIG, EINVAL);
    prepare(&start, "--tell");
    start.request.guard_fd = 63;
    fails(&start, STEP_GUARD, EBADF);
    prepare(&start, "--tell");
    start.request.cgroup_fd = cgroup; /* no cgroup's folder */
    fails(&start, STEP_CGROUP, ENOENT);
    close(cgroup);
}

const struct check checks_of_one[] = {
    {"plain", check_plain},
    {"session and group", check_session},
    {"affinity", check_affinity},
    {"memory policy", check_memory_policy},
    {"refused binding", check_refused_binding},
    {"a binding granted in part", check_binding_granted_in_part},
    {"streams", check_streams},
    {"descriptors", check_descriptors},
    {"folder and umask", check_folder_and_umask},
    {"ids", check_ids},
    {"signals", check_signals},
    {"signal storm", check_signal_storm},
    {"failures", check_failures},
    {NULL, NULL},
};
