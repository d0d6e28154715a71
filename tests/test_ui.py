"""The page in a browser: headless Chromium over its DevTools pipe where there is one, and, where there is Node.js, the
page's script with a document of 60 lines. Both talk to a real server whose engine the test steps by hand.
"""

import base64
import itertools
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import pytest

from nanochat.conversation import render_for_completion
from nanochat.server import PAGE
from tests.test_server import HELLO, SECONDS, TOKENIZER, FakeEngine, Live, serving, tokens_of

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
NODE = shutil.which("node")
FLAGS = """--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking
    --disable-component-update --disable-sync --disable-dev-shm-usage --remote-debugging-pipe""".split()
# Chromium reads commands from descriptor 3 and writes to 4.
LAUNCHER = """
import fcntl, os, sys
reading, writing = (fcntl.fcntl(int(fd), fcntl.F_DUPFD_CLOEXEC, 10) for fd in sys.argv[1:3])
os.dup2(reading, 3)
os.dup2(writing, 4)
os.execv(sys.argv[3], sys.argv[3:])
"""
# As much of a document as the script touches. Reads expressions, a JSON string per line, and answers with their values.
DOCUMENT = r"""
{
const fs = require("fs"), vm = require("vm"), readline = require("readline");
const [file, base] = process.argv.slice(1);
class Node extends EventTarget {
  constructor(tag) {
    super();
    Object.assign(this, { tag, nodes: [], parent: null, className: "", hidden: false, value: "", style: {} });
    Object.assign(this, { scrollHeight: 0, scrollTop: 0, clientHeight: 0 });
    const names = () => this.className.split(" ").filter(Boolean);
    this.classList = {
      add: name => this.className = [...new Set([...names(), name])].join(" "),
      remove: name => this.className = names().filter(other => other !== name).join(" "),
      contains: name => names().includes(name),
    };
  }
  get textContent() { return this.nodes.map(node => typeof node === "string" ? node : node.textContent).join(""); }
  set textContent(text) { this.replaceChildren(...(text ? [String(text)] : [])); }
  get elements() { return this.nodes.filter(node => typeof node !== "string"); }
  get childElementCount() { return this.elements.length; }
  get lastChild() { return this.nodes.at(-1); }
  append(...nodes) { for (const node of nodes) this.appendChild(node); }
  appendChild(node) {
    if (node instanceof Node) { node.remove(); node.parent = this; }
    this.nodes.push(node);
    return node;
  }
  remove() {
    if (this.parent) this.parent.nodes = this.parent.nodes.filter(node => node !== this);
    this.parent = null;
  }
  replaceChildren(...nodes) {
    for (const node of this.elements) node.parent = null;
    this.nodes = [];
    this.append(...nodes);
  }
  querySelectorAll(selector) {
    const fits = node => selector.startsWith(".") ? node.classList.contains(selector.slice(1)) : node.tag === selector;
    return this.elements.flatMap(node => [...(fits(node) ? [node] : []), ...node.querySelectorAll(selector)]);
  }
  click() { this.dispatchEvent(new Event("click")); }
  focus() { document.activeElement = this; }
}
class KeyboardEvent extends Event {
  constructor(type, { bubbles, cancelable, ...keys }) {
    super(type, { bubbles, cancelable });
    Object.assign(this, keys);
  }
}
const page = fs.readFileSync(file, "utf8");
const byId = Object.fromEntries([...page.matchAll(/<(\w+) id="(\w+)"/g)].map(([, tag, id]) => [id, new Node(tag)]));
byId.main.className = "empty";
const document = new Node("document");
Object.assign(document, { getElementById: id => byId[id], createElement: tag => new Node(tag) });
const ask = fetch;
Object.assign(globalThis, { document, KeyboardEvent, fetch: (path, options) => ask(new URL(path, base), options) });
vm.runInThisContext(/<script>([^]*)<\/script>/.exec(page)[1]);
readline.createInterface({ input: process.stdin }).on("line", async line => {
  let answer;
  try { answer = { value: await vm.runInThisContext(JSON.parse(line)) }; }
  catch (error) { answer = { error: error.stack }; }
  process.stdout.write(JSON.stringify(answer) + "\n");
});
}
"""


class Page(Protocol):
    """An open page."""

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression, awaited where it is a promise."""

    def close(self) -> None: ...


class NodePage:
    """The page's script in Node.js."""

    def __init__(self, url: str):
        command = [str(NODE), "-e", DOCUMENT, str(PAGE), url]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def evaluate(self, expression: str) -> Any:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps(expression) + "\n")
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline())
        assert "error" not in answer, answer["error"]
        return answer.get("value")

    def close(self) -> None:
        with self.process:
            self.process.kill()


