"""Replies on their way from the engines to those who wait for them: a line, one thread per engine, and their text.

Requests wait in one line, first come first served, and join the batch that runs the fewest. All that run in a batch
decode together; they come and go between its steps. Nothing here knows HTTP.

Promises: the event loop never waits for a model; a reply that is cancelled costs one step at most; a request that fails
ends no thread and, but for the engine's own failures, no other; characters are whole, and no part of a stop string is
ever shown. A client that reads slowly gets fewer and longer parts: at most one reply's text waits for it.
"""

import asyncio
import contextlib
import threading
import time
import traceback
from collections import Counter, deque
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from nanochat.common import UserError
from nanochat.conversation import StreamDecoder
from nanochat.engine import Batch, Engine, Request, Said
from nanochat.tokenizer import Tokenizer

# To send an event costs 0.25 ms of CPU. Of N replies that run each is sent every 2 N ms at most, so that takes at most
# an eighth of a core whatever the model's speed; a reply alone comes token by token, 32 of them 15 times a second.
EVENT_SECONDS = 0.002
SILENCE_SECONDS = 15  # after which follow() says that nothing is new; proxies cut silent streams off after 30 or 60


class Busy(Exception):
    """No request is taken: the line is full, or (`ended`) there will be no engine."""

    def __init__(self, why: str, ended: bool):
        super().__init__(why)
        self.ended = ended


@dataclass
class Part:
    """A stretch of a reply: whole characters of one kind; their tokens, where log-probabilities were asked for."""

    kind: str  # text, python or python_output
    text: str
    said: list[Said] = field(default_factory=list)


class Reply:
    """One continuation. An engine's thread writes it, the event loop reads it with follow()."""

    def __init__(self, request: Request, tokenizer: Tokenizer, stop: Sequence[str] = (), echo: int | None = None):
        self.request, self.tokenizer = request, tokenizer
        self.stop, self.echo = stop, echo  # echo: from which of its tokens on the prompt is repeated (None = not)
        self.decoder = StreamDecoder(tokenizer)
        self.length, self.held = 0, ""  # characters so far, and those of them that may begin a stop string
        self.held_said: list[tuple[int, Said]] = []  # tokens that are not shown yet, with where their text begins
        self.stopped = False  # by a stop string
        self.lock = threading.Lock()  # held to change or take parts
        self.parts: list[Part] = []  # for the reader
        self.ready = asyncio.Event()  # there is news; replies that are submitted together share one
        self.worker = 0  # number of the engine
        self.ahead = 0  # how many must end before its turn comes
        self.cancelled = False
        self.finished: str | None = None  # stop, length, cancelled or error; all parts are there by then
        self.error: Exception | None = None

    def hear(self, said: Said) -> None:
        """Take in the next token."""
        kind, special = self.decoder.kind, said.token in self.decoder.switches
        if said.logprob is not None and not special:
            self.held_said.append((self.length, said))
        piece = self.decoder.feed(said.token)
        if self.stop or self.held_said:
            self.write(kind, piece.text if piece else "", flush=special)
        elif piece:  # nothing can be held back: the usual case, at half the cost
            self.add(piece.kind, piece.text, [])

    def write(self, kind: str, text: str, flush: bool) -> None:
        """Show what is held back and `text`: all of it, or without flush what can't begin a stop string."""
        self.held += text
        self.length += len(text)
        stops = self.stop if kind == "text" else ()
        found = [place for stop in stops if (place := self.held.find(stop)) >= 0]
        self.stopped = bool(found)
        cut = min(found) if found else len(self.held) - (0 if flush else overlap(self.held, stops))
        shown, self.held = self.held[:cut], self.held[cut:]
        end = self.length - len(self.held)
        said = [one for start, one in self.held_said if start < end or (flush and not found)]
        self.held_said = self.held_said[len(said) :]
        if shown or said:
            self.add(kind, shown, said)

    def add(self, kind: str, text: str, said: list[Said]) -> None:
        """Put a part behind what the reader has not taken yet; neighbours of a kind become one."""
        with self.lock:
            if self.parts and self.parts[-1].kind == kind:
                self.parts[-1].text += text
                self.parts[-1].said += said
            else:
                self.parts.append(Part(kind, text, said))

    def repeat(self, engine: Engine) -> None:
        """Show the prompt."""
        prompt, top = self.request.prompt[self.echo :], self.request.sampling.logprobs
        scores: list[Any] = [] if top is None else [(None, ()), *engine.score(self.request.prompt, top)][self.echo :]
        said = [Said(self.request, token, 0, *score) for token, score in zip(prompt, scores, strict=False)]
        self.add("text", self.tokenizer.decode(prompt), said)

    def finish(self, reason: str, error: Exception | None = None) -> None:
        """The end: what was held back is shown, but for a stop string and what stands behind it."""
        if not self.stopped and not error:
            kind, piece = self.decoder.kind, self.decoder.finish()
            self.write(kind, piece.text if piece else "", flush=True)
        self.finished, self.error = "stop" if self.stopped else reason, error

    def take(self) -> list[Part]:
        """What has come since the last time."""
        with self.lock:
            parts, self.parts = self.parts, []
        return parts


