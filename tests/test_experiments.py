"""Controlled experiments with base_train: one AdamW, schedules, clipping, fp16; on any number of ranks, and resumed."""

import csv
import json
import math
import statistics
import xml.dom.minidom
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from nanochat import train
from nanochat.common import NotFinite, UserError
from nanochat.compute import Compute
from nanochat.configurator import parse_args, read_block
from nanochat.gpt import GPTConfig
from nanochat.model import build_model
from nanochat.train import Rates, Spikes, Sums
from tests import tiny
from tests.faults import SETTINGS, STEPS, Faults, check_losses

CPU = Compute(torch.device("cpu"), torch.float32)
CONFIG = GPTConfig(sequence_len=8, vocab_size=50, n_layer=1, n_head=1, n_kv_head=1, n_embd=16)
FLAT = Rates(lr=1.0, momentum=0.9, weight_decay=0.0)
ADAMW = {"optimizer": "adamw", "lr": 3e-3, "weight_decay": 0.1, "schedule": "cosine", "warmup_ratio": 0.1}
KINDS = {
    "adamw": {**ADAMW, "clip": "parameter", "clip_norm": 0.1},
    "keller": {"clip": "normalize", "clip_norm": 1.0, "schedule": "wsd"},
    "clipped": {"clip_norm": 0.5},
}