class Chromium:
    """A browser without a window, spoken to in NUL-separated JSON (the DevTools protocol)."""

    def __init__(self, profile: Path):
        reading, self.to_browser = os.pipe()
        self.from_browser, writing = os.pipe()
        launch = [sys.executable, "-c", LAUNCHER, str(reading), str(writing)]
        command = [*launch, str(CHROMIUM), *FLAGS, f"--user-data-dir={profile}"]
        log = subprocess.DEVNULL  # it complains about the missing desktop
        self.process = subprocess.Popen(
            command, pass_fds=(reading, writing), stdout=log, stderr=log, start_new_session=True
        )
        os.close(reading)
        os.close(writing)
        self.received = b""
        self.numbers = itertools.count(1)
        self.events: list[dict[str, Any]] = []

    def call(self, method: str, session: str | None = None, **params: Any) -> dict[str, Any]:
        """The result of a command; events that come before it are kept."""
        number = next(self.numbers)
        command = {"id": number, "method": method, "params": params, **({"sessionId": session} if session else {})}
        message = json.dumps(command).encode() + b"\0"
        while message:
            message = message[os.write(self.to_browser, message) :]
        while True:
            answer = self.receive()
            if answer.get("id") == number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                result: dict[str, Any] = answer["result"]
                return result
            self.events.append(answer)

    def receive(self) -> dict[str, Any]:
        while b"\0" not in self.received:
            assert select.select([self.from_browser], [], [], 6 * SECONDS)[0], "Chromium doesn't answer"
            data = os.read(self.from_browser, 1 << 20)
            assert data, f"Chromium ended, exit code {self.process.wait(SECONDS)}"
            self.received += data
        line, _, self.received = self.received.partition(b"\0")
        message: dict[str, Any] = json.loads(line)
        return message

    def close(self) -> None:
        os.close(self.to_browser)  # at which it ends
        os.close(self.from_browser)
        try:
            self.process.wait(SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


class ChromiumPage:
    """The page in a tab of its own, once it has what `ready` finds."""

    def __init__(self, browser: Chromium, url: str, ready: str = "document.getElementById('box')"):
        self.browser = browser
        self.target = browser.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = browser.call("Target.attachToTarget", targetId=self.target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        self.call("Page.navigate", url=url)
        until(self, f"document.readyState === 'complete' && !!{ready}")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        return self.browser.call(method, self.session, **params)

    def evaluate(self, expression: str) -> Any:
        answer = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def press(self, key: str, code: int, text: str = "") -> None:
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code, text=text)

    def resize(self, width: int, height: int, scheme: str) -> None:
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def picture(self, path: Path, whole: bool = False) -> None:
        shot = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)["data"]
        path.write_bytes(base64.b64decode(shot))

    def complaints(self) -> list[Any]:
        """Exceptions and console entries so far: a refused script or style is among them."""
        kinds = ("Log.entryAdded", "Runtime.exceptionThrown", "Runtime.consoleAPICalled")
        return [event for event in self.browser.events if event.get("method") in kinds]

    def close(self) -> None:
        self.browser.call("Target.closeTarget", targetId=self.target)
        self.browser.events.clear()


# -----------------------------------------------------------------------------
# Fixtures and what the tests do to the page


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    if not CHROMIUM:
        pytest.skip("no chromium on PATH")
    chromium = Chromium(tmp_path_factory.mktemp("profile"))
    yield chromium
    chromium.close()


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine(tokens_of("abcdef", "<|assistant_end|>"), stepped=True)


@pytest.fixture
def live(engine: FakeEngine) -> Iterator[Live]:
    with serving(engine) as server:
        yield server


@pytest.fixture(params=["chromium", "node"])
def page(request: pytest.FixtureRequest) -> Iterator[Page]:
    """The page, once in each."""
    if request.param == "node" and not NODE:
        pytest.skip("no node on PATH")
    browser = request.getfixturevalue("browser") if request.param == "chromium" else None
    url = f"http://127.0.0.1:{request.getfixturevalue('live').port}/"
    opened: Page = ChromiumPage(browser, url) if browser else NodePage(url)
    try:
        until(opened, "limits !== null")
        yield opened
    finally:
        opened.close()


def until(page: Page, expression: str) -> None:
    """Wait until it is true."""
    for _ in range(SECONDS * 100):
        if page.evaluate(expression):
            return
        threading.Event().wait(0.01)
    shown = page.evaluate("document.getElementById('log')?.textContent")
    raise AssertionError(f"never true: {expression}; the log says {shown!r}")


