/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The kernel's interface without a C library: system calls, the program's start, and functions
 * that compiled code calls.
 *
 * Calls return a negative errno on failure. x86-64 and aarch64 have all of these calls, so the wrappers work on both.
 */

#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include <asm/ioctls.h>
#include <asm/poll.h>
#include <asm/signal.h>
#include <asm/termios.h>
#include <asm/unistd.h>
#include <linux/errno.h>
#include <linux/eventpoll.h>
#include <linux/fcntl.h>
#include <linux/netlink.h>
#include <linux/prctl.h>
#include <linux/random.h>
#include <linux/sched.h>
#include <linux/time_types.h>
#include <linux/wait.h>

/* These are part of the kernel's interface, but not in its headers. */
#define AF_NETLINK 16
#define SOCK_RAW 3
#define CLOCK_REALTIME 0
#define CLOCK_MONOTONIC 1
#define SIGNAL_BYTES 8
#define SIGNALS 64

#if defined(__x86_64__)

/* The stack has argc, argv and the environment, which are not needed. It must be aligned for the first call. */
__asm__(".globl _start\n"
        "_start:\n"
        "\txor %ebp, %ebp\n"
        "\tand $-16, %rsp\n"
        "\tcall start\n");

static inline long call6(long number, long a, long b, long c, long d, long e, long f) {
        register long r10 __asm__("r10") = d;
        register long r8 __asm__("r8") = e;
        register long r9 __asm__("r9") = f;
        long result;

        __asm__ volatile("syscall"
                         : "=a"(result)
                         : "a"(number), "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8), "r"(r9)
                         : "rcx", "r11", "memory");
        return result;
}

#elif defined(__aarch64__)

__asm__(".globl _start\n"
        "_start:\n"
        "\tmov x29, #0\n"
        "\tmov x30, #0\n"
        "\tbl start\n");

static inline long call6(long number, long a, long b, long c, long d, long e, long f) {
        register long x8 __asm__("x8") = number;
        register long x0 __asm__("x0") = a;
        register long x1 __asm__("x1") = b;
        register long x2 __asm__("x2") = c;
        register long x3 __asm__("x3") = d;
        register long x4 __asm__("x4") = e;
        register long x5 __asm__("x5") = f;

        __asm__ volatile("svc #0"
                         : "+r"(x0)
                         : "r"(x8), "r"(x1), "r"(x2), "r"(x3), "r"(x4), "r"(x5)
                         : "memory");
        return x0;
}

#else
#error "the agent is made for x86-64 and aarch64"
#endif

#define call(number, a, b, c, d, e) call6(number, (long) (a), (long) (b), (long) (c), (long) (d), (long) (e), 0)

_Noreturn void start(void);

/* Compilers turn loops and assignments into calls of these functions. */

void *memcpy(void *restrict to, const void *restrict from, size_t size) {
        unsigned char *t = to;
        const unsigned char *f = from;

        while (size-- > 0)
                *t++ = *f++;
        return to;
}

void *memmove(void *to, const void *from, size_t size) {
        unsigned char *t = to;
        const unsigned char *f = from;

        if ((uintptr_t) t <= (uintptr_t) f)
                return memcpy(to, from, size);
        while (size-- > 0)
                t[size] = f[size];
        return to;
}

void *memset(void *to, int value, size_t size) {
        unsigned char *t = to;

        while (size-- > 0)
                *t++ = (unsigned char) value;
        return to;
}

int memcmp(const void *left, const void *right, size_t size) {
        const unsigned char *l = left, *r = right;

        for (; size > 0; size--, l++, r++)
                if (*l != *r)
                        return *l < *r ? -1 : 1;
        return 0;
}

size_t strlen(const char *text) {
        size_t length = 0;

        while (text[length] != '\0')
                length++;
        return length;
}

static inline bool equal(const char *left, const char *right) {
        size_t length = strlen(left);

        return length == strlen(right) && memcmp(left, right, length) == 0;
}

