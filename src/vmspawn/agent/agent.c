/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * vmspawn's agent: runs commands in the guest for the host (docs/agent.md has the protocol).
 *
 * The host plugs virtio-serial ports into the machine. The control port carries messages; each command has its own
 * ports for its streams and its status. The agent reads messages and forks a supervisor for each command. The
 * supervisor runs the command on pipes or a terminal, moves bytes between these and the ports, and reports the end. A
 * supervisor depends only on its ports, so commands outlive an agent that is killed and started again.
 *
 * The host is trusted, commands are not. No memory is allocated: every message, table and buffer has a bound.
 */

#include "kernel.h"

#define VERSION "1"
#define CAPABILITIES "tty,resize,signal,hangup,shell,fork"

#define CONTROL_PORT "io.vmspawn.agent"
#define COMMAND_PORT "io.vmspawn.exec."

/* These bounds are the same in protocol.py. */
#define MESSAGE_MAX (512 * 1024)
#define WORDS_MAX (32 * 1024)
#define ENVIRONMENT_MAX 1024
#define NAME_MAX 64

/* The maximum number of commands that run at once. */
#define RUNS_MAX 64

/* Milliseconds within which the ports of a command must appear, and killed processes must die. */
#define PORTS_TIMEOUT 10000
#define KILL_TIMEOUT 5000

/* Milliseconds within which the host must make room for an answer. */
#define ANSWER_TIMEOUT 1000

/* The exit status of a supervisor that did not get the ports of its command. */
#define WITHOUT_PORTS 1

/* The maximum size of one write to a virtio-serial port. */
#define BUFFER_SIZE (32 * 1024)

/* The size of a pipe for output. A command can write that much before the supervisor has to run. */
#define PIPE_SIZE (256 * 1024)

#define PATH_SIZE 4096
#define GROUPS_MAX 64
#define DEFAULT_PATH "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

/* The ports of a set. A terminal uses the port of stdin in both directions. */
enum { STDIN, STDOUT, STDERR, STATUS, PORTS };

static const char *const port_names[PORTS] = { "stdin", "stdout", "stderr", "status" };

/* A command that the host requests. All text is in the buffer of the message. */
struct request {
        const char *id;
        const char *ports; /* The set of ports of the command */
        const char *user;
        const char *directory;
        bool terminal;
        bool input;
        unsigned rows, columns;
        char **arguments; /* Ends with NULL; empty for the user's shell */
        size_t argument_count;
};

/* A running command. */
struct run {
        char id[NAME_MAX + 1];
        int supervisor; /* 0 if this entry is free */
        int orders;
};

/* An order from the agent to a supervisor. It is so small that a write to a pipe is atomic. */
struct order {
        enum { RESIZE, SIGNAL, CLOSE, HANG_UP } kind;
        unsigned first, second;
};

/* ---- Text ---- */

/* One line for the host. It is truncated if it is too long. */
struct text {
        char data[512];
        size_t length;
};

static void add_byte(struct text *text, char byte) {
        if (text->length < sizeof text->data)
                text->data[text->length++] = byte;
}

static void add_word(struct text *text, const char *word) {
        for (; *word != '\0'; word++)
                add_byte(text, *word);
        add_byte(text, ' ');
}

static void add_number(struct text *text, uint64_t number) {
        char digits[21];
        size_t position = sizeof digits - 1;

        digits[position] = '\0';
        do
                digits[--position] = (char) ('0' + number % 10);
        while ((number /= 10) > 0);
        add_word(text, digits + position);
}

static void add_end(struct text *text) {
        add_byte(text, ';');
        add_byte(text, '\n');
}

/* Parses a text of digits. Returns false for any other text, and for a number above the bound. */
static bool parse_number(const char *text, unsigned bound, unsigned *number) {
        uint64_t value = 0;

        if (*text == '\0')
                return false;
        for (; *text != '\0'; text++) {
                if (*text < '0' || *text > '9')
                        return false;
                value = value * 10 + (uint64_t) (*text - '0');
                if (value > bound)
                        return false;
        }
        *number = (unsigned) value;
        return true;
}

static int hex_digit(char digit) {
        if (digit >= '0' && digit <= '9')
                return digit - '0';
        if (digit >= 'a' && digit <= 'f')
                return digit - 'a' + 10;
        return -1;
}

/* Decodes a word in place: %xx is a byte other than NUL, and a lone % is the empty word. */
static bool decode(char *word) {
        char *to = word;

        if (equal(word, "%")) {
                *word = '\0';
                return true;
        }
        while (*word != '\0') {
                int high, low;

                if (*word != '%') {
                        *to++ = *word++;
                        continue;
                }
                if ((high = hex_digit(word[1])) < 0 || (low = hex_digit(word[2])) < 0 || (high | low) == 0)
                        return false;
                *to++ = (char) (high << 4 | low);
                word += 3;
        }
        *to = '\0';
        return true;
}

/* Appends to a path, which stays terminated. Returns false if it does not fit. */
static bool append(char path[PATH_SIZE], size_t *length, const char *text, size_t size) {
        if (size >= PATH_SIZE - *length)
                return false;
        memcpy(path + *length, text, size);
        *length += size;
        path[*length] = '\0';
        return true;
}

static bool join(char path[PATH_SIZE], const char *first, const char *second, const char *third) {
        size_t length = 0;

        return append(path, &length, first, strlen(first)) && append(path, &length, second, strlen(second)) &&
                append(path, &length, third, strlen(third));
}

/* ---- Files that consist of lines ---- */

struct lines {
        int fd;
        char data[4096];
        size_t start, end;
        bool skip;
};

static bool lines_open(struct lines *lines, const char *path) {
        lines->fd = sys_open(path, O_RDONLY);
        lines->start = lines->end = 0;
        lines->skip = false;
        return lines->fd >= 0;
}

/* Makes room and reads more. Returns false at the end of the file. */
static bool lines_fill(struct lines *lines) {
        long n;

        if (lines->start == 0 && lines->end == sizeof lines->data) {
                /* The line is longer than any useful line: skip it. */
                lines->skip = true;
                lines->end = 0;
        }
        memmove(lines->data, lines->data + lines->start, lines->end - lines->start);
        lines->end -= lines->start;
        lines->start = 0;
        n = sys_read(lines->fd, lines->data + lines->end, sizeof lines->data - lines->end);
        if (n == 0 && lines->end > 0) {
                /* The last line has no line feed. */
                lines->data[lines->end++] = '\n';
                return true;
        }
        if (n <= 0)
                return false;
        lines->end += (size_t) n;
        return true;
}

/* Returns the next line without its line feed, valid until the next call, or NULL after the last line. */
static char *lines_next(struct lines *lines) {
        do {
                for (size_t i = lines->start; i < lines->end; i++) {
                        char *line = lines->data + lines->start;

                        if (lines->data[i] != '\n')
                                continue;
                        lines->data[i] = '\0';
                        lines->start = i + 1;
                        if (!lines->skip)
                                return line;
                        lines->skip = false;
                }
        } while (lines_fill(lines));
        return NULL;
}

static void lines_close(struct lines *lines) {
        sys_close(lines->fd);
}

/* Returns the next field, and moves *text past the field's separator. Returns NULL after the last field. */
static char *next_field(char **text, char separator) {
        char *field = *text, *end = field;

        if (field == NULL)
                return NULL;
        while (*end != '\0' && *end != separator)
                end++;
        *text = *end == '\0' ? NULL : end + 1;
        *end = '\0';
        return field;
}