def type_text(page: Page, text: str) -> None:
    page.evaluate(f"box.value = {json.dumps(text)}; box.dispatchEvent(new Event('input')); 0")


def press(page: Page, target: str = "box", **event: Any) -> None:
    options = json.dumps({"bubbles": True, "cancelable": True, **event})
    page.evaluate(f"{target}.dispatchEvent(new KeyboardEvent('keydown', {options}))")


def say(page: Page, text: str) -> None:
    type_text(page, text)
    press(page, key="Enter")


def click(page: Page, text: str) -> None:
    """Press the button in the log that says so."""
    page.evaluate(f"[...log.querySelectorAll('button')].find(b => b.textContent === {json.dumps(text)}).click()")


def texts(page: Page, selector: str) -> list[str]:
    found: list[str] = page.evaluate(f"[...log.querySelectorAll('{selector}')].map(e => e.textContent)")
    return found


def last_request(engine: FakeEngine) -> list[int]:
    tokens: list[int] = engine.calls[-1]["tokens"]
    return tokens


def answer(page: Page, engine: FakeEngine, text: str) -> None:
    """Say something and let the whole reply come."""
    say(page, text)
    engine.allow(len(engine.tokens))
    until(page, "running === null")


def pairs(*contents: Any) -> list[dict[str, Any]]:
    """Messages of user and assistant in turn."""
    return [{"role": "user" if i % 2 == 0 else "assistant", "content": text} for i, text in enumerate(contents)]


# -----------------------------------------------------------------------------
# In both


def test_the_reply_grows_and_stop_keeps_it_and_ends_the_engine(page: Page, live: Live, engine: FakeEngine) -> None:
    say(page, "Hello")
    for shown in ("a", "ab"):
        engine.allow()
        until(page, f"log.textContent.endsWith('Hello{shown}')")
    assert page.evaluate("element('send').hidden && !element('stop').hidden")
    page.evaluate("element('stop').click()")
    until(page, "running === null")
    assert page.evaluate("element('stop').hidden && !element('send').hidden")
    worker = live.server.config.app.state.worker  # type: ignore[union-attr]
    for _ in range(SECONDS * 100):
        if worker.active is None or worker.active.cancelled:
            break
        threading.Event().wait(0.01)
    engine.allow()  # the step that was running
    assert engine.closed.acquire(timeout=SECONDS) and engine.taken == [3]
    assert texts(page, ".assistant") == ["ab"] and texts(page, ".note") == ["Stopped"]
    answer(page, engine, "And then?")
    assert last_request(engine) == render_for_completion(pairs("Hello", "ab", "And then?"), TOKENIZER)


def test_stop_before_anything_was_said_gives_the_text_back(page: Page, engine: FakeEngine) -> None:
    say(page, "Hello")
    assert page.evaluate("box.value") == ""
    press(page, "document", key="Escape")
    until(page, "running === null")
    assert page.evaluate("box.value") == "Hello" and texts(page, ".turn") == []
    assert page.evaluate("main.classList.contains('empty') && !element('welcome').hidden")


def test_tool_calls_are_chips_and_return_to_the_server_as_tool_calls(page: Page, engine: FakeEngine) -> None:
    call = ("<|python_start|>", "12*3", "<|python_end|>", "<|output_start|>", "36", "<|output_end|>")
    engine.tokens = tokens_of("It is ", *call, *call, ".", "<|assistant_end|>")
    answer(page, engine, "12*3?")
    assert texts(page, ".tool") == ["12*3 = 36"] * 2
    assert texts(page, ".assistant") == ["It is 12*3 = 3612*3 = 36."]
    parts = [{"type": "python", "text": "12*3"}, {"type": "python_output", "text": "36"}] * 2
    said = [{"type": "text", "text": "It is "}, *parts, {"type": "text", "text": "."}]
    answer(page, engine, "Sure?")
    assert last_request(engine) == render_for_completion(pairs("12*3?", said, "Sure?"), TOKENIZER)


