/* What ps(1), py-spy and /proc/PID/cmdline and environ show of a forked rank: its own command, not its template's.
 *
 * The kernel shows what lies between four addresses of the process, which prctl(PR_SET_MM, PR_SET_MM_MAP) sets: with
 * the other boundaries of its memory, which stay as they are, and without a capability (prctl(2), Linux 3.18).
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "spawn.h"

#include <errno.h>

#ifdef __linux__

#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { STAT_BYTES = 2048, FIELDS = 64 };

/* Read the fields of /proc/self/stat, by their numbers in proc_pid_stat(5). Returns false if they cannot be read. */
static bool
read_stat(unsigned long long fields[FIELDS])
{
    char text[STAT_BYTES];
    int fd = open("/proc/self/stat", O_RDONLY | O_CLOEXEC);
    ssize_t length = fd < 0 ? -1 : read(fd, text, sizeof text - 1);
    if (fd >= 0) {
        close(fd);
    }
    text[length > 0 ? length : 0] = 0;
    char *at = strrchr(text, ')'); /* the end of field 2, the name, which may hold anything */
    int field = 3;
    for (at = at ? strchr(at, ' ') : NULL; at && field < FIELDS; at = strchr(at + 1, ' ')) {
        fields[field++] = strtoull(at + 1, NULL, 10);
    }
    return field > 51;
}

static size_t
length_of(char *const *texts)
{
    size_t length = 0;
    for (; *texts; texts++) {
        length += strlen(*texts) + 1;
    }
    return length;
}

static char *
copy_all(char *to, char *const *texts)
{
    for (; *texts; texts++) {
        to = stpcpy(to, *texts) + 1;
    }
    return to;
}

int
spawn_show_command(char *const *argv, char *const *envp)
{
    unsigned long long stat[FIELDS] = {0};
    size_t bytes = length_of(argv) + length_of(envp) + 1;
    if (!read_stat(stat)) {
        return EIO;
    }
    char *text = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (text == MAP_FAILED) {
        return errno;
    }
    char *end_of_arguments = copy_all(text, argv);
    struct prctl_mm_map map = {
        .start_code = stat[26],
        .end_code = stat[27],
        .start_stack = stat[28],
        .start_data = stat[45],
        .end_data = stat[46],
        .start_brk = stat[47],
        .brk = (unsigned long)syscall(SYS_brk, NULL),
        .arg_start = (uintptr_t)text,
        .arg_end = (uintptr_t)end_of_arguments,
        .env_start = (uintptr_t)end_of_arguments,
        .env_end = (uintptr_t)copy_all(end_of_arguments, envp),
        .exe_fd = (uint32_t)-1,
    };
    if (syscall(SYS_prctl, PR_SET_MM, PR_SET_MM_MAP, &map, sizeof map, 0) < 0) {
        int error = errno;
        munmap(text, bytes);
        return error;
    }
    return 0;
}

#else

int
spawn_show_command(char *const *argv, char *const *envp)
{
    (void)argv, (void)envp;
    return ENOSYS;
}

#endif