def settings_of(kind, ranks=1, **changes):
    """Twelve rows a step: two micro-batches on any number of ranks."""
    shape = {"total_batch_size": 12 * 32, "device_batch_size": 6 // ranks, "num_iterations": STEPS}
    return {**shape, **KINDS.get(kind, {}), "model_tag": f"{kind}{ranks}", **changes}


@pytest.mark.parametrize(
    ("kind", "ranks", "shard"),
    [("adamw", 3, True), ("keller", 2, False)]
    + [
        pytest.param(*case, marks=pytest.mark.soak)
        for case in (("adamw", 3, False), ("keller", 3, True), ("clipped", 3, True))
    ],
)
def test_the_run_is_the_same_on_any_number_of_ranks(faults, kind, ranks, shard):
    one = faults.train("base", settings_of(kind))
    many = faults.train("base", settings_of(kind, ranks, shard=shard, model_tag=f"{kind}{ranks}-{shard}"), ranks)
    check_losses(one["step"], many["step"])
    assert one["step"][-1]["loss"] < 0.9 * one["step"][0]["loss"]
    if kind == "adamw":  # Muon deals out whole matrices, which three ranks do not share evenly
        whole, share = (run["plan"][0]["optimizer_state_bytes"] for run in (one, many))
        assert share < 1.1 * whole / ranks


@pytest.mark.parametrize("kind", ["adamw", "half"])
def test_a_stopped_experiment_continues_bit_for_bit(faults, kind):
    """fp16 with a loss scale that has come down on its way, and one AdamW, whose counter is part of its state."""
    fp16 = {"dtype": "float16", "clip_norm": 1.0} if kind == "half" else {}
    settings = settings_of(kind, **fp16, save_every=8, model_tag=f"{kind}-resumed")
    code, output = faults.run("base", settings, spoil=("gradient", 3))
    assert code == (0 if fp16 else 3), output
    if not fp16:
        assert faults.run("base", {**settings, "resume": True})[0] == 0
    whole = tiny.weights(faults.base_dir, settings["model_tag"], STEPS)
    code, output = faults.run("base", {**settings, "resume_from_step": 8})
    assert code == 0, output
    assert tiny.weights(faults.base_dir, settings["model_tag"], STEPS) == whole


def test_fp16_skips_a_step_that_overflows_and_halves_the_scale(faults):
    settings = settings_of("half", dtype="float16", model_tag="overflow")
    code, output = faults.run("base", settings, spoil=("gradient", 5))
    assert code == 0 and output.count("update skipped, loss scale now") == 1, output
    steps = tiny.events(faults.base_dir, "base", "overflow", "step")
    assert [event["step"] for event in steps if event["grad_norm"] is None] == [4]
    assert tiny.events(faults.base_dir, "base", "overflow", "end")[0]["overflows_skipped"] == 1
    whole = faults.train("base", settings_of("plain"))["step"]
    for a, b in zip(whole[:4], steps[:4], strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=0.01) and b["grad_norm"] == pytest.approx(
            a["grad_norm"], rel=0.05
        )


def test_another_optimizer_than_before_is_told_in_one_line(faults):
    faults.train("base", settings_of("plain"))
    code, output = faults.run("base", {**settings_of("plain"), **ADAMW, "resume": True, "num_iterations": STEPS + 1})
    assert code == 2 and "the same --optimizer as before" in output.splitlines()[-1]


def step_with(gradients, dtype=torch.float32, **options):
    """update() of a model from these gradients of its mean loss: model, reduced gradients, spikes, result."""
    model, spikes = build_model(CONFIG, CPU.device, 0), Spikes(dtype)
    for p, grad in zip(model.parameters(), gradients, strict=True):
        p.grad = grad * spikes.scale
    optimizers = model.setup_adamw(lr=0.01)
    sums = Sums(torch.tensor([3.0, 1.0]), scale=spikes.scale)
    agreed = train.agree(sums, 0, optimizers, CPU)
    result = train.update(optimizers, agreed, FLAT, CPU, spikes, **options)
    return model, {name: grad for o in optimizers for name, grad in o.own_gradients()}, spikes, result


def random_gradients(size=1.0):
    generator = torch.Generator().manual_seed(0)
    return [size * torch.randn(p.shape, generator=generator) for p in build_model(CONFIG, CPU.device, 0).parameters()]


@pytest.mark.parametrize(("how", "limit"), [("global", 0.5), ("parameter", 20.0), ("normalize", 1.0), ("global", 1e6)])
def test_clipping_is_torchs(how, limit, monkeypatch):
    """torch.nn.utils.clip_grad_norm_ of all parameters, or of each by itself."""
    taken = {}
    monkeypatch.setattr("nanochat.adamw.Slice.send", watch_gradient(taken))
    norm = step_with(random_gradients(), clip=(how, limit))[3].grad_norm
    params = [torch.nn.Parameter(torch.zeros_like(grad)) for grad in random_gradients()]
    for p, grad in zip(params, random_gradients(), strict=True):
        p.grad = grad / grad.norm() * limit if how == "normalize" else grad
    before = torch.nn.utils.clip_grad_norm_([p for p in params if how == "global"], limit)
    for p in params if how == "parameter" else []:
        torch.nn.utils.clip_grad_norm_([p], limit)
    assert how != "global" or norm == pytest.approx(before.item(), rel=1e-5)
    names = [name for name, _ in build_model(CONFIG, CPU.device, 0).named_parameters()]
    for name, p in zip(names, params, strict=True):
        torch.testing.assert_close(taken[name], p.grad, rtol=1e-5, atol=1e-7)
        assert how != "normalize" or taken[name].norm().item() == pytest.approx(1.0, rel=1e-5)


def watch_gradient(taken):
    from nanochat.adamw import Slice

    send = Slice.send

    def watched(self, *values):
        taken[self.name] = self.grad.clone()
        return send(self, *values)

    return watched


def test_a_zero_gradient_stays_zero_when_it_is_normalized():
    model, _, _, _ = step_with([0 * grad for grad in random_gradients()], clip=("normalize", 1.0))
    assert all(
        torch.equal(a, b)
        for a, b in zip(model.parameters(), build_model(CONFIG, CPU.device, 0).parameters(), strict=True)
    )


def test_the_loss_scale_cancels_halves_and_doubles():
    plain, scaled = (step_with(random_gradients(0.1), dtype)[0] for dtype in (torch.float32, torch.float16))
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), scaled.parameters(), strict=True))
    spikes = Spikes(torch.float16)
    first = spikes.scale
    assert spikes.overflow(math.inf) and spikes.scale == first / 2
    assert not any(spikes.overflow(1.0) for _ in range(spikes.GROW_AFTER)) and spikes.scale == first
    again = Spikes(torch.float16)
    again.restore(json.loads(json.dumps(spikes.state())))
    assert again.state() == spikes.state() and again.summary()["overflows_skipped"] == 1


