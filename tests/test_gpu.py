"""What must hold on a card too: small runs there beside the same on a CPU. dev/gpu_day.sh runs it on one.

A CPU in bf16 stands for the card where there is none, so that the tests themselves are tested.
"""

import json

import pytest
import torch

from dev.gpu_page import costliest
from dev.infer_arm import draw_weights
from nanochat.engine import Engine, Sampling
from nanochat.gpt import config_from_depth
from nanochat.model import build_model
from tests import tiny

no_card = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU that torch sees")
DEVICES = ["cpu", pytest.param("cuda", marks=no_card)]
SPEED = {"cpu": ["--dtype=bfloat16", "--compile=false"], "cuda": []}


@pytest.mark.parametrize("device", DEVICES)
def test_a_run_learns_what_it_learns_in_fp32_on_a_cpu_and_goes_on_from_a_checkpoint(own_home, device):
    def train(tag: str, *words: str) -> list[float]:
        tiny.run(own_home, "scripts.base_train", *tiny.RUN, f"--model-tag={tag}-{device}", *words)
        events = tiny.events(own_home, "base", f"{tag}-{device}", "step")
        return [event["loss"] for event in events]

    exact = train("exact", *tiny.EAGER)
    there = train("there", f"--device-type={device}", *SPEED[device], "--save-every=10")
    assert len(there) == 20 and there == pytest.approx(exact, rel=0.02)
    both = train("there", f"--device-type={device}", *SPEED[device], "--resume-from-step=10")
    assert len(both) == 30 and both[20:] == pytest.approx(there[10:], rel=0.01)


@pytest.mark.parametrize("device", DEVICES)
def test_greedy_answers_are_those_of_a_cpu(device):
    said = []
    for where in ("cpu", device):
        model = build_model(config_from_depth(2, 320, 64), torch.device(where), 0)
        draw_weights(model.named_parameters(), 0)  # some token leads by more than a card rounds
        prompts = [[1, 2, 3, 4, 5], [7, 8]]
        said.append(Engine(model, dtype=torch.float32).generate_batch(prompts, Sampling(24, 0))[0])
    assert said[0] == said[1] and len(said[0]) == 2


@pytest.mark.parametrize("device", DEVICES)
def test_what_times_a_step_times_it_there(tmp_path, device):
    shape = ["--depth=2", "--max-seq-len=64", f"--device-type={device}"]
    batch = ["--vocab-size=320", "--rows=1", "--steps=2", "--compile=false", f"--profile={tmp_path}/trace.json"]
    training = tiny.run(tmp_path, "scripts.bench", *shape, *batch)
    attention = tiny.run(tmp_path, "dev.bench_attention", *shape, "--device-batch-size=1", "--repeats=2")
    assert '"tokens_per_second": ' in training.stdout.splitlines()[-1]
    assert '"windows, kernels": "' in attention.stdout.splitlines()[-1]
    assert costliest(json.loads((tmp_path / "trace.json").read_text()))
