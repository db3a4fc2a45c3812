/* rankspawn-guard: a program that outlives a launcher, to end what the launcher could not. src/rankspawn/_end/guard.py
 * starts it, and says why it is sound.
 *
 *     rankspawn-guard LAUNCHER PIPE PIDFD PATIENCE FOLDERFD FOLDER CGROUP NOTE
 *
 * LAUNCHER  its pid             PIPE      where the ranks register: as csrc/spawn.h says
 * PIDFD     of the launcher, or "-"       PATIENCE  in milliseconds
 * FOLDERFD  the open temporary folder, or "-", and FOLDER its path
 * CGROUP    the path of the group's cgroup, which may be there or not, or ""
 * NOTE      the path of the launcher's note for `rankspawn ps`, which may be there or not, or ""
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "folders.h"
#include "sessions.h"
#include "spawn.h"

#include <errno.h>
#include <time.h>

enum {
    /* Ranks start and end by dozens: after an event the guard sleeps this long, and then handles all that has come at
     * once. */
    REST_MS = 10,
    BLIND_MS = 100, /* between two looks if the kernel has no pidfds to wait for */
    ROUND_MS = 1000,
    EVENTS_AT_ONCE = 64,
    RANKS_AT_ONCE = 256,
};

/* The data of events that do not come from a witness. */
enum { FROM_PIPE = 0, FROM_LAUNCHER = 1 };

struct guard {
    pid_t launcher;
    bool is_told_to_end; /* by the launcher, whose job has ended */
    int pipe;            /* -1: at its end, all ranks have registered */
    int launcher_pidfd;  /* -1: none */
    int64_t patience;
    int folder; /* -1: none */
    const char *folder_path;
    const char *cgroup_path;
    const char *note_path;
    struct sessions sessions;
};

/* Read the new registrations. */
static void
take_registrations(struct guard *guard)
{
    struct spawn_registration told[RANKS_AT_ONCE];
    while (guard->pipe >= 0) {
        long bytes = read_from(guard->pipe, told, sizeof told);
        if (bytes == -EAGAIN || bytes == -EINTR) {
            return;
        }
        if (bytes <= 0) {
            close_fd(guard->pipe);
            guard->pipe = -1;
        }
        for (long i = 0; i < bytes / (long)sizeof *told; i++) {
            if (told[i].pid == 0) {
                guard->is_told_to_end = true;
            } else {
                sessions_add(&guard->sessions, told[i].pid, ticks_of(told[i].written_ns));
            }
        }
    }
}

/* Wait at most so many milliseconds for the launcher's death. Returns whether it has died. */
static bool
launcher_has_died(const struct guard *guard, int milliseconds)
{
    bool died = wait_for(guard->launcher_pidfd, POLLIN, (int64_t)milliseconds * NANOSECONDS_IN_MS);
    if (guard->launcher_pidfd >= 0) {
        return died;
    }
    /* 0: the launcher is in an outer PID namespace, and getppid cannot show its death. */
    pid_t parent = parent_pid();
    return parent != guard->launcher && parent != 0;
}

static void
take_events(struct guard *guard)
{
    struct epoll_event events[EVENTS_AT_ONCE];
    long count;
    take_registrations(guard);
    do {
        count = epoll_next(guard->sessions.epoll, events, EVENTS_AT_ONCE, 0);
        for (long i = 0; i < count; i++) {
            if (events[i].data.u64 > FROM_LAUNCHER) {
                sessions_lose_witness(&guard->sessions, (pid_t)events[i].data.u64);
            }
        }
    } while (count == EVENTS_AT_ONCE);
}

static void
until_launcher_dies_or_tells(struct guard *guard)
{
    bool sees_all = guard->launcher_pidfd >= 0;
    for (;;) {
        struct epoll_event event;
        epoll_next(guard->sessions.epoll, &event, 1, sees_all ? -1 : BLIND_MS);
        if (launcher_has_died(guard, REST_MS)) {
            return;
        }
        take_events(guard);
        if (guard->is_told_to_end) {
            /* All ranks have registered before, and a forked copy of the launcher may hold the pipe for ever. */
            if (guard->pipe >= 0) {
                close_fd(guard->pipe);
                guard->pipe = -1;
            }
            return;
        }
        sees_all = sessions_renew(&guard->sessions) && guard->launcher_pidfd >= 0;
    }
}

