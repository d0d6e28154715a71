"""Make the README's pictures anew: a learning curve from a record, and a chat with a running server.

    python -m scripts.chat_web -i rl -g laptop &
    python -m dev.pictures --model-tag=laptop                  # both, into docs/pictures
    python -m dev.pictures --model-tag=laptop --url=None       # the curve alone

Needs Chromium for the chat, which the tests' own driver drives. Nothing is drawn that did not happen: the curve is a
base run's record, and the answers are the model's.
"""

from nanochat.configurator import Positive, configure

# Curve
model_tag = "laptop"  # of the base run
# Chat
url: str | None = "http://127.0.0.1:8000/"  # of the server (None = no picture of a chat)
questions = "Who are you?|How many r are in strawberry?"  # to ask, joined by |
width: Positive = 760  # of the page, in pixels
height: Positive = 520  # and its height
# Files
out = "docs/pictures"  # folder to write to
settings = configure(__name__)

import tempfile
from pathlib import Path

from dev.plot import svg_file
from dev.repeat import find
from nanochat.common import UserError, get_base_dir, run_main
from nanochat.report import learning


def main() -> None:
    folder, events = Path(out), find(model_tag)
    if not events:
        raise UserError(f"--model-tag={model_tag}: no base run of that name in {get_base_dir()}/records")
    folder.mkdir(parents=True, exist_ok=True)
    curve = learning(events, f"Base model {model_tag}: loss", "nats per token")
    curve = curve._replace(series=[series for series in curve.series if series.points])
    (folder / "curve.svg").write_text(svg_file(curve), encoding="utf-8")
    print(f"written: {folder / 'curve.svg'}")
    if url:
        take_picture(url, folder / "chat.png")
        print(f"written: {folder / 'chat.png'}, {(folder / 'chat.png').stat().st_size / 1000:.0f} kB")


def take_picture(address: str, path: Path) -> None:
    """The page in a light scheme, after it has been asked everything."""
    from tests.test_ui import CHROMIUM, Chromium, Tab, idle, say, until

    if not CHROMIUM:
        raise UserError("there is no chromium; install it (Debian: apt install chromium), or --url=None")
    with tempfile.TemporaryDirectory() as profile:
        browser = Chromium(Path(profile))
        try:
            page = Tab(browser, address)
            page.resize(width, height, "light")
            until(page, "Boolean(health.model)")
            for question in questions.split("|"):
                say(page, question)
                idle(page)
            page.picture(path)
        finally:
            browser.close()


if __name__ == "__main__":
    run_main(main)
