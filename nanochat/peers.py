"""Ranks that notice a dead one: when a rank of a run dies, all others end within 30 s, and one line says which it was.

Every rank keeps one TCP connection to rank 0, and a thread that sleeps in select() until the kernel has news of it:

- a process that ends in whatever way has its connections closed by its kernel: the others know within milliseconds;
- a machine that loses power or network stops answering TCP keepalives, which kernels exchange: 20 s (Linux, macOS;
  elsewhere the system's own setting, often two hours).

Nothing is sent while all is well and no Python code has to answer, so a rank that compiles for minutes, sits in one
long kernel or is stopped by SIGSTOP is alive. What is NOT noticed: a rank that lives and hangs (the collective's
timeout is for that), and a death before watch() is called.

Rank 0 prints the line and ends the others. Where rank 0 itself is gone, the lowest rank that lives prints it; where the
network is cut in two, each part prints one. A rank that leaves early but alive (an exception, sys.exit) says so; the
others, who may be about to leave with the same message, then have GRACE_SECONDS to end by themselves, less if one of
them is in a collective that has failed. They end by os._exit, because the main thread may hang in the driver.

What the ranks say is one line each: `bye` (done), `left` (left early), `stuck` (a collective failed here), `end` (a
rank is dead and somebody prints it), `judge HOW` (rank 0 is gone, and you are the lowest I can reach).
"""

import atexit
import contextlib
import hmac
import json
import os
import secrets
import selectors
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any, NoReturn, Protocol

from nanochat.common import EXIT_RANK_DIED, UserError

GRACE_SECONDS = 5.0  # between the first rank that leaves early and the end of the others
VERDICT_SECONDS = 5.0  # how long a failed collective waits to be explained by a death
CONNECT_SECONDS = 20.0  # for all ranks to connect, once each has published its card
# 10 s of silence, then a probe every 3 s; three unanswered ones, or 19 s with data on the way, end the connection.
KEEPALIVE = {"TCP_KEEPIDLE": 10, "TCP_KEEPALIVE": 10, "TCP_KEEPINTVL": 3, "TCP_KEEPCNT": 3, "TCP_USER_TIMEOUT": 19_000}

DIED, LEFT, UNREACHABLE = "died", "ended early", "cannot be reached any more"


class Store(Protocol):
    """Where ranks leave notes for each other: get() waits for a set() of any rank, as torch's TCPStore does."""

    def set(self, key: str, value: str, /) -> Any: ...
    def get(self, key: str, /) -> bytes: ...


# -----------------------------------------------------------------------------
# For compute.py

_watch: "PeerWatch | None" = None


def watch(rank: int, world_size: int, master: str, store: Store) -> None:
    """Connect to the other ranks and watch them from now on; returns when all are connected. `master` is MASTER_ADDR.
    Raises UserError where a rank can't be reached. One watch at a time; end it with stop().
    """
    global _watch
    assert _watch is None and world_size > 1
    listener = open_listener(world_size)
    listener.settimeout(1)  # a call may be withdrawn between select() and accept()
    master_ip, own_ip = addresses_of_route(master)
    card = {"rank": rank, "pid": os.getpid(), "host": socket.gethostname(), "ip": own_ip}
    card |= {"port": listener.getsockname()[1], "token": secrets.token_hex(16)}
    store.set(f"nanochat/peer/{rank}", json.dumps(card))
    cards = [json.loads(store.get(f"nanochat/peer/{other}")) for other in range(world_size)]
    _watch = PeerWatch(rank, cards, master_ip, listener)
    _watch.thread.start()
    atexit.register(leave)
    if hasattr(os, "register_at_fork"):  # not on Windows, which can't fork
        os.register_at_fork(after_in_child=forget)


def stop() -> None:
    """This rank is done: the others do not wait for it, and it does not watch them any more."""
    say("bye")


def leave() -> None:
    """At the end of the process: whoever did not stop() leaves early."""
    say("left")


def await_verdict() -> None:
    """A collective has failed: if a rank is dead, this does not return, because the process ends. Else it returns after
    VERDICT_SECONDS.
    """
    if _watch:
        send_word(_watch.words, "stuck")
        time.sleep(VERDICT_SECONDS)


def say(word: str) -> None:
    global _watch
    if _watch:
        send_word(_watch.words, word)
        _watch.thread.join(VERDICT_SECONDS)
        _watch = None


def forget() -> None:
    """In a forked child: close its copies, which would keep the connections of a dead parent open."""
    global _watch
    if _watch:
        _watch.close()
        _watch = None


# -----------------------------------------------------------------------------
# Sockets


def open_listener(backlog: int) -> socket.socket:
    """A free port on all interfaces, for IPv4 and, where the machine has it, IPv6."""
    if socket.has_dualstack_ipv6():
        with contextlib.suppress(OSError):  # compiled in, but switched off
            return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=backlog)
    return socket.create_server(("", 0), backlog=backlog)


