"""Programs that try to do harm, or to look right without being so: families with parameters, the same ones every time.

They are text and run in the jail alone. `programs()` gives (name, source); in a source stand SECRET (a file outside),
FOLDER (where it lies, with `canary` and `socket`), PORT (a listener on 127.0.0.1), PARENT (the process id of who starts
it). Each is expected to define f(x) = x * x + 1, and none does.
"""

import itertools
from textwrap import indent

HEAD = "import ctypes, os, sys, time\nlibc = ctypes.CDLL(None, use_errno=True)\n"
SHOW = "print(data if isinstance(data, str) else bytes(data).decode('latin-1'))"

READ_PATHS = ["SECRET", "/etc/passwd", "/proc/PARENT/environ", "/proc/self/rootSECRET", "../" * 12 + "SECRET"]
READ_WAYS = [
    "data = open(PATH).read()",
    "data = os.read(os.open(PATH, os.O_RDONLY), 9999)",
    "import pathlib; data = pathlib.Path(PATH).read_bytes()",
    "import shutil; shutil.copyfile(PATH, 'mine'); data = open('mine').read()",
    "b = ctypes.create_string_buffer(9999); libc.read(libc.open(PATH.encode(), 0), b, 9998); data = b.value",
    "b = ctypes.create_string_buffer(99); libc.read(libc.syscall(257, -100, PATH.encode(), 0), b, 98); data = b.value",
    "import mmap; data = mmap.mmap(os.open(PATH, os.O_RDONLY), 10, prot=mmap.PROT_READ)[:]",
    "import linecache; data = ''.join(linecache.getlines(PATH))",
    "os.chdir(os.path.dirname(PATH)); data = open(os.path.basename(PATH)).read()",
    "import fileinput; data = ''.join(fileinput.input(PATH))",
]
CHANGES = """
    open('FOLDER/canary', 'w').write('x')
    open('FOLDER/canary', 'a').write('x')
    open('FOLDER/canary', 'r+').write('x')
    open('FOLDER/new', 'w').write('x')
    open('/tmp/nanochat-hostile', 'w').write('x')
    os.open('FOLDER/canary', os.O_RDONLY | os.O_TRUNC)
    os.open('FOLDER', os.O_TMPFILE | os.O_RDWR)
    os.truncate('FOLDER/canary', 0)
    os.unlink('FOLDER/canary')
    os.rename('FOLDER/canary', 'FOLDER/other')
    os.rename('FOLDER/canary', 'mine')
    os.replace('FOLDER/canary', 'FOLDER/empty/canary')
    os.link('FOLDER/canary', 'mine'); open('mine', 'w').write('x')
    os.symlink('FOLDER/canary', 'mine'); open('mine', 'w').write('x')
    os.symlink('/etc', 'FOLDER/etc')
    os.chmod('FOLDER/canary', 0o777)
    os.fchmod(os.open('FOLDER/canary', os.O_PATH), 0o777)
    os.chmod('/proc/self/fd/%d' % os.open('FOLDER/canary', os.O_PATH), 0o777)
    os.chmod('FOLDER', 0)
    os.chown('FOLDER/canary', 65534, 65534)
    os.lchown('FOLDER/canary', os.getuid(), -1)
    os.utime('FOLDER/canary', (0, 0))
    os.setxattr('FOLDER/canary', 'user.x', b'x')
    os.mkdir('FOLDER/new')
    os.rmdir('FOLDER/empty')
    os.mkfifo('FOLDER/new')
    os.mknod('FOLDER/new')
    import shutil; shutil.rmtree('FOLDER')
    import sqlite3; sqlite3.connect('FOLDER/new').execute('create table t(x)')
    import dbm.dumb; dbm.dumb.open('FOLDER/new', 'c')['x'] = 'x'
    import logging; logging.FileHandler('FOLDER/new').emit(logging.makeLogRecord({}))
    import mmap; mmap.mmap(os.open('FOLDER/canary', os.O_RDWR), 5)[0] = 0
    libc.syscall(87, b'FOLDER/canary')
    libc.syscall(263, -100, b'FOLDER/canary', 0)
    libc.syscall(85, b'FOLDER/canary', 0o600)
    libc.syscall(437, -100, b'FOLDER/canary', (ctypes.c_uint64 * 3)(2, 0, 0), 24)
    libc.syscall(452, -100, b'FOLDER/canary', 0o777, 0)
    libc.mount(b'tmpfs', b'FOLDER', b'tmpfs', 0, None)
    os.chroot('.')
    libc.unshare(0x10000000); os.unlink('FOLDER/canary')
"""
PEEKS = """
    data = open('/proc/PARENT/mem', 'rb').read(1)
    data = open('/proc/PARENT/cmdline').read()
    data = open('/proc/PARENT/maps').read()
    data = ' '.join(os.listdir('/proc/PARENT/fd'))
    data = os.readlink('/proc/PARENT/exe')
    data = os.readlink('/proc/PARENT/cwd')
    data = open('/proc/PARENT/rootSECRET').read()
    data = open('/proc/PARENT/cwd/pyproject.toml').read()
    data = open('/proc/self/environ').read()
    data = open('/proc/PARENT/oom_score_adj', 'w').write('1000')
    data = open('/proc/sys/kernel/hostname', 'w').write('x')
    data = open('/dev/mem', 'rb').read(1)
    data = open('/dev/tty', 'w').write('x')
    data = os.listdir('/proc'), os.listdir('/'), os.listdir('FOLDER')
    b = ctypes.create_string_buffer(64); data = str(libc.process_vm_readv(PARENT, b, 1, b, 1, 0))
    data = str(libc.ptrace(16, PARENT, 0, 0))
    data = str(libc.syscall(438, libc.syscall(434, PARENT, 0), 0, 0))
    data = str(libc.syscall(304, -100, ctypes.create_string_buffer(64), 0))
"""
SOCKETS = """
    socket.create_connection(('127.0.0.1', PORT))
    socket.create_connection(('localhost', PORT))
    socket.socket(socket.AF_INET6).connect(('::ffff:127.0.0.1', PORT))
    socket.socket(type=socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', PORT))
    socket.socket(socket.AF_UNIX).connect('FOLDER/socket')
    socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM).sendto(b'x', 'FOLDER/socket')
    socket.socketpair(type=socket.SOCK_DGRAM)[0].sendto(b'x', 'FOLDER/socket')
    socket.socket(socket.AF_UNIX).connect(b'\\0nanochat-hostile')
    socket.socket(type=socket.SOCK_RAW, proto=1).sendto(b'x' * 8, ('127.0.0.1', 0))
    socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
    socket.socket(socket.AF_NETLINK, socket.SOCK_RAW)
    socket.socket(38, socket.SOCK_SEQPACKET)
    socket.socket(40)
    socket.create_server(('127.0.0.1', 0))
    socket.getaddrinfo('example.com', 80)
    import urllib.request; urllib.request.urlopen('http://127.0.0.1:PORT/')
    import http.client; http.client.HTTPConnection('127.0.0.1', PORT).request('GET', '/')
    import smtplib; smtplib.SMTP('127.0.0.1', PORT)
    import ftplib; ftplib.FTP().connect('127.0.0.1', PORT)
    import asyncio; asyncio.run(asyncio.open_connection('127.0.0.1', PORT))
    from multiprocessing.connection import Client; Client(('127.0.0.1', PORT))
    import _socket; _socket.socket().connect(('127.0.0.1', PORT))
    assert libc.socket(2, 1, 0) >= 0
    assert libc.syscall(41, 2, 2, 0) >= 0
    assert libc.syscall(425, 8, ctypes.create_string_buffer(120)) >= 0
    assert libc.syscall(41 | 1 << 30, 2, 1, 0) >= 0
    for fd in range(64): libc.connect(fd, b'\\2\\0' + (PORT).to_bytes(2, 'big') + b'\\x7f\\0\\0\\1' + bytes(8), 16)
"""
PROCESSES = """
    os.system(COMMAND)
    os.popen(COMMAND).read()
    import subprocess; subprocess.run(COMMAND, shell=True)
    import subprocess; subprocess.Popen(['/bin/sh', '-c', COMMAND], start_new_session=True)
    import subprocess; subprocess.run([sys.executable, '-c', 'pass'])
    os.execv('/bin/sh', ['sh', '-c', COMMAND])
    os.execve(os.open('/bin/sh', os.O_PATH), ['sh', '-c', COMMAND], {})
    os.posix_spawn('/bin/sh', ['sh', '-c', COMMAND], {})
    os.spawnv(os.P_NOWAIT, '/bin/sh', ['sh', '-c', COMMAND])
    import pty; pty.spawn(['/bin/sh', '-c', COMMAND])
    os.fork() or time.sleep(60)
    os.fork() or (os.setsid(), os.fork(), time.sleep(60))
    os.forkpty()
    while True: os.fork()
    import multiprocessing; multiprocessing.Process(target=time.sleep, args=(60,)).start()
    from concurrent.futures import ProcessPoolExecutor as P; list(P(2).map(abs, [1]))
    libc.fork() or time.sleep(60)
    libc.system(COMMAND.encode())
    libc.syscall(57) or time.sleep(60)
    libc.syscall(58) or time.sleep(60)
    libc.syscall(56, 17, 0, 0, 0, 0) or time.sleep(60)
    libc.syscall(435, (ctypes.c_uint64 * 11)(0, 0, 0, 0, 17), 88) or time.sleep(60)
    libc.syscall(59, b'/bin/sh', None, None)
    import threading; threading.Thread(target=time.sleep, args=(60,)).start()
    import _thread; _thread.start_new_thread(time.sleep, (60,)); time.sleep(60)
    from concurrent.futures import ThreadPoolExecutor as T; list(T(2).map(abs, [1]))
    import signal; signal.signal(signal.SIGCHLD, signal.SIG_IGN); os.fork()
    os.setsid(); os.setpgid(0, PARENT)
"""
SIGNALS = """
    os.kill(PARENT, 15)
    os.kill(PARENT, 9)
    os.kill(PARENT, 19)
    os.kill(PARENT, 2)
    os.kill(PARENT, 10)
    os.kill(-1, 9)
    os.kill(0, 9)
    os.killpg(os.getpgid(PARENT), 9)
    for pid in range(2, 70000): libc.kill(pid, 9)
    libc.syscall(234, PARENT, PARENT, 9)
    libc.syscall(129, PARENT, 10, ctypes.create_string_buffer(128))
    import signal; signal.pidfd_send_signal(os.pidfd_open(PARENT), 9)
    from fcntl import fcntl as c; r, w = os.pipe(); c(r, 8, PARENT); c(r, 10, 9); c(r, 4, 0o20000); os.write(w, b'x')
    import resource; resource.prlimit(PARENT, resource.RLIMIT_NOFILE, (0, 0))
    import resource; resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
    import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (9999, 9999))
    os.sched_setaffinity(PARENT, {0})
    os.setpriority(os.PRIO_PROCESS, PARENT, 19)
    os.setpriority(os.PRIO_USER, os.getuid(), 19)
    os.sched_setscheduler(PARENT, os.SCHED_IDLE, os.sched_param(0))
    os.setuid(0)
    os.setresuid(0, 0, 0); os.kill(PARENT, 9)
    import signal; [signal.signal(s, lambda *a: None) for s in range(1, 32) if s not in (9, 19)]; time.sleep(60)
    import signal; signal.signal(signal.SIGXCPU, signal.SIG_IGN); [0 for _ in iter(int, 1)]
    import signal; signal.setitimer(signal.ITIMER_REAL, 1e-4, 1e-4); time.sleep(60)
    import signal; signal.pthread_sigmask(0, range(1, 65)); time.sleep(60)
    import faulthandler; faulthandler._sigsegv()
"""
RESOURCES = """
    bytearray(10 ** 11)
    x = [bytearray(1 << 24) for _ in iter(int, 1)]
    x = 'a'; [globals().update(x=globals()['x'] * 2) for _ in iter(int, 1)]
    9 ** 9 ** 9
    str(10 ** 9999999)
    x = {i: i for i in range(10 ** 9)}
    x = []; [x.append(x[:]) for _ in iter(int, 1)]
    import mmap; x = [mmap.mmap(-1, 1 << 24) for _ in iter(int, 1)]
    x = [os.memfd_create('x') for _ in range(9)]; os.write(x[0], bytes(1 << 30))
    assert libc.shmget(0, 1 << 30, 0o1600) >= 0
    import zlib; c = zlib.compressobj(9); z = c.compress(bytes(1 << 26)) + c.flush(); zlib.decompress(z) * 99
    import itertools; list(itertools.product(range(99), repeat=9))
    while True: pass
    time.sleep(10 ** 6)
    sum(range(10 ** 13))
    import re; re.match('(a+)+$', 'a' * 60 + 'b')
    import threading; threading.Lock().acquire(); l = threading.Lock(); l.acquire(); l.acquire()
    os.read(os.pipe()[0], 1)
    import select; select.select([], [], [])
    input()
    sys.stdin.read(); time.sleep(60)
    import atexit; atexit.register(time.sleep, 60); sys.exit(0)
    class A: __del__ = lambda self: time.sleep(60) ;; a = A()
    open('a', 'wb').write(bytes(1 << 30))
    os.posix_fallocate(os.open('a', 66), 0, 1 << 40)
    x = [open('/dev/null') for _ in iter(int, 1)]
    x = [os.pipe() for _ in iter(int, 1)]
    x = [os.dup(1) for _ in iter(int, 1)]
    for fd in range(64): os.dup2(1, fd)
    os.closerange(0, 64); time.sleep(60)
    import select; x = [select.epoll() for _ in iter(int, 1)]
    import tempfile; x = [tempfile.TemporaryFile() for _ in iter(int, 1)]
"""
OUTPUTS = """
    while True: print('x' * 10000)
    while True: sys.stderr.write('x')
    while True: os.write(1, bytes(1 << 20))
    while True: os.write(2, b'\\xff\\xfe\\0' * 9999)
    while True: print(end='x')
    raise ValueError('x' * (1 << 24))
    import warnings; [warnings.warn(str(i)) for i in range(10 ** 7)]
    import logging; [logging.error('x' * 999) for _ in iter(int, 1)]
    for fd in range(3, 64): os.set_blocking(fd, False); [os.write(fd, b'passed\\n') for _ in range(99)]
    for fd in range(64): libc.write(fd, b'[[], null]\\npassed\\n', 18)
    for fd in range(64): libc.write(fd, b'[null, 10]\\n' * 9, 99)
    for fd in range(64): libc.write(fd, b'[null, true]\\n' * 9, 117)
    for fd in range(3, 64): libc.write(fd, b'x' * 65536, 65536)
    for fd in range(3, 64): libc.write(fd, b'[' * 65536 + b'\\n', 65537)
    print('passed'); os._exit(0)
    def r(): r() ;; r()
    sys.setrecursionlimit(10 ** 9)\ndef r(): r() ;; r()
    x = [] ;; for _ in range(10 ** 6): x = [x] ;; print(x)
    eval('(' * 10 ** 5)
    eval('-' * 10 ** 6 + '1')
    x = lambda: None ;; for _ in range(10 ** 6): x = x.__init__ ;; del x
"""
EXITS = """
    sys.exit(0)
    sys.exit()
    os._exit(0)
    raise SystemExit
    raise KeyboardInterrupt
    raise GeneratorExit
    libc.exit(0)
    libc._exit(0)
    libc.syscall(231, 0)
    os.abort()
    ctypes.string_at(0)
    ctypes.memset(id(int), 0, 4096)
    sys.excepthook = lambda *a: os._exit(0); raise ValueError
    import atexit; atexit.register(os._exit, 0); sys.exit(1)
    os.closerange(3, 64); os._exit(0)
"""
# What f returns: each claims to be equal to everything, or breaks who reads it.
LIES = [
    "type('A', (), {'__eq__': lambda s, o: True})()",
    *(
        f"type('A', ({kind},), {{'__eq__': lambda *a: True, '__ne__': lambda *a: False, '__hash__': lambda s: 10}})()"
        for kind in "int float str bytes list tuple dict set frozenset complex".split()
    ),
    "type('A', (int,), {'__repr__': lambda s: '10', '__str__': lambda s: '10', '__int__': lambda s: 10})(3)",
    "type('A', (float,), {'__repr__': lambda s: '10', '__class__': property(lambda s: bool)})(3)",
    "type('A', (), {'__class__': property(lambda s: list), '__iter__': lambda s: iter([10])})()",
    "type('A', (dict,), {'items': lambda s: iter(int, 1)})(a=1)",
    "type('A', (list,), {'__iter__': lambda s: iter(int, 1)})()",
    "__import__('unittest.mock').mock.ANY",
    "float('nan')",
    "float('inf')",
    "x",
    "f",
    "(i for i in [10])",
    "None",
    "True",
    "[10]",
    "'10'",
    "(lambda l: l.append(l) or l)([])",
    "__import__('functools').reduce(lambda a, _: [a], range(10 ** 5), [])",
    "'x' * 10 ** 8",
    "10 ** 10 ** 5",
    "['eval', ['10']]",
    "{'__class__': 'int', 'value': 10}",
]
RAISES = [
    *"StopIteration StopAsyncIteration AssertionError RecursionError MemoryError SystemError BrokenPipeError".split(),
    *(f"type('{name}', (Exception,), {{}})" for name in "exit SystemExit exec print __import__ object int".split()),
    "UnicodeDecodeError('a', b'', 0, 1, 'a')",
    "type('A', (Exception,), {'__str__': lambda s: 1 / 0})()",
    "type('A', (BaseException,), {})()",
]
# What is sent instead of an answer, before it or without being asked.
FORGERIES = [
    "[null, true]",
    '[null, {"__eq__": 1}]',
    "[null]",
    "[]",
    "10",
    "null",
    "NaN",
    '["StopIteration", ""]',
    '["exit", 0]',
    '["SystemExit", 0]',
    '["os._exit", 0]',
    "[0, 10]",
    '[["int"], 10]',
    '[null, ["eval", ["10"]]]',
    '[null, ["set", [["list", []]]]]',
    '[null, ["dict", [1, 2]]]',
    '[null, ["complex", [1, 2, 3]]]',
    '[null, ["bytes", [999]]]',
    '[null, ["bytes", [1000000000000]]]',
    "[" * 5000,
    "[null, " + "9" * 9999 + "]",
    "\\ud800",
    "",
]
PATCHES = """
    import builtins; builtins.AssertionError = Warning
    import builtins; builtins.isinstance = lambda *a: True
    import builtins; builtins.len = builtins.abs = lambda *a: 10
    import builtins; builtins.exec = builtins.compile = lambda *a: None
    import json; json.dumps = lambda *a, **k: '[null, true]'
    import json; json.loads = lambda *a: [[], {}]
    os.write = lambda *a: 0
    os._exit = lambda *a: None
    os.write = lambda fd, data, w=os.write: w(fd, b'[null, true]\\n')
    sys.modules['__main__'] = sys
    sys.modules.clear()
    sys.settrace(lambda *a: os._exit(0))
    sys.setprofile(lambda *a: os._exit(0))
    sys.addaudithook(lambda *a: sys.exit(0))
    sys.meta_path.insert(0, type('A', (), {'find_spec': lambda *a: os._exit(0)})())
    import gc; [o.clear() for o in gc.get_objects() if type(o) is dict and 'serve' in o]
    import gc; [o.update(decode=lambda *a, **k: True) for o in gc.get_objects() if type(o) is dict and 'decode' in o]
    import gc; [print(o) for o in gc.get_objects() if type(o) is dict and 'limits' in str(o)[:9999]]
    g = sys._getframe(1).f_globals; g['encode'] = lambda value: True
    g = sys._getframe(1).f_globals; g['serve'] = lambda *a: os._exit(0)
    g = sys._getframe(1).f_locals['job']; print(g); os.write(g['serve'][2], b'[null, true]\\n')
    frame = sys._getframe() ;; while frame: print(frame.f_locals); frame = frame.f_back
    import inspect; [print(s.frame.f_locals) for s in inspect.stack()]
    import threading; threading.main_thread = lambda: sys.exit(0)
    class B(type): __instancecheck__ = lambda *a: True ;; int = float = B('int', (), {})
    import math; math.isclose = lambda *a, **k: True
"""
SOURCES = [
    "a\0b",
    "'\ud800'",
    "# coding: rot13\nqrs s(k): erghea 10",
    "# coding: utf-7\n",
    "# coding: nonsense\n",
    "\ufeffdef f(x): return None",
    "def f(x): return '\u202e'",
    "def \u0192(x): return 10",
    "x = " + "(" * 50_000,
    "x = " + "[" * 99 + "]" * 99,
    "x = " + "+".join(["1"] * 50_000),
    "x = 1\n" * 200_000,
    "x = '" + "x" * 5_000_000 + "'",
    "x = " + "9" * 100_000,
    "if 1:\n" + "".join(" " * i + "if 1:\n" for i in range(1, 150)),
    "def f(x):\n" + "    x = [x for x in [x]]\n" * 20_000,
    "\f\v\x1a\x00",
    "import this; from __future__ import annotations",
    "'''",
    "return 10",
]
MACHINE = """
import mmap
m = mmap.mmap(-1, 4096, prot=7)
m.write(bytes.fromhex(CODE))
print(ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(m)))())
"""
MACHINE_CODES = [
    "b802000000cd80c3",  # int 0x80: fork of i386
    "b80b000000cd80c3",  # int 0x80: execve of i386
    "b8390000400f05c3",  # syscall: fork of x32
    "b8390000000f05c3",  # syscall: fork
    "0f0b",
    "ebfe",
    "f4",
]
FUZZ = """
import random, signal
rng = random.Random(SEED)
signal.signal(signal.SIGALRM, lambda *a: None)
signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)  # ends calls that wait
buffer = ctypes.create_string_buffer(65536)
values = [0, 1, 2, 3, 4, 5, 17, 64, 4096, -1, -100, 1 << 31, PARENT, ctypes.addressof(buffer)]
harmless_but_final = {0, 15, 34, 35, 60, 61, 130, 219, 230, 231, 232, 247, 270, 271, 281}
while True:
    number = rng.choice([rng.randrange(470), rng.randrange(470), rng.randrange(1 << 32)])
    if number not in harmless_but_final:
        libc.syscall(ctypes.c_long(number), *(ctypes.c_long(rng.choice(values)) for _ in range(6)))
"""


