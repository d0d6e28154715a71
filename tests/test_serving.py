"""The line and the engines' threads, without HTTP; and what a stop string hides."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanochat import markdown
from nanochat.engine import Request, Said, Sampling
from nanochat.markdown import Renderer, render_markdown
from nanochat.serving import Busy, Part, Reply, Serving
from tests import tiny
from tests.test_server import TOKENIZER, FakeEngine, tokens_of


def reply_for(text: str = "x", **options: Any) -> Reply:
    return Reply(Request(tokens_of(text), Sampling(**options.pop("sampling", {}))), TOKENIZER, **options)


def run(engine: FakeEngine, use: Callable[[Serving], Awaitable[None]], **options: Any) -> None:
    """Use a Serving of one engine in an event loop, and end both."""

    async def main() -> None:
        serving = Serving([engine], **options)
        try:
            await use(serving)
        finally:
            engine.allow(10_000)
            await asyncio.to_thread(serving.close)

    asyncio.run(main())


async def read(serving: Serving, replies: list[Reply]) -> list[str]:
    """The texts of replies, to their ends."""
    found = ["" for _ in replies]
    async for index, parts, _ in serving.follow(replies):
        for part in parts:
            found[index] += part.text
    return found


@given(st.text("abé", max_size=12), st.lists(st.text("abé", min_size=1, max_size=4), max_size=3))
def test_what_is_shown_ends_before_the_first_stop_string(text: str, stops: list[str]) -> None:
    """Whatever stands at token borders: here each byte is a token. Log-probabilities come for what is shown."""
    reply, shown = reply_for(stop=stops), ""
    for token in tokens_of(text):
        if not reply.stopped:
            reply.hear(Said(reply.request, token, 1, -0.5))
            shown = "".join(part.text for part in reply.parts)
            assert not any(stop in shown for stop in stops)
    reply.finish("length")
    (part,) = reply.take() or [Part("text", "")]
    # The first to be complete; of those that are complete with the same token the longest.
    ends = [end for end in range(len(text) + 1) if any(text[:end].endswith(stop) for stop in stops)]
    matching = [len(stop) for stop in stops if ends and text[: ends[0]].endswith(stop)]
    expected = text[: ends[0] - max(matching)] if ends else text
    assert part.text == expected and reply.finished == ("stop" if ends else "length")
    assert [one.token for one in part.said] == tokens_of(expected)


def test_a_slow_reader_finds_one_part_and_readers_are_woken_once_a_step() -> None:
    engine = FakeEngine(tokens_of("abcdefgh"), stepped=True)

    async def use(serving: Serving) -> None:
        replies, woken = [reply_for() for _ in range(3)], 0
        loop = asyncio.get_running_loop()
        wake = loop.call_soon_threadsafe

        def counted(*arguments: Any) -> Any:
            nonlocal woken
            woken += 1
            return wake(*arguments)

        serving.submit(replies)
        tiny.wait_until(lambda: serving.stats()["active"] == 3)
        loop.call_soon_threadsafe = counted  # type: ignore[method-assign]
        engine.allow(8)
        tiny.wait_until(serving.is_idle)
        assert [reply.take() for reply in replies] == [[Part("text", "abcdefgh")]] * 3 and woken <= 9

    run(engine, use)


def test_a_reply_that_fails_ends_no_other(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    engine = FakeEngine(tokens_of("abc"), stepped=True)

    async def use(serving: Serving) -> None:
        broken, other = [reply_for(), reply_for()]
        monkeypatch.setattr(broken.decoder, "feed", lambda token: 1 / 0)
        empty = reply_for("")
        serving.submit([broken, other, empty])
        engine.allow(3)
        assert await read(serving, [broken, other, empty]) == ["", "abc", ""]
        assert "ZeroDivisionError" in str(broken.error) and "0 tokens" in str(empty.error) and not other.error
        assert sorted(engine.taken) == [1, 3]  # its slot was free after one step

    run(engine, use)
    assert "ZeroDivisionError" in capsys.readouterr().err


def test_after_a_failing_step_there_is_a_new_batch(capsys: pytest.CaptureFixture[str]) -> None:
    engine = FakeEngine(tokens_of("ab"), error=ValueError("told by a test"))

    async def use(serving: Serving) -> None:
        failed = [reply_for(), reply_for()]
        serving.submit(failed)
        await read(serving, failed)
        assert all(reply.error for reply in failed)
        engine.error = None
        served = [reply_for()]
        serving.submit(served)
        assert await read(serving, served) == ["ab"]

    run(engine, use)
    assert capsys.readouterr().err.count("told by a test") == 1


def test_a_request_is_taken_whole_or_not_at_all() -> None:
    engine = FakeEngine(tokens_of("ab"), stepped=True)

    async def use(serving: Serving) -> None:
        with pytest.raises(Busy, match="0 requests wait already"):
            serving.submit([reply_for() for _ in range(4)])
        taken = [reply_for() for _ in range(3)]
        serving.submit(taken)
        tiny.wait_until(lambda: serving.stats()["active"] == 1)
        assert serving.stats()["waiting"] == 2 and [reply.ahead for reply in taken] == [0, 1, 2]
        serving.cancel(taken)
        engine.allow(1)
        tiny.wait_until(serving.is_idle)
        assert [reply.finished for reply in taken] == ["cancelled"] * 3 and engine.taken == [1]

    run(engine, use, slots=1, max_waiting=2)


def test_markdown_passes_on_no_html_no_image_and_no_address_that_runs() -> None:
    text = "<b onclick=x>a</b> ![i](https://evil.example/x.png) [j](javascript:alert(1)) [d](data:text/html,x) [r](/x)"
    html = render_markdown(text)
    assert "<b" not in html and "<img" not in html and html.count("<a ") == 1
    assert '<a href="https://evil.example/x.png" target="_blank" rel="noopener noreferrer nofollow">i</a>' in html
    table = render_markdown("| a |\n|--:|\n| b |\n\n```python\nx = 1\n```")
    assert "style=" not in table and '<td class="align-right">' in table and '<span class="o">=</span>' in table


def test_a_text_that_takes_too_long_is_shown_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """32,000 times "[" take half a minute; a lexer can take longer, and holds the interpreter meanwhile."""

    async def main() -> None:
        renderer = Renderer()
        assert await renderer.render("**a**") == "<p><strong>a</strong></p>\n"
        monkeypatch.setattr(markdown, "SECONDS", 0.01)
        assert await renderer.render("[" * 32_000 + "<") == f"<p>{'[' * 32_000}&lt;</p>"
        monkeypatch.setattr(markdown, "SECONDS", 60)
        assert await renderer.render("\ud800*b*") == "<p>\ud800<em>b</em></p>\n"
        await renderer.stop()

    asyncio.run(main())


def test_a_server_that_ended_while_a_page_was_rendered_told_of_two_readers() -> None:
    """The one that ended the process read its last words, which the one who waited for an answer was reading."""

    async def main() -> str:
        renderer = Renderer()
        answer = asyncio.create_task(renderer.render("[" * 20_000))  # half a minute's work
        while renderer.process is None:
            await asyncio.sleep(0.01)
        await renderer.stop()
        return await answer

    assert asyncio.run(main()).startswith("<p>[[[")