def test_a_scale_that_has_come_down_for_nothing_ends_the_run():
    """Else a model with an infinite weight would skip steps for ever."""
    spikes = Spikes(torch.float16)
    assert 10 < [spikes.overflow(math.nan) for _ in range(100)].count(True) < 30
    assert not Spikes(torch.bfloat16).overflow(math.inf)
    gradients = random_gradients()
    gradients[0][0, 0] = math.nan
    with pytest.raises(NotFinite):
        step_with(gradients)
    assert step_with(gradients, torch.float16)[3].grad_norm != 0


def test_the_loss_scale_is_in_the_gradients_and_not_in_the_loss():
    targets = torch.randint(0, 50, (2, 8), generator=torch.Generator().manual_seed(0))

    def gradients(scale):
        model = build_model(CONFIG, CPU.device, 0)
        sums = train.accumulate(model, iter([(targets, targets, None)]), 1, CPU, scale)
        return sums, model.lm_head.weight.grad

    (plain, one), (scaled, two) = gradients(1.0), gradients(64.0)
    assert torch.equal(plain.totals, scaled.totals) and scaled.scale == 64
    torch.testing.assert_close(two, one * scaled.scale, rtol=1e-5, atol=0)


# -----------------------------------------------------------------------------
# Programs that run base_train


def run_program(monkeypatch, program, **values):
    """The main() of a program with settings of its own and of base_train."""
    assert values.keys() <= program.settings.keys(), values.keys() - program.settings.keys()
    monkeypatch.setattr(program, "settings", {**program.settings, **SETTINGS["base"], **values})
    for name in values.keys() & vars(program).keys():
        monkeypatch.setattr(program, name, values[name])
    program.main()


@pytest.fixture
def runs(faults, monkeypatch):
    """Runs of base_train that a program starts happen in forks; the tags of these."""
    tags = []

    def run(command, cwd, env=None, **streams):
        words = command[command.index("scripts.base_train") + 1 :]
        block = read_block(Path(cwd) / "scripts" / "base_train.py")
        given = {name: value for name, (value, _) in parse_args(block, words).items()}
        tags.append(given["model_tag"])
        home = Faults(Path(env["NANOCHAT_BASE_DIR"]) if env else faults.base_dir, faults.server)
        return SimpleNamespace(returncode=home.run("base", given)[0], stderr="")

    monkeypatch.setattr("subprocess.run", run)
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(faults.base_dir))
    return tags


def test_repeats_give_mean_and_standard_error_and_finished_seeds_are_not_run_again(faults, runs, monkeypatch, capsys):
    from dev import repeat

    def ask(**changes):
        run_program(monkeypatch, repeat, **{"num_iterations": 6, "model_tag": "rep", **changes})
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    result = ask(seeds=3)
    assert runs == ["rep-s42", "rep-s43", "rep-s44"]
    values = [tiny.events(faults.base_dir, "base", tag, "eval")[-1]["val_bpb"] for tag in runs]
    assert result["val_bpb"] == pytest.approx(statistics.fmean(values), rel=1e-5) and len(set(values)) == 3
    assert result["val_bpb_stderr"] == pytest.approx(statistics.stdev(values) / 3**0.5, rel=0.01)
    assert ask(seeds=3) == result and len(runs) == 3
    ask(seeds=4)
    assert runs[3:] == ["rep-s45"]
    with pytest.raises(UserError, match="rep-s42 has ended with --num-iterations=6, not 7; choose another --model-tag"):
        ask(seeds=3, num_iterations=7)


