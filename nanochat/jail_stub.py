"""What runs inside the jail: it locks itself in, then runs a program.

nanochat/execution.py starts this file in a fresh interpreter with a job as JSON on stdin. The restrictions are applied
here, before the program's first line, because the interpreter needs some of what they take away to start, and because
code between fork and exec is not safe in a parent with threads. The first line on the report pipe says which of them
the machine gave; without seccomp the program runs only if the job says `unsafe`.

A job may connect its program to another one: `serve` answers calls of a function that the program defines, `call` puts
a function into it whose calls are answered elsewhere. Values cross as text and are made anew on the other side.

System call numbers: Linux, asm/unistd_64.h for x86_64 and asm-generic/unistd.h for aarch64; structures:
linux/landlock.h, linux/seccomp.h, linux/filter.h, linux/capability.h.
"""

import builtins
import ctypes
import errno
import json
import os
import resource
import struct
import sys
from collections.abc import Callable
from typing import Any

MAX_MESSAGE = 1 << 20  # bytes of one call or one answer
NOBODY = 65534  # the user and group that programs run as where the caller is root
CAP_DAC_READ_SEARCH = 1 << 2
PR_SET_KEEPCAPS, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 8, 22, 38
LANDLOCK_CREATE, LANDLOCK_ADD_RULE, LANDLOCK_RESTRICT = 444, 445, 446  # the same on all machines
FILE_RIGHTS = (1 << 13) - 1  # all that its first ABI knows; the filter refuses what later ones added
READ_FILE, READ_DIR = 1 << 2, 1 << 3

MACHINES = {"x86_64": (0xC000003E, 0), "aarch64": (0xC00000B7, 1)}  # audit architecture, column of the tables below
LAST_CALL = 423  # what is newer (io_uring, clone3, openat2, pidfd_open, ...) answers as on a kernel that has not got it

# Refused: what reaches other processes, the network or the kernel's larger doors, what changes files or directories,
# and memory that no limit counts. What needs a capability fails by itself. Numbers on x86_64 and on aarch64.
REFUSED = """
    fork 57 -, vfork 58 -, clone 56 220, execve 59 221, execveat 322 281, unshare 272 97, setns 308 268,
    kill 62 129, tkill 200 130, tgkill 234 131, rt_sigqueueinfo 129 138, rt_tgsigqueueinfo 297 240,
    ptrace 101 117, process_vm_readv 310 270, process_vm_writev 311 271, kcmp 312 272, setsid 112 157, setpgid 109 154,
    setpriority 141 140, ioprio_set 251 30, sched_setaffinity 203 122, sched_setparam 142 118,
    sched_setscheduler 144 119, sched_setattr 314 274, migrate_pages 256 238, move_pages 279 239,
    socket 41 198, socketpair 53 199, memfd_create 319 279, io_setup 206 0, sync 162 81, syncfs 306 267,
    shmget 29 194, shmat 30 196, semget 64 190, msgget 68 186, mq_open 240 180, mq_unlink 241 181,
    unlink 87 -, unlinkat 263 35, rmdir 84 -, rename 82 -, renameat 264 38, renameat2 316 276, creat 85 -,
    mkdir 83 -, mkdirat 258 34, mknod 133 -, mknodat 259 33, symlink 88 -, symlinkat 266 36, link 86 -, linkat 265 37,
    chmod 90 -, fchmod 91 52, fchmodat 268 53, chown 92 -, lchown 94 -, fchown 93 55, fchownat 260 54,
    utime 132 -, utimes 235 -, futimesat 261 -, utimensat 280 88, truncate 76 45, flock 73 32,
    setxattr 188 5, lsetxattr 189 6, fsetxattr 190 7, removexattr 197 14, lremovexattr 198 15, fremovexattr 199 16,
    name_to_handle_at 303 264, open_by_handle_at 304 265, inotify_add_watch 254 27, fanotify_init 300 262,
    mount 165 40, umount2 166 39, pivot_root 155 41, chroot 161 51, bpf 321 280, perf_event_open 298 241,
    userfaultfd 323 282, add_key 248 217, request_key 249 218, keyctl 250 219, personality 135 92, modify_ldt 154 -
"""
# Refused when the argument of that index, under the mask, is that value (or, with !=, is not).
REFUSED_ARGUMENTS = [
    ("fcntl 72 25", 1, 0xFFFFFFFF, "==", 8),  # F_SETOWN: a signal for another process when a pipe has data
    ("fcntl 72 25", 1, 0xFFFFFFFF, "==", 10),  # F_SETSIG
    ("fcntl 72 25", 1, 0xFFFFFFFF, "==", 15),  # F_SETOWN_EX
    ("prlimit64 302 261", 0, 0xFFFFFFFF, "!=", 0),  # another process's limits
    ("open 2 -", 1, 0o1103, "!=", 0),  # any but O_RDONLY without O_CREAT and O_TRUNC
    ("openat 257 56", 2, 0o1103, "!=", 0),
]

libc = ctypes.CDLL(None, use_errno=True)


