/* The group's cgroup, and the launcher's temporary folder; see folders.h.
 *
 * A process that can write to the temporary folder could replace one of its names by a symbolic link or another folder
 * at any moment. So each folder is opened by its name in the one above it, no link is followed and no mount entered
 * (open_inside), and what is removed is named by that descriptor. The cgroup's own files cannot be removed one by one:
 * rmdir of the folder removes them.
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "folders.h"

#include <errno.h>
#include <time.h>

enum {
    DEEPEST = 64,
    MOST_ROUNDS = 100, /* a process that has left its session may still make files */
    EVENTS_ROOM = 256,
    PIDS_ROOM = 4096,
    FREEZE_MS = 1000,
    KILL_PAUSE_MS = 100,
};

struct removal {
    int folder;
    int depth;
    bool removed_one;
};

static bool empty(int folder, int depth);

static bool
remove_one(void *context, const char *name)
{
    struct removal *removal = context;
    long done = unlink_at(removal->folder, name, 0);
    if (done == -EISDIR && removal->depth < DEEPEST) {
        long inner = open_inside(removal->folder, name);
        if (inner >= 0) {
            empty((int)inner, removal->depth + 1);
            close_fd((int)inner);
        }
        done = unlink_at(removal->folder, name, AT_REMOVEDIR);
    }
    removal->removed_one = removal->removed_one || done == 0;
    return true;
}

/* Remove what is in a folder. Some file systems skip names while others are removed, so this reads it again until it
 * has nothing left to remove. */
static bool
empty(int folder, int depth)
{
    struct removal removal = {folder, depth, true};
    for (int i = 0; i < MOST_ROUNDS && removal.removed_one; i++) {
        removal.removed_one = false;
        seek_to(folder, 0);
        while (next_names(folder, remove_one, &removal) > 0) {
        }
    }
    return !removal.removed_one;
}

void
folder_remove(int folder, const char *path)
{
    struct identity is, was;
    empty(folder, 0);
    if (identify(folder, "", &was) && identify(AT_FDCWD, path, &is) && is.inode == was.inode &&
        is.device_major == was.device_major && is.device_minor == was.device_minor) {
        unlink_at(AT_FDCWD, path, AT_REMOVEDIR);
    }
}

/* ---- the cgroup: admin-guide/cgroup-v2.rst of the kernel's documentation -----------------------------------------*/

static long
write_file(int folder, const char *name, const char *text)
{
    long fd = open_at(folder, name, O_WRONLY);
    if (fd < 0) {
        return fd;
    }
    long written = write_to((int)fd, text, 1);
    close_fd((int)fd);
    return written;
}

/* Wait until cgroup.events has the line `name` with 0 or 1. */
static bool
wait_for_event(int cgroup, const char *name, char value, int64_t until)
{
    char text[EVENTS_ROOM];
    long fd = open_at(cgroup, "cgroup.events", O_RDONLY);
    if (fd < 0) {
        return true; /* it was removed */
    }
    for (;;) {
        seek_to((int)fd, 0);
        long length = read_from((int)fd, text, sizeof text - 1);
        text[length > 0 ? length : 0] = 0;
        const char *told = after_line_start(text, name);
        int64_t left = until - now(CLOCK_MONOTONIC);
        if (length <= 0 || (told && *told == value) || left <= 0) {
            close_fd((int)fd);
            return length <= 0 || (told && *told == value);
        }
        wait_for((int)fd, POLLPRI, left);
    }
}

static bool
kill_below(void *context, const char *name)
{
    int cgroup = *(const int *)context;
    char text[PIDS_ROOM];
    long inner = *name ? open_inside(cgroup, name) : cgroup;
    if (inner < 0) {
        return true; /* a file, or removed since */
    }
    int below = (int)inner;
    if (read_file(below, "cgroup.procs", text, sizeof text) > 0) {
        const char *at = text;
        while (*at >= '0' && *at <= '9') {
            pid_t pid = (pid_t)number_in(at, &at);
            if (pid > 0 &&
                *at == '\n') { /* 0: a process of an outer PID namespace. A number that was cut off has none */
                signal_to(pid, SIGKILL);
            }
            at += *at == '\n';
        }
    }
    seek_to(below, 0);
    while (*name && next_names(below, kill_below, &below) > 0) {
    }
    if (*name) {
        close_fd(below);
    }
    return true;
}

/* Without cgroup.kill (Linux 5.14): freeze it first, so that no process forks and no pid is reused. */
static void
kill_each(int cgroup)
{
    if (write_file(cgroup, "cgroup.freeze", "1") == 1) {
        wait_for_event(cgroup, "frozen ", '1', now(CLOCK_MONOTONIC) + (int64_t)FREEZE_MS * NANOSECONDS_IN_MS);
    }
    for (int i = 0; i < MOST_ROUNDS; i++) {
        kill_below(&cgroup, "");
        seek_to(cgroup, 0);
        while (next_names(cgroup, kill_below, &cgroup) > 0) {
        }
        if (wait_for_event(cgroup, "populated ", '0',
                           now(CLOCK_MONOTONIC) + (int64_t)KILL_PAUSE_MS * NANOSECONDS_IN_MS)) {
            break;
        }
    }
}

bool
cgroup_kill(int cgroup)
{
    long written = write_file(cgroup, "cgroup.kill", "1");
    if (written == -ENOENT) {
        kill_each(cgroup);
        return true;
    }
    return written == 1;
}

bool
cgroup_wait_empty(int cgroup, int64_t until)
{
    return wait_for_event(cgroup, "populated ", '0', until);
}
