"""The page in headless Chromium, over its DevTools pipe, with a real server whose engine the test steps by hand."""

import base64
import itertools
import json
import os
import select
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nanochat.conversation import render_for_completion
from tests import tiny
from tests.test_server import HELLO, SECONDS, TOKENIZER, FakeEngine, Live, pairs, serving, tokens_of

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = """--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking
    --disable-component-update --disable-sync --disable-dev-shm-usage --remote-debugging-pipe""".split()


class Chromium:
    """A browser without a window, spoken to in NUL-separated JSON (the DevTools protocol)."""

    def __init__(self, profile: Path):
        reading, self.to_browser = os.pipe()
        self.from_browser, writing = os.pipe()
        # It reads commands from descriptor 3 and writes to 4.
        launch = ["bash", "-c", f'exec "$@" 3<&{reading} 4>&{writing}', "bash"]
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


class Tab:
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


@pytest.fixture
def page(browser: Chromium, live: Live) -> Iterator[Tab]:
    opened = Tab(browser, f"http://127.0.0.1:{live.port}/")
    try:
        until(opened, "limits !== null")
        yield opened
    finally:
        opened.close()


def until(page: Tab, expression: str) -> None:
    """Wait until it is true."""
    tiny.wait_until(lambda: page.evaluate(expression))


def type_text(page: Tab, text: str) -> None:
    page.evaluate(f"box.value = {json.dumps(text)}; box.dispatchEvent(new Event('input')); 0")


def press(page: Tab, target: str = "box", **event: Any) -> None:
    options = json.dumps({"bubbles": True, "cancelable": True, **event})
    page.evaluate(f"{target}.dispatchEvent(new KeyboardEvent('keydown', {options}))")


def say(page: Tab, text: str) -> None:
    type_text(page, text)
    press(page, key="Enter")


def click(page: Tab, text: str) -> None:
    """Press the button in the log that says so."""
    page.evaluate(f"[...log.querySelectorAll('button')].find(b => b.textContent === {json.dumps(text)}).click()")


def texts(page: Tab, selector: str) -> list[str]:
    found: list[str] = page.evaluate(f"[...log.querySelectorAll('{selector}')].map(e => e.textContent)")
    return found


def last_request(engine: FakeEngine) -> list[int]:
    tokens: list[int] = engine.calls[-1]["tokens"]
    return tokens


def answer(page: Tab, engine: FakeEngine, text: str) -> None:
    """Say something and let the whole reply come."""
    say(page, text)
    engine.allow(len(engine.tokens))
    until(page, "running === null")


# -----------------------------------------------------------------------------
# Tests


def test_the_reply_grows_and_stop_keeps_it_and_ends_the_engine(page: Tab, live: Live, engine: FakeEngine) -> None:
    say(page, "Hello")
    for shown in ("a", "ab"):
        engine.allow()
        until(page, f"log.textContent.endsWith('Hello{shown}')")
    assert page.evaluate("element('send').hidden && !element('stop').hidden")
    page.evaluate("element('stop').click()")
    until(page, "running === null")
    assert page.evaluate("element('stop').hidden && !element('send').hidden")
    worker = live.server.config.app.state.worker  # type: ignore[union-attr]
    tiny.wait_until(lambda: worker.active is None or worker.active.cancelled)
    engine.allow()  # the step that was running
    assert engine.closed.acquire(timeout=SECONDS) and engine.taken == [3]
    assert texts(page, ".assistant") == ["ab"] and texts(page, ".note") == ["Stopped"]
    answer(page, engine, "And then?")
    assert last_request(engine) == render_for_completion(pairs("Hello", "ab", "And then?"), TOKENIZER)


def test_stop_before_anything_was_said_gives_the_text_back(page: Tab, engine: FakeEngine) -> None:
    say(page, "Hello")
    assert page.evaluate("box.value") == ""
    press(page, "document", key="Escape")
    until(page, "running === null")
    assert page.evaluate("box.value") == "Hello" and texts(page, ".turn") == []
    assert page.evaluate("main.classList.contains('empty') && !element('welcome').hidden")


def test_tool_calls_are_chips_and_return_to_the_server_as_tool_calls(page: Tab, engine: FakeEngine) -> None:
    call = ("<|python_start|>", "12*3", "<|python_end|>", "<|output_start|>", "36", "<|output_end|>")
    engine.tokens = tokens_of("It is ", *call, *call, ".", "<|assistant_end|>")
    answer(page, engine, "12*3?")
    assert texts(page, ".tool") == ["12*3 = 36"] * 2
    assert texts(page, ".assistant") == ["It is 12*3 = 3612*3 = 36."]
    parts = [{"type": "python", "text": "12*3"}, {"type": "python_output", "text": "36"}] * 2
    said = [{"type": "text", "text": "It is "}, *parts, {"type": "text", "text": "."}]
    answer(page, engine, "Sure?")
    assert last_request(engine) == render_for_completion(pairs("12*3?", said, "Sure?"), TOKENIZER)


def test_an_error_offers_retry_and_leaves_no_half_turn(page: Tab, engine: FakeEngine) -> None:
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


def test_a_refused_message_can_be_edited(page: Tab, engine: FakeEngine) -> None:
    say(page, "x" * 8_001)
    until(page, "running === null")
    assert "8,001 characters; at most 8,000" in texts(page, ".error")[0] and not engine.calls
    click(page, "Edit")
    assert page.evaluate("box.value.length") == 8_001 and texts(page, ".turn") == []
    answer(page, engine, "shorter")
    assert last_request(engine) == render_for_completion(pairs("shorter"), TOKENIZER)


