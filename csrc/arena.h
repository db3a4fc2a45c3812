/* Memory that is taken piece by piece, never moves, and is freed all at once. Zeros are an empty arena. */
#ifndef RANKSPAWN_ARENA_H
#define RANKSPAWN_ARENA_H

#include <stddef.h>

struct arena {
    void **block; /* the newest; it begins with a pointer to the block before it */
    char *unused;
    size_t left, block_size;
};

/* Take `size` bytes, aligned as a pointer is. Returns NULL when there is no memory. */
void *arena_take(struct arena *arena, size_t size);

/* Free all memory of the arena. */
void arena_free(struct arena *arena);

#endif
