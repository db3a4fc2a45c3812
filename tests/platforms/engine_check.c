/* The engine without Python: starts this program by each of the engine's mechanisms, and asks each child what it was
 * born with.
 *
 *   engine_check [--through EMULATOR] FOLDER MODE...
 *
 * FOLDER is an empty one to work in. EMULATOR starts the children where the kernel cannot (QEMU's user mode). A MODE is
 *
 *   clone3       Linux's mechanism as it is; each start must be by clone3.c's assembly
 *   clone        the same where a seccomp filter says ENOSYS to clone3: libc's clone
 *   oldest       the same where the filter says ENOSYS to close_range and the calls for pidfds, too
 *   posix_spawn  the portable mechanism, which must decline what it cannot express
 *
 * It is linked with -Wl,--wrap=clone3_to_child, so that it can count the calls of the assembly. It prints whether clone
 * shares memory here, a line for each check that failed or could not be made, and the counts; the status is 0 when none
 * failed.
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "check.h"
#include "clone3.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

/* Numbers that are the same on every architecture; older headers lack them. */
enum { NR_PIDFD_SEND_SIGNAL = 424, NR_PIDFD_OPEN = 434, NR_CLONE3 = 435, NR_CLOSE_RANGE = 436 };

static const struct mode modes[] = {
    {"clone3", SPAWN_CLONE, {0}},
    {"clone", SPAWN_CLONE, {NR_CLONE3}},
    {"oldest", SPAWN_CLONE, {NR_CLONE3, NR_CLOSE_RANGE, NR_PIDFD_OPEN, NR_PIDFD_SEND_SIGNAL}},
    {"posix_spawn", SPAWN_POSIX, {0}},
};

const struct mode *mode;
const char *folder;
bool honoured;
unsigned long own_cpus[MASK_WORDS];

atomic_long by_clone3;

static const char *emulator, *self, *check;
static atomic_int failed, skipped;

long __real_clone3_to_child(struct clone3_args *args, void *start);
long __wrap_clone3_to_child(struct clone3_args *args, void *start);

long
__wrap_clone3_to_child(struct clone3_args *args, void *start)
{
    long pid = __real_clone3_to_child(args, start);
    if (pid > 0) {
        atomic_fetch_add(&by_clone3, 1);
    }
    return pid;
}

/* ---- what checks are made of ----------------------------------------------------------------------------------- */

void
say(const char *what, const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    printf("%s %s: %s: ", what, mode->name, check);
    vprintf(format, arguments);
    putchar('\n');
    va_end(arguments);
    fflush(stdout);
}

void
skip(const char *why)
{
    atomic_fetch_add(&skipped, 1);
    say("skipped", "%s", why);
}

bool
expect(bool holds, int line, const char *text)
{
    if (!holds) {
        atomic_fetch_add(&failed, 1);
        say("FAILED", "line %d: %s (errno %s)", line, text, strerror(errno));
    }
    return holds;
}

void
prepare(struct start *start, const char *word)
{
    static atomic_int count;
    int at = 0;
    memset(start, 0, sizeof *start);
    snprintf(start->path, sizeof start->path, "%s/born-%d", folder, atomic_fetch_add(&count, 1));
    start->executables[0] = emulator ? emulator : self;
    if (emulator) {
        start->argv[at++] = (char *)emulator;
    }
    start->argv[at++] = (char *)self;
    start->argv[at++] = (char *)word;
    start->argv[at++] = start->path;
    start->argv[at] = "an argument";
    start->request = (struct spawn_request){
        .executables = start->executables,
        .argv = start->argv,
        .envp = environ,
        SPAWN_NOTHING_SPECIAL,
        .binding_required = true,
    };
    for (int i = 0; i < 3; i++) {
        start->request.streams[i].fd = start->request.parent_ends[i] = STREAM_INHERIT;
    }
    /* A child with other ids must be able to write to the file, too. */
    int fd = open(start->path, O_CREAT | O_EXCL | O_WRONLY | O_CLOEXEC, 0666);
    if (EXPECT(fd >= 0)) {
        EXPECT(fchmod(fd, 0666) == 0);
        close(fd);
    }
}

