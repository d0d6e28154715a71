"""When did a model know its training lines, and when the others? A base run with --eval-train as a plot and a table.

    python -m dev.grokking_curve --model-tag=grokking

Draws the share of documents whose whole answer is right, in training and in validation, over the logarithm of the
steps, as figure 1 of the paper on grokking does (arXiv 2201.02177): report/grokking-<tag>.svg. Prints the first step at
which each is at least --reached; the last line is one JSON object.
"""

from nanochat.configurator import Share, configure

# Run
model_tag = "grokking"  # of the base run
# Figures
reached: Share = 0.99  # share of right documents that counts as learnt
settings = configure(__name__)

import json
import math

from dev.plot import svg_file
from dev.repeat import find
from nanochat.common import UserError, get_base_dir, run_main
from nanochat.files import write_atomic
from nanochat.report import points
from nanochat.report_page import Curve, Series


def main() -> None:
    events = find(model_tag)
    shares = {"training": points(events, "eval_train", "exact"), "validation": points(events, "eval", "exact")}
    if not all(shares.values()):
        wanted = "a base run with --eval-train and --eval-every, as in dev/configs/grokking.py"
        raise UserError(
            f"--model-tag={model_tag}: no scores of training documents in {get_base_dir()}/records; {wanted}"
        )
    result = {}
    for part, scores in shares.items():
        first = next((step for step, share in scores if share >= reached), None)
        when = f"{reached:.0%} from step {first:,}" if first else f"never {reached:.0%}"
        print(f"{part}: {when}; {scores[-1][1]:.1%} at the end, after {scores[-1][0]:,} steps")
        result |= {part: scores[-1][1], f"{part}_reached_at": first}
    series = [
        Series(part, "line", [(math.log10(step), share) for step, share in scores], hue)
        for hue, (part, scores) in enumerate(shares.items())
    ]
    path = get_base_dir() / "report" / f"grokking-{model_tag}.svg"
    write_atomic(path, svg_file(Curve(f"{model_tag}: right documents", "share", series, "log10(step)")))
    print(f"written to {path}")
    print(json.dumps(result))


if __name__ == "__main__":
    run_main(main)