def overlap(text: str, stops: Sequence[str]) -> int:
    """How many characters at the end of `text` one of `stops` begins with."""
    longest = max(map(len, stops), default=1) - 1
    return next((n for n in range(min(longest, len(text)), 0, -1) if any(s.startswith(text[-n:]) for s in stops)), 0)


def told(error: Exception) -> Exception:
    """An error as a client may see it."""
    if isinstance(error, UserError):
        return error
    traceback.print_exception(error)
    return RuntimeError(f"the model failed ({type(error).__name__}); the server's terminal says where")


class Worker:
    """An engine, its batch, and the thread that they belong to."""

    def __init__(self, serving: "Serving", engine: Engine, number: int):
        self.serving, self.engine, self.number = serving, engine, number
        self.batch: Batch | None = None
        self.running: dict[Request, Reply] = {}
        self.news: set[Reply] = set()  # replies whose reader is to be woken
        self.counts = Counter(dict.fromkeys(("tokens", "stop", "length", "cancelled", "error"), 0))
        self.seconds = 0.0  # in steps
        self.thread = threading.Thread(target=self.run, name=f"engine {number}", daemon=True)

    def run(self) -> None:
        """The thread: steps until close()."""
        while self.admit():
            clock = time.monotonic()
            try:
                said = self.batch.step() if self.batch is not None else []
            except Exception as error:  # nobody knows whose fault that is, or in which state it leaves the batch
                self.batch, said, seen = None, [], told(error)
                for request in list(self.running):
                    self.end(request, "error", seen)
            for one in said:
                self.hear(one)
            self.counts["tokens"] += len(said)
            self.seconds += time.monotonic() - clock

    def admit(self) -> bool:
        """Wake the readers of what was said; let those go who are cancelled, and those in whose turn it is. Waits while
        there is nothing to do; False when all is over.
        """
        serving = self.serving
        while not serving.closed or self.running:
            serving.wake(self.news)
            self.news.clear()
            with serving.changed:
                serving.changed.wait_for(lambda: self.running or serving.closed or serving.is_turn_of(self))
                for request in [request for request, reply in self.running.items() if reply.cancelled]:
                    self.end(request, "cancelled")
                joining = serving.take_turns(self)
            for reply in joining:
                self.begin(reply)
            if self.running:
                return True
        serving.wake(self.news)
        return False

    def begin(self, reply: Reply) -> None:
        """Add a request to the batch."""
        reply.worker = self.number
        try:
            if self.batch is None:
                self.batch = self.engine.batch(self.serving.slots)
            if reply.echo is not None:
                reply.repeat(self.engine)
            self.batch.add(reply.request)
            self.note(reply)
        except Exception as error:
            self.end(reply.request, "error", told(error))

    def hear(self, said: Said) -> None:
        """Pass on what the batch says for one request."""
        if reply := self.running.get(said.request):
            try:
                reply.hear(said)
                self.note(reply)
            except Exception as error:
                self.end(reply.request, "error", told(error))

    def note(self, reply: Reply) -> None:
        """There is news of a reply; perhaps it is finished."""
        self.news.add(reply)
        if reply.stopped or reply.request.finished:
            self.end(reply.request, reply.request.finished or "stop")

    def end(self, request: Request, reason: str, error: Exception | None = None) -> None:
        """A request leaves."""
        reply = self.running.pop(request)
        if self.batch is not None and not request.finished:
            self.batch.cancel(request)
        reply.finish(reason, error)
        self.counts[reason] += 1
        self.news.add(reply)


def set_all(events: Iterable[asyncio.Event]) -> None:
    for event in events:
        event.set()


