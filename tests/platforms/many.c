/* Many at once, from many threads, and what outlives the start: descriptors of processes, guards, cgroups, deaths. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "check.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { RANKS = 16, WORKERS = 4, THREADS = 4, STARTS_OF_THREAD = 6, PATIENCE_MS = 60000, SMALL_STACK = 64 * 1024 };

static bool
readable(int fd, int milliseconds)
{
    struct pollfd waited = {.fd = fd, .events = POLLIN};
    int ready;
    while ((ready = poll(&waited, 1, milliseconds)) < 0 && errno == EINTR) {
    }
    return ready == 1;
}

/* Reap a child of --wait, which SIGKILL must have ended. */
static void
killed(struct start *start)
{
    int status = 0;
    EXPECT(waitpid(start->result.pid, &status, 0) == start->result.pid);
    EXPECT(WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL);
    unlink(start->path);
    if (start->result.pidfd >= 0) {
        close(start->result.pidfd);
    }
}

static void
check_pidfd(void)
{
    /* Where clone does not share memory a start returns before the child has made its group. */
    for (int group = 0; group < (honoured ? 2 : 1); group++) {
        struct start start;
        prepare(&start, "--wait");
        start.request.new_session = true;
        if (!started(&start, true)) {
            return;
        }
        if (start.result.pidfd < 0) {
            skip(strerror(start.result.pidfd_error));
            kill(start.result.pid, SIGKILL);
            killed(&start);
            return;
        }
        EXPECT(!readable(start.result.pidfd, 0));
        int error = spawn_pidfd_signal(start.result.pidfd, SIGKILL, group);
        if (error) {
            EXPECT(error == ENOSYS || (group && error == EINVAL)); /* as spawn.h says */
            kill(start.result.pid, SIGKILL);
        }
        EXPECT(readable(start.result.pidfd, PATIENCE_MS));
        killed(&start);
    }
}

static void
check_guard(void)
{
    struct start start;
    struct spawn_registration said = {.pid = 0};
    struct timespec now;
    int ends[2];
    if (!EXPECT(pipe2(ends, O_CLOEXEC) == 0)) {
        return;
    }
    prepare(&start, "--tell");
    start.request.guard_fd = ends[1];
    if (born(&start, false)) {
        EXPECT(read(ends[0], &said, sizeof said) == sizeof said && said.pid == start.born.pid);
        EXPECT(clock_gettime(CLOCK_BOOTTIME, &now) == 0 && said.written_ns > 0);
        EXPECT(said.written_ns <= (int64_t)now.tv_sec * 1000000000 + now.tv_nsec);
    }
    close(ends[0]);
    close(ends[1]);
}

