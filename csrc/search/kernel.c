/* System calls, with the C library or without; see kernel.h.
 *
 * Without it, guard.c has nothing but this file below it. The hazards:
 *
 *  1. The program is not relocated (it is position-independent, and has no dynamic linker): no initialised pointers in
 *     static memory. The linker refuses those that it could not write in read-only memory (-z text); tests/wheel looks.
 *  2. Thread-local storage is not set up: no stack protector, no errno.
 *  3. The compiler calls memcpy, memmove and memset wherever it likes: they are here, and are compiled so that they do
 *     not call themselves (-fno-tree-loop-distribute-patterns, -ffreestanding).
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "kernel.h"

#include <errno.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>

#ifndef SYS_pidfd_send_signal
#define SYS_pidfd_send_signal 424
#endif
#ifndef SYS_pidfd_open
#define SYS_pidfd_open 434
#endif
#ifndef SYS_statx
#ifdef __x86_64__
#define SYS_statx 332
#else
#define SYS_statx 291
#endif
#endif

/* As <linux/stat.h> has it, which not every C library brings. */
enum { WANTS_BASIC_STATS = 0x7ff };

struct kernel_statx {
    uint64_t first[4];
    uint64_t inode;
    uint64_t size_to_times[11];
    uint32_t of_device_file[2];
    uint32_t device_major, device_minor;
    uint64_t rest[14];
};
_Static_assert(sizeof(struct kernel_statx) == 256, "struct statx");

enum { KERNEL_SIGNALS_BYTES = 8, FIRST_ROOM = 64, NANOSECONDS_IN_S = 1000000000 };

/* struct timespec as these system calls take it on every machine: libc's may be wider. */
struct kernel_time {
    long seconds;
    long nanoseconds;
};

#ifndef RANKSPAWN_FREESTANDING

#include <stdlib.h>

static long
call(long number, long a, long b, long c, long d, long e, long f)
{
    long done = syscall(number, a, b, c, d, e, f);
    return done < 0 ? -(long)errno : done;
}

bool
make_room(void **array, size_t *room, size_t count, size_t element_bytes)
{
    if (count < *room) {
        return true;
    }
    size_t more = *room ? 2 * *room : FIRST_ROOM;
    void *grown = realloc(*array, more * element_bytes);
    if (!grown) {
        return false;
    }
    *array = grown;
    *room = more;
    return true;
}

#else

#if defined(__x86_64__) && !defined(__ILP32__)

__asm__(".text\n"
        ".globl _start\n"
        ".hidden _start\n"
        ".type _start, @function\n"
        "_start:\n"
        "\tendbr64\n"
        "\txorl %ebp, %ebp\n"
        "\tmovq %rsp, %rdi\n"
        "\tandq $-16, %rsp\n"
        "\tcall start\n"
        "\thlt\n");

static long
call(long number, long a, long b, long c, long d, long e, long f)
{
    long done;
    register long r10 __asm__("r10") = d;
    register long r8 __asm__("r8") = e;
    register long r9 __asm__("r9") = f;
    __asm__ volatile("syscall"
                     : "=a"(done)
                     : "a"(number), "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8), "r"(r9)
                     : "rcx", "r11", "memory", "cc");
    return done;
}

#elif defined(__aarch64__) && !defined(__ILP32__)

__asm__(".text\n"
        ".globl _start\n"
        ".hidden _start\n"
        ".type _start, @function\n"
        "_start:\n"
        "\tmov x29, #0\n"
        "\tmov x30, #0\n"
        "\tmov x0, sp\n"
        "\tbl start\n"
        "\tbrk #1\n");

static long
call(long number, long a, long b, long c, long d, long e, long f)
{
    register long x8 __asm__("x8") = number;
    register long x0 __asm__("x0") = a;
    register long x1 __asm__("x1") = b;
    register long x2 __asm__("x2") = c;
    register long x3 __asm__("x3") = d;
    register long x4 __asm__("x4") = e;
    register long x5 __asm__("x5") = f;
    __asm__ volatile("svc #0" : "+r"(x0) : "r"(x8), "r"(x1), "r"(x2), "r"(x3), "r"(x4), "r"(x5) : "memory", "cc");
    return x0;
}

#else
#error "build without RANKSPAWN_FREESTANDING: the system call of this machine is not known here"
#endif

/* The kernel puts argc, argv and a NULL, envp and a NULL on the stack. */
__attribute__((used, visibility("hidden"))) _Noreturn void
start(long *stack)
{
    int status = guard_main((int)stack[0], (char *const *)(stack + 1));
    for (;;) {
        call(SYS_exit_group, status, 0, 0, 0, 0, 0);
    }
}

