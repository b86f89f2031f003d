/* Counts the calls by which a program changes a folder, and lets the n-th of them go wrong.
 *
 * Preloaded; nothing happens before `shim_arm`. One counter for all threads, so that n names one
 * moment of the run. Calls outside the folder are passed through uncounted.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

enum { OPEN, WRITE, SYNC, RENAME, UNLINK, MKDIR, ALLOCATE, LOCK, READ, TRUNCATE, MODE };
enum { COUNT, KILL_BEFORE, KILL_AFTER, FAIL, SHORTEN, FAIL_ALWAYS, SKIP };

static unsigned mask;
static long moment;
static int action, code;
static char folder[PATH_MAX];
static atomic_long calls;
static atomic_long by_kind[16];

void shim_arm(const char *where, unsigned kinds, long n, int what, int error)
{
    snprintf(folder, sizeof folder, "%s", where);
    atomic_store(&calls, 0);
    for (int kind = 0; kind < 16; kind++)
        atomic_store(&by_kind[kind], 0);
    moment = n, action = what, code = error;
    mask = kinds;
}

long shim_calls(void) { return atomic_load(&calls); }
long shim_calls_of(int kind) { return atomic_load(&by_kind[kind]); }

static int inside(const char *path, int fd)
{
    char resolved[PATH_MAX];
    if (path != NULL && path[0] == '/')
        return strncmp(path, folder, strlen(folder)) == 0;
    char link[64];
    snprintf(link, sizeof link, fd == AT_FDCWD ? "/proc/self/cwd" : "/proc/self/fd/%d", fd);
    ssize_t size = readlink(link, resolved, sizeof resolved - 1);
    if (size < 0)
        return 0;
    resolved[size] = 0;
    return strncmp(resolved, folder, strlen(folder)) == 0;
}

/* Returns whether the call is to fail, be shortened or be skipped. */
static int due(int kind, const char *path, int fd)
{
    if (!(mask >> kind & 1))
        return 0;
    int saved = errno, counted = inside(path, fd);
    errno = saved;
    if (!counted)
        return 0;
    atomic_fetch_add(&by_kind[kind], 1);
    long n = atomic_fetch_add(&calls, 1) + 1;
    if (action == FAIL_ALWAYS || action == SKIP)
        return 1;
    if (n != moment)
        return 0;
    if (action == KILL_BEFORE)
        kill(getpid(), SIGKILL), pause();
    return action != COUNT;
}

static void done(int was_due)
{
    if (was_due && action == KILL_AFTER)
        kill(getpid(), SIGKILL), pause();
}

