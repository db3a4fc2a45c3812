/* Copies the caller's environment, finds a variable in it, and writes a variable that is a number. */
#ifndef RANKSPAWN_ENVIRON_H
#define RANKSPAWN_ENVIRON_H

#include <stddef.h>
#include <stdint.h>

struct environment {
    char **variables; /* NULL at the end; one block of malloc(3) with the text that it points to. NULL: no memory */
    size_t count;
};

/* Copy environ(7). No other thread may change the environment meanwhile. The caller frees `variables`. */
struct environment environment_copy(void);

/* Which of `count` variables has the name of `pair`, a "NAME=value". Returns its index, or -1. */
ptrdiff_t environment_index(char *const *variables, size_t count, const char *pair);

/* The bytes that environment_number() writes beside the name, at most: "=", 20 digits, and the end. */
enum { ENVIRONMENT_NUMBER_ROOM = 22 };

/* Write "NAME=number". `name` has `size` bytes, and `pair` has room for ENVIRONMENT_NUMBER_ROOM more. */
void environment_number(char *pair, const char *name, size_t size, uint64_t number);

#endif