bool
told(struct start *start)
{
    int status = -1;
    bool all = EXPECT(waitpid(start->result.pid, &status, 0) == start->result.pid) && EXPECT(status == 0);
    int fd = open(start->path, O_RDONLY | O_CLOEXEC);
    all = EXPECT(read(fd, &start->born, sizeof start->born) == (ssize_t)sizeof start->born) && all;
    close(fd);
    unlink(start->path);
    EXPECT((start->result.pidfd >= 0) == (start->result.pidfd_error == 0));
    if (start->result.pidfd >= 0) {
        EXPECT(fcntl(start->result.pidfd, F_GETFD) == FD_CLOEXEC);
        close(start->result.pidfd);
    }
    return all && EXPECT(start->born.pid == start->result.pid);
}

bool
uses_clone3(void)
{
    return mode == &modes[0];
}

bool
started(struct start *start, bool portable)
{
    long before = by_clone3;
    int outcome = spawn(&start->request, &start->result, mode->mechanism);
    EXPECT(by_clone3 - before == (outcome == SPAWN_STARTED && uses_clone3()));
    if (mode->mechanism == SPAWN_POSIX && !portable) {
        EXPECT(outcome == SPAWN_DECLINED);
        unlink(start->path);
        return false;
    }
    if (!EXPECT(outcome == SPAWN_STARTED)) {
        say("   ", "step %d: %s", start->result.step, strerror(start->result.error));
        unlink(start->path);
        return false;
    }
    return EXPECT(start->result.pid > 0 && start->result.executed_ns > 0);
}

bool
born(struct start *start, bool portable)
{
    return started(start, portable) && told(start);
}

void
fails(struct start *start, int step, int error)
{
    int outcome = spawn(&start->request, &start->result, mode->mechanism);
    unlink(start->path);
    if (mode->mechanism == SPAWN_POSIX && step != STEP_EXEC && step != STEP_STDOUT) {
        EXPECT(outcome == SPAWN_DECLINED);
    } else if (!honoured && outcome == SPAWN_STARTED) {
        /* The child of libc's posix_spawn tells the error in memory that it does not share with its parent here. */
        int status = -1;
        EXPECT(waitpid(start->result.pid, &status, 0) > 0 && WIFEXITED(status) && WEXITSTATUS(status) == 127);
        close(start->result.pidfd);
    } else if (!EXPECT(outcome == SPAWN_FAILED && start->result.step == step && start->result.error == error)) {
        say("   ", "outcome %d, step %d: %s", outcome, start->result.step, strerror(start->result.error));
    }
    EXPECT(waitpid(-1, NULL, WNOHANG) == -1 && errno == ECHILD);
}

bool
same_file(struct file a, struct file b)
{
    return a.open && b.open && a.device == b.device && a.inode == b.inode;
}

bool
has(const unsigned long *mask, int bit)
{
    const int word = 8 * (int)sizeof(unsigned long);
    return mask[bit / word] >> (bit % word) & 1;
}

bool
only(const unsigned long *mask, int bit)
{
    unsigned long wanted[MASK_WORDS] = {0};
    spawn_mask_set(wanted, MASK_BITS, (unsigned int)bit);
    return memcmp(mask, wanted, sizeof wanted) == 0;
}

int
nth_cpu(int nth)
{
    int found = -1;
    for (int cpu = 0, seen = 0; cpu < MASK_BITS; cpu++) {
        if (has(own_cpus, cpu) && seen++ <= nth) {
            found = cpu;
        }
    }
    return found;
}

/* ---- modes ------------------------------------------------------------------------------------------------------ */

static bool
refuse(const unsigned int *calls)
{
    struct sock_filter code[8] = {BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr))};
    unsigned short length = 1, count = 0;
    while (count < 4 && calls[count]) {
        count++;
    }
    for (unsigned short i = 0; i < count; i++) {
        /* Jump over the comparisons that follow and the line that allows. */
        code[length++] = (struct sock_filter)BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, calls[i], (__u8)(count - i), 0);
    }
    code[length++] = (struct sock_filter)BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW);
    code[length++] = (struct sock_filter)BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | ENOSYS);
    struct sock_fprog program = {length, code};
    return count == 0 ||
           (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0 && prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program) == 0);
}