def addresses_of_route(master: str) -> tuple[str, str]:
    """The address of the host `master`, and this machine's address on the way to it. Sends nothing."""
    failure: OSError | None = None
    try:
        for family, kind, protocol, _, target in socket.getaddrinfo(master, 9, type=socket.SOCK_DGRAM):
            try:
                with socket.socket(family, kind, protocol) as probe:
                    probe.connect(target)
                    return str(target[0]), str(probe.getsockname()[0])
            except OSError as error:
                failure = error
    except OSError as error:
        failure = error
    raise UserError(f"MASTER_ADDR={master}: {failure}; expected the name or address of rank 0's machine")


def is_loopback(ip: str) -> bool:
    return ip.startswith("127.") or ip == "::1"


def keep_alive(connection: socket.socket) -> None:
    """Let the kernel find out when the other machine is gone."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in KEEPALIVE.items():
        if hasattr(socket, option):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)


def receive_line(connection: socket.socket, seconds: float) -> str:
    """The first line that arrives, without its end; "" when none of at most 1,000 bytes does. Leaves what follows it:
    byte by byte, for a word may already stand behind the line. `seconds` is the longest pause.
    """
    connection.settimeout(seconds)
    line = b""
    with contextlib.suppress(OSError):
        while len(line) < 1000 and (byte := connection.recv(1)):
            if byte == b"\n":
                return line.decode(errors="replace")
            line += byte
    return ""


def send_word(connection: socket.socket, word: str) -> None:
    """Send a line to someone who may be gone."""
    with contextlib.suppress(OSError):
        connection.sendall(f"{word}\n".encode())


# -----------------------------------------------------------------------------


class PeerWatch:
    """One rank's watch: rank 0 is connected to all, the others to rank 0. All reading and sending after the start
    happens in `thread`; the main thread puts its own words into `words`.
    """

    def __init__(self, rank: int, cards: list[dict[str, Any]], master_ip: str, listener: socket.socket) -> None:
        self.rank, self.cards, self.master_ip, self.listener = rank, cards, master_ip, listener
        self.peers = self.accept_all() if rank == 0 else {0: self.connect()}
        self.unread = dict.fromkeys([*self.peers, rank], b"")
        self.words, self.own = socket.socketpair()
        self.left: int | None = None  # the first rank that left early, and when the others end
        self.deadline = 0.0
        self.stuck = self.over = False
        self.thread = threading.Thread(target=self.run, name="peers", daemon=True)

    def close(self) -> None:
        for connection in (self.words, self.own, self.listener, *self.peers.values()):
            connection.close()

    # The start

    def accept_all(self) -> dict[int, socket.socket]:
        """Rank 0: a connection from every other rank. Whoever does not know the token is turned away."""
        peers: dict[int, socket.socket] = {}
        deadline = time.monotonic() + CONNECT_SECONDS
        while len(peers) < len(self.cards) - 1:
            self.listener.settimeout(max(0.01, deadline - time.monotonic()))
            try:
                connection, _ = self.listener.accept()
            except TimeoutError:
                missing = next(card for card in self.cards[1:] if card["rank"] not in peers)
                raise UserError(f"{self.describe(missing)} did not connect within {CONNECT_SECONDS:.0f} s") from None
            word = self.receive_trusted(connection, 2)
            if not word.isdecimal():
                connection.close()
                continue
            send_word(connection, self.cards[int(word)]["token"])
            peers[int(word)] = self.prepare(connection)
        self.listener.close()
        return peers

    def connect(self) -> socket.socket:
        """The other ranks: the connection to rank 0, which proves itself with this rank's token."""
        deadline = time.monotonic() + CONNECT_SECONDS
        while time.monotonic() < deadline:
            for address in self.addresses(self.cards[0]):
                with contextlib.suppress(OSError):
                    connection = socket.create_connection((address, self.cards[0]["port"]), timeout=5)
                    send_word(connection, f"{self.cards[0]['token']} {self.rank}")
                    answer = receive_line(connection, max(0.1, deadline - time.monotonic()))
                    if hmac.compare_digest(answer.encode(), self.cards[self.rank]["token"].encode()):
                        return self.prepare(connection)
                    connection.close()
            time.sleep(0.2)
        tried = " and ".join(f"{address}:{self.cards[0]['port']}" for address in self.addresses(self.cards[0]))
        raise UserError(
            f"rank {self.rank} on {socket.gethostname()} can't reach {self.describe(self.cards[0])} at {tried}; "
            "if it did not end, open all TCP ports between the machines"
        )

    def prepare(self, connection: socket.socket) -> socket.socket:
        keep_alive(connection)
        connection.setblocking(False)
        return connection

    def receive_trusted(self, connection: socket.socket, seconds: float) -> str:
        """What someone who knows this rank's token says; "" to strangers."""
        token, _, word = receive_line(connection, seconds).partition(" ")
        return word if hmac.compare_digest(token.encode(), self.cards[self.rank]["token"].encode()) else ""

    def addresses(self, card: dict[str, Any]) -> Iterator[str]:
        """Where to try a rank: on the same host, which two containers may believe wrongly, at loopback first. Its own
        address is loopback when it shares a host with MASTER_ADDR, so then it is there.
        """
        if card["host"] == self.cards[self.rank]["host"]:
            yield "127.0.0.1"
        address = self.master_ip if is_loopback(card["ip"]) else card["ip"]
        if address != "127.0.0.1" or card["host"] != self.cards[self.rank]["host"]:
            yield address

    # The watch

    def run(self) -> None:
        selector = selectors.DefaultSelector()
        sources = {self.rank: self.own, **self.peers}
        if self.rank != 0:
            sources[-1] = self.listener
        for name, source in sources.items():
            selector.register(source, selectors.EVENT_READ, name)
        while not self.over:
            seconds = max(0.0, self.deadline - time.monotonic()) if self.left is not None else None
            for key, _ in selector.select(seconds):
                if key.data == -1:
                    if how := self.take_call():
                        self.end(0, how)
                elif not self.read(key.data, sources[key.data]):
                    selector.unregister(sources[key.data])
                    self.peers.pop(key.data).close()
            if self.left is not None and (self.stuck or time.monotonic() >= self.deadline):
                self.end(self.left, LEFT)
        selector.close()
        self.close()

    def read(self, rank: int, source: socket.socket) -> bool:
        """Take in what a rank says, this one's main thread included; False when nothing more can come."""
        try:
            data = source.recv(4096)
        except (BlockingIOError, InterruptedError):
            return True
        except ConnectionResetError:
            data = b""
        except OSError:
            return self.gone(rank, UNREACHABLE)
        if not data:
            return self.gone(rank, DIED)
        *words, self.unread[rank] = (self.unread[rank] + data).split(b"\n")
        more = True
        for word in words:
            more &= self.hear(rank, word.decode())
        return more

    def hear(self, rank: int, word: str) -> bool:
        """One word of a rank; False when it was its last."""
        if word == "end":
            os._exit(EXIT_RANK_DIED)
        self.stuck |= word == "stuck"
        if rank == self.rank:
            self.over = word != "stuck"
            for peer in self.peers.values():
                send_word(peer, word)
            return True
        self.over |= word == "bye" and rank == 0  # without rank 0 no collective can follow
        if word == "left" and self.left is None:
            self.left, self.deadline = rank, time.monotonic() + GRACE_SECONDS
        return word == "stuck"

    def gone(self, rank: int, how: str) -> bool:
        """The connection to a rank ended without a last word. After one that left early this explains nothing."""
        if self.left is None:
            self.end(rank, how)
        return False

    def take_call(self) -> str:
        """Answer a rank that has lost rank 0: HOW when it asks this one to judge, "" for a stranger; ends on `end`."""
        with contextlib.suppress(OSError):
            connection, _ = self.listener.accept()
            with connection:
                word, _, how = self.receive_trusted(connection, 1).partition(" ")
                if word == "end":
                    os._exit(EXIT_RANK_DIED)
                if word == "judge":
                    send_word(connection, "yes")
                    return how
        return ""

    # The end

    def end(self, rank: int, how: str) -> NoReturn:
        """End all ranks; see that one of them says why."""
        if rank == 0:
            self.end_without_rank_0(how)
        else:
            for peer in self.peers.values():
                send_word(peer, "end")
        line = f"{self.describe(self.cards[rank])} {how}; the others stop. A training run continues with --resume\n"
        os.write(2, line.encode())  # sys.stderr may be locked by a thread that hangs
        os._exit(EXIT_RANK_DIED)

    def end_without_rank_0(self, how: str) -> None:
        """Leave the word to a lower rank that lives, and end; if there is none, end the higher ones and return."""
        silent: set[str] = set()
        if any(self.call(card, f"judge {how}", silent) for card in self.cards[1 : self.rank]):
            os._exit(EXIT_RANK_DIED)
        # A lower rank may have judged and ended before it was called. It called first, so its "end" lies here.
        while selectable(self.listener):
            self.take_call()
        for card in self.cards[self.rank + 1 :]:
            self.call(card, "end", silent)

    def call(self, card: dict[str, Any], word: str, silent: set[str]) -> bool:
        """Tell a rank something. Whether it is there and, asked to judge, says yes: a dying process may still be
        connected to. Addresses that do not answer at all go into `silent`.
        """
        for address in self.addresses(card):
            if address not in silent:
                try:
                    with socket.create_connection((address, card["port"]), timeout=1) as connection:
                        send_word(connection, f"{card['token']} {word}")
                        return word == "end" or receive_line(connection, 3) == "yes"
                except TimeoutError:
                    silent.add(address)
                except OSError:
                    pass
        return False

    def describe(self, card: dict[str, Any]) -> str:
        return f"rank {card['rank']} of {len(self.cards)} (pid {card['pid']} on {card['host']})"


def selectable(source: socket.socket) -> bool:
    """Whether something waits to be read or accepted."""
    with selectors.DefaultSelector() as selector:
        selector.register(source, selectors.EVENT_READ)
        return bool(selector.select(0))
