/* The portable mechanism: libc's posix_spawn.
 *
 * Before it does anything, it declines a request that posix_spawn cannot express. It also declines one whose errors it
 * could not report as subprocess does, because posix_spawn returns one errno and does not say which step failed. Only
 * ISO C and POSIX are used, and two extensions where libc has them.
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "spawn.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <spawn.h>
#include <string.h>
#include <unistd.h>

#ifdef __linux__
#include <sys/syscall.h>
#ifndef SYS_pidfd_open
#define SYS_pidfd_open 434
#endif
#endif

#if defined(__GLIBC__) && defined(__GLIBC_PREREQ)
#if __GLIBC_PREREQ(2, 34)
#define HAVE_CLOSEFROM 1
#endif
#endif

static bool
can_express(const struct spawn_request *request)
{
    for (int i = 0; i < 3; i++) {
        const struct spawn_stream *stream = &request->streams[i];
        /* File actions cannot keep a source that is itself stream 0, 1 or 2 from being overwritten. posix_spawn would
         * report a file that cannot be opened as a failed exec; /dev/null can be opened. */
        if (stream->path ? strcmp(stream->path, "/dev/null") != 0 : stream->fd >= 0 && stream->fd < 3) {
            return false;
        }
    }
    if (request->process_group > 0 || (request->process_group == 0 && request->new_session)) {
        return false; /* setpgid can fail, and posix_spawn would report that as a failed exec */
    }
#ifndef HAVE_CLOSEFROM
    if (request->close_fds) {
        return false;
    }
#endif
#ifndef POSIX_SPAWN_SETSID
    if (request->new_session) {
        return false;
    }
#endif
    return !request->cwd && !request->pass_fds_count && request->umask < 0 && !request->set_gid && !request->set_uid &&
           request->groups_count < 0 && !request->cpu_mask && request->mem_mode < 0 && !request->death_signal &&
           request->cgroup_fd < 0 && request->guard_fd < 0;
}

static int
add_stream(posix_spawn_file_actions_t *actions, const struct spawn_stream *stream, int target)
{
    if (stream->path) {
        return posix_spawn_file_actions_addopen(actions, target, stream->path, stream->open_flags, 0666);
    }
    if (stream->fd == STREAM_SAME_AS_STDOUT) {
        return posix_spawn_file_actions_adddup2(actions, STDOUT_FILENO, target);
    }
    return stream->fd >= 0 ? posix_spawn_file_actions_adddup2(actions, stream->fd, target) : 0;
}

/* Returns 0, or an errno with the step in *step. */
static int
add_streams(posix_spawn_file_actions_t *actions, const struct spawn_request *request, int *step)
{
    for (int i = 0; i < 3; i++) {
        /* posix_spawn would report a closed descriptor as a failed exec. */
        if (!request->streams[i].path && request->streams[i].fd >= 0 && fcntl(request->streams[i].fd, F_GETFD) < 0) {
            *step = STEP_STDIN + i;
            return errno;
        }
        int error = add_stream(actions, &request->streams[i], i);
        if (error) {
            *step = STEP_STDIN + i;
            return error;
        }
    }
    for (int i = 0; i < 3; i++) {
        if (request->parent_ends[i] > STDERR_FILENO && !request->close_fds) {
            posix_spawn_file_actions_addclose(actions, request->parent_ends[i]);
        }
    }
#ifdef HAVE_CLOSEFROM
    if (request->close_fds) {
        return posix_spawn_file_actions_addclosefrom_np(actions, STDERR_FILENO + 1);
    }
#endif
    return 0;
}

static void
set_attributes(posix_spawnattr_t *attributes, const struct spawn_request *request, const sigset_t *child_mask)
{
    short flags = 0;
#ifdef POSIX_SPAWN_SETSID
    flags |= request->new_session ? POSIX_SPAWN_SETSID : 0;
#endif
    if (request->process_group >= 0) {
        flags |= POSIX_SPAWN_SETPGROUP;
        posix_spawnattr_setpgroup(attributes, request->process_group);
    }
    sigset_t restored, none;
    sigemptyset(&restored);
    sigemptyset(&none);
    if (request->restore_signals) {
        sigaddset(&restored, SIGPIPE);
        sigaddset(&restored, SIGXFSZ);
        flags |= POSIX_SPAWN_SETSIGDEF;
    }
    if (request->fresh_signals) {
        uint64_t left = request->ignored_signals;
        for (int sig = 1; left; sig++, left >>= 1) {
            if (left & 1) {
                sigaddset(&restored, sig);
            }
        }
        child_mask = &none;
        flags |= POSIX_SPAWN_SETSIGDEF;
    }
    posix_spawnattr_setsigdefault(attributes, &restored);
    if (child_mask) {
        posix_spawnattr_setsigmask(attributes, child_mask);
        flags |= POSIX_SPAWN_SETSIGMASK;
    }
    posix_spawnattr_setflags(attributes, flags);
}

static void
open_pidfd(struct spawn_result *result)
{
#ifdef __linux__
    /* The child has not been reaped: no other process can have its pid. */
    result->pidfd = (int)syscall(SYS_pidfd_open, result->pid, 0);
    result->pidfd_error = result->pidfd < 0 ? errno : 0;
#else
    result->pidfd_error = ENOSYS;
#endif
}

int
spawn_by_posix(const struct spawn_request *request, struct spawn_result *result, const sigset_t *child_mask)
{
    memset(result, 0, sizeof *result);
    result->pidfd = -1;
    if (!can_express(request)) {
        return SPAWN_DECLINED;
    }
    posix_spawn_file_actions_t actions;
    posix_spawnattr_t attributes;
    posix_spawn_file_actions_init(&actions);
    posix_spawnattr_init(&attributes);
    set_attributes(&attributes, request, child_mask);
    int step = STEP_CLONE, telling = 0;
    int error = add_streams(&actions, request, &step);
    if (!error) {
        for (const char *const *candidate = request->executables; *candidate; candidate++) {
            step = STEP_EXEC;
            error = posix_spawn(&result->pid, *candidate, &actions, &attributes, request->argv, request->envp);
            if (!error) {
                break;
            }
            if (error != ENOENT && error != ENOTDIR && !telling) {
                telling = error;
            }
        }
    }
    posix_spawnattr_destroy(&attributes);
    posix_spawn_file_actions_destroy(&actions);
    if (error) {
        result->error = telling ? telling : error;
        result->step = result->error == EAGAIN || result->error == ENOMEM ? STEP_CLONE : step;
        return SPAWN_FAILED;
    }
    open_pidfd(result);
    return SPAWN_STARTED;
}