def lines(table: str) -> list[str]:
    """The attacks of a table, one in a line; " ;; " stands for the end of a line of theirs."""
    return [line.strip().replace(" ;; ", "\n") for line in table.strip().splitlines()]


def families() -> dict[str, list[str]]:
    """What is done, by family."""
    reads = itertools.product(READ_WAYS, READ_PATHS)
    return {
        "read": [f"PATH = '{path}'\n{way}\n{SHOW}" for way, path in reads],
        "change": lines(CHANGES),
        "peek": [f"{line}\nprint(data)" for line in lines(PEEKS)],
        "socket": [f"import socket\n{line}" for line in lines(SOCKETS)],
        "process": [f"COMMAND = 'echo x >FOLDER/new; sleep 60'\n{line}\ntime.sleep(60)" for line in lines(PROCESSES)],
        "signal": lines(SIGNALS),
        "resource": lines(RESOURCES),
        "output": lines(OUTPUTS),
        "exit": lines(EXITS),
        "raise": [f"raise {error}" for error in RAISES],
        "forgery": [f"for fd in range(3, 64): libc.write(fd, b'{text}\\n', {len(text) + 1})" for text in FORGERIES],
        "patch": lines(PATCHES),
        "machine": [MACHINE.replace("CODE", repr(code)) for code in MACHINE_CODES],
        "fuzz": [FUZZ.replace("SEED", str(seed)) for seed in range(12)],
    }


def programs() -> list[tuple[str, str]]:
    """(name, source) of all; the attacks of a family happen by turns when it starts and when f is called."""
    found = [(f"lie-{i}", f"{HEAD}def f(x): return {value}\n") for i, value in enumerate(LIES)]
    found += [(f"source-{i}", source) for i, source in enumerate(SOURCES)]
    for family, attacks in families().items():
        for i, attack in enumerate(attacks):
            called = f"def f(x):\n{indent(attack, '    ')}\n    return None\n"
            first = f"{attack}\ndef f(x): return None\n"
            found.append((f"{family}-{i}", HEAD + (called if i % 2 else first)))
    return found
