/* The first process of the virtual machine that run.py boots.
 *
 * It makes the host's root file system the guest's (9p, read-only, below a tmpfs overlay, so that whatever is written
 * is lost), runs /job from the initramfs in it, with its output on the second serial port, and says there when the job
 * starts and how it ended. Built with -static: there is no libc in the initramfs.
 *
 * Called on the host, as any other process than the first, it prints the frequency of the time stamp counter in kHz.
 * The guest has the same counter under software emulation and is told: its own calibration goes wrong, by seconds, when
 * the host is busy.
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <net/if.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <termios.h>
#include <time.h>
#include <unistd.h>
#include <x86intrin.h>

#define MODULES "/modules"
#define JOB "/job"
#define REPORT "/dev/ttyS1"

static _Noreturn void
end(void)
{
    sync();
    tcdrain(STDOUT_FILENO);
    /* QEMU runs with -no-reboot: this ends it. */
    reboot(RB_AUTOBOOT);
    for (;;) {
        pause();
    }
}

static _Noreturn void
die(const char *what, const char *of)
{
    printf("numavm: %s %s: %s\n", what, of, strerror(errno));
    fflush(stdout);
    end();
}

static void
mount_at(const char *source, const char *target, const char *type, unsigned long flags, const char *options)
{
    mkdir(target, 0755);
    if (mount(source, target, type, flags, options) < 0) {
        die("mount", target);
    }
}

/* run.py numbered the names in the order in which the modules depend on each other. */
static void
load_modules(void)
{
    struct dirent **names;
    int count = scandir(MODULES, &names, NULL, alphasort);
    for (int i = 0; i < count; i++) {
        char path[PATH_MAX];
        if (names[i]->d_name[0] == '.') {
            continue;
        }
        snprintf(path, sizeof path, "%s/%s", MODULES, names[i]->d_name);
        int fd = open(path, O_RDONLY | O_CLOEXEC);
        if (fd < 0 || (syscall(SYS_finit_module, fd, "", 0) < 0 && errno != EEXIST)) {
            die("load", path);
        }
        close(fd);
    }
}

static void
mount_root(void)
{
    mount_at("root", "/lower", "9p", MS_RDONLY, "trans=virtio,version=9p2000.L,msize=262144,cache=loose");
    mount_at("tmpfs", "/upper", "tmpfs", 0, "size=50%");
    mkdir("/upper/files", 0755);
    mkdir("/upper/work", 0755);
    mount_at("overlay", "/root", "overlay", 0, "lowerdir=/lower,upperdir=/upper/files,workdir=/upper/work");
    mount_at("/dev", "/root/dev", NULL, MS_MOVE, NULL);
    mount_at("/proc", "/root/proc", NULL, MS_MOVE, NULL);
    mount_at("/sys", "/root/sys", NULL, MS_MOVE, NULL);
    mount_at("tmpfs", "/root/run", "tmpfs", 0, NULL);
    mount_at("tmpfs", "/root/dev/shm", "tmpfs", 0, NULL);
    mount_at("cgroup2", "/root/sys/fs/cgroup", "cgroup2", 0, NULL);
    if (chdir("/root") < 0 || mount(".", "/", NULL, MS_MOVE, NULL) < 0 || chroot(".") < 0 || chdir("/") < 0) {
        die("switch to", "/root");
    }
}

/* The kernel is booted with maxcpus=1: everything before this is seconds faster with one CPU than with many. */
static void
start_cpus(void)
{
    for (int cpu = 1;; cpu++) {
        char path[64];
        snprintf(path, sizeof path, "/sys/devices/system/cpu/cpu%d/online", cpu);
        int fd = open(path, O_WRONLY | O_CLOEXEC);
        if (fd < 0) {
            return;
        }
        if (write(fd, "1", 1) != 1) {
            die("start", path);
        }
        close(fd);
    }
}

/* 127.0.0.1, for the launcher's free port. */
static void
start_loopback(void)
{
    struct ifreq request = {.ifr_name = "lo", .ifr_flags = IFF_UP | IFF_RUNNING};
    int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    if (fd < 0 || ioctl(fd, SIOCSIFFLAGS, &request) < 0) {
        die("start", "lo");
    }
    close(fd);
}

static int
open_report(void)
{
    struct termios settings;
    int fd = open(REPORT, O_RDWR | O_NOCTTY | O_CLOEXEC);
    if (fd < 0 || tcgetattr(fd, &settings) < 0) {
        die("open", REPORT);
    }
    cfmakeraw(&settings);
    cfsetspeed(&settings, B115200);
    tcsetattr(fd, TCSANOW, &settings);
    return fd;
}

static int
run_job(int job, int report)
{
    int status = 0;
    pid_t ended, child = fork();
    if (child == 0) {
        char path[32];
        setsid();
        dup2(open("/dev/null", O_RDONLY), STDIN_FILENO);
        dup2(report, STDOUT_FILENO);
        dup2(report, STDERR_FILENO);
        /* The initramfs is no longer reachable by name. The shell closes nothing above 2, so it is read as fd 9. */
        dup2(job, 9);
        snprintf(path, sizeof path, "/proc/self/fd/%d", 9);
        execl("/bin/sh", "sh", path, (char *)NULL);
        _exit(126);
    }
    /* Orphans of the job come here too. */
    do {
        ended = waitpid(-1, &status, 0);
    } while (ended != child && (ended >= 0 || errno == EINTR));
    return WIFSIGNALED(status) ? 128 + WTERMSIG(status) : WEXITSTATUS(status);
}

/* The counter and the clock read at one moment, or nearly: the closest pair of several. */
static unsigned long long
counter_at(double *milliseconds)
{
    unsigned long long best = 0, shortest = ~0ULL;
    for (int i = 0; i < 20; i++) {
        struct timespec now;
        unsigned long long before = __rdtsc();
        clock_gettime(CLOCK_MONOTONIC, &now);
        unsigned long long took = __rdtsc() - before;
        if (took < shortest) {
            shortest = took;
            best = before;
            *milliseconds = (double)now.tv_sec * 1e3 + (double)now.tv_nsec / 1e6;
        }
    }
    return best;
}

static void
print_counter_khz(void)
{
    double begin, stop;
    unsigned long long first = counter_at(&begin);
    usleep(60000);
    unsigned long long last = counter_at(&stop);
    printf("%.0f\n", (double)(last - first) / (stop - begin));
}

int
main(void)
{
    if (getpid() != 1) {
        print_counter_khz();
        return 0;
    }
    mount_at("devtmpfs", "/dev", "devtmpfs", 0, NULL);
    int console = open("/dev/console", O_RDWR);
    dup2(console, STDIN_FILENO);
    dup2(console, STDOUT_FILENO);
    dup2(console, STDERR_FILENO);
    mount_at("proc", "/proc", "proc", 0, NULL);
    mount_at("sysfs", "/sys", "sysfs", 0, NULL);
    load_modules();
    int job = open(JOB, O_RDONLY);
    mount_root();
    start_cpus();
    start_loopback();
    sethostname("numavm", strlen("numavm"));
    int report = open_report();
    dprintf(report, "numavm: start\n");
    dprintf(report, "numavm: exit %d\n", run_job(job, report));
    tcdrain(report);
    /* run.py ends the machine when it has read that line. */
    sleep(30);
    end();
}