/* Returns the rest of a text after a prefix, or NULL if the text has another beginning. */
static inline const char *after(const char *text, const char *prefix) {
        size_t length = strlen(prefix);

        for (size_t i = 0; i < length; i++)
                if (text[i] != prefix[i])
                        return NULL;
        return text + length;
}

/* Files */

static inline int sys_openat(int directory, const char *path, int flags) {
        return (int) call(__NR_openat, directory, path, flags | O_CLOEXEC, 0, 0);
}

static inline int sys_open(const char *path, int flags) {
        return sys_openat(AT_FDCWD, path, flags);
}

static inline int sys_close(int fd) {
        return (int) call(__NR_close, fd, 0, 0, 0, 0);
}

static inline long sys_read(int fd, void *data, size_t size) {
        return call(__NR_read, fd, data, size, 0, 0);
}

static inline long sys_write(int fd, const void *data, size_t size) {
        return call(__NR_write, fd, data, size, 0, 0);
}

static inline int sys_pipe(int fds[2]) {
        return (int) call(__NR_pipe2, fds, O_CLOEXEC, 0, 0, 0);
}

/* execve does not close the copy. */
static inline int sys_dup_to(int fd, int number) {
        return (int) call(__NR_dup3, fd, number, 0, 0, 0);
}

static inline int sys_fcntl(int fd, unsigned command, unsigned long argument) {
        return (int) call(__NR_fcntl, fd, command, argument, 0, 0);
}

static inline int sys_ioctl(int fd, unsigned request, unsigned long argument) {
        return (int) call(__NR_ioctl, fd, request, argument, 0, 0);
}

static inline int sys_ioctl_pointer(int fd, unsigned request, void *argument) {
        return (int) call(__NR_ioctl, fd, request, argument, 0, 0);
}

static inline int sys_fchown(int fd, unsigned user, unsigned group) {
        return (int) call(__NR_fchown, fd, user, group, 0, 0);
}

static inline int sys_mkdir(const char *path) {
        return (int) call(__NR_mkdirat, AT_FDCWD, path, 0755, 0, 0);
}

static inline int sys_rmdir(const char *path) {
        return (int) call(__NR_unlinkat, AT_FDCWD, path, 0x200 /* AT_REMOVEDIR */, 0, 0);
}

static inline int sys_chdir(const char *path) {
        return (int) call(__NR_chdir, path, 0, 0, 0, 0);
}

static inline long sys_list(int fd, void *entries, size_t size) {
        return call(__NR_getdents64, fd, entries, size, 0, 0);
}

static inline int sys_uevents(void) {
        struct sockaddr_nl address = { .nl_family = AF_NETLINK, .nl_groups = 1 };
        int fd, r;

        fd = (int) call(__NR_socket, AF_NETLINK, SOCK_RAW | O_CLOEXEC | O_NONBLOCK, NETLINK_KOBJECT_UEVENT, 0, 0);
        if (fd < 0)
                return fd;
        r = (int) call(__NR_bind, fd, &address, sizeof address, 0, 0);
        if (r < 0) {
                sys_close(fd);
                return r;
        }
        return fd;
}

/* Waiting */

/* The timeout is in milliseconds; a negative timeout never expires. */
static inline int sys_poll(struct pollfd *fds, size_t count, long timeout) {
        struct __kernel_timespec time = { .tv_sec = timeout / 1000, .tv_nsec = timeout % 1000 * 1000000 };

        return (int) call(__NR_ppoll, fds, count, timeout < 0 ? NULL : &time, 0, SIGNAL_BYTES);
}

static inline int sys_epoll_create(void) {
        return (int) call(__NR_epoll_create1, EPOLL_CLOEXEC, 0, 0, 0, 0);
}

