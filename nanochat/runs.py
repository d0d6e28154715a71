"""What the page's Runs tab shows: the training records of this base directory, thinned for curves. It only reads.

    GET /runs            {"runs": [{"name", "stage", "tag", "state", "step", "num_steps", ...}], "problems": [...]}
    GET /runs/{name}     one of them with its {"numbers": {...}, "facts": {...}, "samples": [...]}
    GET /curves?run=...  {"curves": [...]}: diagrams of one run or of several together
    GET /report          {"html": ...}: the report card of everything, as it is now

Each answer has an ETag, and asking again costs nothing while nothing was written. A run that was stopped and resumed is
one run. A name is looked up among the records and never becomes a path. Reading a record that grows takes at most a
twentieth of the time: the longer one is, the older it may be when it is shown.
"""

import asyncio
import json
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from hashlib import sha256
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

from fastapi import APIRouter, HTTPException, Query, Request, Response

from nanochat.common import STAGES, UserError, get_base_dir
from nanochat.report import Events, build, command, curves, last, merged, of_kind, points, read_run, read_runs, resumes
from nanochat.report_page import DRAWN, HUES, LEFT, RIGHT, WIDTH, Curve, Series, figure, round_ticks, thinned, visible

MORE = [("speed", "tokens per second", "speed"), ("gradient norm", "before clipping", "grad_norm")]  # of every step
SAMPLES = 8  # the newest
MOST = 20  # runs in one diagram
SHARE = 20  # after a reading that took a second, none for this many


def reduced(events: Events) -> Events:
    """The events with every nth step only, so that about DRAWN of them are left; each has its speed."""
    steps = of_kind(events, "step")
    kept = {id(event) for event in thinned(steps, DRAWN)} | {id(event) for event in steps if event.get("spike")}
    for event in steps:
        event["speed"] = event["tokens"] / event["seconds"] if event.get("seconds") else None
    return [event for event in events if event["event"] != "step" or id(event) in kept]


class Records:
    """The training records of a folder, each read again when it has changed."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.lock = threading.Lock()
        self.read: dict[str, tuple[object, float, Events]] = {}  # file name: stamp, when it may be read again, events

    def events(self, path: Path) -> Events:
        """A record's, reduced; none of a stage that trains nothing. Raises UserError for a damaged one."""
        status = path.stat()
        stamp, begun = (status.st_mtime_ns, status.st_size), time.monotonic()
        known, again, events = self.read.get(path.name, (None, 0.0, []))
        if known != stamp and begun >= again:
            trains = path.name.partition("-")[0] in STAGES
            events = reduced(read_run(path)) if trains else []
            again = begun + (1 + SHARE) * (time.monotonic() - begun)
            self.read[path.name] = (stamp, again, events)
        return events

    def runs(self) -> tuple[dict[str, Events], list[str]]:
        """{name: events} of all runs, oldest first, and what is wrong with records that can't be read."""
        records, problems = [], []
        with self.lock:
            for path in self.folder.glob("*.jsonl"):
                try:
                    records.append((path.stem, self.events(path)))
                except (UserError, OSError) as error:
                    problems.append(str(error))
        chains: dict[tuple[str, str], tuple[str, list[Events]]] = {}
        found: dict[str, list[Events]] = {}
        for name, events in sorted((r for r in records if r[1]), key=lambda record: record[1][0]["time"]):
            key = (events[0]["stage"], events[0]["tag"])
            if not resumes(events) or key not in chains:
                chains[key] = (name, found.setdefault(name, []))
            chains[key][1].append(events)
        return {name: merged(chain) for name, chain in found.items()}, problems

    def find(self, names: Sequence[str]) -> list[Events]:
        """The runs of these names. Raises HTTPException for one that is not there."""
        runs, _ = self.runs()
        if missing := [name for name in names if name not in runs]:
            raise HTTPException(404, f"there is no run {missing[0]!r:.80}")
        return [runs[name] for name in names]


def summary(name: str, events: Events) -> dict[str, Any]:
    """A line of the list. `state` is "end", why it stopped, or "" for a run that goes on or died without a word."""
    stage, tag = events[0]["stage"], events[0]["tag"]
    state = "end" if of_kind(events, "end") else last(events, "stopped", "reason", "")
    step, of = last(events, "step", "step", -1) + 1, last(events, "plan", "num_steps")
    about = {"name": name, "stage": STAGES[stage].title, "tag": tag, "state": state, "step": step, "num_steps": of}
    return {**about, "started": events[0]["time"], "updated": events[-1]["time"]}


