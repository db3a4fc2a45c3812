/* A process looks at itself, by system calls. Nothing of the engine is used. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "born.h"

#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { NODE_OF_ADDRESS = 1 << 0 | 1 << 1 /* MPOL_F_NODE | MPOL_F_ADDR */, KERNEL_SIGNALS = 64 };

struct file
file_at(int fd)
{
    struct stat status;
    if (fstat(fd, &status) < 0) {
        return (struct file){.open = false};
    }
    return (struct file){true, fcntl(fd, F_GETFL), (uint64_t)status.st_dev, (uint64_t)status.st_ino};
}

static void
look_at_signals(struct born *born)
{
    /* struct sigaction as rt_sigaction(2) takes it: the handler comes first. libc's call leaves two signals out. */
    struct {
        void *handler;
        unsigned long rest[7];
    } action;
    for (int sig = 1; sig <= KERNEL_SIGNALS; sig++) {
        if (syscall(SYS_rt_sigaction, sig, NULL, &action, sizeof(uint64_t)) == 0 && action.handler == (void *)SIG_IGN) {
            born->ignored |= (uint64_t)1 << (sig - 1);
        }
    }
    syscall(SYS_rt_sigprocmask, SIG_BLOCK, NULL, &born->blocked, sizeof born->blocked);
    prctl(PR_GET_PDEATHSIG, &born->death_signal);
}

static void
look_at_memory(struct born *born)
{
    size_t page = (size_t)sysconf(_SC_PAGESIZE);
    char *touched = mmap(NULL, page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    born->memory_mode = born->page_node = -1;
    syscall(SYS_get_mempolicy, &born->memory_mode, born->memory_nodes, (unsigned long)MASK_BITS, NULL, 0UL);
    if (touched != MAP_FAILED) {
        touched[0] = 1;
        syscall(SYS_get_mempolicy, &born->page_node, NULL, 0UL, touched, (unsigned long)NODE_OF_ADDRESS);
        munmap(touched, page);
    }
}

void
look(struct born *born, const char *argument)
{
    const char *variable = getenv("ENGINE_CHECK");
    memset(born, 0, sizeof *born);
    for (int fd = 0; fd < HIGHEST_FD; fd++) {
        struct file file = file_at(fd);
        if (fd < MOST_FDS) {
            born->fds[fd] = file;
        }
        born->fds_above += fd >= MOST_FDS && file.open;
    }
    born->pid = getpid();
    born->session = getsid(0);
    born->group = getpgrp();
    look_at_signals(born);
    syscall(SYS_sched_getaffinity, 0, sizeof born->cpus, born->cpus);
    look_at_memory(born);
    umask((mode_t)(born->umask = (int)umask(0)));
    getresuid(&born->uids[0], &born->uids[1], &born->uids[2]);
    getresgid(&born->gids[0], &born->gids[1], &born->gids[2]);
    born->groups_count = getgroups(MOST_GROUPS, born->groups);
    if (!getcwd(born->cwd, sizeof born->cwd)) {
        born->cwd[0] = 0;
    }
    snprintf(born->argument, sizeof born->argument, "%s", argument);
    snprintf(born->variable, sizeof born->variable, "%s", variable ? variable : "");
}
