"""Fixtures that more than one test file uses."""

import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import tiny
from tests.faults import Faults, fork_server

# A shell that runs the suite in the background ignores these for all its children, and nohup the second: tests that
# send them failed there. What is ignored is inherited; a handler is not, so children begin with the default again.
for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, handler)

SHARED_DATA = Path(__file__).parents[2] / "shared" / "data"


@pytest.fixture
def base_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty NANOCHAT_BASE_DIR, for this process and those it starts."""
    path = tmp_path / "base"
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(path))
    return path


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Published data sets beside the checkout, ../shared/data: some machines have them."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"no {SHARED_DATA}")
    return SHARED_DATA


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Corpus `tiny` and a tokenizer of 320 tokens, made once by the commands a user types."""
    folder = tmp_path_factory.mktemp("prepared")
    tiny.prepare(folder)
    return folder


@pytest.fixture(scope="session")
def server() -> Iterator[subprocess.Popen[str]]:
    with fork_server() as process:
        yield process


@pytest.fixture(scope="module")
def own_home(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base directory of each module's own, with that corpus and tokenizer."""
    return Path(shutil.copytree(prepared, tmp_path_factory.mktemp("home") / "base"))


@pytest.fixture(scope="module")
def faults(own_home: Path, server: subprocess.Popen[str]) -> Faults:
    """Runs of the stages in that directory."""
    return Faults(own_home, server)