def test_a_server_that_is_gone_is_said(page: Tab, live: Live, engine: FakeEngine) -> None:
    live.server.should_exit = True
    until(page, "fetch('health').then(() => false, () => true)")
    say(page, "Hello")
    until(page, "running === null")
    assert texts(page, ".error") == ["The server can’t be reached.RetryEdit"]


def test_a_reply_that_says_nothing_is_said(page: Tab, engine: FakeEngine) -> None:
    engine.tokens = tokens_of("<|assistant_end|>")
    answer(page, engine, "Hello")
    assert texts(page, ".error") == ["The model ended its reply before it said anything.RetryEdit"]


def test_a_new_chat_ends_the_old_one(page: Tab, live: Live, engine: FakeEngine) -> None:
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


def test_enter_sends_but_not_while_a_word_is_composed(page: Tab, engine: FakeEngine) -> None:
    type_text(page, "にほん")
    press(page, key="Enter", isComposing=True)
    press(page, key="Enter", keyCode=229)  # as Safari says it
    press(page, key="Enter", shiftKey=True)
    assert texts(page, ".turn") == []
    press(page, key="Enter")
    assert texts(page, ".user") == ["にほん"]
    say(page, "too early")
    assert texts(page, ".user") == ["にほん"] and page.evaluate("box.value") == "too early"


def test_who_waits_and_what_is_left_out_is_said(page: Tab, live: Live, engine: FakeEngine) -> None:
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


def test_only_what_the_server_takes_is_sent(page: Tab) -> None:
    """A long chat must go on, and not end in `at most 32,000 characters`."""

    def sent(*sizes: int) -> int:
        messages = json.dumps(pairs(*("x" * size for size in sizes)))
        return int(page.evaluate(f"recent({messages}).length"))

    assert sent(*[1] * 501) == 499 and sent(*[1] * 499) == 499
    assert sent(*[8_000] * 3) == 3 and sent(*[8_000] * 5) == 3
    assert sent(5, 5, 5, 9_000, 5, 5, 5) == 3  # a reply too long to be sent back
    assert sent(9_000) == 1  # the server says what is wrong with it


def test_events_split_anywhere_are_whole(page: Tab) -> None:
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


def test_real_keys_type_and_send_and_the_policy_holds(page: Tab, engine: FakeEngine) -> None:
    markup = "<img src=x onerror='document.title=1'><script>document.title=2</script>"
    engine.tokens = tokens_of(markup, "<|assistant_end|>")
    assert page.evaluate("document.activeElement === box")
    page.call("Input.insertText", text="Hello")
    page.press("Enter", 13, "\r")
    engine.allow(len(engine.tokens))
    until(page, "running === null && log.textContent.length > 10")
    assert texts(page, ".assistant") == [markup] and page.evaluate("log.querySelectorAll('img, script').length") == 0
    assert page.evaluate("document.title") == "nanochat" and page.evaluate("document.activeElement === box")
    assert page.evaluate("getComputedStyle(document.body).display") == "flex"  # the style sheet was let in
    assert page.complaints() == []
    refused = "try { document.body.innerHTML = '<b>x</b>'; false } catch { true }"
    assert page.evaluate(refused)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1200])
def test_nothing_is_wider_than_the_window(
    page: Tab, engine: FakeEngine, tmp_path: Path, width: int, scheme: str
) -> None:
    """Leaves a screenshot in tmp_path."""
    call = ("<|python_start|>", "'strawberry'.count('r')", "<|python_end|>", "<|output_start|>", "3", "<|output_end|>")
    engine.tokens = tokens_of("Let me count: ", *call, f". So three. {'x' * 200} ", "Words. " * 60, "<|assistant_end|>")
    page.resize(width, 760, scheme)
    answer(page, engine, "How many r are in strawberry? " + "y" * 120)
    engine.error = ValueError("told by a test")
    engine.tokens = tokens_of("And then")
    answer(page, engine, "And in raspberry?")
    assert page.evaluate("document.documentElement.scrollWidth") <= width and page.evaluate("main.scrollWidth") <= width
    assert page.evaluate("main.scrollHeight - main.scrollTop - main.clientHeight") < 2  # it followed the text
    assert page.evaluate("log.getBoundingClientRect().width") <= 46 * 16
    assert page.evaluate("document.getElementById('composer').getBoundingClientRect().bottom") <= 760
    page.picture(tmp_path / f"chat-{width}-{scheme}.png")
    assert (tmp_path / f"chat-{width}-{scheme}.png").read_bytes().startswith(b"\x89PNG")


def test_the_log_follows_only_a_reader_who_is_at_its_end(page: Tab, engine: FakeEngine) -> None:
    engine.tokens = tokens_of("line\n" * 100, "<|assistant_end|>")
    answer(page, engine, "Hello")
    assert page.evaluate("main.scrollTop") > 500
    say(page, "More")
    page.evaluate("main.scrollTop = 100; 0")
    engine.allow(len(engine.tokens))
    until(page, "running === null")
    assert page.evaluate("main.scrollTop") == 100


def test_the_box_grows_with_its_text(page: Tab) -> None:
    heights = []
    for lines in (1, 3, 100):
        type_text(page, "\n".join(["line"] * lines))
        heights.append(page.evaluate("box.getBoundingClientRect().height"))
    assert heights[0] < heights[1] < heights[2] <= 12 * 16