/* ---- Users ---- */

struct user {
        char name[256], home[1024], shell[1024];
        unsigned id, group;
        unsigned groups[GROUPS_MAX];
        size_t group_count;
};

static void copy(char *to, size_t size, const char *from) {
        size_t length = strlen(from);

        if (length >= size)
                length = size - 1;
        memcpy(to, from, length);
        to[length] = '\0';
}

/* Parses a line of /etc/passwd if it is the line of the requested user. */
static bool user_from_line(struct user *user, char *line, const char *wanted) {
        char *fields[7];
        unsigned id, group;

        for (size_t i = 0; i < 7; i++)
                if ((fields[i] = next_field(&line, ':')) == NULL)
                        return false;
        if (!parse_number(fields[2], UINT32_MAX - 1, &id) || !parse_number(fields[3], UINT32_MAX - 1, &group))
                return false;
        if (!equal(fields[0], wanted) && !equal(fields[2], wanted))
                return false;
        copy(user->name, sizeof user->name, fields[0]);
        copy(user->home, sizeof user->home, fields[5]);
        copy(user->shell, sizeof user->shell, *fields[6] == '\0' ? "/bin/sh" : fields[6]);
        user->id = id;
        user->group = group;
        return true;
}

static bool user_from_file(struct user *user, const char *wanted) {
        struct lines lines;
        bool found = false;
        char *line;

        if (!lines_open(&lines, "/etc/passwd"))
                return false;
        while (!found && (line = lines_next(&lines)) != NULL)
                found = user_from_line(user, line, wanted);
        lines_close(&lines);
        return found;
}

static bool is_member(char *members, const char *name) {
        char *member;

        while ((member = next_field(&members, ',')) != NULL)
                if (equal(member, name))
                        return true;
        return false;
}

/* Collects the groups that name the user as a member. */
static void user_groups(struct user *user) {
        struct lines lines;
        char *line;

        user->groups[0] = user->group;
        user->group_count = 1;
        if (!lines_open(&lines, "/etc/group"))
                return;
        while (user->group_count < GROUPS_MAX && (line = lines_next(&lines)) != NULL) {
                unsigned id;
                char *number;

                next_field(&line, ':');
                next_field(&line, ':');
                number = next_field(&line, ':');
                if (number != NULL && line != NULL && parse_number(number, UINT32_MAX - 1, &id) &&
                    id != user->group && is_member(line, user->name))
                        user->groups[user->group_count++] = id;
        }
        lines_close(&lines);
}

/* Finds a user by name or number. Neither root nor a number needs an entry in /etc/passwd. */
static bool user_find(struct user *user, const char *wanted) {
        if (user_from_file(user, wanted)) {
                user_groups(user);
                return true;
        }
        if (equal(wanted, "root"))
                user->id = 0;
        else if (!parse_number(wanted, UINT32_MAX - 1, &user->id))
                return false;
        copy(user->name, sizeof user->name, wanted);
        copy(user->home, sizeof user->home, user->id == 0 ? "/root" : "/");
        copy(user->shell, sizeof user->shell, "/bin/sh");
        user->group = user->id;
        user->groups[0] = user->group;
        user->group_count = 1;
        return true;
}

/* ---- Ports ---- */

struct directory_entry {
        uint64_t inode;
        int64_t offset;
        uint16_t size;
        uint8_t type;
        char name[];
};

/* Calls the function with each entry of a directory. Returns false if the directory does not exist. */
static bool each_entry(const char *path, void (*function)(const char *entry, void *data), void *data) {
        _Alignas(struct directory_entry) char entries[2048];
        int fd = sys_open(path, O_RDONLY | O_DIRECTORY);
        long n;

        if (fd < 0)
                return false;
        while ((n = sys_list(fd, entries, sizeof entries)) > 0)
                for (long at = 0; at < n;) {
                        const struct directory_entry *entry = (const void *) (entries + at);

                        function(entry->name, data);
                        at += entry->size;
                }
        sys_close(fd);
        return true;
}

/* Reads a small file as one line. Returns false if it is missing or too long. */
static bool read_line(const char *path, char *line, size_t size) {
        int fd = sys_open(path, O_RDONLY);
        long n;

        if (fd < 0)
                return false;
        n = sys_read(fd, line, size - 1);
        sys_close(fd);
        if (n <= 0)
                return false;
        line[n] = '\0';
        for (char *end = line; *end != '\0'; end++)
                if (*end == '\n')
                        *end = '\0';
        return true;
}

static int open_device(const char *entry) {
        char path[PATH_SIZE];

        if (!join(path, "/dev/", entry, ""))
                return -ENAMETOOLONG;
        return sys_open(path, O_RDWR | O_NONBLOCK | O_NOCTTY);
}

/* A search for the ports of a set, or for the control port. */
struct search {
        const char *set; /* NULL for the control port */
        int fds[PORTS]; /* -1 until opened; the control port is the first */
};

static void search_entry(const char *entry, void *data) {
        struct search *search = data;
        char path[PATH_SIZE], name[128];
        const char *rest;

        if (after(entry, "vport") == NULL || !join(path, "/sys/class/virtio-ports/", entry, "/name") ||
            !read_line(path, name, sizeof name))
                return;
        if (search->set == NULL) {
                if (search->fds[0] < 0 && equal(name, CONTROL_PORT))
                        search->fds[0] = open_device(entry);
                return;
        }
        if ((rest = after(name, COMMAND_PORT)) == NULL || (rest = after(rest, search->set)) == NULL || *rest++ != '.')
                return;
        for (size_t i = 0; i < PORTS; i++)
                if (search->fds[i] < 0 && equal(rest, port_names[i]))
                        search->fds[i] = open_device(entry);
}

/*
 * Waits until the kernel announces a device, or the time has passed. Callers pass a short time, because a device gets
 * its node and its name one after the other.
 */
static void wait_for_uevent(int uevents, long milliseconds) {
        struct pollfd poll = { .fd = uevents, .events = POLLIN };
        char message[2048];

        if (sys_poll(&poll, 1, milliseconds) <= 0)
                return;
        while (sys_read(uevents, message, sizeof message) > 0)
                ;
}

static void close_fd(int *fd) {
        if (*fd >= 0)
                sys_close(*fd);
        *fd = -1;
}

static short poll_now(int fd, short events) {
        struct pollfd poll = { .fd = fd, .events = events };

        return sys_poll(&poll, 1, 0) < 0 ? POLLERR : poll.revents;
}

/*
 * Returns whether the ports that a command needs are open and connected. A port that is not connected yet reports
 * POLLHUP, as a port whose other end was closed does.
 */
static bool ports_ready(const struct request *request, const int fds[PORTS]) {
        const bool wanted[PORTS] = {
                [STDIN] = request->terminal || request->input,
                [STDOUT] = !request->terminal,
                [STDERR] = !request->terminal,
                [STATUS] = true,
        };

        for (size_t i = 0; i < PORTS; i++)
                if (wanted[i] && (fds[i] < 0 || (poll_now(fds[i], POLLOUT) & POLLHUP) != 0))
                        return false;
        return true;
}

