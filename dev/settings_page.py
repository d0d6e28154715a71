"""Write docs/reference/settings.md: every setting of every script, as their blocks say it.

    python -m dev.settings_page

A test compares the page with what this makes, so a setting that is added, changed or dropped changes the page as well.
"""

from nanochat.configurator import configure

page = "docs/reference/settings.md"  # the file to write, in the checkout
settings = configure(__name__)

import re
from itertools import groupby
from pathlib import Path

from nanochat.configurator import Setting, read_block

ROOT = Path(__file__).parent.parent
HEAD = """# Every setting of every script

Made from the scripts by `python -m dev.settings_page`; `--help` of a script says the same. Dashes and underscores are
alike, so are `=` and a space before a value; a bool is also given bare, or with `no-` before its name. `None` as a
default means that the script decides, as the line says. [The README](../../README.md#settings) shows settings files.
"""


def scripts() -> dict[str, Path]:
    """{module: file} of everything with a settings block."""
    paths = [path for folder in ("scripts", "nanochat", "dev") for path in sorted((ROOT / folder).glob("*.py"))]
    with_block = [path for path in paths if "\nsettings = configure(__name__" in path.read_text(encoding="utf-8")]
    return {f"{path.parent.name}.{path.stem}": path for path in with_block}


def cell(text: str) -> str:
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*").replace("_", "\\_")


def row(setting: Setting, letters: dict[str, str]) -> str:
    letter = letters.get(setting.name)
    flag = f"`--{setting.name.replace('_', '-')}`" + (f", `-{letter}`" if letter else "")
    flag += ", or the words without dashes" * (letter == "")
    default = repr(setting.default).replace("|", "\\|")
    return f"| {flag} | {cell(setting.type_name)} | `{default}` | {cell(setting.help)} |"


def section(module: str, path: Path) -> list[str]:
    """A script's heading, what it is for, and a table for each group of its settings."""
    block = read_block(path)
    source = path.read_text(encoding="utf-8")
    also = re.search(r'^ALSO = "(\w+)/(\w+)\.py"', source, re.MULTILINE)
    inherited = read_block(ROOT / also[1] / f"{also[2]}.py").settings if also else {}
    lines = ["", f"## {module}", "", cell(block.doc.split("\n\n")[0].replace("\n", " "))]
    if also:
        lines += ["", f"All settings of [{also[1]}.{also[2]}](#{also[1]}{also[2]}), and:"]
    letters = {name: letter for letter, name in block.short.items()}
    own = [setting for name, setting in block.settings.items() if name not in inherited]
    for title, group in groupby(own, key=lambda setting: setting.section):
        lines += ["", f"| {cell(title)} | | | |", "|---|---|---|---|", *(row(setting, letters) for setting in group)]
    return lines


def make(paths: dict[str, Path]) -> str:
    """The page."""
    return HEAD + "\n".join(line for module, path in paths.items() for line in section(module, path)) + "\n"


if __name__ == "__main__":
    (ROOT / page).write_text(make(scripts()), encoding="utf-8")