#define REAL(name) \
    static __typeof__(name) *real; \
    if (real == NULL) \
        real = (__typeof__(name) *)dlsym(RTLD_NEXT, #name)

/* Passes a call on, fails it, skips it, or kills the process before or after it. */
#define AROUND(type, kind, path, fd, call) \
    int was_due = due(kind, path, fd); \
    if (was_due && (action == FAIL || action == FAIL_ALWAYS)) { \
        errno = code; \
        return -1; \
    } \
    if (was_due && action == SKIP) \
        return 0; \
    type result = call; \
    done(was_due); \
    return result

#define LESS(count) (was_due && action == SHORTEN && (count) > 1 ? (count) / 2 : (count))

static mode_t mode_of(int flags, va_list rest)
{
    return flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0;
}

#define OPENING(name) \
    int name(const char *path, int flags, ...) \
    { \
        REAL(name); \
        va_list rest; \
        va_start(rest, flags); \
        mode_t mode = mode_of(flags, rest); \
        va_end(rest); \
        AROUND(int, OPEN, path, AT_FDCWD, real(path, flags, mode)); \
    }
#define OPENING_AT(name) \
    int name(int at, const char *path, int flags, ...) \
    { \
        REAL(name); \
        va_list rest; \
        va_start(rest, flags); \
        mode_t mode = mode_of(flags, rest); \
        va_end(rest); \
        AROUND(int, OPEN, path, at, real(at, path, flags, mode)); \
    }
#define WRITING_AT(name, offset_type) \
    ssize_t name(int fd, const void *data, size_t count, offset_type offset) \
    { \
        REAL(name); \
        AROUND(ssize_t, WRITE, NULL, fd, real(fd, data, LESS(count), offset)); \
    }
#define READING_AT(name, offset_type) \
    ssize_t name(int fd, const struct iovec *parts, int count, offset_type offset) \
    { \
        REAL(name); \
        struct iovec first = parts[0]; \
        AROUND(ssize_t, READ, NULL, fd, \
               (first.iov_len = LESS(first.iov_len), real(fd, &first, 1, offset))); \
    }
#define SYNCING(name) \
    int name(int fd) \
    { \
        REAL(name); \
        AROUND(int, SYNC, NULL, fd, real(fd)); \
    }

OPENING(open)
OPENING(open64)
OPENING_AT(openat)
OPENING_AT(openat64)
WRITING_AT(pwrite, off_t)
WRITING_AT(pwrite64, off64_t)
READING_AT(preadv, off_t)
READING_AT(preadv64, off64_t)
SYNCING(fsync)
SYNCING(fdatasync)

ssize_t preadv2(int fd, const struct iovec *parts, int count, off_t offset, int flags)
{
    REAL(preadv2);
    struct iovec first = parts[0];
    AROUND(ssize_t, READ, NULL, fd,
           (first.iov_len = LESS(first.iov_len), real(fd, &first, 1, offset, flags)));
}

ssize_t preadv64v2(int fd, const struct iovec *parts, int count, off64_t offset, int flags)
{
    REAL(preadv64v2);
    struct iovec first = parts[0];
    AROUND(ssize_t, READ, NULL, fd,
           (first.iov_len = LESS(first.iov_len), real(fd, &first, 1, offset, flags)));
}

int sync_file_range(int fd, off64_t offset, off64_t count, unsigned flags)
{
    REAL(sync_file_range);
    AROUND(int, SYNC, NULL, fd, real(fd, offset, count, flags));
}

int rename(const char *from, const char *to)
{
    REAL(rename);
    AROUND(int, RENAME, from, AT_FDCWD, real(from, to));
}

int renameat(int at, const char *from, int to_at, const char *to)
{
    REAL(renameat);
    AROUND(int, RENAME, from, at, real(at, from, to_at, to));
}

int renameat2(int at, const char *from, int to_at, const char *to, unsigned flags)
{
    REAL(renameat2);
    AROUND(int, RENAME, from, at, real(at, from, to_at, to, flags));
}

int unlink(const char *path)
{
    REAL(unlink);
    AROUND(int, UNLINK, path, AT_FDCWD, real(path));
}

int unlinkat(int at, const char *path, int flags)
{
    REAL(unlinkat);
    AROUND(int, UNLINK, path, at, real(at, path, flags));
}

int rmdir(const char *path)
{
    REAL(rmdir);
    AROUND(int, UNLINK, path, AT_FDCWD, real(path));
}

int mkdir(const char *path, mode_t mode)
{
    REAL(mkdir);
    AROUND(int, MKDIR, path, AT_FDCWD, real(path, mode));
}

int chmod(const char *path, mode_t mode)
{
    REAL(chmod);
    AROUND(int, MODE, path, AT_FDCWD, real(path, mode));
}

int fchmodat(int at, const char *path, mode_t mode, int flags)
{
    REAL(fchmodat);
    AROUND(int, MODE, path, at, real(at, path, mode, flags));
}

int fallocate(int fd, int mode, off_t offset, off_t count)
{
    REAL(fallocate);
    AROUND(int, ALLOCATE, NULL, fd, real(fd, mode, offset, count));
}

int ftruncate64(int fd, off64_t size)
{
    REAL(ftruncate64);
    AROUND(int, TRUNCATE, NULL, fd, real(fd, size));
}

int ftruncate(int fd, off_t size)
{
    REAL(ftruncate);
    AROUND(int, TRUNCATE, NULL, fd, real(fd, size));
}

int flock(int fd, int operation)
{
    REAL(flock);
    AROUND(int, LOCK, NULL, fd, real(fd, operation));
}