static bool open_ports(const struct request *request, int fds[PORTS]) {
        struct search search = { .set = request->ports, .fds = { -1, -1, -1, -1 } };
        int uevents = -1;
        long deadline = now() + PORTS_TIMEOUT;
        bool ready;

        for (;;) {
                each_entry("/sys/class/virtio-ports", search_entry, &search);
                ready = ports_ready(request, search.fds);
                if (ready || now() > deadline)
                        break;
                if (uevents < 0)
                        uevents = sys_uevents();
                else
                        wait_for_uevent(uevents, 20);
        }
        close_fd(&uevents);
        memcpy(fds, search.fds, sizeof search.fds);
        return ready;
}

static int open_control(void) {
        struct search search = { .set = NULL, .fds = { -1 } };
        int uevents = sys_uevents();

        /* Wait at most a second: the kernel does not announce that another agent has closed the port. */
        while (each_entry("/sys/class/virtio-ports", search_entry, &search), search.fds[0] < 0)
                wait_for_uevent(uevents, 1000);
        sys_close(uevents);
        return search.fds[0];
}

/* ---- The command ---- */

/* The reason why a command could not be started, sent through a pipe. The pipe closes when the command runs. */
struct failure {
        unsigned code;
        int error;
        char what[16];
};

static struct failure failed(unsigned code, int error, const char *what) {
        struct failure failure = { .code = code, .error = error < 0 ? -error : error };

        copy(failure.what, sizeof failure.what, what);
        return failure;
}

static char *environment[ENVIRONMENT_MAX + 8];
static size_t environment_count;

static const char *environment_get(const char *name) {
        const char *rest;

        for (size_t i = 0; i < environment_count; i++)
                if ((rest = after(environment[i], name)) != NULL && *rest == '=')
                        return rest + 1;
        return NULL;
}

/* Writes NAME=VALUE to `storage` and adds it to the environment, unless the host has set the variable. */
static void environment_default(char *storage, size_t size, const char *name, const char *value) {
        size_t length = strlen(name);

        if (environment_get(name) != NULL)
                return;
        copy(storage, size, name);
        copy(storage + length, size - length, "=");
        copy(storage + length + 1, size - length - 1, value);
        environment[environment_count++] = storage;
}

static void environment_complete(const struct user *user, bool terminal) {
        static char home[1200], name[300], logname[300], shell[1200], term[16];
        static char path[] = DEFAULT_PATH;

        environment_default(home, sizeof home, "HOME", user->home);
        environment_default(name, sizeof name, "USER", user->name);
        environment_default(logname, sizeof logname, "LOGNAME", user->name);
        environment_default(shell, sizeof shell, "SHELL", user->shell);
        if (terminal)
                environment_default(term, sizeof term, "TERM", "vt220");
        if (environment_get("PATH") == NULL)
                environment[environment_count++] = path;
        environment[environment_count] = NULL;
}

/* Executes a file. A file in a format that the kernel does not know is a shell script, as in a shell. */
static int execute_file(const char *path, char **arguments, size_t count) {
        static char *script[WORDS_MAX + 3];
        int r;

        r = sys_exec(path, arguments, environment);
        if (r != -ENOEXEC)
                return r;
        script[0] = (char *) "sh";
        script[1] = (char *) path;
        for (size_t i = 1; i <= count; i++)
                script[i + 1] = arguments[i];
        return sys_exec("/bin/sh", script, environment);
}

/* Tries one directory after the other. Reports "Permission denied" only if no other directory has the program. */
static int execute_from_path(char **arguments, size_t count) {
        const char *at = environment_get("PATH");
        int denied = 0;

        for (;;) {
                char path[PATH_SIZE];
                size_t length = 0, end = 0;
                int r = -ENOENT;

                while (at[end] != '\0' && at[end] != ':')
                        end++;
                if (append(path, &length, at, end) && (end == 0 || append(path, &length, "/", 1)) &&
                    append(path, &length, arguments[0], strlen(arguments[0])))
                        r = execute_file(path, arguments, count);
                if (r == -EACCES)
                        denied = r;
                else if (r != -ENOENT && r != -ENOTDIR)
                        return r;
                if (at[end] == '\0')
                        return denied != 0 ? denied : -ENOENT;
                at += end + 1;
        }
}

static int execute(char **arguments, size_t count) {
        if (*arguments[0] == '\0')
                return -ENOENT;
        for (const char *name = arguments[0]; *name != '\0'; name++)
                if (*name == '/')
                        return execute_file(arguments[0], arguments, count);
        return execute_from_path(arguments, count);
}

/* Executes a login shell: its name begins with a dash. */
static int execute_shell(const struct user *user) {
        static char name[sizeof user->shell + 1];
        char *arguments[] = { name, NULL };
        const char *base = user->shell;

        for (const char *at = user->shell; *at != '\0'; at++)
                if (*at == '/')
                        base = at + 1;
        copy(name, sizeof name, "-");
        copy(name + 1, sizeof name - 1, base);
        return execute_file(user->shell, arguments, 1);
}

/* Changes to the requested directory, which must exist, or to the home directory, which may be missing. */
static int change_directory(const struct request *request, const struct user *user) {
        if (request->directory != NULL)
                return sys_chdir(request->directory);
        return sys_chdir(user->home) < 0 ? sys_chdir("/") : 0;
}

/* Resets all signals: the agent or its parent may ignore or block some of them. */
static void reset_signals(void) {
        for (int signal = 1; signal <= SIGNALS; signal++)
                if (signal != SIGKILL && signal != SIGSTOP)
                        sys_signal(signal, SIG_DFL);
        sys_signal_mask(0);
}

/* ---- The supervisor ---- */

/*
 * Moves bytes between a port and a pipe or terminal of the command. Both descriptors are -1 in a closed pump. The port
 * stays open: until the host has closed its end, no other command may use it.
 */
struct pump {
        int from, to;
        bool input; /* From the port */
        bool last;  /* The host sends no more */
        size_t start, end;
        uint64_t total;
        uint64_t limit; /* Bytes that are still to be read */
        unsigned char data[BUFFER_SIZE];
};

static struct pump pumps[3];

struct supervisor {
        const struct request *request;
        int pid;
        int command;           /* The process; 0 after its end */
        int ports[PORTS];      /* -1 for a missing port */
        int terminal;          /* Our side, or -1 */
        int terminal_far_side; /* The command's side, kept open until the command ends, or -1 */
        int failure;           /* Pipe, until the command runs, or -1 */
        int orders;            /* Pipe, or -1 after the agent's end */
        int signals;
        int wait_status;
        char cgroup[PATH_SIZE]; /* Empty if there is none */
};

static void pump_open(struct pump *pump, int from, int to, bool input) {
        pump->from = from;
        pump->to = to;
        pump->input = input;
        pump->limit = UINT64_MAX;
}

static void pump_close(struct pump *pump) {
        close_fd(pump->input ? &pump->to : &pump->from);
        pump->from = pump->to = -1;
        pump->start = pump->end = 0;
}

static bool pump_is_empty(const struct pump *pump) {
        return pump->start == pump->end;
}

/*
 * Polls for bytes, or for room to write them. A reader that has closed its end is noticed in both cases. The source is
 * not polled while bytes wait to be written, because its POLLHUP would end every poll at once.
 */
static void pump_wait(const struct pump *pump, struct pollfd poll[2]) {
        bool empty = pump_is_empty(pump);

        poll[0] = (struct pollfd) { .fd = empty ? pump->from : -1, .events = POLLIN };
        poll[1] = (struct pollfd) { .fd = pump->to, .events = empty ? 0 : POLLOUT };
}

