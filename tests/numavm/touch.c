/* Touches the memory that it is asked for, and stays until its standard input ends, so that its pages can be looked at.
 *
 * touch PAGES: prints the address of the first of PAGES anonymous pages, of the small size, all of which were written.
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

int
main(int argc, char **argv)
{
    long page = sysconf(_SC_PAGESIZE), pages = argc > 1 ? atol(argv[1]) : 1;
    char byte, *memory = mmap(NULL, (size_t)(pages * page), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) {
        return 1;
    }
    /* A huge page would lie on one node, whatever is to be spread. */
    madvise(memory, (size_t)(pages * page), MADV_NOHUGEPAGE);
    for (long i = 0; i < pages; i++) {
        memory[i * page] = 1;
    }
    printf("%p\n", (void *)memory);
    fflush(stdout);
    while (read(STDIN_FILENO, &byte, 1) > 0) {
    }
    return 0;
}