void *
memcpy(void *restrict to, const void *restrict from, size_t count)
{
    for (size_t i = 0; i < count; i++) {
        ((char *)to)[i] = ((const char *)from)[i];
    }
    return to;
}

void *
memmove(void *to, const void *from, size_t count)
{
    bool upwards = (uintptr_t)to <= (uintptr_t)from;
    for (size_t i = 0; i < count; i++) {
        size_t at = upwards ? i : count - 1 - i;
        ((char *)to)[at] = ((const char *)from)[at];
    }
    return to;
}

void *
memset(void *to, int byte, size_t count)
{
    for (size_t i = 0; i < count; i++) {
        ((char *)to)[i] = (char)byte;
    }
    return to;
}

bool
make_room(void **array, size_t *room, size_t count, size_t element_bytes)
{
    if (count < *room) {
        return true;
    }
    size_t before = *room * element_bytes, more = *room ? 2 * *room : FIRST_ROOM;
    long bytes = (long)(more * element_bytes);
    long made = before ? call(SYS_mremap, (long)*array, (long)before, bytes, MREMAP_MAYMOVE, 0, 0)
                       : call(SYS_mmap, 0, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (made < 0 && made > -4096) {
        return false;
    }
    *array = (void *)made;
    *room = more;
    return true;
}

#endif

/* ---- processes ----------------------------------------------------------------------------------------------------*/

pid_t
own_pid(void)
{
    return (pid_t)call(SYS_getpid, 0, 0, 0, 0, 0, 0);
}

pid_t
parent_pid(void)
{
    return (pid_t)call(SYS_getppid, 0, 0, 0, 0, 0, 0);
}

long
session_of(pid_t pid)
{
    return call(SYS_getsid, pid, 0, 0, 0, 0, 0);
}

bool
is_process(pid_t pid)
{
    return call(SYS_tgkill, pid, pid, 0, 0, 0, 0) != -ESRCH;
}

long
group_of(pid_t pid)
{
    return call(SYS_getpgid, pid, 0, 0, 0, 0, 0);
}

long
signal_to(pid_t pid, int sig)
{
    return call(SYS_kill, pid, sig, 0, 0, 0, 0);
}

long
pidfd_of(pid_t pid)
{
    return call(SYS_pidfd_open, pid, 0, 0, 0, 0, 0);
}

long
signal_by(int pidfd, int sig)
{
    return call(SYS_pidfd_send_signal, pidfd, sig, 0, 0, 0, 0);
}

void
ignore_signal(int sig)
{
    /* struct sigaction as the kernel takes it: the handler comes first. */
    struct {
        void (*handler)(int);
        unsigned long rest[7];
    } ignored = {.handler = SIG_IGN};
    call(SYS_rt_sigaction, sig, (long)&ignored, 0, KERNEL_SIGNALS_BYTES, 0, 0);
}

void
raise_descriptor_limit(void)
{
    struct {
        uint64_t soft, hard;
    } limit;
    if (call(SYS_prlimit64, 0, RLIMIT_NOFILE, 0, (long)&limit, 0, 0) == 0) {
        limit.soft = limit.hard;
        call(SYS_prlimit64, 0, RLIMIT_NOFILE, (long)&limit, 0, 0, 0);
    }
}

/* ---- files --------------------------------------------------------------------------------------------------------*/

long
open_at(int folder, const char *path, int flags)
{
    return call(SYS_openat, folder, (long)path, flags | O_CLOEXEC, 0, 0, 0);
}

long
read_from(int fd, void *bytes, size_t count)
{
    return call(SYS_read, fd, (long)bytes, (long)count, 0, 0, 0);
}

long
write_to(int fd, const void *bytes, size_t count)
{
    return call(SYS_write, fd, (long)bytes, (long)count, 0, 0, 0);
}

void
close_fd(int fd)
{
    call(SYS_close, fd, 0, 0, 0, 0, 0);
}

long
seek_to(int fd, int64_t offset)
{
    return call(SYS_lseek, fd, (long)offset, SEEK_SET, 0, 0, 0);
}

long
unlink_at(int folder, const char *name, int flags)
{
    return call(SYS_unlinkat, folder, (long)name, flags, 0, 0, 0);
}

long
set_nonblocking(int fd)
{
    return call(SYS_fcntl, fd, F_SETFL, O_NONBLOCK, 0, 0, 0);
}

bool
identify(int folder, const char *path, struct identity *found)
{
    struct kernel_statx told = {.inode = 0};
    int flags = AT_EMPTY_PATH | AT_SYMLINK_NOFOLLOW;
    if (call(SYS_statx, folder, (long)path, flags, WANTS_BASIC_STATS, (long)&told, 0) < 0) {
        return false;
    }
    *found = (struct identity){told.inode, told.device_major, told.device_minor};
    return true;
}

/* The mount that an open file is on, by proc(5); -1 where that cannot be read. */
static int64_t
mount_of(int fd)
{
    char path[64], text[512];
    put_number(put_text(path, "/proc/self/fdinfo/"), fd);
    const char *at = read_file(AT_FDCWD, path, text, sizeof text) > 0 ? after_line_start(text, "mnt_id:\t") : NULL;
    return at ? number_in(at, &at) : -1;
}

long
open_inside(int folder, const char *name)
{
    long fd = open_at(folder, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW);
    if (fd >= 0 && (mount_of((int)fd) < 0 || mount_of((int)fd) != mount_of(folder))) {
        close_fd((int)fd);
        return -EXDEV;
    }
    return fd;
}

long
read_entries(int folder, void *entries, size_t room)
{
    return call(SYS_getdents64, folder, (long)entries, (long)room, 0, 0, 0);
}

long
next_names(int folder, bool (*each)(void *context, const char *name), void *context)
{
    _Alignas(8) char entries[4096];
    long bytes = read_entries(folder, entries, sizeof entries);
    for (long at = 0; at < bytes;) {
        const struct entry *entry = (const struct entry *)(const void *)(entries + at);
        const char *name = entry->name;
        at += entry->length;
        bool is_dots = name[0] == '.' && (!name[1] || (name[1] == '.' && !name[2]));
        if (!is_dots && !each(context, name)) {
            break;
        }
    }
    return bytes;
}

long
read_file(int folder, const char *path, char *text, size_t room)
{
    long fd = open_at(folder, path, O_RDONLY), got = 0;
    size_t length = 0;
    if (fd < 0) {
        return fd;
    }
    while (length < room - 1 && (got = read_from((int)fd, text + length, room - 1 - length)) > 0) {
        length += (size_t)got;
    }
    close_fd((int)fd);
    text[length] = 0;
    return got < 0 ? got : (long)length;
}

/* ---- waiting ------------------------------------------------------------------------------------------------------*/

int64_t
now(int clock)
{
    struct kernel_time time = {0, 0};
    call(SYS_clock_gettime, clock, (long)&time, 0, 0, 0, 0);
    return (int64_t)time.seconds * NANOSECONDS_IN_S + time.nanoseconds;
}

bool
wait_for(int fd, short events, int64_t nanoseconds)
{
    struct pollfd one = {.fd = fd, .events = events};
    nanoseconds = nanoseconds > 0 ? nanoseconds : 0;
    struct kernel_time time = {(long)(nanoseconds / NANOSECONDS_IN_S), (long)(nanoseconds % NANOSECONDS_IN_S)};
    return call(SYS_ppoll, (long)&one, 1, (long)&time, 0, KERNEL_SIGNALS_BYTES, 0) > 0 && one.revents != 0;
}

long
make_epoll(void)
{
    return call(SYS_epoll_create1, EPOLL_CLOEXEC, 0, 0, 0, 0, 0);
}

long
epoll_watch(int epoll, int fd, uint64_t data)
{
    struct epoll_event event = {.events = EPOLLIN, .data.u64 = data};
    return call(SYS_epoll_ctl, epoll, EPOLL_CTL_ADD, fd, (long)&event, 0, 0);
}

long
epoll_next(int epoll, struct epoll_event *events, int count, int milliseconds)
{
    return call(SYS_epoll_pwait, epoll, (long)events, count, milliseconds, 0, KERNEL_SIGNALS_BYTES);
}

/* ---- text ---------------------------------------------------------------------------------------------------------*/

int64_t
number_in(const char *text, const char **end)
{
    int64_t number = 0;
    while (*text >= '0' && *text <= '9') {
        number = number * 10 + (*text++ - '0');
    }
    *end = text;
    return number;
}

char *
put_number(char *text, int64_t number)
{
    char digits[20];
    int count = 0;
    do {
        digits[count++] = (char)('0' + number % 10);
        number /= 10;
    } while (number > 0);
    while (count > 0) {
        *text++ = digits[--count];
    }
    *text = 0;
    return text;
}

char *
put_text(char *to, const char *from)
{
    while ((*to = *from++)) {
        to++;
    }
    return to;
}

const char *
after_line_start(const char *text, const char *name)
{
    while (*text) {
        const char *at = text, *expected = name;
        while (*expected && *at == *expected) {
            at++, expected++;
        }
        if (!*expected) {
            return at;
        }
        while (*text && *text++ != '\n') {
        }
    }
    return NULL;
}
