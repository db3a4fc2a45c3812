/* The system calls of the search and of the guard's program, and the few functions that they need of a C library.
 *
 * The program is linked without a C library if kernel.c knows the machine's system call (x86-64, AArch64). So it starts
 * without a dynamic linker, in a tenth of a millisecond, and maps some 40 KiB. RANKSPAWN_FREESTANDING builds it so;
 * without that macro it is built with the C library: for the engine, on other machines, and for the sanitizers.
 *
 * Every function returns what the kernel returns: an error is a negative errno.
 */
#ifndef RANKSPAWN_SEARCH_KERNEL_H
#define RANKSPAWN_SEARCH_KERNEL_H

#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/epoll.h>
#include <sys/types.h>

/* Where the guard's program starts. */
int guard_main(int argc, char *const *argv);

/* ---- processes ----------------------------------------------------------------------------------------------------*/

pid_t own_pid(void);
pid_t parent_pid(void);
long session_of(pid_t pid);
long group_of(pid_t pid);
bool is_process(pid_t pid);         /* tgkill(2): false for the number of a thread that is not a process's first one */
long signal_to(pid_t pid, int sig); /* kill(2): a negative pid is a process group */
long pidfd_of(pid_t pid);
long signal_by(int pidfd, int sig);
void ignore_signal(int sig);
void raise_descriptor_limit(void);

/* ---- files --------------------------------------------------------------------------------------------------------*/

long open_at(int folder, const char *path, int flags); /* O_CLOEXEC is added */
long read_from(int fd, void *bytes, size_t count);
long write_to(int fd, const void *bytes, size_t count);
void close_fd(int fd);
long seek_to(int fd, int64_t offset);
long unlink_at(int folder, const char *name, int flags);
long set_nonblocking(int fd);

/* Which file it is, whatever its name: by statx(2), Linux 4.11. path "": the folder itself. */
struct identity {
    uint64_t inode;
    uint32_t device_major, device_minor;
};
bool identify(int folder, const char *path, struct identity *found);

/* Open a folder in a folder: neither through a symbolic link nor on another mount, which takes /proc. */
long open_inside(int folder, const char *name);

/* A name in a folder, as getdents64(2) gives it. next: seek_to() it, and the name after this one is read. */
struct entry {
    uint64_t inode;
    int64_t next;
    unsigned short length; /* in bytes, to the entry after this one */
    unsigned char type;
    char name[];
};

/* The next entries of a folder, as many as there is room for; 8-aligned. Returns their bytes: 0 at the end. */
long read_entries(int folder, void *entries, size_t room);

/* The next names in a folder. Call `each` for every name but . and .., until it returns false. Returns what
 * getdents64(2) returned: 0 at the end. */
long next_names(int folder, bool (*each)(void *context, const char *name), void *context);

/* Read a small file to its end. Returns its length, at most `room` - 1, and a 0 follows; or a negative errno. */
long read_file(int folder, const char *path, char *text, size_t room);

/* ---- waiting ------------------------------------------------------------------------------------------------------*/

enum { NANOSECONDS_IN_MS = 1000000 };

/* CLOCK_MONOTONIC or CLOCK_BOOTTIME, in nanoseconds. */
int64_t now(int clock);

/* Wait for one descriptor, at most so many nanoseconds; 0 only looks. fd -1: wait for the time to pass. Returns
 * whether any of the events, POLLHUP or POLLERR has come. */
bool wait_for(int fd, short events, int64_t nanoseconds);

long make_epoll(void);
long epoll_watch(int epoll, int fd, uint64_t data);

/* milliseconds: -1 waits for ever. */
long epoll_next(int epoll, struct epoll_event *events, int count, int milliseconds);

/* ---- memory and text ----------------------------------------------------------------------------------------------*/

/* Make room for one more element in an array. Returns false, and changes nothing, if there is no memory. */
bool make_room(void **array, size_t *room, size_t count, size_t element_bytes);

/* Read the decimal number at the start of `text`; *end is where it ends. Without a digit: 0, and *end is `text`. */
int64_t number_in(const char *text, const char **end);

/* Write a number in decimal, and a 0. Returns where the 0 is. */
char *put_number(char *text, int64_t number);

/* Copy a text with its 0. Returns where the 0 is. */
char *put_text(char *to, const char *from);

/* The text after `name` in the first line that begins with it, or NULL. */
const char *after_line_start(const char *text, const char *name);

#endif
