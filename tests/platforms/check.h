/* What the checks of engine_check.c are made of. */
#ifndef RANKSPAWN_TESTS_CHECK_H
#define RANKSPAWN_TESTS_CHECK_H

#include "born.h"
#include "spawn.h"

#include <limits.h>

struct mode {
    const char *name;
    enum spawn_mechanism mechanism;
    unsigned int refused[4]; /* system calls that a seccomp filter says ENOSYS to; 0 ends them */
};

extern char **environ;

extern const struct mode *mode;
extern const char *folder;                 /* the one to work in */
extern bool honoured;                      /* clone shares memory */
extern unsigned long own_cpus[MASK_WORDS]; /* where this process may run */

extern atomic_long by_clone3; /* how many children clone3.c has made */

/* Whether clone3.c must make every child in this mode. */
bool uses_clone3(void);

/* Print a line about the current check. */
void say(const char *what, const char *format, ...) __attribute__((format(printf, 2, 3)));

/* Say why the current check cannot be made here. */
void skip(const char *why);

/* Count and print an expectation that does not hold. Returns whether it holds. */
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

/* Make a request for this program with a word: --tell (what it was born with) or --wait (for ever). */
void prepare(struct start *start, const char *word);

/* Start it. A request that is not `portable` must be declined by posix_spawn. Returns whether it was started. */
bool started(struct start *start, bool portable);

/* Wait for a started child and read what it tells. Returns false when that is not possible. */
bool told(struct start *start);

/* started() and told(). */
bool born(struct start *start, bool portable);

/* Start what must fail at a step with an errno, and leave no child. */
void fails(struct start *start, int step, int error);

bool has(const unsigned long *mask, int bit);
bool only(const unsigned long *mask, int bit);
bool same_file(struct file a, struct file b);

/* The nth of the CPUs where this process may run, or the last of them. */
int nth_cpu(int nth);

/* A check in one.c or many.c; the name is what is printed. */
struct check {
    const char *name;
    void (*run)(void);
};

extern const struct check checks_of_one[], checks_of_many[]; /* NULL ends them */

#endif
