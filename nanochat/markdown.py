"""Markdown that a model or a stranger wrote, as HTML that is safe to show.

Promises: HTML in the text is shown, never passed on; links lead to http, https and mailto alone and tell the other side
nothing; no image is loaded (its address could carry the chat away), it becomes a link; no inline styles or scripts, so
a strict Content-Security-Policy holds. Code has pygments' classes (`k`, `s`, ...), which the style sheet colours.

Some texts take minutes: 4,000 characters "\\n \\n \\n" are 7 s as C, 32,000 times "[" 30 s. A model that repeats itself
writes such, and a lexer would hold the interpreter all the time. So the server has a process for it (Renderer), and
what takes longer than two seconds is shown as it is.
"""

import asyncio
import contextlib
import html
import json
import sys
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from markdown_it import MarkdownIt
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import get_lexer_by_name
from pygments.util import ClassNotFound

SECONDS = 2.0
PROGRAM = "from nanochat.markdown import answer_lines; answer_lines()"


def render_markdown(text: str) -> str:
    """The HTML of a text, however long that takes."""
    return str(parser().render(text))


@cache
def parser() -> MarkdownIt:
    markdown = MarkdownIt("js-default", {"html": False, "linkify": False, "highlight": color}).disable("image")
    markdown.validateLink = is_safe  # type: ignore[method-assign, assignment]
    markdown.add_render_rule("link_open", open_link)
    markdown.add_render_rule("th_open", open_cell)
    markdown.add_render_rule("td_open", open_cell)
    return markdown


def color(code: str, language: str, attributes: str) -> str:
    """The HTML of a code block; "" where the language is not known, which leaves it plain."""
    with contextlib.suppress(ClassNotFound):
        return str(highlight(code, get_lexer_by_name(language), HtmlFormatter(nowrap=True)))
    return ""


def is_safe(address: str) -> bool:
    try:
        return urlsplit(address).scheme in ("http", "https", "mailto")
    except ValueError:
        return False


def open_link(renderer: Any, tokens: Any, index: int, options: Any, env: Any) -> str:
    tokens[index].attrs |= {"target": "_blank", "rel": "noopener noreferrer nofollow"}
    return str(renderer.renderToken(tokens, index, options, env))


def open_cell(renderer: Any, tokens: Any, index: int, options: Any, env: Any) -> str:
    if style := tokens[index].attrs.pop("style", None):  # text-align:right
        tokens[index].attrs["class"] = style.replace("text-align:", "align-")
    return str(renderer.renderToken(tokens, index, options, env))


def plain(text: str) -> str:
    return f"<p>{html.escape(text)}</p>".replace("\n", "<br>\n")


def answer_lines() -> None:
    """What the process of a Renderer does: a text per line in, its HTML out, both as JSON strings."""
    for line in sys.stdin:
        print(json.dumps(render_markdown(json.loads(line))), flush=True)


class Renderer:
    """render_markdown() in a process of its own, which is started when it is first needed."""

    def __init__(self) -> None:
        self.lock = asyncio.Lock()
        self.process: asyncio.subprocess.Process | None = None

    async def render(self, text: str) -> str:
        """The HTML of a text, or its plain text where that takes too long."""
        async with self.lock:
            try:
                if self.process is None:
                    await self.start()
                    await self.ask("")  # it has imported everything by then
                async with asyncio.timeout(SECONDS):
                    return await self.ask(text)
            except (OSError, ValueError):  # a TimeoutError is an OSError
                await self.stop()
                return plain(text)
            except asyncio.CancelledError:  # its answer must not become the next one's
                await self.stop()
                raise

    async def start(self) -> None:
        command, pipe = (sys.executable, "-c", PROGRAM), asyncio.subprocess.PIPE
        root, limit = Path(__file__).parent.parent, 1 << 24  # from where it can be imported; bytes of an answer
        self.process = await asyncio.create_subprocess_exec(
            *command, stdin=pipe, stdout=pipe, cwd=root, limit=limit, start_new_session=True
        )

    async def ask(self, text: str) -> str:
        assert self.process and self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps(text).encode() + b"\n")
        return str(json.loads(await self.process.stdout.readline()))

    async def stop(self) -> None:
        """End the process; render() starts another."""
        process, self.process = self.process, None
        if process:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()  # communicate() would read, which an answer's reader may be doing
