/* What a child was born with: the child writes this into a file, engine_check.c reads it. */
#ifndef RANKSPAWN_TESTS_BORN_H
#define RANKSPAWN_TESTS_BORN_H

#include <stdbool.h>
#include <stdint.h>
#include <sys/types.h>

enum { MASK_WORDS = 16, MASK_BITS = MASK_WORDS * 8 * (int)sizeof(unsigned long), MOST_GROUPS = 8 };
enum { MOST_FDS = 64, HIGHEST_FD = 256 };

struct file {
    bool open;
    int flags; /* F_GETFL */
    uint64_t device, inode;
};

struct born {
    pid_t pid, session, group;
    uint64_t ignored, blocked; /* bit n-1 for signal n */
    int death_signal;
    unsigned long cpus[MASK_WORDS];
    int memory_mode, page_node; /* the node of a page that was touched; -1: the kernel does not say */
    unsigned long memory_nodes[MASK_WORDS];
    struct file fds[MOST_FDS];
    int fds_above;
    int umask;
    uid_t uids[3];
    gid_t gids[3], groups[MOST_GROUPS];
    int groups_count;
    char cwd[512], argument[64], variable[64];
};

/* What descriptor `fd` of this process is. */
struct file file_at(int fd);

/* Look at this process. `argument` is one that it was given. */
void look(struct born *born, const char *argument);

#endif
