/* The processes that /proc shows; see processes.h.
 *
 * Fields of /proc/N/stat are counted as proc(5) counts them. Field 2, the name, may hold spaces and parentheses: what
 * follows is counted from the last parenthesis on.
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "processes.h"

#include <errno.h>

enum {
    STAT_STATE = 3,
    STAT_GROUP = 5,
    STAT_SESSION = 6,
    STAT_THREADS = 20,
    STAT_START = 22,
    TICKS_IN_S = 100, /* USER_HZ, on every machine that this is built for */
    MOST_PIDS = 1 << 22,
    PATH_ROOM = 64,
    STAT_ROOM = 1024,
    STATUS_ROOM = 4096,
    FEW_ENTRIES_ROOM = 320, /* takes any name; what is read beyond the first known number is read in vain */
    CLOSE = 16,             /* so many numbers are asked for, rather than read /proc again behind a known one */
    CROWD = 8,              /* so many known numbers are worth it */
    UNKNOWN_OFFSET = -1,
};

static long
read_of(pid_t shown, const char *name, char *text, size_t room)
{
    char path[PATH_ROOM];
    put_text(put_number(put_text(path, "/proc/"), shown), name);
    return read_file(AT_FDCWD, path, text, room);
}

/* A field of /proc/N/stat from the third on, or NULL. */
static const char *
stat_field(const struct process *process, int field, char text[STAT_ROOM])
{
    if (!process->shown || read_of(process->shown, "/stat", text, STAT_ROOM) <= 0) {
        return NULL;
    }
    const char *at = NULL;
    for (const char *each = text; *each; each++) {
        at = *each == ')' ? each : at;
    }
    for (int number = 2; at && number < field; number++) {
        do {
            at++;
        } while (*at && *at != ' ');
        at = *at ? at : NULL;
    }
    return at ? at + 1 : NULL;
}

/* Count the numbers in the line NSpid: one for each PID namespace, from that of the procfs inwards. *number becomes the
 * one at index `wanted`, counted from 1, if there is one. */
static int
numbers_in(const char *status, int wanted, pid_t *number)
{
    const char *at = after_line_start(status, "NSpid:");
    int count = 0;
    while (at && *at == '\t') {
        pid_t one = (pid_t)number_in(at + 1, &at);
        count++;
        if (count == wanted) {
            *number = one;
        }
    }
    return count;
}

static void
add(struct processes *processes, pid_t pid, pid_t shown)
{
    if (make_room((void **)&processes->all, &processes->room, processes->count, sizeof *processes->all)) {
        processes->all[processes->count++] = (struct process){pid, shown};
    } else {
        processes->is_whole = false;
    }
}

struct listing {
    struct processes *processes;
    struct pids known;
    size_t met;     /* how many of the known numbers the list has come to */
    int depth;      /* the index of the own number in the line NSpid */
    int folder;     /* /proc */
    int64_t place;  /* of the next entry in it */
    int64_t offset; /* a number's place is at this distance from the number; UNKNOWN_OFFSET */
};

/* List a process that /proc shows. */
static void
list_shown(struct listing *listing, pid_t shown)
{
    pid_t pid = shown;
    if (listing->depth > 1) {
        char status[STATUS_ROOM];
        pid = 0;
        long got = read_of(shown, "/status", status, sizeof status);
        if (got > 0) {
            numbers_in(status, listing->depth, &pid);
        } else if (got != -ENOENT && got != -ESRCH) {
            listing->processes->is_whole = false; /* it may be one of ours */
        }
    }
    if (pid > 0) {
        add(listing->processes, pid, listing->depth > 1 ? 0 : shown);
    }
}

/* The index after the last of the known numbers, from one index on, that lie close together. */
static size_t
end_of_crowd(struct pids known, size_t from)
{
    size_t end = from + 1;
    while (end < known.count && known.all[end] - known.all[end - 1] <= CLOSE) {
        end++;
    }
    return end;
}

/* /proc has come to a number. If known ones that lie close together begin there, list them and what is among them, and
 * go on in /proc behind them. */
static bool
lists_crowd(struct listing *listing, pid_t shown)
{
    struct pids known = listing->known;
    while (listing->met < known.count && known.all[listing->met] < shown) {
        listing->met++;
    }
    if (listing->met == known.count || listing->offset == UNKNOWN_OFFSET || listing->depth > 1) {
        return false;
    }
    size_t end = end_of_crowd(known, listing->met);
    if (known.all[listing->met] != shown || end - listing->met < CROWD) {
        return false;
    }
    listing->place = seek_to(listing->folder, listing->offset + known.all[end - 1] + 1);
    if (listing->place < 0) {
        listing->offset = UNKNOWN_OFFSET;
        return false;
    }
    pid_t pid = shown;
    for (size_t i = listing->met; i < end; i++) {
        for (; pid < known.all[i]; pid++) {
            if (session_of(pid) != -ESRCH && is_process(pid)) {
                add(listing->processes, pid, pid);
            }
        }
        add(listing->processes, pid, pid);
        pid++;
    }
    listing->met = end;
    return true;
}