static void pump_read(struct pump *pump) {
        size_t size = pump->limit < sizeof pump->data ? (size_t) pump->limit : sizeof pump->data;
        long n = size == 0 ? 0 : sys_read(pump->from, pump->data, size);

        if (n == -EINTR || (n == -EAGAIN && !pump->last))
                return;
        if (n <= 0) {
                /* End of file, or an error that means the same: a terminal whose other side is closed returns EIO. */
                pump_close(pump);
                return;
        }
        pump->start = 0;
        pump->end = (size_t) n;
        if (pump->limit != UINT64_MAX)
                pump->limit -= (uint64_t) n;
}

/* Returns false if the reader has closed its end. */
static bool pump_write(struct pump *pump) {
        long n = sys_write(pump->to, pump->data + pump->start, pump->end - pump->start);

        if (n == -EAGAIN || n == -EINTR)
                return true;
        if (n < 0) {
                pump_close(pump);
                return false;
        }
        pump->start += (size_t) n;
        pump->total += (uint64_t) n;
        return true;
}

/*
 * Moves bytes until reading or writing would block. Moves at most as many bytes as a pipe holds, so that the other
 * streams get their turn. Returns false if the reader has closed its end.
 *
 * splice(2) would copy less, but it passes empty buffers of a pipe to QEMU, which then stops the controller. If a
 * command's write(2) fails, it leaves an empty buffer in the pipe.
 */
static bool pump_move(struct pump *pump) {
        for (size_t moved = 0; moved < PIPE_SIZE; moved += sizeof pump->data) {
                if (pump_is_empty(pump))
                        pump_read(pump);
                if (pump_is_empty(pump))
                        return true;
                if (!pump_write(pump))
                        return false;
                if (!pump_is_empty(pump))
                        return true;
        }
        return true;
}

/* Sends a line to the status port. The host always reads that port, so the port has room unless the host is gone. */
static void report(int port, struct text *line) {
        add_end(line);
        sys_write(port, line->data, line->length);
}

static void report_failure(int port, struct failure failure) {
        struct text line = { .length = 0 };

        add_word(&line, "error");
        add_number(&line, failure.code);
        add_number(&line, (uint64_t) failure.error);
        add_word(&line, failure.what);
        report(port, &line);
}

static void report_start(const struct supervisor *supervisor) {
        struct text line = { .length = 0 };

        add_word(&line, "started");
        add_number(&line, (uint64_t) supervisor->command);
        report(supervisor->ports[STATUS], &line);
}

/* Reports the command's end and the number of bytes that were written. The host may not have read all of them. */
static void report_end(const struct supervisor *supervisor) {
        struct text line = { .length = 0 };
        int status = supervisor->wait_status, signal = status & 0x7f;

        add_word(&line, signal != 0 ? "signal" : "exit");
        add_number(&line, (uint64_t) (signal != 0 ? signal : status >> 8 & 0xff));
        add_number(&line, pumps[STDOUT].total);
        add_number(&line, pumps[STDERR].total);
        report(supervisor->ports[STATUS], &line);
}

/* Reports that the command has closed its input. */
static void report_closed(const struct supervisor *supervisor) {
        struct text line = { .length = 0 };

        add_word(&line, "closed");
        add_word(&line, "stdin");
        report(supervisor->ports[STATUS], &line);
}

/* Kills a process if its parent is this one. */
static void kill_child(const char *entry, void *data) {
        char path[PATH_SIZE], line[512], *end = NULL, *field;
        unsigned pid, parent, self = *(unsigned *) data;

        if (!parse_number(entry, INT32_MAX, &pid) || !join(path, "/proc/", entry, "/stat") ||
            !read_line(path, line, sizeof line))
                return;
        /* The name, in parentheses, may contain anything; after it come the state and the parent. */
        for (char *at = line; *at != '\0'; at++)
                if (*at == ')')
                        end = at;
        if (end == NULL || end[1] != ' ')
                return;
        end += 2;
        next_field(&end, ' ');
        field = next_field(&end, ' ');
        if (field != NULL && parse_number(field, INT32_MAX, &parent) && parent == self)
                sys_kill((int) pid, SIGKILL);
}

/* Reaps ended children. Returns false if there are no children. */
static bool reap(struct supervisor *supervisor) {
        int pid, status;

        while ((pid = sys_reap(&status)) > 0)
                if (pid == supervisor->command) {
                        supervisor->command = 0;
                        supervisor->wait_status = status;
                }
        return pid == 0;
}

static bool write_file(const char *path, const char *content) {
        int fd = sys_open(path, O_WRONLY);
        long n;

        if (fd < 0)
                return false;
        n = sys_write(fd, content, strlen(content));
        sys_close(fd);
        return n >= 0;
}

/*
 * Kills the command and all processes that it started.
 *
 * If the command has a control group, killing the group kills its processes. Processes outside the group become
 * children of the supervisor when their parents end. So killing all children until none is left also kills these
 * processes, whatever their sessions are.
 */
static void kill_all(struct supervisor *supervisor) {
        unsigned self = (unsigned) sys_getpid();
        long deadline = now() + KILL_TIMEOUT;
        char path[PATH_SIZE];

        if (supervisor->command > 0)
                sys_kill(-supervisor->command, SIGKILL);
        if (*supervisor->cgroup != '\0' && join(path, supervisor->cgroup, "/cgroup.kill", ""))
                write_file(path, "1");
        while (reap(supervisor) && now() < deadline) {
                struct pollfd poll = { .fd = supervisor->signals, .events = POLLIN };
                char information[1024];

                each_entry("/proc", kill_child, &self);
                sys_poll(&poll, 1, 100);
                while (sys_read(supervisor->signals, information, sizeof information) > 0)
                        ;
        }
}

/* Finds the agent's own control group in a line such as "0::/system.slice/vmspawn-agent.service". */
static bool own_cgroup(char path[PATH_SIZE]) {
        struct lines lines;
        bool found = false;
        char *line;

        if (!lines_open(&lines, "/proc/self/cgroup"))
                return false;
        while (!found && (line = lines_next(&lines)) != NULL) {
                const char *name = after(line, "0::");

                found = name != NULL && join(path, "/sys/fs/cgroup", equal(name, "/") ? "" : name, "");
        }
        lines_close(&lines);
        return found;
}

/* Makes a control group for the command. If that fails, the command has none. */
static void make_cgroup(struct supervisor *supervisor) {
        char own[PATH_SIZE];

        if (!own_cgroup(own) || !join(supervisor->cgroup, own, "/vmspawn-", supervisor->request->id) ||
            sys_mkdir(supervisor->cgroup) < 0)
                *supervisor->cgroup = '\0';
}

/*
 * Forks into the control group, if the command has one. If the kernel cannot do that, the command gets no group: moving
 * a process later would take 10 ms, and kernels before 5.14 cannot kill a group anyway.
 */
static int fork_into_cgroup(struct supervisor *supervisor) {
        int group = *supervisor->cgroup == '\0' ? -1 : sys_open(supervisor->cgroup, O_RDONLY | O_DIRECTORY), r;

        if (group >= 0) {
                r = sys_fork_into_cgroup(group);
                if (r >= 0) {
                        sys_close(group);
                        return r;
                }
                sys_close(group);
                sys_rmdir(supervisor->cgroup);
        }
        *supervisor->cgroup = '\0';
        return sys_fork();
}

