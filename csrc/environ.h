/* A copy of the caller's environment, and where a variable is in it. */
#ifndef RANKSPAWN_ENVIRON_H
#define RANKSPAWN_ENVIRON_H

#include <stddef.h>

struct environment {
    char **variables; /* NULL at the end; one block of malloc(3) with the text that it points to. NULL: no memory */
    size_t count;
};

/* Copy environ(7). No other thread may change the environment meanwhile. The caller frees `variables`. */
struct environment environment_copy(void);

/* Which of `count` variables has the name of `pair`, a "NAME=value". Returns its index, or -1. */
ptrdiff_t environment_index(char *const *variables, size_t count, const char *pair);

#endif