class Serving:
    """The line and the workers, until close()."""

    def __init__(self, engines: Sequence[Engine], slots: int = 32, max_waiting: int = 64):
        self.slots, self.max_waiting = slots, max_waiting  # replies that an engine decodes together, and in line
        self.line: deque[Reply] = deque()
        self.ending = self.closed = False
        self.changed = threading.Condition()  # held to look at or change line, ending and closed
        self.counts = Counter(dict.fromkeys(("requests", "refused", "cancelled"), 0))
        self.started = time.monotonic()
        self.loop: asyncio.AbstractEventLoop | None = None
        self.workers = [Worker(self, engine, number) for number, engine in enumerate(engines)]
        for worker in self.workers:
            worker.thread.start()

    def is_turn_of(self, worker: Worker) -> bool:
        """Whether the next one in line is this worker's: it has room and none runs fewer."""
        load = len(worker.running)
        return bool(self.line) and load < self.slots and load == min(len(other.running) for other in self.workers)

    def take_turns(self, worker: Worker) -> list[Reply]:
        """Those in line who are this worker's. Called with the lock held, as is_turn_of()."""
        taken = []
        while self.is_turn_of(worker):
            taken.append(self.line.popleft())
            worker.running[taken[-1].request] = taken[-1]
        if taken:
            self.tell_places(taken)
        return taken

    def free(self) -> int:
        return sum(self.slots - len(worker.running) for worker in self.workers)

    def submit(self, replies: Sequence[Reply]) -> None:
        """Put replies in the line, all or none; one reader will follow() them. Raises Busy."""
        with self.changed:
            if self.ending or len(self.line) + len(replies) > self.max_waiting + self.free():
                self.counts["refused"] += 1
                raise Busy("the server ends" if self.ending else f"{len(self.line)} requests wait already", self.ending)
            self.loop = asyncio.get_running_loop()
            self.counts["requests"] += 1
            for reply in replies:
                reply.ready = replies[0].ready
            self.line.extend(replies)
            self.tell_places([])
            self.changed.notify_all()

    def cancel(self, replies: Sequence[Reply]) -> None:
        """Take replies out of the line, or end them after the step that is running; no effect on finished ones."""
        with self.changed:
            for reply in replies:
                reply.cancelled = True
                if reply in self.line:
                    self.line.remove(reply)
                    self.counts["cancelled"] += 1
                    reply.finish("cancelled")
            self.tell_places(replies)

    def tell_places(self, others: Sequence[Reply]) -> None:
        """Wake those in the line whose place is another now, and those who left it. Called with the lock held."""
        ahead = {reply: max(0, place + 1 - self.free()) for place, reply in enumerate(self.line)}
        moved = [reply for reply in [*self.line, *others] if reply.ahead != ahead.get(reply, 0)]
        for reply in moved:
            reply.ahead = ahead.get(reply, 0)
        self.wake([*moved, *(reply for reply in others if reply.finished)])

    async def follow(self, replies: Sequence[Reply]) -> AsyncIterator[tuple[int, list[Part], bool]]:
        """(which reply, its new parts, whether it is finished) until all are; without parts there is only another place
        in the line or, with -1 for the reply, SILENCE_SECONDS of silence. The replies were submitted together.
        """
        left, ready = dict(enumerate(replies)), replies[0].ready
        while left:
            ready.clear()
            for index, reply in list(left.items()):
                finished, parts = bool(reply.finished), reply.take()  # in this order: with the end all parts are there
                if finished:
                    del left[index]
                yield index, parts, finished
            await asyncio.sleep(EVENT_SECONDS * sum(len(worker.running) for worker in self.workers) if left else 0)
            try:
                async with asyncio.timeout(SILENCE_SECONDS):
                    while left and not ready.is_set():
                        await ready.wait()
            except TimeoutError:
                yield -1, [], False

    def wake(self, replies: Iterable[Reply]) -> None:
        """Tell the event loop that there is news of these; nothing happens once it has ended."""
        ready = {reply.ready for reply in replies}
        if self.loop and ready:
            with contextlib.suppress(RuntimeError):
                self.loop.call_soon_threadsafe(set_all, ready)

    def is_idle(self) -> bool:
        return not self.line and not any(worker.running for worker in self.workers)

    def is_ready(self) -> bool:
        return not self.ending and all(worker.thread.is_alive() for worker in self.workers)

    def close(self) -> None:
        """Cancel everything and wait for the threads, which end after the step that is running."""
        with self.changed:
            self.ending = self.closed = True
            self.cancel([*self.line, *(reply for worker in self.workers for reply in list(worker.running.values()))])
            self.changed.notify_all()
        for worker in self.workers:
            worker.thread.join(timeout=10)

    def stats(self) -> dict[str, float]:
        """Requests (of any number of replies) and replies. Tokens per second are those of the time spent in steps."""
        counts = sum((worker.counts for worker in self.workers), self.counts)
        rate = sum(worker.counts["tokens"] / worker.seconds for worker in self.workers if worker.seconds)
        return {
            "requests": counts["requests"],
            "refused": counts["refused"],
            "active": sum(len(worker.running) for worker in self.workers),
            "waiting": len(self.line),
            "cancelled": counts["cancelled"],
            "failed": counts["error"],
            "tokens": counts["tokens"],
            "tokens_per_second": round(rate, 1),
            "uptime_seconds": round(time.monotonic() - self.started, 1),
        }