def main() -> None:
    job = json.load(sys.stdin)
    null = os.open("/dev/null", os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    layers, missing = lock_in(job["limits"])
    run = not missing or job["unsafe"]
    os.write(job["report"], json.dumps([layers, None if run else missing]).encode() + b"\n")
    if run:
        run_program(job)


def run_program(job: dict[str, Any]) -> None:
    """Run the job's code as __main__, or as a module if its function is to be served; then serve that, or report that
    its end was reached.
    """
    name = "program" if "serve" in job else "__main__"
    module = sys.modules["__main__"] = sys.modules[name] = type(sys)(name)
    sys.argv[:] = [job["name"]]
    if "call" in job:
        name, calls, answers = job["call"]
        module.__dict__[name] = remote(calls, answers)
    if "serve" in job:
        os.close(job["report"])
    exec(compile(job["code"], job["name"], "exec"), module.__dict__)
    if "serve" in job:
        name, calls, answers = job["serve"]
        serve(module.__dict__[name], calls, answers)
    else:
        os.write(job["report"], b"passed\n")


# ---------------------------------------------------------------------------
# Calls between two programs, a line of JSON each


def remote(calls: int, answers: int) -> Callable[..., Any]:
    """A function that the process at the other end computes. It raises what that says was raised, if it is a built-in
    exception, else RuntimeError; StopIteration counts as none, because a loop would take it for its end. An answer that
    is no answer ends this process at once: the tests cannot catch that.
    """
    reader = os.fdopen(answers, "rb")

    def function(*args: Any, **kwargs: Any) -> Any:
        call = json.dumps(encode((args, kwargs))).encode() + b"\n"
        try:
            os.write(calls, call)
            raised, answer = json.loads(reader.readline(MAX_MESSAGE))
            value = decode(answer)
            kind = getattr(builtins, raised or "", RuntimeError)
        except Exception as error:
            print(f"no answer from the program: {type(error).__name__}", file=sys.stderr, flush=True)
            os._exit(1)
        if raised is None:
            return value
        known = isinstance(kind, type) and issubclass(kind, Exception)
        raise (kind if known and not issubclass(kind, StopIteration | StopAsyncIteration) else RuntimeError)(value)

    return function


def serve(function: Callable[..., Any], calls: int, answers: int) -> None:
    """Answer calls with [None, value] or [name of the exception, what it says], until there are no more."""
    with open(calls, "rb") as reader:
        for line in reader:
            try:
                args, kwargs = decode(json.loads(line))
                answer = json.dumps([None, encode(function(*args, **kwargs))])
            except Exception as error:
                answer = json.dumps([type(error).__name__, str(error)[:1000]])
            os.write(answers, answer.encode() + b"\n")


KINDS: tuple[Any, ...] = (list, tuple, dict, set, frozenset, bytes, complex)


def encode(value: Any) -> Any:
    """A value as JSON: containers, bytes and complex numbers as [kind, items], the others as themselves. What is of a
    subclass (a Counter, a named tuple) becomes what it is a subclass of. TypeError for anything else.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    for kind in KINDS:
        if isinstance(value, kind):
            items = value.items() if kind is dict else (value.real, value.imag) if kind is complex else value
            return [kind.__name__, [encode(item) for item in items]]
    raise TypeError(f"{type(value).__name__} is none of the types that can be returned to the tests")


def decode(data: Any) -> Any:
    """The value, of built-in types alone, that encode made this of. Raises errors of all kinds for other data."""
    if not isinstance(data, list):
        return data
    name, items = data
    kind = {kind.__name__: kind for kind in KINDS}[name]
    values = [decode(item) for item in items]
    return kind(*values) if kind is complex else kind(values)


# ---------------------------------------------------------------------------
# The restrictions


def lock_in(limits: dict[str, int]) -> tuple[list[str], str | None]:
    """Give up what can be given up. Returns (what that was, why that is too little or None): no seccomp, no jail."""
    layers = ["own session"]
    for name, value in limits.items():
        layers += set_limit(name, value)
    machine = MACHINES.get(os.uname().machine) if sys.platform == "linux" and sys.maxsize > 1 << 32 else None
    if not machine:
        return layers, f"{sys.platform} on {os.uname().machine}: seccomp is used on Linux with x86_64 or aarch64"
    ruleset = landlock_rules()
    layers += give_up_root()
    if libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0:
        return layers, "the kernel refuses no_new_privs"
    if ruleset is not None:
        check(libc.syscall(LANDLOCK_RESTRICT, ruleset, 0))
        os.close(ruleset)
        layers.append("Landlock")
    if not install(program_filter(*machine)):
        return layers, f"the kernel refuses a seccomp filter ({os.strerror(ctypes.get_errno())})"
    return [*layers, "seccomp"], None


def set_limit(name: str, value: int) -> list[str]:
    kind = getattr(resource, name, None)
    if kind is None:
        return []
    hard = resource.getrlimit(kind)[1]
    limit = value if hard == resource.RLIM_INFINITY else min(value, hard)
    try:
        resource.setrlimit(kind, (limit, limit))
    except (OSError, ValueError):  # macOS knows RLIMIT_AS and refuses it
        return []
    return [name]


def landlock_rules() -> int | None:
    """A ruleset: of all files, read Python's and the system's libraries. None where the kernel has no Landlock."""
    ruleset = libc.syscall(LANDLOCK_CREATE, struct.pack("Q", FILE_RIGHTS), ctypes.c_long(8), 0)
    if ruleset < 0:
        return None
    library = os.path.dirname(os.path.dirname(os.__file__))  # /usr/lib of /usr/lib/python3.11/os.py
    for path in (library, "/lib", "/lib64", "/usr/lib", "/usr/lib64", "/etc/ld.so.cache", "/dev/urandom", "/dev/null"):
        try:
            fd = os.open(path, os.O_PATH)
        except FileNotFoundError:
            continue
        rights = READ_FILE | READ_DIR if os.path.isdir(path) else READ_FILE
        check(libc.syscall(LANDLOCK_ADD_RULE, ruleset, 1, struct.pack("=Qi", rights, fd), 0))
        os.close(fd)
    return int(ruleset)


def give_up_root() -> list[str]:
    """Root becomes nobody, and every capability goes; but where only root may enter the directories above Python
    (/root), reading past permissions stays, and Landlock says what may be read.
    """
    layers = []
    if os.geteuid() == 0:
        try:
            libc.prctl(PR_SET_KEEPCAPS, 1, 0, 0, 0)
            os.setgroups([])
            os.setresgid(NOBODY, NOBODY, NOBODY)
            os.setresuid(NOBODY, NOBODY, NOBODY)
            layers.append(f"user {NOBODY}")
        except OSError:  # a container without CAP_SETUID, or without such a user
            pass
    keep = set_capabilities(0, CAP_DAC_READ_SEARCH) and not os.access(os.__file__, os.R_OK)
    kept = CAP_DAC_READ_SEARCH if keep else 0
    return [*layers, "no capabilities"] if set_capabilities(kept, kept) else layers


def set_capabilities(effective: int, permitted: int) -> bool:
    version_3_of_this_process = struct.pack("Ii", 0x20080522, 0)
    return bool(libc.capset(version_3_of_this_process, struct.pack("6I", effective, permitted, 0, 0, 0, 0)) == 0)


def check(result: int) -> int:
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


# ---------------------------------------------------------------------------
# The seccomp filter: a program for the kernel's classic BPF machine, run at every system call


def program_filter(architecture: int, column: int) -> bytes:
    entries: list[tuple[str, Any]] = [(entry, None) for entry in REFUSED.split(",")]
    entries += [(entry, argument) for entry, *argument in REFUSED_ARGUMENTS]
    refused = [(int(word), rest) for entry, rest in entries if (word := entry.split()[1 + column]) != "-"]
    return build_filter(architecture, refused, LAST_CALL)


def build_filter(architecture: int, refused: list[tuple[int, Any]], last: int) -> bytes:
    """Calls above `last` are unknown (ENOSYS), which covers x86_64's x32 calls (bit 30 is set), `refused` ones (number,
    None or [index, mask, operator, value] of an argument) are not permitted (EPERM), a foreign architecture ends the
    process, the rest is allowed. An instruction is code, jump if true, jump if false, constant; struct seccomp_data has
    the number at 0, the architecture at 4, the six arguments from 16 on.
    """
    load, mask, equal, greater, give = 0x20, 0x54, 0x15, 0x25, 0x06  # BPF_LD|W|ABS, ALU|AND|K, JMP|JEQ, JMP|JGT, RET
    kill, fail, allow = 0x80000000, 0x00050000, 0x7FFF0000  # SECCOMP_RET_KILL_PROCESS, _ERRNO, _ALLOW
    refuse = (give, 0, 0, fail | errno.EPERM)
    lines = [(load, 0, 0, 4), (equal, 1, 0, architecture), (give, 0, 0, kill)]
    lines += [(load, 0, 0, 0), (greater, 0, 1, last), (give, 0, 0, fail | errno.ENOSYS)]
    for number, argument in refused:
        if argument is None:
            lines += [(equal, 0, 1, number), refuse]
            continue
        index, bits, operator, value = argument
        skip = (0, 1) if operator == "==" else (1, 0)
        lines += [(equal, 0, 5, number), (load, 0, 0, 16 + 8 * index), (mask, 0, 0, bits)]
        lines += [(equal, *skip, value), refuse, (load, 0, 0, 0)]
    return b"".join(struct.pack("HBBI", *line) for line in [*lines, (give, 0, 0, allow)])


def install(instructions: bytes) -> bool:
    """Whether the kernel took the filter; it holds for good, and for all that is started after it."""
    array = ctypes.create_string_buffer(instructions, len(instructions))
    fprog = struct.pack("HP", len(instructions) // 8, ctypes.addressof(array))
    return bool(libc.prctl(PR_SET_SECCOMP, 2, fprog, 0, 0) == 0)


if __name__ == "__main__":
    main()