static void remove_cgroup(const struct supervisor *supervisor) {
        /* This fails while children of the command still run in the background, because they keep the group. */
        if (*supervisor->cgroup != '\0')
                sys_rmdir(supervisor->cgroup);
}

static bool is_hung_up(int port) {
        return port < 0 || (poll_now(port, 0) & (POLLHUP | POLLERR)) != 0;
}

/*
 * Ends this process when the host has closed its end of all ports. If another command got the ports earlier, its
 * supervisor would see the host close them, and would kill that command.
 */
static _Noreturn void leave(struct supervisor *supervisor) {
        for (size_t i = 0; i < 3; i++)
                pump_close(&pumps[i]);
        close_fd(&supervisor->terminal);
        for (size_t i = 0; i < PORTS; i++)
                while (!is_hung_up(supervisor->ports[i])) {
                        struct pollfd poll = { .fd = supervisor->ports[i] };

                        sys_poll(&poll, 1, -1);
                }
        sys_exit(0);
}

static _Noreturn void hang_up(struct supervisor *supervisor) {
        kill_all(supervisor);
        remove_cgroup(supervisor);
        leave(supervisor);
}

static int set_size(int terminal, unsigned rows, unsigned columns) {
        struct winsize size = { .ws_row = (unsigned short) rows, .ws_col = (unsigned short) columns };

        return sys_ioctl_pointer(terminal, TIOCSWINSZ, &size);
}

static void handle_order(struct supervisor *supervisor) {
        struct order order;
        long n = sys_read(supervisor->orders, &order, sizeof order);

        if (n == -EAGAIN || n == -EINTR)
                return;
        if (n != sizeof order) {
                close_fd(&supervisor->orders);
                return;
        }
        switch (order.kind) {
        case RESIZE:
                if (supervisor->terminal >= 0)
                        set_size(supervisor->terminal, order.first, order.second);
                break;
        case SIGNAL:
                if (supervisor->command > 0)
                        sys_kill(-supervisor->command, (int) order.first);
                break;
        case CLOSE:
                if (order.first == STDIN)
                        pumps[STDIN].last = true;
                else
                        pump_close(&pumps[order.first]);
                break;
        case HANG_UP:
                hang_up(supervisor);
        }
}

/* The command's process closes this pipe when it runs the command, or writes the reason to it if that fails. */
static void handle_failure(struct supervisor *supervisor) {
        struct failure failure;
        long n = sys_read(supervisor->failure, &failure, sizeof failure);

        if (n == -EAGAIN || n == -EINTR)
                return;
        close_fd(&supervisor->failure);
        if (n != sizeof failure) {
                report_start(supervisor);
                return;
        }
        report_failure(supervisor->ports[STATUS], failure);
        hang_up(supervisor);
}

/* Limits the output to the bytes that were written before the command's end. */
static void limit_output(struct supervisor *supervisor) {
        close_fd(&supervisor->terminal_far_side);
        for (size_t i = STDOUT; i <= STDERR; i++) {
                struct pump *pump = &pumps[i];
                int size = 0;

                if (pump->from < 0)
                        continue;
                /* A terminal does not report how much was written, but it holds less than this. */
                if (supervisor->terminal >= 0)
                        pump->limit = 4 * BUFFER_SIZE;
                else if (sys_ioctl_pointer(pump->from, FIONREAD, &size) >= 0)
                        pump->limit = (uint64_t) size;
        }
}

static void handle_signals(struct supervisor *supervisor) {
        char information[1024];
        bool running = supervisor->command > 0;

        while (sys_read(supervisor->signals, information, sizeof information) > 0)
                ;
        reap(supervisor);
        if (running && supervisor->command == 0)
                limit_output(supervisor);
}

/* Returns whether all output of the ended command was sent. Later output of its children is not sent. */
static bool output_is_done(void) {
        for (size_t i = STDOUT; i <= STDERR; i++) {
                struct pump *pump = &pumps[i];

                if (pump->from >= 0 && pump_is_empty(pump) &&
                    (pump->limit == 0 || (poll_now(pump->from, POLLIN) & POLLIN) == 0))
                        pump_close(pump);
                if (pump->from >= 0)
                        return false;
        }
        return true;
}

static void handle_pumps(struct supervisor *supervisor, const struct pollfd *polls) {
        for (size_t i = 0; i < 3; i++) {
                short readable = polls[2 * i].revents, writable = polls[2 * i + 1].revents;
                bool taken = true;

                if ((writable & (POLLHUP | POLLERR)) != 0) {
                        pump_close(&pumps[i]);
                        taken = false;
                } else if (writable != 0 || readable != 0 || (pumps[i].last && pumps[i].from >= 0))
                        taken = pump_move(&pumps[i]);
                if (i == STDIN && !taken && supervisor->terminal < 0 && supervisor->command > 0)
                        report_closed(supervisor);
        }
}

/* Executes the command in this process, which was forked for it. Returns only if that fails. */
static struct failure run_command(const struct supervisor *supervisor, const struct user *user, const int streams[3]) {
        const struct request *request = supervisor->request;
        int r;

        sys_setsid();
        reset_signals();
        sys_umask(022);
        for (int i = 0; i < 3; i++)
                if ((r = sys_dup_to(streams[i], i)) < 0)
                        return failed(125, r, "streams");
        if (request->terminal && (r = sys_ioctl(0, TIOCSCTTY, 0)) < 0)
                return failed(125, r, "terminal");
        if ((r = sys_become(user->id, user->group, user->groups, user->group_count)) < 0)
                return failed(125, r, "user");
        /* Ends the command if the supervisor is killed. A change of user would clear this, so it comes afterwards. */
        sys_prctl(PR_SET_PDEATHSIG, SIGKILL);
        if (sys_getppid() != supervisor->pid)
                return failed(125, ECHILD, "supervisor");
        if ((r = change_directory(request, user)) < 0)
                return failed(125, r, "chdir");
        environment_complete(user, request->terminal);
        r = request->argument_count == 0 ? execute_shell(user) : execute(request->arguments, request->argument_count);
        return failed(r == -ENOENT || r == -ENOTDIR ? 127 : 126, r, "exec");
}

/* Serves the command until its end, and until all of its output is written. */
static void serve(struct supervisor *supervisor) {
        while (supervisor->command > 0 || !output_is_done()) {
                struct pollfd polls[10];

                for (size_t i = 0; i < 3; i++)
                        pump_wait(&pumps[i], polls + 2 * i);
                polls[6] = (struct pollfd) { .fd = supervisor->signals, .events = POLLIN };
                polls[7] = (struct pollfd) { .fd = supervisor->orders, .events = POLLIN };
                polls[8] = (struct pollfd) { .fd = supervisor->failure, .events = POLLIN };
                /* Only POLLHUP: the host has unplugged the port, or is gone. */
                polls[9] = (struct pollfd) { .fd = supervisor->ports[STATUS] };
                if (sys_poll(polls, 10, -1) < 0)
                        continue;
                if (polls[9].revents != 0)
                        hang_up(supervisor);
                if (polls[8].revents != 0)
                        handle_failure(supervisor);
                if (polls[7].revents != 0)
                        handle_order(supervisor);
                if (polls[6].revents != 0)
                        handle_signals(supervisor);
                handle_pumps(supervisor, polls);
        }
}

static int set_nonblocking(int fd) {
        return sys_fcntl(fd, F_SETFL, O_NONBLOCK);
}