static void
check_cgroup(void)
{
    struct start start;
    char made[64], path[64], line[512] = "";
    snprintf(made, sizeof made, "/sys/fs/cgroup/engine_check-%d", (int)getpid());
    if (access("/sys/fs/cgroup/cgroup.controllers", R_OK) < 0 || mkdir(made, 0755) < 0) {
        skip("no cgroup v2 at /sys/fs/cgroup, or it may not be written to");
        return;
    }
    prepare(&start, "--wait");
    start.request.cgroup_fd = open(made, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (started(&start, false)) {
        snprintf(path, sizeof path, "/proc/%d/cgroup", (int)start.result.pid);
        FILE *listed = fopen(path, "re");
        while (listed && fgets(line, sizeof line, listed) && strncmp(line, "0::", 3) != 0) {
        }
        EXPECT(listed && strstr(line, strrchr(made, '/')));
        if (listed) {
            fclose(listed);
        }
        kill(start.result.pid, SIGKILL);
        killed(&start);
    }
    close(start.request.cgroup_fd);
    EXPECT(rmdir(made) == 0);
}

static void *
start_dying(void *start)
{
    ((struct start *)start)->request.death_signal = SIGKILL;
    started(start, false);
    return NULL;
}

/* A rank with a death signal ends with its launcher, and does not end with the thread that asked for it. The rank holds
 * the writing end of a pipe. */
static void
check_launchers_death(void)
{
    for (int from_thread = 0; from_thread < 2; from_thread++) {
        int ends[2];
        if (!EXPECT(pipe(ends) == 0)) {
            return;
        }
        fcntl(ends[0], F_SETFD, FD_CLOEXEC);
        pid_t pid = fork();
        if (pid == 0) {
            struct start start;
            pthread_t thread;
            prepare(&start, "--wait");
            if (!from_thread) {
                start_dying(&start);
            } else if (EXPECT(pthread_create(&thread, NULL, start_dying, &start) == 0)) {
                pthread_join(thread, NULL);
            }
            if (start.result.pid > 0) {
                usleep(100000);
                EXPECT(waitpid(start.result.pid, NULL, WNOHANG) == 0);
            }
            unlink(start.path);
            _exit(start.result.pid > 0 ? 0 : 1);
        }
        int status = -1;
        close(ends[1]);
        EXPECT(waitpid(pid, &status, 0) == pid);
        EXPECT(status == (mode->mechanism == SPAWN_POSIX ? 1 << 8 : 0));
        char nothing;
        EXPECT(readable(ends[0], PATIENCE_MS) && read(ends[0], &nothing, 1) == 0);
        close(ends[0]);
    }
}

static void *
start_some(void *unused)
{
    struct start *start = malloc(sizeof *start);
    for (int i = 0; EXPECT(start) && i < STARTS_OF_THREAD; i++) {
        prepare(start, "--tell");
        start->request.new_session = true;
        start->request.death_signal = mode->mechanism == SPAWN_CLONE && i % 3 == 0 ? SIGTERM : 0;
        if (EXPECT(spawn(&start->request, &start->result, mode->mechanism) == SPAWN_STARTED) && told(start)) {
            EXPECT(start->born.session == start->born.pid);
            EXPECT(start->born.death_signal == start->request.death_signal);
        }
    }
    free(start);
    return unused;
}

/* Start from threads whose stacks are small, as those of musl's threads are by default. */
static void
check_threads(void)
{
    pthread_t threads[THREADS];
    pthread_attr_t attributes;
    long before = by_clone3, least = sysconf(_SC_THREAD_STACK_MIN);
    int made = 0;
    pthread_attr_init(&attributes);
    EXPECT(pthread_attr_setstacksize(&attributes, least > SMALL_STACK ? (size_t)least : SMALL_STACK) == 0);
    while (made < THREADS && EXPECT(pthread_create(&threads[made], &attributes, start_some, NULL) == 0)) {
        made++;
    }
    for (int i = 0; i < made; i++) {
        pthread_join(threads[i], NULL);
    }
    pthread_attr_destroy(&attributes);
    EXPECT(by_clone3 - before == (uses_clone3() ? made * STARTS_OF_THREAD : 0));
}

enum kind { PLAIN, BOUND, BOUND_AND_DYING, ONE_FAILS };

/* Start a crew. Returns how many ranks were started. */
static size_t
start_crew(enum kind kind)
{
    static struct start ranks[RANKS];
    static struct spawn_request requests[RANKS];
    static struct spawn_result results[RANKS];
    static atomic_int outcomes[RANKS];
    unsigned long masks[2][MASK_WORDS] = {{0}};
    const char *nowhere[] = {"/no/such/program", NULL};
    size_t count[5] = {0};
    long before = by_clone3;
    for (int i = 0; i < 2; i++) {
        spawn_mask_set(masks[i], MASK_BITS, (unsigned int)nth_cpu(i));
    }
    for (size_t i = 0; i < RANKS; i++) {
        prepare(&ranks[i], "--tell");
        requests[i] = ranks[i].request;
        requests[i].new_session = true;
        requests[i].death_signal = kind == BOUND_AND_DYING ? SIGKILL : 0;
        if (kind != PLAIN) {
            requests[i].cpu_mask = masks[i % 2];
            requests[i].cpu_mask_bytes = sizeof masks[0];
        }
        if (kind == ONE_FAILS && i == RANKS / 2) {
            requests[i].executables = nowhere;
        }
        outcomes[i] = SPAWN_NOT_TRIED;
    }
    struct spawn_crew crew = {requests, results, outcomes, RANKS, WORKERS, mode->mechanism, 0};
    spawn_many(&crew);
    for (size_t i = 0; i < RANKS; i++) {
        count[outcomes[i]]++;
        ranks[i].result = results[i];
        if (outcomes[i] == SPAWN_STARTED && told(&ranks[i])) {
            EXPECT(kind == PLAIN || only(ranks[i].born.cpus, nth_cpu((int)i % 2)));
            EXPECT(kind != PLAIN || memcmp(ranks[i].born.cpus, own_cpus, sizeof own_cpus) == 0);
            EXPECT(ranks[i].born.death_signal == requests[i].death_signal);
        }
        unlink(ranks[i].path);
    }
    EXPECT(count[SPAWN_UNDER_WAY] == 0 && spawn_many_started(&crew) == count[SPAWN_STARTED]);
    EXPECT(count[SPAWN_FAILED] == (kind == ONE_FAILS && mode->mechanism == SPAWN_CLONE));
    EXPECT((size_t)(by_clone3 - before) == (uses_clone3() ? count[SPAWN_STARTED] + count[SPAWN_FAILED] : 0));
    return count[SPAWN_STARTED];
}

static void
check_crews(void)
{
    bool portable = mode->mechanism == SPAWN_POSIX;
    EXPECT(start_crew(PLAIN) == RANKS);
    EXPECT(start_crew(BOUND) == (portable ? 0 : RANKS));
    EXPECT(start_crew(BOUND_AND_DYING) == (portable ? 0 : RANKS));
    EXPECT(start_crew(ONE_FAILS) < RANKS);
}

const struct check checks_of_many[] = {
    {"pidfd", check_pidfd},
    {"guard", check_guard},
    {"cgroup", check_cgroup},
    {"launcher's death", check_launchers_death},
    {"threads", check_threads},
    {"crews", check_crews},
    {NULL, NULL},
};
