/* clone3(2) and, in the child, the call of child_main.
 *
 * They are one piece of assembly, because a child that returned from libc's syscall() on its new stack would have no
 * frame to return to. In the parent nothing but the result register changes.
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "clone3.h"
#include "child.h"

#ifdef __linux__

#include <errno.h>
#include <sys/syscall.h>

#ifndef SYS_clone3
#define SYS_clone3 435
#endif

#if defined(__x86_64__)

long
clone3_to_child(struct clone3_args *args, void *start)
{
    long pid;
    register int (*child)(void *) __asm__("r8") = child_main;
    register void *argument __asm__("r9") = start;
    __asm__ volatile("syscall\n\t"
                     "testq %%rax, %%rax\n\t"
                     "jnz 1f\n\t"
                     "xorl %%ebp, %%ebp\n\t"
                     "movq %%r9, %%rdi\n\t"
                     "call *%%r8\n\t"
                     "hlt\n"
                     "1:"
                     : "=a"(pid)
                     : "a"((long)SYS_clone3), "D"(args), "S"(sizeof *args), "r"(child), "r"(argument)
                     : "rcx", "r11", "memory", "cc");
    return pid;
}

#elif defined(__aarch64__)

long
clone3_to_child(struct clone3_args *args, void *start)
{
    register long x0 __asm__("x0") = (long)args;
    register long x1 __asm__("x1") = (long)sizeof *args;
    register long x8 __asm__("x8") = SYS_clone3;
    register int (*child)(void *) __asm__("x9") = child_main;
    register void *argument __asm__("x10") = start;
    __asm__ volatile("svc #0\n\t"
                     "cbnz x0, 1f\n\t"
                     "mov x29, xzr\n\t"
                     "mov x0, x10\n\t"
                     "blr x9\n\t"
                     "brk #1\n"
                     "1:"
                     : "+r"(x0)
                     : "r"(x1), "r"(x8), "r"(child), "r"(argument)
                     : "memory", "cc");
    return x0;
}

#else

long
clone3_to_child(struct clone3_args *args, void *start)
{
    (void)args, (void)start;
    return -ENOSYS;
}

#endif
#endif
