"""The same run on 1, 2 and 3 ranks: gloo on CPU, the code path of many GPUs."""

import pytest

from tests import tiny
from tests.tiny import EAGER, RUN


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    base_dir = tmp_path_factory.mktemp("ranks")
    tiny.prepare(base_dir)
    return base_dir


def test_losses_and_optimizer_state_on_1_2_and_3_ranks(home):
    """
    12 rows a step: 6 micro-batches of 2 on one rank, 3 on two, 2 on three. Same rows, same losses, state divided by the
    ranks.
    """
    flags = [*RUN, *EAGER, f"--total-batch-size={12 * 32}"]
    tiny.run(home, "scripts.base_train", *flags, "--model-tag=one")
    for ranks, tag in ((2, "two"), (3, "three")):
        tiny.torchrun(home, ranks, "scripts.base_train", "--", *flags, f"--model-tag={tag}")
    one, *others = (tiny.events(home, "base", tag, "step") for tag in ("one", "two", "three"))
    plan, *plans = (tiny.events(home, "base", tag, "plan")[0] for tag in ("one", "two", "three"))
    for ranks, steps, its_plan in zip((2, 3), others, plans, strict=True):
        assert len(steps) == len(one) == 20
        for a, b in zip(one, steps, strict=True):
            assert a["tokens"] == b["tokens"] and a["loss"] == pytest.approx(b["loss"], abs=1e-5)
            assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)
        assert its_plan["optimizer_state_bytes"] == pytest.approx(plan["optimizer_state_bytes"] / ranks, rel=0.35)