/* Kill all members, until none is left and no rank can register, or the guard's patience is over. */
static void
end_all(struct guard *guard)
{
    int64_t until = now(CLOCK_MONOTONIC) + guard->patience, left;
    int cgroup = *guard->cgroup_path ? (int)open_at(AT_FDCWD, guard->cgroup_path, O_RDONLY | O_DIRECTORY) : -1;
    bool nobody, kills_cgroup = cgroup >= 0;
    if (*guard->note_path && !guard->is_told_to_end) { /* a living launcher removes its note itself */
        unlink_at(AT_FDCWD, guard->note_path, 0);
    }
    take_events(guard);
    do {
        take_registrations(guard);
        /* It may refuse, on a mount that is read-only now for example: the sessions are left then. */
        kills_cgroup = kills_cgroup && cgroup_kill(cgroup);
        left = until - now(CLOCK_MONOTONIC);
        int64_t most = (int64_t)ROUND_MS * NANOSECONDS_IN_MS;
        nobody = sessions_end(&guard->sessions, now(CLOCK_MONOTONIC) + (left < most ? left : most));
        if (nobody && guard->pipe >= 0) {
            wait_for(guard->pipe, POLLIN, left);
        }
    } while (left > 0 && (!nobody || guard->pipe >= 0));
    if (kills_cgroup && cgroup_wait_empty(cgroup, until)) {
        folder_remove(cgroup, guard->cgroup_path);
    }
    if (guard->folder >= 0 && nobody && launcher_has_died(guard, 0)) {
        folder_remove(guard->folder, guard->folder_path);
    }
}

static int
descriptor_in(const char *text)
{
    const char *end;
    int number = (int)number_in(text, &end);
    return end == text ? -1 : number;
}

#ifndef RANKSPAWN_FREESTANDING
int
main(int argc, char **argv)
{
    return guard_main(argc, argv);
}
#endif

int
guard_main(int argc, char *const *argv)
{
    static struct guard guard;
    const char *end;
    if (argc != 9) {
        static const char by_hand[] = "rankspawn-guard: rankspawn starts this program, not a person\n";
        write_to(2, by_hand, sizeof by_hand - 1);
        return 2;
    }
    /* Slurm sends a job's signals to all its processes, also the notice before the time limit. */
    static const int for_others[] = {SIGINT, SIGTERM, SIGHUP, SIGQUIT, SIGUSR1, SIGUSR2, SIGALRM, SIGXCPU};
    for (unsigned i = 0; i < sizeof for_others / sizeof *for_others; ++i) {
        ignore_signal(for_others[i]);
    }
    raise_descriptor_limit(); /* a witness for each rank */
    guard.launcher = (pid_t)number_in(argv[1], &end);
    guard.pipe = descriptor_in(argv[2]);
    guard.launcher_pidfd = descriptor_in(argv[3]);
    guard.patience = number_in(argv[4], &end) * NANOSECONDS_IN_MS;
    guard.folder = descriptor_in(argv[5]);
    guard.folder_path = argv[6];
    guard.cgroup_path = argv[7];
    guard.note_path = argv[8];
    guard.sessions.epoll = (int)make_epoll();
    processes_begin(&guard.sessions.search.processes);
    set_nonblocking(guard.pipe);
    epoll_watch(guard.sessions.epoll, guard.pipe, FROM_PIPE);
    if (guard.launcher_pidfd >= 0) {
        epoll_watch(guard.sessions.epoll, guard.launcher_pidfd, FROM_LAUNCHER);
    }
    until_launcher_dies_or_tells(&guard);
    end_all(&guard);
    return 0;
}
