"""What the Runs tab is told of the records."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from nanochat.record import open_record
from nanochat.runs import SHARE, runs_router


async def render(text: str) -> str:
    return f"<p>{len(text)}</p>"


@pytest.fixture
def client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[TestClient]:
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    monkeypatch.setattr("nanochat.runs.SHARE", 0)  # a record is read again as soon as it has changed
    app = FastAPI()
    app.include_router(runs_router(render))
    with TestClient(app) as client:
        yield client


def train(tag: str, first: int, last: int, of: int = 40, **end: Any) -> None:
    """Write the record of a training from step `first` to before `last`, and perhaps how it ended."""
    record = open_record("base", tag, {})
    record.write("plan", first_step=first, num_steps=of, formula="told by a test", batch="one row", parameters=3)
    for step in range(first, last):
        figures = {"loss": 5 - step / of, "smooth_loss": 5 - step / of, "grad_norm": 1.0, "spike": step == 7}
        record.write("step", step=step, tokens=64, seconds=0.5, **figures)
    if end:
        record.write(**end)
    record.close()


def get(client: TestClient, path: str, **query: Any) -> Any:
    answer = client.get(path, params=query)
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_an_empty_folder_has_no_runs_and_no_report(client: TestClient, tmp_path: Path) -> None:
    assert get(client, "/runs") == {"runs": [], "problems": [], "folder": str(tmp_path / "records")}
    assert get(client, "/curves") == {"curves": []}
    assert client.get("/report").status_code == 404


def test_a_run_that_was_stopped_and_resumed_is_one(client: TestClient) -> None:
    train("a", 0, 10, event="stopped", step=10, reason="SIGTERM")
    assert get(client, "/runs")["runs"][0]["state"] == "SIGTERM"
    train("a", 10, 40, event="end")
    (run,) = get(client, "/runs")["runs"]
    assert (run["state"], run["step"], run["num_steps"]) == ("end", 40, 40)
    loss = get(client, "/curves", run=run["name"])["curves"][0]
    assert [x for x, _ in loss["lines"][0]["points"]] == list(range(1, 41)) and 'class="flag' in loss["figure"]


def test_a_long_run_is_thinned_and_keeps_its_spikes(client: TestClient) -> None:
    train("long", 0, 20_000, 20_000)
    (run,) = get(client, "/runs")["runs"]
    answer = client.get("/curves", params={"run": run["name"]})
    assert len(answer.content) < 200_000 and 'class="cross' in answer.json()["curves"][0]["figure"]
    assert all(len(line["points"]) <= 400 for curve in answer.json()["curves"] for line in curve["lines"])
    details = get(client, f"/runs/{run['name']}")
    assert details["numbers"]["tokens/s"] == 128 and details["step"] == 20_000


def test_runs_are_drawn_together(client: TestClient) -> None:
    train("a", 0, 9)
    train("b", 0, 9)
    names = [run["name"] for run in get(client, "/runs")["runs"]]
    first = get(client, "/curves", run=names)["curves"][0]
    assert [line["name"] for line in first["lines"]] == ["b smoothed", "a smoothed"]
    assert "hue0" in first["figure"] and "hue1" in first["figure"]


def test_what_has_not_changed_costs_nothing(client: TestClient, tmp_path: Path) -> None:
    train("a", 0, 9)
    tag = client.get("/runs").headers["ETag"]
    assert client.get("/runs", headers={"If-None-Match": tag}).status_code == 304
    step = {"event": "step", "time": 0.0, "step": 9, "loss": 1.0, "smooth_loss": 1.0, "tokens": 64, "seconds": 0.5}
    with open(next((tmp_path / "records").iterdir()), "a", encoding="utf-8") as file:
        file.write(json.dumps(step) + "\n")
    answer = client.get("/runs", headers={"If-None-Match": tag})
    assert answer.status_code == 200 and answer.json()["runs"][0]["step"] == 10 and SHARE > 0


def test_names_are_looked_up_and_never_paths(client: TestClient, tmp_path: Path) -> None:
    train("a", 0, 2)
    (tmp_path / "base-secret.jsonl").write_text(next((tmp_path / "records").iterdir()).read_text())
    for name in ("../base-secret", "..%2Fbase-secret", str(tmp_path / "base-secret"), "base-*"):
        assert client.get(f"/runs/{name}").status_code == 404
        assert client.get("/curves", params={"run": name}).status_code == 404
    assert client.get("/curves", params={"run": ["x"] * 21}).status_code == 422


def test_a_damaged_record_is_named_and_the_others_are_shown(client: TestClient, tmp_path: Path) -> None:
    train("a", 0, 2)
    (tmp_path / "records" / "base-bad.jsonl").write_text("{\n{}\n")
    (tmp_path / "records" / "chat_eval-other.jsonl").write_text(json.dumps({"event": "start"}) + "\n")
    answer = get(client, "/runs")
    assert [run["tag"] for run in answer["runs"]] == ["a"]
    (problem,) = answer["problems"]
    assert "base-bad.jsonl" in problem and "mv " in problem
