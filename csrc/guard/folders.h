/* The folders that the guard ends with the group: its cgroup, and the launcher's temporary folder. */
#ifndef RANKSPAWN_GUARD_FOLDERS_H
#define RANKSPAWN_GUARD_FOLDERS_H

#include "search/kernel.h"

/* Remove what is in a folder, and then the folder itself, if `path` is still its path. */
void folder_remove(int folder, const char *path);

/* Send SIGKILL to every process in a cgroup v2 and below it, also to those that are being forked. Returns whether that
 * could be done. */
bool cgroup_kill(int cgroup);

/* Wait until no process is in it or below it, or until that moment (CLOCK_MONOTONIC). A zombie does not count.
 * Returns whether it is empty. */
bool cgroup_wait_empty(int cgroup, int64_t until);

#endif