def test_an_error_offers_retry_and_leaves_no_half_turn(page: Page, engine: FakeEngine) -> None:
    """nanochat kept the question of a failed request, so the next one had two user messages in a row."""
    answer(page, engine, "First")
    engine.error, engine.tokens = ValueError("told by a test"), tokens_of("ab")
    answer(page, engine, "Second")
    assert texts(page, ".error") == ["the model failed (ValueError); the server's terminal says whereRetryEdit"]
    assert texts(page, ".assistant") == ["abcdef", "ab"]
    click(page, "Retry")
    engine.allow(2)
    until(page, "running === null")
    assert last_request(engine) == render_for_completion(pairs("First", "abcdef", "Second"), TOKENIZER)
    assert texts(page, ".user") == ["First", "Second"] and len(texts(page, ".error")) == 1
    engine.error, engine.tokens = None, tokens_of("ok", "<|assistant_end|>")
    answer(page, engine, "Third")
    assert last_request(engine) == render_for_completion(pairs("First", "abcdef", "Third"), TOKENIZER)
    assert texts(page, ".dropped") == ["SecondabNot part of the conversation"]


def test_a_refused_message_can_be_edited(page: Page, engine: FakeEngine) -> None:
    say(page, "x" * 8_001)
    until(page, "running === null")
    assert "8,001 characters; at most 8,000" in texts(page, ".error")[0] and not engine.calls
    click(page, "Edit")
    assert page.evaluate("box.value.length") == 8_001 and texts(page, ".turn") == []
    answer(page, engine, "shorter")
    assert last_request(engine) == render_for_completion(pairs("shorter"), TOKENIZER)


def test_a_server_that_is_gone_is_said(page: Page, live: Live, engine: FakeEngine) -> None:
    live.server.should_exit = True
    until(page, "fetch('health').then(() => false, () => true)")
    say(page, "Hello")
    until(page, "running === null")
    assert texts(page, ".error") == ["The server can’t be reached.RetryEdit"]


def test_a_reply_that_says_nothing_is_said(page: Page, engine: FakeEngine) -> None:
    engine.tokens = tokens_of("<|assistant_end|>")
    answer(page, engine, "Hello")
    assert texts(page, ".error") == ["The model ended its reply before it said anything.RetryEdit"]


def test_a_new_chat_ends_the_old_one(page: Page, live: Live, engine: FakeEngine) -> None:
    answer(page, engine, "Hello")
    say(page, "More")
    live.wait("active", 1)
    press(page, "document", key="O", ctrlKey=True, shiftKey=True)
    assert texts(page, ".turn") == [] and page.evaluate("running === null && conversation.length") == 0
    assert engine.closed.acquire(timeout=SECONDS)  # the first reply's
    for _ in range(10 * SECONDS):  # the server learns between two steps that the page has gone
        engine.allow()
        if engine.closed.acquire(timeout=0.1):
            break
    answer(page, engine, "Hello")
    assert last_request(engine) == render_for_completion(HELLO, TOKENIZER)
    assert texts(page, ".turn") == ["Helloabcdef"]


def test_enter_sends_but_not_while_a_word_is_composed(page: Page, engine: FakeEngine) -> None:
    type_text(page, "にほん")
    press(page, key="Enter", isComposing=True)
    press(page, key="Enter", keyCode=229)  # as Safari says it
    press(page, key="Enter", shiftKey=True)
    assert texts(page, ".turn") == []
    press(page, key="Enter")
    assert texts(page, ".user") == ["にほん"]
    say(page, "too early")
    assert texts(page, ".user") == ["にほん"] and page.evaluate("box.value") == "too early"


def test_who_waits_and_what_is_left_out_is_said(page: Page, live: Live, engine: FakeEngine) -> None:
    live.chat()
    live.wait("active", 1)
    say(page, "Hello")
    until(page, "log.textContent.includes('1 before you')")
    engine.allow(2 * len(engine.tokens))
    until(page, "running === null")
    assert texts(page, ".assistant") == ["abcdef"] and not texts(page, ".waiting")
    page.evaluate(
        "conversation = Array.from({length: 500}, (_, i) => ({role: i % 2 ? 'assistant' : 'user', content: 'xx'})); 0"
    )
    answer(page, engine, "Hello")
    (note,) = texts(page, ".note")
    assert note.startswith("The model no longer sees the first ") and int("".join(filter(str.isdigit, note))) > 2


def test_only_what_the_server_takes_is_sent(page: Page) -> None:
    """A long chat must go on, and not end in `at most 32,000 characters`."""

    def sent(*sizes: int) -> int:
        messages = json.dumps(pairs(*("x" * size for size in sizes)))
        return int(page.evaluate(f"recent({messages}).length"))

    assert sent(*[1] * 501) == 499 and sent(*[1] * 499) == 499
    assert sent(*[8_000] * 3) == 3 and sent(*[8_000] * 5) == 3
    assert sent(5, 5, 5, 9_000, 5, 5, 5) == 3  # a reply too long to be sent back
    assert sent(9_000) == 1  # the server says what is wrong with it


