// A disk that fails when a test says so: preloaded, it stands between a program and libc.
//
// Calls that write below a folder are numbered, and one of them fails, or all from there on. Where
// the number is 0 they are only counted.
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

#include <atomic>
#include <string>

namespace {

std::string folder;  // empty: nothing fails
long wanted = 0;
int error = 0;  // SIGKILL's number, negated: the process dies instead
bool stays = false;
int flock_error = 0;
std::atomic<long> calls{0};
char failed[256] = "";

template <class Function>
Function original(const char* name) {
  return reinterpret_cast<Function>(dlsym(RTLD_NEXT, name));
}

bool below(const char* path) {
  return !folder.empty() && path && strncmp(path, folder.c_str(), folder.size()) == 0;
}

// The call fails; errno says why.
bool fails(const char* name, const char* path) {
  if (!below(path)) return false;
  const long number = ++calls;
  if (wanted == 0 || (stays ? number < wanted : number != wanted)) return false;
  if (number == wanted) snprintf(failed, sizeof(failed), "%s %s", name, path);
  if (error < 0) kill(getpid(), -error);
  errno = error;
  return true;
}

bool fails(const char* name, int descriptor) {
  if (folder.empty()) return false;
  char link[64], path[4096];
  snprintf(link, sizeof(link), "/proc/self/fd/%d", descriptor);
  const ssize_t length = readlink(link, path, sizeof(path) - 1);
  if (length < 0) return false;
  path[length] = 0;
  return fails(name, path);
}

bool opening_fails(const char* path, int flags) {
  return (flags & (O_CREAT | O_WRONLY | O_RDWR)) && fails("open", path);
}

mode_t mode_of(int flags, va_list arguments) {
  return flags & (O_CREAT | O_TMPFILE) ? va_arg(arguments, mode_t) : 0;
}

}  // namespace

#define CALL(name, ...) original<decltype(&name)>(#name)(__VA_ARGS__)
#define FAULTY(result, name, parameters, where, ...) \
  extern "C" result name parameters { return fails(#name, where) ? -1 : CALL(name, __VA_ARGS__); }
#define OPEN(name)                                                          \
  extern "C" int name(const char* path, int flags, ...) {                   \
    va_list arguments;                                                      \
    va_start(arguments, flags);                                             \
    const mode_t mode = mode_of(flags, arguments);                          \
    va_end(arguments);                                                      \
    return opening_fails(path, flags) ? -1 : CALL(name, path, flags, mode); \
  }
#define OPENAT(name)                                                            \
  extern "C" int name(int at, const char* path, int flags, ...) {               \
    va_list arguments;                                                          \
    va_start(arguments, flags);                                                 \
    const mode_t mode = mode_of(flags, arguments);                              \
    va_end(arguments);                                                          \
    return opening_fails(path, flags) ? -1 : CALL(name, at, path, flags, mode); \
  }

extern "C" void faulty_disk(const char* where, long number, int reason, int stay, int of_flock) {
  folder = where;
  wanted = number;
  error = reason;
  stays = stay;
  flock_error = of_flock;
  calls = 0;
}
extern "C" long faulty_disk_calls() { return calls; }
extern "C" const char* faulty_disk_failed() { return failed; }

OPEN(open)
OPEN(open64)
OPENAT(openat)
OPENAT(openat64)
FAULTY(ssize_t, write, (int to, const void* data, size_t size), to, to, data, size)
FAULTY(ssize_t, pwrite, (int to, const void* data, size_t size, off_t at), to, to, data, size, at)
FAULTY(ssize_t, pwrite64, (int to, const void* data, size_t size, off64_t at), to, to, data, size,
       at)
FAULTY(ssize_t, writev, (int to, const struct iovec* parts, int count), to, to, parts, count)
FAULTY(ssize_t, sendfile, (int to, int from, off_t* at, size_t size), to, to, from, at, size)
FAULTY(ssize_t, sendfile64, (int to, int from, off64_t* at, size_t size), to, to, from, at, size)
FAULTY(ssize_t, copy_file_range,
       (int from, off64_t* at, int to, off64_t* there, size_t size, unsigned flags), to, from, at,
       to, there, size, flags)
FAULTY(int, fsync, (int file), file, file)
FAULTY(int, fdatasync, (int file), file, file)
FAULTY(int, ftruncate, (int file, off_t size), file, file, size)
FAULTY(int, ftruncate64, (int file, off64_t size), file, file, size)
FAULTY(int, rename, (const char* from, const char* to), to, from, to)
FAULTY(int, link, (const char* from, const char* to), to, from, to)
FAULTY(int, mkdir, (const char* path, mode_t mode), path, path, mode)

// These return the error.
extern "C" int posix_fallocate(int file, off_t from, off_t size) {
  return fails("posix_fallocate", file) ? errno : CALL(posix_fallocate, file, from, size);
}
extern "C" int posix_fallocate64(int file, off64_t from, off64_t size) {
  return fails("posix_fallocate64", file) ? errno : CALL(posix_fallocate64, file, from, size);
}

extern "C" int flock(int file, int operation) {
  if (flock_error == 0) return CALL(flock, file, operation);
  errno = flock_error;
  return -1;
}