def test_a_range_test_leaves_a_table_a_plot_and_a_suggestion_and_no_checkpoint(faults, runs, monkeypatch, capsys):
    from dev import lr_range

    before = sorted(path.name for path in (faults.base_dir / "base_checkpoints").glob("*"))
    run_program(monkeypatch, lr_range, model_tag="ranged", steps=30, minutes=1.0)
    *_, flags, last = capsys.readouterr().out.splitlines()
    result = json.loads(last)
    assert runs == ["ranged"] and result["steps"] == 30
    assert flags.endswith(f"--unembedding-lr={0.004 * result['suggested']:.3g}")
    with open(faults.base_dir / "report" / "lr-range-ranged.csv") as file:
        rows = [*csv.DictReader(file)]
    assert float(rows[0]["multiplier"]) == pytest.approx(math.exp(-2.5), rel=1e-5)
    assert float(rows[-1]["multiplier"]) == pytest.approx(math.exp(2.5), rel=1e-5)
    assert xml.dom.minidom.parse(str(faults.base_dir / "report" / "lr-range-ranged.svg")).getElementsByTagName(
        "polyline"
    )
    assert sorted(path.name for path in (faults.base_dir / "base_checkpoints").glob("*")) == before
    assert not tiny.events(faults.base_dir, "base", "ranged", "start")


def test_a_mistake_in_a_range_test_is_one_line_without_its_temporary_folder(own_home):
    result = tiny.run(own_home, "dev.lr_range", *tiny.RUN, "--corpus=other", check=False)
    said = f"base_train: corpus=other: not among tiny in {own_home}/data; get it with: python -m nanochat.dataset"
    assert result.returncode == 2 and result.stderr.startswith(said) and result.stderr.count("\n") == 1, result.stderr


def test_the_suggestion_is_half_the_rate_with_the_lowest_mean():
    from dev import lr_range

    losses = [abs(i - 60) / 10 for i in range(100)]
    losses[10] = -1.0  # one lucky batch is not the lowest mean
    losses[99] = -1.0  # also at the end, where the mean would be of it alone
    multipliers = [math.exp(5 * i / 99 - 2.5) for i in range(100)]
    suggested, at = lr_range.suggest(multipliers, lr_range.smoothed(losses))
    assert at == 60 and suggested == pytest.approx(multipliers[60] / 2)


def test_a_loss_that_still_falls_at_the_highest_rate_is_told(tmp_path, monkeypatch, capsys):
    """AdamW from 1e-3 on: lowest at the last step but one, which was called the lowest and no more."""
    from dev import lr_range

    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    monkeypatch.setattr(lr_range, "test_rates", lambda tag: [3 - i / 100 for i in range(98)] + [1.0, 2.5])
    lr_range.main()
    assert "it was still falling, try again with higher rates" in capsys.readouterr().out


def test_bench_times_every_batch_and_leaves_a_table_and_a_trace(tmp_path, monkeypatch, capsys):
    from scripts import bench

    shape = {"depth": 1, "aspect_ratio": 16, "head_dim": 8, "max_seq_len": 16, "vocab_size": 64, "device_type": "cpu"}
    files = {"csv": str(tmp_path / "bench.csv"), "profile": str(tmp_path / "trace.json")}
    how = {"rows": "2,4", "accumulation": "1 2", "steps": 2, "compile": False, "dtype": "float32"}
    tiny.run_here(monkeypatch, bench, {**shape, **files, **how})
    printed = capsys.readouterr().out
    assert "aten::" in printed and json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    with open(tmp_path / "bench.csv") as file:
        rows = [*csv.DictReader(file)]
    assert [(row["rows"], row["accumulation"]) for row in rows] == [("2", "1"), ("2", "2"), ("4", "1"), ("4", "2")]
    assert [int(row["tokens_per_step"]) for row in rows] == [32, 64, 64, 128]
    best = json.loads(printed.splitlines()[-1])
    assert best["tokens_per_second"] == max(int(row["tokens_per_second"]) for row in rows) and best["ms_per_step"] > 0
    with pytest.raises(UserError, match="--rows=2,x: expected whole numbers"):
        tiny.run_here(monkeypatch, bench, {**shape, "rows": "2,x"})


