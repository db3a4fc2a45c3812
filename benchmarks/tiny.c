/* The smallest program there is to start: one system call, no libc, so that what is timed is the start and not the
 * program. Built with -nostdlib -static. */

__attribute__((noreturn)) void _start(void);

void
_start(void)
{
#if defined(__x86_64__)
    __asm__ volatile("syscall" : : "a"(60L), "D"(0L)); /* exit(0) */
#elif defined(__aarch64__)
    register long number __asm__("x8") = 93; /* exit(0) */
    register long status __asm__("x0") = 0;
    __asm__ volatile("svc 0" : : "r"(number), "r"(status));
#else
#error "tiny.c knows exit() on x86-64 and aarch64 only: add this machine's system call"
#endif
    __builtin_unreachable();
}