def test_events_split_anywhere_are_whole(page: Page) -> None:
    """nanochat's page dropped an event that two reads shared, and broke characters that two reads shared."""
    bodies = page.evaluate("""(async () => {
      const events = [{ token: "Gr\\u00f6\\u00dfe" }, { token: "\\u{1f388}\\n\\n" }, { done: true }];
      const bytes = new TextEncoder().encode(events.map(event => `data: ${JSON.stringify(event)}\\n\\n`).join(""));
      const results = [];
      for (let size = 1; size <= bytes.length; size++) {
        let at = 0;
        const read = async () => {
          if (at >= bytes.length) return { done: true };
          return { done: false, value: bytes.slice(at, at += size) };
        };
        const got = [];
        for await (const event of readEvents({ getReader: () => ({ read }) })) got.push(event);
        results.push(JSON.stringify(got) === JSON.stringify(events));
      }
      return results;
    })()""")
    assert len(bodies) > 60 and all(bodies)


# -----------------------------------------------------------------------------
# In Chromium only


@pytest.fixture
def tab(browser: Chromium, live: Live) -> Iterator[ChromiumPage]:
    opened = ChromiumPage(browser, f"http://127.0.0.1:{live.port}/")
    try:
        until(opened, "limits !== null")
        yield opened
    finally:
        opened.close()


def test_real_keys_type_and_send_and_the_policy_holds(tab: ChromiumPage, engine: FakeEngine) -> None:
    markup = "<img src=x onerror='document.title=1'><script>document.title=2</script>"
    engine.tokens = tokens_of(markup, "<|assistant_end|>")
    assert tab.evaluate("document.activeElement === box")
    tab.call("Input.insertText", text="Hello")
    tab.press("Enter", 13, "\r")
    engine.allow(len(engine.tokens))
    until(tab, "running === null && log.textContent.length > 10")
    assert texts(tab, ".assistant") == [markup] and tab.evaluate("log.querySelectorAll('img, script').length") == 0
    assert tab.evaluate("document.title") == "nanochat" and tab.evaluate("document.activeElement === box")
    assert tab.evaluate("getComputedStyle(document.body).display") == "flex"  # the style sheet was let in
    assert tab.complaints() == []
    refused = "try { document.body.innerHTML = '<b>x</b>'; false } catch { true }"
    assert tab.evaluate(refused)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1200])
def test_nothing_is_wider_than_the_window(
    tab: ChromiumPage, engine: FakeEngine, tmp_path: Path, width: int, scheme: str
) -> None:
    """Leaves a screenshot in tmp_path."""
    call = ("<|python_start|>", "'strawberry'.count('r')", "<|python_end|>", "<|output_start|>", "3", "<|output_end|>")
    engine.tokens = tokens_of("Let me count: ", *call, f". So three. {'x' * 200} ", "Words. " * 60, "<|assistant_end|>")
    tab.resize(width, 760, scheme)
    answer(tab, engine, "How many r are in strawberry? " + "y" * 120)
    engine.error = ValueError("told by a test")
    engine.tokens = tokens_of("And then")
    answer(tab, engine, "And in raspberry?")
    assert tab.evaluate("document.documentElement.scrollWidth") <= width and tab.evaluate("main.scrollWidth") <= width
    assert tab.evaluate("main.scrollHeight - main.scrollTop - main.clientHeight") < 2  # it followed the text
    assert tab.evaluate("log.getBoundingClientRect().width") <= 46 * 16
    assert tab.evaluate("document.getElementById('composer').getBoundingClientRect().bottom") <= 760
    tab.picture(tmp_path / f"chat-{width}-{scheme}.png")
    assert (tmp_path / f"chat-{width}-{scheme}.png").read_bytes().startswith(b"\x89PNG")


def test_the_log_follows_only_a_reader_who_is_at_its_end(tab: ChromiumPage, engine: FakeEngine) -> None:
    engine.tokens = tokens_of("line\n" * 100, "<|assistant_end|>")
    answer(tab, engine, "Hello")
    assert tab.evaluate("main.scrollTop") > 500
    say(tab, "More")
    tab.evaluate("main.scrollTop = 100; 0")
    engine.allow(len(engine.tokens))
    until(tab, "running === null")
    assert tab.evaluate("main.scrollTop") == 100


def test_the_box_grows_with_its_text(tab: ChromiumPage) -> None:
    heights = []
    for lines in (1, 3, 100):
        type_text(tab, "\n".join(["line"] * lines))
        heights.append(tab.evaluate("box.getBoundingClientRect().height"))
    assert heights[0] < heights[1] < heights[2] <= 12 * 16