/* Makes a pipe between the supervisor, whose end does not block, and the command, whose end belongs to its user. */
static int open_pipe(int *ours, int *theirs, bool input, const struct user *user) {
        int fds[2], r;

        if ((r = sys_pipe(fds)) < 0)
                return r;
        *ours = fds[input ? 1 : 0];
        *theirs = fds[input ? 0 : 1];
        if ((r = set_nonblocking(*ours)) < 0)
                return r;
        /* Otherwise the command could not open /dev/stdout. */
        return user->id == 0 ? 0 : sys_fchown(*theirs, user->id, user->group);
}

static int open_pipes(const struct request *request, const int ports[PORTS], const struct user *user, int streams[3]) {
        int ours, r;

        if (!request->input) {
                if ((streams[0] = sys_open("/dev/null", O_RDONLY)) < 0)
                        return streams[0];
        } else {
                if ((r = open_pipe(&ours, &streams[0], true, user)) < 0)
                        return r;
                pump_open(&pumps[STDIN], ports[STDIN], ours, true);
        }
        for (int i = STDOUT; i <= STDERR; i++) {
                if ((r = open_pipe(&ours, &streams[i], false, user)) < 0)
                        return r;
                pump_open(&pumps[i], ours, ports[i], false);
                /* The pipe keeps its size if this fails. */
                sys_fcntl(ours, F_SETPIPE_SZ, PIPE_SIZE);
        }
        return 0;
}

/*
 * Makes a terminal for the command. All three streams of the command are the terminal's far side. Each pump gets its
 * own descriptor of the supervisor's side, which the pump closes.
 */
static int open_terminal(struct supervisor *supervisor, int port, const struct user *user, int streams[3]) {
        const struct request *request = supervisor->request;
        int terminal, far, r, unlock = 0;

        if ((terminal = sys_open("/dev/ptmx", O_RDWR | O_NOCTTY | O_NONBLOCK)) < 0)
                return terminal;
        if ((r = sys_ioctl_pointer(terminal, TIOCSPTLCK, &unlock)) < 0)
                return r;
        if ((far = sys_ioctl(terminal, TIOCGPTPEER, O_RDWR | O_NOCTTY | O_CLOEXEC)) < 0)
                return far;
        if ((r = sys_fchown(far, user->id, (unsigned) -1)) < 0 ||
            (r = set_size(terminal, request->rows, request->columns)) < 0)
                return r;
        supervisor->terminal = terminal;
        supervisor->terminal_far_side = far;
        streams[0] = streams[1] = streams[2] = far;
        pump_open(&pumps[STDIN], port, sys_fcntl(terminal, F_DUPFD_CLOEXEC, 0), true);
        pump_open(&pumps[STDOUT], sys_fcntl(terminal, F_DUPFD_CLOEXEC, 0), port, false);
        if (pumps[STDIN].to < 0 || pumps[STDOUT].from < 0)
                return -EMFILE;
        return 0;
}

/*
 * Forks the command. The supervisor closes its copies of the command's ends of the pipes, so that the pipes close when
 * the command ends.
 */
static struct failure start_command(struct supervisor *supervisor, const struct user *user, const int streams[3]) {
        int pipe[2], r;

        if ((r = sys_pipe(pipe)) < 0)
                return failed(125, r, "pipe");
        if ((r = fork_into_cgroup(supervisor)) < 0)
                return failed(125, r, "fork");
        if (r == 0) {
                struct failure failure = run_command(supervisor, user, streams);

                sys_write(pipe[1], &failure, sizeof failure);
                sys_exit(1);
        }
        supervisor->command = r;
        supervisor->failure = pipe[0];
        sys_close(pipe[1]);
        if (supervisor->terminal < 0)
                for (size_t i = 0; i < 3; i++)
                        sys_close(streams[i]);
        return (struct failure) { 0 };
}

/* Prepares and forks the command. A code of 0 is success. */
static struct failure prepare(struct supervisor *supervisor) {
        const struct request *request = supervisor->request;
        static struct user user;
        int streams[3], r;

        /* Orphans of the command become children of this process (see kill_all). */
        if ((r = sys_prctl(PR_SET_CHILD_SUBREAPER, 1)) < 0)
                return failed(125, r, "subreaper");
        if (!user_find(&user, request->user))
                return failed(125, ENOENT, "user");
        if (request->terminal) {
                if ((r = open_terminal(supervisor, supervisor->ports[STDIN], &user, streams)) < 0)
                        return failed(125, r, "terminal");
        } else if ((r = open_pipes(request, supervisor->ports, &user, streams)) < 0)
                return failed(125, r, "streams");
        make_cgroup(supervisor);
        return start_command(supervisor, &user, streams);
}

/* Runs a command to its end in this process, which was forked for it. Exits with WITHOUT_PORTS if ports are missing. */
static _Noreturn void supervise(const struct request *request, int orders, int signals) {
        static struct supervisor supervisor;
        struct failure failure;

        supervisor = (struct supervisor) {
                .request = request,
                .pid = sys_getpid(),
                .terminal = -1,
                .terminal_far_side = -1,
                .failure = -1,
                .orders = orders,
                .signals = signals,
        };
        for (size_t i = 0; i < 3; i++)
                pumps[i].from = pumps[i].to = -1;
        /* A writing command keeps the processor until its pipe is full, because switching processes is expensive. */
        sys_schedule(SCHED_BATCH | SCHED_RESET_ON_FORK);
        if (!open_ports(request, supervisor.ports))
                sys_exit(WITHOUT_PORTS);
        failure = prepare(&supervisor);
        if (failure.code != 0) {
                report_failure(supervisor.ports[STATUS], failure);
                hang_up(&supervisor);
        }
        serve(&supervisor);
        report_end(&supervisor);
        remove_cgroup(&supervisor);
        leave(&supervisor);
}

/* ---- The agent ---- */

static struct {
        int control;
        int epoll;
        int signals;
        bool connected;
        bool skip; /* The rest of a line that is too long */
        char session[NAME_MAX + 1];
        char line[MESSAGE_MAX];
        size_t length;
        struct run runs[RUNS_MAX];
} agent;

static char *words[WORDS_MAX + 1];

/*
 * Sends a line. Waits for room, because many lines may fill the port for a moment. The line is lost if the host reads
 * nothing within ANSWER_TIMEOUT, or is gone.
 */
static void answer(struct text *line) {
        struct pollfd poll = { .fd = agent.control, .events = POLLOUT };

        add_end(line);
        while (sys_write(agent.control, line->data, line->length) == -EAGAIN)
                if (sys_poll(&poll, 1, ANSWER_TIMEOUT) <= 0 || (poll.revents & POLLOUT) == 0)
                        return;
}

/* Names in answers come from the host and are checked, so they need no encoding. */
static void answer_word(const char *kind, const char *word) {
        struct text line = { .length = 0 };

        add_word(&line, kind);
        add_word(&line, word);
        answer(&line);
}

static void answer_refused(const char *id, int error, const char *what) {
        struct text line = { .length = 0 };

        add_word(&line, "refused");
        add_word(&line, id);
        add_number(&line, (uint64_t) error);
        add_word(&line, what);
        answer(&line);
}

static void answer_ready(const char *nonce) {
        struct text line = { .length = 0 };

        add_word(&line, "ready");
        add_word(&line, nonce);
        add_word(&line, VERSION);
        add_number(&line, (uint64_t) sys_getpid());
        add_word(&line, CAPABILITIES);
        answer(&line);
}

