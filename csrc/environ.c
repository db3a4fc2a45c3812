/* The caller's environment, copied into one block: a start reads it while other threads may change the original. */
#include "environ.h"

#include <stdlib.h>
#include <string.h>

#ifdef __APPLE__
#include <crt_externs.h>
#define CALLERS (*_NSGetEnviron())
#else
extern char **environ;
#define CALLERS environ
#endif

struct environment
environment_copy(void)
{
    char **callers = CALLERS;
    size_t count = 0, size = 0;
    while (callers && callers[count]) {
        size += strlen(callers[count++]) + 1;
    }
    struct environment copy = {malloc((count + 1) * sizeof(char *) + size), count};
    if (!copy.variables) {
        return copy;
    }
    char *text = (char *)(copy.variables + count + 1);
    for (size_t i = 0; i < count; i++) {
        size = strlen(callers[i]) + 1;
        copy.variables[i] = memcpy(text, callers[i], size);
        text += size;
    }
    copy.variables[count] = NULL;
    return copy;
}

ptrdiff_t
environment_index(char *const *variables, size_t count, const char *pair)
{
    size_t size = (size_t)(strchr(pair, '=') - pair) + 1;
    for (size_t i = 0; i < count; i++) {
        if (strncmp(variables[i], pair, size) == 0) {
            return (ptrdiff_t)i;
        }
    }
    return -1;
}

void
environment_number(char *pair, const char *name, size_t size, uint64_t number)
{
    char digits[ENVIRONMENT_NUMBER_ROOM], *first = digits + sizeof digits;
    *--first = '\0';
    do {
        *--first = (char)('0' + number % 10);
    } while (number /= 10);
    *--first = '=';
    memcpy(pair, name, size);
    memcpy(pair + size, first, (size_t)(digits + sizeof digits - first));
}