static int
open_fds(void)
{
    int count = 0;
    for (int fd = 0; fd < HIGHEST_FD; fd++) {
        count += fcntl(fd, F_GETFD) >= 0;
    }
    return count;
}

/* Run a check, and check that it leaves descriptors, signal mask, affinity and children as it found them. */
static void
run(const struct check *one)
{
    unsigned long cpus[MASK_WORDS] = {0};
    uint64_t before = 0, after = 0;
    int fds = open_fds();
    check = one->name;
    syscall(SYS_rt_sigprocmask, SIG_BLOCK, NULL, &before, sizeof before);
    one->run();
    syscall(SYS_rt_sigprocmask, SIG_BLOCK, NULL, &after, sizeof after);
    syscall(SYS_sched_getaffinity, 0, sizeof cpus, cpus);
    EXPECT(open_fds() == fds);
    EXPECT(after == before);
    EXPECT(memcmp(cpus, own_cpus, sizeof cpus) == 0);
    EXPECT(waitpid(-1, NULL, WNOHANG) == -1 && errno == ECHILD);
}

/* Run all checks. The caller is a process for this mode alone, because a process cannot get rid of a seccomp filter. */
static _Noreturn void
run_mode(void)
{
    int passed = 0, wrong = 0;
    setpgid(0, 0);
    syscall(SYS_sched_getaffinity, 0, sizeof own_cpus, own_cpus);
    check = "filter";
    EXPECT(refuse(mode->refused));
    for (int i = 0; i < 2; i++) {
        for (const struct check *one = i ? checks_of_many : checks_of_one; one->name; one++) {
            int failed_before = failed, skipped_before = skipped;
            run(one);
            wrong += failed > failed_before;
            if (failed == failed_before && skipped == skipped_before) {
                passed++;
                printf("passed %s: %s\n", mode->name, one->name);
                fflush(stdout);
            }
        }
    }
    printf("%s: %d passed, %d failed, %d skipped\n", mode->name, passed, wrong, skipped);
    fflush(stdout);
    _exit(failed != 0);
}

/* What a started child does: it writes what it was born with into the file. */
static int
tell(const char *path, const char *argument)
{
    static struct born own;
    look(&own, argument);
    int fd = open(path, O_WRONLY | O_CLOEXEC);
    return fd >= 0 && write(fd, &own, sizeof own) == (ssize_t)sizeof own ? 0 : 1;
}

int
main(int argc, char **argv)
{
    int at = 1, status, worst = 0;
    if (argc == 4 && strcmp(argv[1], "--tell") == 0) {
        return tell(argv[2], argv[3]);
    }
    while (argc > 1 && strcmp(argv[1], "--wait") == 0) {
        pause();
    }
    if (argc > 3 && strcmp(argv[1], "--through") == 0) {
        emulator = argv[2];
        at = 3;
    }
    if (argc < at + 2 || argv[0][0] != '/' || argv[at][0] != '/') {
        fprintf(stderr, "usage: /PATH/engine_check [--through EMULATOR] /FOLDER MODE...\n");
        return 2;
    }
    self = argv[0];
    folder = argv[at++];
    for (int fd = 3; fd < HIGHEST_FD; fd++) {
        close(fd); /* children would show the descriptors that this process was given */
    }
    honoured = spawn_clone_is_honoured() > 0;
    printf("clone shares memory: %s\n", honoured ? "yes" : "no");
    for (; at < argc; at++) {
        mode = NULL;
        for (size_t i = 0; i < sizeof modes / sizeof modes[0]; i++) {
            mode = strcmp(modes[i].name, argv[at]) == 0 ? &modes[i] : mode;
        }
        if (!mode || (mode->mechanism == SPAWN_CLONE && !honoured)) {
            printf("%s: not possible here\n", argv[at]);
            worst = 1;
            continue;
        }
        fflush(stdout);
        pid_t pid = fork();
        if (pid == 0) {
            run_mode();
        }
        if (waitpid(pid, &status, 0) != pid || status != 0) {
            printf("%s: status %#x\n", mode->name, (unsigned int)status);
            worst = 1;
        }
    }
    return worst;
}