/* Identifiers and nonces consist of a-z, 0-9 and dashes, and do not begin with a dash. */
static bool is_name(const char *text) {
        size_t length = strlen(text);

        if (length == 0 || length > NAME_MAX || *text == '-')
                return false;
        for (; *text != '\0'; text++)
                if (!(*text >= 'a' && *text <= 'z') && !(*text >= '0' && *text <= '9') && *text != '-')
                        return false;
        return true;
}

static struct run *find_run(const char *id) {
        for (size_t i = 0; i < RUNS_MAX; i++)
                if (agent.runs[i].supervisor != 0 && equal(agent.runs[i].id, id))
                        return &agent.runs[i];
        return NULL;
}

static struct run *free_run(void) {
        for (size_t i = 0; i < RUNS_MAX; i++)
                if (agent.runs[i].supervisor == 0)
                        return &agent.runs[i];
        return NULL;
}

/* Closes the agent's files in the supervisor, above all the control port, which only one process can open. */
static void forget_agent(void) {
        close_fd(&agent.control);
        close_fd(&agent.epoll);
        for (size_t i = 0; i < RUNS_MAX; i++)
                if (agent.runs[i].supervisor != 0)
                        sys_close(agent.runs[i].orders);
}

/* Starts a supervisor. Returns 0 or an error. */
static int start_run(struct run *run, const struct request *request) {
        int pipe[2], r;

        if ((r = sys_pipe(pipe)) < 0)
                return r;
        if ((r = set_nonblocking(pipe[0])) < 0 || (r = set_nonblocking(pipe[1])) < 0 || (r = sys_fork()) < 0) {
                sys_close(pipe[0]);
                sys_close(pipe[1]);
                return r;
        }
        if (r == 0) {
                sys_close(pipe[1]);
                forget_agent();
                supervise(request, pipe[0], agent.signals);
        }
        sys_close(pipe[0]);
        run->supervisor = r;
        run->orders = pipe[1];
        copy(run->id, sizeof run->id, request->id);
        return 0;
}

/* Parses "ROWS,COLUMNS". */
static bool parse_size(const char *text, unsigned *rows, unsigned *columns) {
        char numbers[16], *rest = numbers, *first;

        if (strlen(text) >= sizeof numbers)
                return false;
        copy(numbers, sizeof numbers, text);
        first = next_field(&rest, ',');
        return rest != NULL && parse_number(first, UINT16_MAX, rows) && parse_number(rest, UINT16_MAX, columns);
}

/* Parses one option of a command. Returns false if it is unknown or invalid. */
static bool parse_option(struct request *request, char *option) {
        const char *value;

        if (equal(option, "stdin"))
                return request->input = true;
        if ((value = after(option, "tty=")) != NULL)
                return request->terminal = parse_size(value, &request->rows, &request->columns);
        if ((value = after(option, "user=")) != NULL)
                return *(request->user = value) != '\0';
        if ((value = after(option, "cwd=")) != NULL)
                return *(request->directory = value) != '\0';
        if ((value = after(option, "env=")) != NULL && environment_count < ENVIRONMENT_MAX) {
                environment[environment_count++] = (char *) value;
                return true;
        }
        return false;
}

/* Parses the words after the set of ports: options, "--", and the command's arguments. */
static bool parse_request(struct request *request, char **word, size_t count) {
        size_t i;

        environment_count = 0;
        for (i = 0; i < count && !equal(word[i], "--"); i++)
                if (!parse_option(request, word[i]))
                        return false;
        if (i == count)
                return false;
        request->arguments = word + i + 1;
        request->argument_count = count - i - 1;
        return true;
}

static void handle_run(char **word, size_t count) {
        struct request request = { .id = word[1], .ports = word[3], .user = "root" };
        struct run *run = free_run();
        int r;

        if (!equal(word[2], agent.session) || *agent.session == '\0')
                answer_refused(word[1], ESTALE, "session");
        else if (find_run(word[1]) != NULL)
                answer_refused(word[1], EEXIST, "id");
        else if (run == NULL)
                answer_refused(word[1], EAGAIN, "commands");
        else if (!is_name(word[3]) || !parse_request(&request, word + 4, count - 4))
                answer_refused(word[1], EINVAL, "options");
        else if ((r = start_run(run, &request)) < 0)
                answer_refused(word[1], -r, "fork");
}

static void send_order(const char *id, struct order order) {
        struct run *run = find_run(id);

        /* If the pipe is full, the supervisor is stuck, and another order has no effect. */
        if (run == NULL || sys_write(run->orders, &order, sizeof order) < 0)
                answer_refused(id, ESRCH, "id");
}

struct port_count {
        const char *set;
        unsigned number;
};

static void count_entry(const char *entry, void *data) {
        struct port_count *count = data;
        char path[PATH_SIZE], name[128];
        const char *rest;

        if (after(entry, "vport") != NULL && join(path, "/sys/class/virtio-ports/", entry, "/name") &&
            read_line(path, name, sizeof name) && (rest = after(name, COMMAND_PORT)) != NULL &&
            (rest = after(rest, count->set)) != NULL && *rest == '.')
                count->number++;
}

static void answer_count(const char *kind, const char *set, unsigned number) {
        struct text line = { .length = 0 };

        add_word(&line, kind);
        add_word(&line, set);
        add_number(&line, number);
        answer(&line);
}

/* Reports the number of ports of a set that the kernel knows. */
static void handle_ports(const char *set) {
        struct port_count count = { .set = set };

        each_entry("/sys/class/virtio-ports", count_entry, &count);
        answer_count("ports", set, count.number);
}

/* Reports the number of ports of a set that are connected to the host and used by no command. */
static void handle_connected(const char *set) {
        struct search search = { .set = set, .fds = { -1, -1, -1, -1 } };
        unsigned number = 0;

        each_entry("/sys/class/virtio-ports", search_entry, &search);
        for (size_t i = 0; i < PORTS; i++) {
                if (search.fds[i] >= 0 && (poll_now(search.fds[i], POLLOUT) & POLLHUP) == 0)
                        number++;
                close_fd(&search.fds[i]);
        }
        answer_count("connected", set, number);
}

/* Begins a session. The host of the last session is gone, so its commands are killed. */
static void handle_sync(const char *nonce) {
        if (!equal(nonce, agent.session))
                for (size_t i = 0; i < RUNS_MAX; i++)
                        if (agent.runs[i].supervisor != 0)
                                send_order(agent.runs[i].id, (struct order) { .kind = HANG_UP });
        copy(agent.session, sizeof agent.session, nonce);
        answer_ready(nonce);
}

/* Makes the kernel mix a text into its random numbers, and draw new keys at once. */
static int reseed(const char *text) {
        struct {
                struct rand_pool_info information;
                char data[NAME_MAX];
        } entropy = { .information = { .buf_size = (int) strlen(text) } };
        int fd, r;

        /* Each character of a hexadecimal number counts for half a byte. */
        entropy.information.entropy_count = entropy.information.buf_size * 4;
        memcpy(entropy.data, text, strlen(text));
        if ((fd = sys_open("/dev/random", O_WRONLY)) < 0)
                return fd;
        r = sys_ioctl_pointer(fd, RNDADDENTROPY, &entropy);
        if (r >= 0)
                r = sys_ioctl(fd, RNDRESEEDCRNG, 0);
        sys_close(fd);
        return r;
}

