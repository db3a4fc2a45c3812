/* Sleeps argv[1] milliseconds, writes the CLOCK_MONOTONIC nanosecond at which it is about to exit to stdout (eight
 * bytes, this machine's order), and exits. How late a parent learns of the end is counted from there. */

#define _GNU_SOURCE
#include <stdint.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

int
main(int argc, char **argv)
{
    long milliseconds = argc > 1 ? strtol(argv[1], NULL, 10) : 0;
    struct timespec pause = {milliseconds / 1000, milliseconds % 1000 * 1000000};
    struct timespec now;

    nanosleep(&pause, NULL);
    clock_gettime(CLOCK_MONOTONIC, &now);
    uint64_t nanoseconds = (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
    _exit(write(STDOUT_FILENO, &nanoseconds, sizeof nanoseconds) == sizeof nanoseconds ? 0 : 1);
}
