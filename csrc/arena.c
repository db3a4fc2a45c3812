/* The memory of requests: a chain of blocks, each at least twice as large as the one before it. */
#include "arena.h"

#include <stdlib.h>

enum { LEAST_BLOCK = 8192 };

void *
arena_take(struct arena *arena, size_t size)
{
    size_t whole = (size + sizeof(void *) - 1) & ~(sizeof(void *) - 1);
    if (whole > arena->left) {
        size_t wanted = arena->block_size ? 2 * arena->block_size : LEAST_BLOCK;
        wanted = wanted < whole + sizeof(void *) ? whole + sizeof(void *) : wanted;
        void **fresh = malloc(wanted);
        if (!fresh) {
            return NULL;
        }
        fresh[0] = arena->block;
        *arena = (struct arena){fresh, (char *)(fresh + 1), wanted - sizeof(void *), wanted};
    }
    char *taken = arena->unused;
    arena->unused += whole;
    arena->left -= whole;
    return taken;
}

void
arena_free(struct arena *arena)
{
    while (arena->block) {
        void **before = arena->block[0];
        free(arena->block);
        arena->block = before;
    }
}