static inline int sys_epoll_add(int epoll, int fd, unsigned events) {
        struct epoll_event event = { .events = events, .data = (__u64) fd };

        return (int) call(__NR_epoll_ctl, epoll, EPOLL_CTL_ADD, fd, &event, 0);
}

static inline int sys_epoll_wait(int epoll, struct epoll_event *events, int count) {
        return (int) call6(__NR_epoll_pwait, epoll, (long) events, count, -1, 0, SIGNAL_BYTES);
}

static inline long now(void) {
        struct __kernel_timespec time = { 0 };

        call(__NR_clock_gettime, CLOCK_MONOTONIC, &time, 0, 0, 0);
        return (long) (time.tv_sec * 1000 + time.tv_nsec / 1000000);
}

static inline int sys_set_clock(long seconds, long nanoseconds) {
        struct __kernel_timespec time = { .tv_sec = seconds, .tv_nsec = nanoseconds };

        return (int) call(__NR_clock_settime, CLOCK_REALTIME, &time, 0, 0, 0);
}

/* Processes */

static inline _Noreturn void sys_exit(int status) {
        for (;;)
                call(__NR_exit_group, status, 0, 0, 0, 0);
}

static inline int sys_fork(void) {
        return (int) call(__NR_clone, SIGCHLD, 0, 0, 0, 0);
}

static inline int sys_fork_into_cgroup(int cgroup) {
        struct clone_args arguments = {
                .flags = CLONE_INTO_CGROUP,
                .exit_signal = SIGCHLD,
                .cgroup = (__u64) cgroup,
        };

        return (int) call(__NR_clone3, &arguments, sizeof arguments, 0, 0, 0);
}

static inline int sys_exec(const char *path, char *const *arguments, char *const *environment) {
        return (int) call(__NR_execve, path, arguments, environment, 0, 0);
}

/* Does not wait. Returns 0 if no child has ended. */
static inline int sys_reap(int *status) {
        return (int) call(__NR_wait4, -1, status, WNOHANG, 0, 0);
}

static inline int sys_kill(int pid, int signal) {
        return (int) call(__NR_kill, pid, signal, 0, 0, 0);
}

static inline int sys_getpid(void) {
        return (int) call(__NR_getpid, 0, 0, 0, 0, 0);
}

static inline int sys_getppid(void) {
        return (int) call(__NR_getppid, 0, 0, 0, 0, 0);
}

static inline int sys_setsid(void) {
        return (int) call(__NR_setsid, 0, 0, 0, 0, 0);
}

static inline int sys_prctl(int option, unsigned long argument) {
        return (int) call(__NR_prctl, option, argument, 0, 0, 0);
}

static inline int sys_schedule(int policy) {
        int priority = 0;

        return (int) call(__NR_sched_setscheduler, 0, policy, &priority, 0, 0);
}

static inline void sys_umask(unsigned mask) {
        call(__NR_umask, mask, 0, 0, 0, 0);
}

static inline int sys_become(unsigned user, unsigned group, const unsigned *groups, size_t count) {
        long r;

        r = call(__NR_setgroups, count, groups, 0, 0, 0);
        if (r >= 0)
                r = call(__NR_setgid, group, 0, 0, 0, 0);
        if (r >= 0)
                r = call(__NR_setuid, user, 0, 0, 0, 0);
        return (int) r;
}

static inline int sys_signal(int signal, __sighandler_t handler) {
        struct sigaction action = { .sa_handler = handler };

        return (int) call(__NR_rt_sigaction, signal, &action, NULL, SIGNAL_BYTES, 0);
}

static inline int sys_signal_mask(uint64_t blocked) {
        return (int) call(__NR_rt_sigprocmask, SIG_SETMASK, &blocked, NULL, SIGNAL_BYTES, 0);
}

static inline int sys_signalfd(uint64_t signals) {
        return (int) call(__NR_signalfd4, -1, &signals, SIGNAL_BYTES, O_CLOEXEC | O_NONBLOCK, 0);
}
