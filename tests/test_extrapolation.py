"""dev.extrapolation: what it prints and writes, on a text and models of a second."""

import pytest

from dev import extrapolation
from nanochat.common import UserError
from tests import tiny


def test_every_kind_is_scored_at_every_length(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    tiny.write_text(tmp_path / "text")
    small = {"file": str(tmp_path / "text" / "val.txt"), "depth": 1, "head_dim": 16, "max_seq_len": 8}
    tiny.run_here(monkeypatch, extrapolation, {**small, "num_iterations": 4, "eval_tokens": 512})
    output = capsys.readouterr().out
    assert "| learned |" in output and output.count("refused: wpe.weight has 8 positions") == 6
    assert "ALiBi: 64 characters, " in output and "rotary: 64 characters, " in output
    page = (tmp_path / "report" / "extrapolation.html").read_text()
    assert "<svg" in page and "rotary" in page


@pytest.mark.parametrize(
    ("text", "line"), [(None, "expected a text file"), (b"short", "is no longer"), (b"\xff", "expected .* UTF-8")]
)
def test_a_text_that_cannot_be_used_is_refused(tmp_path, monkeypatch, text, line):
    path = tmp_path / "text.txt"
    if text:
        path.write_bytes(text)
    with pytest.raises(UserError, match=line):
        tiny.run_here(monkeypatch, extrapolation, {"file": str(path)})
