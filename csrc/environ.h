/* A copy of the caller's environment. */
#ifndef RANKSPAWN_ENVIRON_H
#define RANKSPAWN_ENVIRON_H

#include <stddef.h>

struct environment {
    char **variables; /* NULL at the end; one block of malloc(3) with the text that it points to. NULL: no memory */
    size_t count;
};

/* Copy environ(7). No other thread may change the environment meanwhile. The caller frees `variables`. */
struct environment environment_copy(void);

#endif
