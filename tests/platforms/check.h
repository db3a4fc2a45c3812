/* What the checks of engine_check.c are made of. */
#ifndef RANKSPAWN_TESTS_CHECK_H
#define RANKSPAWN_TESTS_CHECK_H

#include "born.h"
#include "spawn.h"

#include <limits.h>

struct mode {
    const char *name;
    enum spawn_mechanism mechanism;
    unsigned int refused[4]; /* system calls that a filter says ENOSYS to; 0 ends them */
};

extern char **environ;

extern const struct mode *mode;
extern const char *folder;                 /* to work in */
extern bool honoured;                      /* clone shares memory */
extern unsigned long own_cpus[MASK_WORDS]; /* where this process may run */

extern atomic_long by_clone3; /* how many children clone3.c has made */

/* Whether it must make all of them. */
bool uses_clone3(void);

/* Print a line about the current check. */
void say(const char *what, const char *format, ...) __attribute__((format(printf, 2, 3)));

/* It cannot be made here. */
void skip(const char *why);

/* Count and print an expectation that does not hold; whether it holds. */
bool expect(bool holds, int line, const char *text);
#define EXPECT(condition) expect(condition, __LINE__, #condition)

/* A request and what it points to. Its child writes what it was born with into the file `path`. */
struct start {
    struct spawn_request request;
    struct spawn_result result;
    struct born born;
    const char *executables[2];
    char *argv[6];
    char path[PATH_MAX];
};

/* A request that asks for nothing but this program with a word: --tell (what it was born with), --wait (for ever). */
void prepare(struct start *start, const char *word);

/* Start it. By a mechanism that must decline it: false. */
bool started(struct start *start, bool portable);

/* Wait for a started child and read what it tells. False when that is not possible. */
bool told(struct start *start);

/* Both. */
bool born(struct start *start, bool portable);

/* A start that must fail at a step, and leave no child. */
void fails(struct start *start, int step, int error);

bool has(const unsigned long *mask, int bit);
bool only(const unsigned long *mask, int bit);
bool same_file(struct file a, struct file b);

/* The nth of the CPUs where this process may run, or the last. */
int nth_cpu(int nth);

/* A check in one.c or many.c; the name is what is printed. */
struct check {
    const char *name;
    void (*run)(void);
};

extern const struct check checks_of_one[], checks_of_many[]; /* NULL ends them */

#endif
