/* The first process of the AArch64 machine that test_aarch64.py boots: it mounts what programs expect, runs the job,
 * and powers the machine off. Each line of the job is a program and its arguments, because there is no shell.
 *
 * All output goes to the serial console, with a line "platforms: status N" after each program, and "platforms: end".
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <termios.h>
#include <unistd.h>

enum { MOST_WORDS = 16 };

static void
mount_at(const char *type, const char *target)
{
    mkdir(target, 0755);
    if (mount(type, target, type, 0, NULL) < 0) {
        printf("platforms: mount %s: %s\n", target, strerror(errno));
    }
}

static void
run(char *line)
{
    char *words[MOST_WORDS + 1], *rest = NULL;
    int count = 0, status = -1;
    for (char *word = strtok_r(line, " \n", &rest); word && count < MOST_WORDS; word = strtok_r(NULL, " \n", &rest)) {
        words[count++] = word;
    }
    words[count] = NULL;
    pid_t ended, child = fork();
    if (child == 0) {
        setsid();
        execv(words[0], words);
        printf("platforms: %s: %s\n", words[0], strerror(errno));
        _exit(127);
    }
    /* This process reaps orphans, too. */
    do {
        ended = waitpid(-1, &status, 0);
    } while (ended != child && (ended >= 0 || errno == EINTR));
    printf("platforms: status %d\n", WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status));
}

int
main(void)
{
    char line[512];
    mount_at("devtmpfs", "/dev");
    int console = open("/dev/console", O_RDWR);
    dup2(console, STDIN_FILENO);
    dup2(console, STDOUT_FILENO);
    dup2(console, STDERR_FILENO);
    setvbuf(stdout, NULL, _IONBF, 0);
    mount_at("proc", "/proc");
    mount_at("sysfs", "/sys");
    mount_at("cgroup2", "/sys/fs/cgroup");
    mount_at("tmpfs", "/tmp");
    FILE *job = fopen("/job", "re");
    while (job && fgets(line, sizeof line, job)) {
        run(line);
    }
    printf("platforms: end\n");
    tcdrain(STDOUT_FILENO);
    reboot(RB_POWER_OFF);
    return 1;
}
