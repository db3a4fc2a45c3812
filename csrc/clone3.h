/* clone3(2), which libc does not export. */
#ifndef RANKSPAWN_CLONE3_H
#define RANKSPAWN_CLONE3_H

#include <stdint.h>

/* struct clone_args; older headers lack the last field. */
struct clone3_args {
    uint64_t flags, pidfd, child_tid, parent_tid, exit_signal, stack, stack_size, tls, set_tid, set_tid_size, cgroup;
};

/* Make a child that runs child_main(start) on the stack in `args`. Returns its pid or a negative errno, which is
 * -ENOSYS on a processor for which clone3.c has no assembly. */
long clone3_to_child(struct clone3_args *args, void *start);

#endif