/* List what /proc shows. */
static void
list_all(struct listing *listing)
{
    _Alignas(8) char entries[FEW_ENTRIES_ROOM];
    int64_t before = 0; /* the distance that was seen last */
    long bytes;
    while ((bytes = read_entries(listing->folder, entries, sizeof entries)) > 0) {
        bool skips = false;
        for (long at = 0; at < bytes && !skips;) {
            const struct entry *entry = (const struct entry *)(const void *)(entries + at);
            const char *end;
            pid_t shown = (pid_t)number_in(entry->name, &end);
            bool is_process = end != entry->name && !*end;
            if (is_process) {
                /* The same distance twice in a row is the rule by which the kernel counts places. */
                listing->offset = listing->place - shown == before ? before : UNKNOWN_OFFSET;
                before = listing->place - shown;
            }
            listing->place = entry->next;
            at += entry->length;
            skips = is_process && lists_crowd(listing, shown);
            if (is_process && !skips) {
                list_shown(listing, shown);
            }
        }
    }
    listing->processes->is_whole = listing->processes->is_whole && bytes == 0;
}

/* Find out what /proc is. Returns the index, from 1, of a process's own number in the line NSpid. */
static int
recognize(struct processes *processes)
{
    char status[STATUS_ROOM];
    pid_t shown = 0;
    int depth = 0;
    /* If /proc is an outer namespace's, /proc/self has our number there; an unrelated one has no /proc/self. */
    long got = read_file(AT_FDCWD, "/proc/self/status", status, sizeof status);
    if (got == -EMFILE || got == -ENFILE) {
        processes->procfs = PROCFS_SHUT;
        return 0;
    }
    if (got > 0) {
        const char *at = after_line_start(status, "Pid:\t");
        depth = numbers_in(status, 1, &shown);
        shown = at ? (pid_t)number_in(at, &at) : 0; /* also before Linux 4.1 */
    }
    bool is_own = shown == own_pid() && depth <= 1;
    processes->procfs = is_own ? PROCFS_OWN : depth > 1 ? PROCFS_OUTER : PROCFS_NONE;
    return depth;
}

void
processes_begin(struct processes *processes)
{
    recognize(processes);
}

void
processes_list(struct processes *processes, struct pids known)
{
    struct listing listing = {
        .processes = processes, .known = known, .depth = recognize(processes), .offset = UNKNOWN_OFFSET};
    bool is_there = processes->procfs == PROCFS_OWN || processes->procfs == PROCFS_OUTER;
    long folder = is_there ? open_at(AT_FDCWD, "/proc", O_RDONLY | O_DIRECTORY) : -1;
    processes->count = 0;
    processes->is_whole = true;
    if (folder >= 0) {
        listing.folder = (int)folder;
        list_all(&listing);
        close_fd((int)folder);
        return;
    }
    processes->procfs = is_there ? PROCFS_SHUT : processes->procfs;
    if (session_of(own_pid()) < 0) {
        return; /* a seccomp profile refuses getsid(2): nothing says which numbers are processes' */
    }
    for (pid_t pid = 1; pid < MOST_PIDS; pid++) {
        if (session_of(pid) != -ESRCH && is_process(pid)) {
            add(processes, pid, 0);
        }
    }
}

struct process
process_numbered(enum procfs procfs, pid_t pid)
{
    struct process process = {pid, procfs == PROCFS_OWN ? pid : 0};
    long pidfd = procfs == PROCFS_OUTER ? pidfd_of(pid) : -1;
    if (pidfd >= 0) {
        char path[PATH_ROOM], text[STAT_ROOM];
        put_number(put_text(path, "/proc/self/fdinfo/"), pidfd);
        const char *at = read_file(AT_FDCWD, path, text, sizeof text) > 0 ? after_line_start(text, "Pid:\t") : NULL;
        process.shown = at ? (pid_t)number_in(at, &at) : 0;
        close_fd((int)pidfd);
    }
    return process;
}

/* The kernel's answer or, if a security module refused it, the value of the field. */
static long
or_field(long said, const struct process *process, int number)
{
    char text[STAT_ROOM];
    const char *field = said < 0 && said != -ESRCH ? stat_field(process, number, text) : NULL;
    return field ? (long)number_in(field, &field) : said;
}

long
process_session(const struct process *process)
{
    return or_field(session_of(process->pid), process, STAT_SESSION);
}

long
process_group(const struct process *process)
{
    return or_field(group_of(process->pid), process, STAT_GROUP);
}

bool
process_has_ended(const struct process *process)
{
    char text[STAT_ROOM];
    const char *state = stat_field(process, STAT_STATE, text);
    if (!state) {
        return session_of(process->pid) == -ESRCH;
    }
    if (*state != 'Z' && *state != 'X') {
        return false;
    }
    /* If only the first thread has ended, the kernel calls the whole process a zombie. */
    const char *threads = stat_field(process, STAT_THREADS, text);
    return threads && number_in(threads, &threads) <= 1;
}

int64_t
process_start(const struct process *process)
{
    char text[STAT_ROOM];
    const char *start = stat_field(process, STAT_START, text);
    return start ? number_in(start, &start) : -1;
}

int64_t
ticks_of(int64_t nanoseconds)
{
    return nanoseconds / (1000000000 / TICKS_IN_S);
}