def test_bench_says_what_a_gpus_batch_would_take_on_a_cpu(capsys):
    """Silent for an hour: the defaults with --depth=12 on a laptop."""
    from scripts import bench

    bench.warn_of_hours(10**13)
    assert not capsys.readouterr().out
    bench.warn_of_hours(36 * 10**13)
    assert "60 minutes of a CPU that does 100 GFLOP/s; shorter: --depth=4" in capsys.readouterr().out


def test_bench_reads_real_text_too(faults, monkeypatch, capsys):
    from scripts import bench

    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(faults.base_dir))
    shape = {"depth": 1, "aspect_ratio": 16, "head_dim": 8, "max_seq_len": 32, "device_type": "cpu", "compile": False}
    tiny.run_here(monkeypatch, bench, {**shape, "data": "real", "rows": "2", "steps": 1, "optimizer": "adamw"})
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["tokens_per_step"] == 64


def test_a_step_is_told_in_reading_order(base_dir, tmp_path, monkeypatch, capsys):
    from scripts import trace_step

    settings = {"depth": 3, "aspect_ratio": 16, "warmup_steps": 1, "markdown": str(tmp_path / "step.md")}
    tiny.run_here(monkeypatch, trace_step, settings)
    printed = capsys.readouterr().out
    order = ["Tokens", "Forward", "wte ", "blocks.0 ", "blocks.0.attn.c_q", "softmax", "blocks.0.mlp.c_fc", "square"]
    order += [
        "blocks.1 ",
        "blocks.2 ",
        "Loss",
        "Gradients",
        "lm_head.weight",
        "Update by AdamW",
        "wte.weight",
        "Update by Muon",
    ]
    places = [printed.index(order[0])]
    for word in order[1:]:
        places.append(printed.index(word, places[-1]))
    assert "blocks.1.attn" not in printed[: printed.index("Gradients")] and "\033[" not in printed
    told = (tmp_path / "step.md").read_text()
    assert told.startswith("# One training step") and "## Forward" in told and told.count("```") % 2 == 0
    tiny.run_here(monkeypatch, trace_step, {**settings, "markdown": None, "color": "always", "optimizer": "adamw"})
    printed = capsys.readouterr().out
    assert "\033[1;33m" in printed and "Update by AdamW" in printed and "Update by Muon" not in printed
    tiny.run_here(monkeypatch, trace_step, {**settings, "markdown": None, "text": "The cat saw it. " * 200})
    assert "of the 3201 tokens of --text the first 257 are told, a row of this model" in capsys.readouterr().out
    tiny.run_here(
        monkeypatch, trace_step, {**settings, "markdown": None, "text": "Hi"}
    )  # too little to learn tokens of
    assert "'H' -> 'i'" in capsys.readouterr().out


def test_telling_a_step_does_not_change_it(base_dir):
    from scripts.trace_step import Watch

    tokens = torch.randint(0, 50, (1, 9), generator=torch.Generator().manual_seed(0))
    model = build_model(CONFIG, CPU.device, 0)
    plain = model(tokens[:, :-1], tokens[:, 1:])
    with Watch(model, 1) as watch:
        assert torch.equal(model(tokens[:, :-1], tokens[:, 1:]), plain)
    seen = len(watch.lines)
    model(tokens)
    assert len(watch.lines) == seen > 20


def test_a_product_of_matrices_is_told_as_mm_and_not_as_spmm():
    """torch.mm has both names, and resolve_name of torch gives the other one."""
    from scripts.trace_step import Watch

    model = torch.nn.Linear(2, 2)
    model.forward = lambda x: torch.mm(x, model.weight)
    with Watch(model, 1) as watch:
        model(torch.ones(1, 2))
    assert [line.name for line in watch.lines] == ["model", "mm", "= result"]