def details(name: str, events: Events) -> dict[str, Any]:
    """What is told of a run."""
    speeds = [speed for _, speed in points(events, "step", "speed")[-10:]]
    reward, loss = last(events, "step", "reward"), last(events, "step", "smooth_loss")
    numbers = {"loss": loss if reward is None else None, "reward": reward}  # the loss of RL says nothing
    facts = {"command": command(events), "commit": events[0].get("git", "-")}
    facts |= {key: last(events, "plan", key, "-") for key in ("formula", "batch", "parameters")}
    numbers |= {"val bpb": last(events, "eval", "val_bpb_quick"), "tokens/s": fmean(speeds) if speeds else None}
    samples = [{key: visible(str(e[key])) for key in ("step", "prompt", "text")} for e in of_kind(events, "sample")]
    return {**summary(name, events), "facts": facts, "numbers": numbers, "samples": samples[-SAMPLES:]}


def overlaid(runs: Sequence[Events]) -> list[Curve]:
    """The curves of runs, those of one title in one diagram, where each of several runs has its hue and its tag."""
    found: dict[str, Curve] = {}
    for hue, events in enumerate(runs):
        title, tag = STAGES[events[0]["stage"]].title, events[0]["tag"]
        drawn = curves({**{stage: [] for stage in STAGES}, events[0]["stage"]: events})
        for what, unit, key in MORE:
            line = Series(what, "line", points(events, "step", key))
            drawn += [Curve(f"{title[0].upper()}{title[1:]}: {what}", unit, [line])] if line.points else []
        for curve in drawn:
            if len(runs) > 1:
                lines = [line for line in curve.series if line.look != "faint"]
                lines = [line._replace(name=f"{tag} {line.name}", hue=hue % HUES) for line in lines]
                curve = curve._replace(series=[*(found[curve.title].series if curve.title in found else []), *lines])
            found[curve.title] = curve
    return list(found.values())


def plain(curve: Curve) -> dict[str, Any]:
    """A curve as the page shows it: the diagram, and what there is to say of places in it, to six digits."""
    lines = [line for line in curve.series if line.look in ("line", "faint")]
    told = [{"name": s.name, "points": [(x, float(f"{y:.6g}")) for x, y in thinned(s.points, DRAWN)]} for s in lines]
    xs, _ = round_ticks([x for line in curve.series for x, _ in line.points])
    return {"figure": figure(curve), "lines": told, "xs": [xs[0], xs[-1]], "edges": [LEFT, WIDTH - RIGHT, WIDTH]}


def answer(request: Request, content: dict[str, Any]) -> Response:
    """The content, or that the client has it."""
    body = json.dumps(content).encode()
    headers = {"ETag": f'"{sha256(body).hexdigest()[:24]}"', "Cache-Control": "no-cache"}
    if request.headers.get("if-none-match") == headers["ETag"]:
        return Response(status_code=304, headers=headers)
    return Response(body, headers=headers, media_type="application/json")


def runs_router(render: Callable[[str], Awaitable[str]], base_dir: Path | None = None) -> APIRouter:
    """The routes. `render` makes HTML that can be trusted of Markdown that can't."""
    folder = (base_dir or get_base_dir()) / "records"
    router, records = APIRouter(), Records(folder)

    @router.get("/runs")
    def list_runs(request: Request) -> Response:
        runs, problems = records.runs()
        lines = [summary(name, events) for name, events in reversed(runs.items())]
        return answer(request, {"runs": lines, "problems": problems, "folder": str(folder)})

    @router.get("/runs/{name}")
    def show_run(request: Request, name: str) -> Response:
        return answer(request, details(name, records.find([name])[0]))

    @router.get("/curves")
    def show_curves(request: Request, run: Annotated[list[str], Query(max_length=MOST)] = []) -> Response:  # noqa: B006
        return answer(request, {"curves": list(map(plain, overlaid(records.find(run))))})

    @router.get("/report")
    async def report(request: Request) -> Response:
        try:
            text, _ = await asyncio.to_thread(lambda: build(read_runs(folder)))
        except UserError as error:
            raise HTTPException(404, str(error)) from None
        return answer(request, {"html": await render(text)})

    return router