/* Handles a fork: this machine is a copy, whose random numbers must differ and whose clock has the time of the save. */
static void handle_fork(const char *seed, unsigned seconds, unsigned nanoseconds) {
        int r;

        if ((r = reseed(seed)) < 0)
                answer_refused(seed, -r, "seed");
        else if ((r = sys_set_clock((long) seconds, (long) nanoseconds)) < 0)
                answer_refused(seed, -r, "clock");
        else
                answer_word("forked", seed);
}

static bool parse_stream(const char *name, unsigned *stream) {
        for (*stream = STDIN; *stream <= STDERR; ++*stream)
                if (equal(name, port_names[*stream]))
                        return true;
        return false;
}

/* Returns whether a message has this first word, a valid name, and a number of words within the bounds. */
static bool is_message(char **word, size_t count, const char *kind, size_t least, size_t most) {
        return count >= least && count <= most && equal(word[0], kind) && is_name(word[1]);
}

static void handle_words(char **word, size_t count) {
        unsigned first, second;

        if (is_message(word, count, "sync", 2, 2))
                handle_sync(word[1]);
        else if (is_message(word, count, "ping", 2, 2))
                answer_word("pong", word[1]);
        else if (is_message(word, count, "ports", 2, 2))
                handle_ports(word[1]);
        else if (is_message(word, count, "connected", 2, 2))
                handle_connected(word[1]);
        else if (is_message(word, count, "run", 5, WORDS_MAX))
                handle_run(word, count);
        else if (is_message(word, count, "hangup", 2, 2))
                send_order(word[1], (struct order) { .kind = HANG_UP });
        else if (is_message(word, count, "close", 3, 3) && parse_stream(word[2], &first))
                send_order(word[1], (struct order) { .kind = CLOSE, .first = first });
        else if (is_message(word, count, "signal", 3, 3) && parse_number(word[2], SIGNALS, &first) && first > 0)
                send_order(word[1], (struct order) { .kind = SIGNAL, .first = first });
        else if (is_message(word, count, "resize", 4, 4) && parse_number(word[2], UINT16_MAX, &first) &&
                 parse_number(word[3], UINT16_MAX, &second))
                send_order(word[1], (struct order) { .kind = RESIZE, .first = first, .second = second });
        else if (is_message(word, count, "fork", 4, 4) && parse_number(word[2], UINT32_MAX, &first) &&
                 parse_number(word[3], 999999999, &second))
                handle_fork(word[1], first, second);
        else
                answer_refused("-", EBADMSG, "message");
}

/* Splits a line at single spaces and decodes the words. The last word must be ";", the mark of a complete line. */
static void handle_line(char *line) {
        char *rest = line, *word;
        size_t count = 0;

        while ((word = next_field(&rest, ' ')) != NULL) {
                if (count == WORDS_MAX || (rest == NULL) != equal(word, ";") || !decode(word)) {
                        answer_refused("-", EBADMSG, "message");
                        return;
                }
                words[count++] = word;
        }
        words[--count] = NULL;
        handle_words(words, count);
}

/* Handles the complete lines in the buffer. The bytes from `position` on are new. */
static void handle_input(size_t position) {
        size_t start = 0;

        for (; position < agent.length; position++) {
                if (agent.line[position] != '\n')
                        continue;
                agent.line[position] = '\0';
                /* Hosts send an empty line first, to end the unfinished message of an earlier host. */
                if (!agent.skip && position > start)
                        handle_line(agent.line + start);
                agent.skip = false;
                start = position + 1;
        }
        agent.length -= start;
        memmove(agent.line, agent.line + start, agent.length);
        if (agent.length == MESSAGE_MAX) {
                if (!agent.skip)
                        answer_refused("-", EMSGSIZE, "message");
                agent.skip = true;
                agent.length = 0;
        }
}

/* Forgets the partial message and the session of a host that has disconnected. */
static void disconnect(void) {
        agent.connected = false;
        agent.skip = false;
        agent.length = 0;
        agent.session[0] = '\0';
}

static void open_control_port(void) {
        agent.control = open_control();
        /* Edge-triggered: without a host, the port is always in POLLHUP, and only a change matters. POLLOUT shows that
         * a host is connected. */
        if (sys_epoll_add(agent.epoll, agent.control, EPOLLIN | EPOLLOUT | EPOLLET) < 0)
                sys_exit(1);
        disconnect();
}

/* Reads all available input. Returns an error if the port is gone. */
static long read_control(void) {
        for (;;) {
                long n = sys_read(agent.control, agent.line + agent.length, MESSAGE_MAX - agent.length);
                size_t before = agent.length;

                if (n == -EINTR)
                        continue;
                /* The agent may read a host's first bytes before the kernel reports that the host has connected. */
                if (n == 0 && agent.connected)
                        disconnect();
                if (n <= 0)
                        return n;
                agent.length += (size_t) n;
                handle_input(before);
        }
}

static void handle_control(unsigned events) {
        long r;

        if ((events & EPOLLHUP) == 0 && !agent.connected) {
                agent.connected = true;
                /* A host that has begun a session would take a dash for a restart of the agent. */
                answer_ready(*agent.session == '\0' ? "-" : agent.session);
        }
        r = read_control();
        if (r < 0 && r != -EAGAIN) {
                /* The port was unplugged. */
                close_fd(&agent.control);
                open_control_port();
        }
}

/* Reports the end of a supervisor, whose ports are closed in any case. */
static void answer_end(const char *id, int status) {
        if (status == 0)
                answer_word("done", id);
        else if (status == WITHOUT_PORTS << 8)
                answer_refused(id, ETIMEDOUT, "ports");
        else
                answer_word("lost", id);
}

/* Forgets supervisors that have ended. */
static void handle_children(void) {
        char information[1024];
        int pid, status;

        while (sys_read(agent.signals, information, sizeof information) > 0)
                ;
        while ((pid = sys_reap(&status)) > 0)
                for (size_t i = 0; i < RUNS_MAX; i++)
                        if (agent.runs[i].supervisor == pid) {
                                agent.runs[i].supervisor = 0;
                                close_fd(&agent.runs[i].orders);
                                answer_end(agent.runs[i].id, status);
                        }
}

/* Opens the descriptors 0 to 2 if the parent has closed them, so that no other file gets these numbers. */
static void take_standard_streams(void) {
        int fd;

        do
                fd = sys_open("/", O_RDONLY | O_DIRECTORY);
        while (fd >= 0 && fd <= 2);
        sys_close(fd);
}

_Noreturn void start(void) {
        const uint64_t child = UINT64_C(1) << (SIGCHLD - 1);

        take_standard_streams();
        sys_setsid();
        /* A write to a closed pipe returns an error instead. */
        sys_signal(SIGPIPE, SIG_IGN);
        if (sys_signal_mask(child) < 0 || (agent.signals = sys_signalfd(child)) < 0 ||
            (agent.epoll = sys_epoll_create()) < 0 || sys_epoll_add(agent.epoll, agent.signals, EPOLLIN) < 0)
                sys_exit(1);
        open_control_port();
        for (;;) {
                struct epoll_event event = { 0 };

                if (sys_epoll_wait(agent.epoll, &event, 1) <= 0)
                        continue;
                if ((int) event.data == agent.signals)
                        handle_children();
                else
                        handle_control(event.events);
        }
}
