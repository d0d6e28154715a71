"""Evaluate a checkpoint on the tasks of EleutherAI's lm-eval, to compare with numbers that others publish.

    pip install -e ".[eval]"                             # without constraints.txt: it wants an older dateutil
    python -m dev.lm_eval_adapter --tasks=arc_easy,hellaswag              # the base model that was saved last
    python -m dev.lm_eval_adapter --tasks=gsm8k --source=sft --chat       # questions as a user's, answers as in a chat
    python -m dev.lm_eval_adapter --tasks=mine --include-path=my_tasks    # task files of your own

What lm-eval asks is answered by the code of our own evaluations: log-likelihoods by core_eval's scorer, texts by the
engine, in chats with the calculator. bits_per_byte of a perplexity task is val_bpb of its documents. A context that is
too long loses its beginning; how many did is printed and recorded.
"""

from typing import Literal

from nanochat.configurator import Natural, Positive, configure

SHORT = {"i": "source", "g": "model_tag", "s": "step", "b": "device_batch_size", "x": "max_problems"}

# Model
source: Literal["base", "mid", "sft", "rl"] = "base"  # stage of the checkpoint
model_tag: str | None = None  # name of the checkpoint directory (None = the one saved last)
step: Natural | None = None  # checkpoint step (None = the last)
# Tasks
tasks = ""  # names of lm-eval's tasks, joined by commas
include_path: str | None = None  # a directory with task files (YAML) besides lm-eval's own
max_problems: Positive | None = None  # problems of each task (None = all of them)
num_fewshot: Natural | None = None  # solved examples before each question (None = as the task says)
chat = False  # put questions as messages of a chat
device_batch_size: Positive = 64  # answers that are written together
# Machine
device_type: Literal["auto", "cuda", "mps", "xpu", "cpu"] = "auto"  # cuda also stands for AMD's ROCm
dtype: Literal["auto", "bfloat16", "float32"] = "auto"  # what matmuls compute in
settings = configure(__name__)

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from nanochat.checkpoint_manager import find_checkpoint, open_model
from nanochat.common import UserError, print0, run_main
from nanochat.compute import Compute, compute_cleanup, compute_init
from nanochat.conversation import check_messages, decode_parts, parts_text, render_for_completion
from nanochat.core_eval import GPTScorer, Row, batch_units, make_units
from nanochat.engine import Engine, Sampling
from nanochat.loss_eval import document_windows
from nanochat.model import LanguageModel
from nanochat.record import open_record
from nanochat.tokenizer import Tokenizer


class Adapter:
    """The three methods of lm_eval.api.model.LM on one of our models. Requests are objects whose `args` are (context,
    continuation), (text,), or (context, options); answers come in their order.
    """

    def __init__(
        self, model: LanguageModel, tokenizer: Tokenizer, compute: Compute, batch_size: int = 64, chat: bool = False
    ):
        self.scorer = GPTScorer(model, tokenizer, compute)
        bos = tokenizer.get_bos_token_id()
        self.engine = Engine(model, tokenizer if chat else None, compute.dtype, stop_tokens=[bos])
        self.tokenizer, self.bos, self.context, self.batch_size = tokenizer, bos, model.config.sequence_len, batch_size
        self.chats: dict[str, list[int]] = {}  # what apply_chat_template() returned -> the tokens it stands for
        self.cut = 0  # contexts that lost their beginning

    # -------------------------------------------------------------------------
    # Log-likelihoods

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log-probability of the continuation in nats, whether each of its tokens is the likeliest), by request."""
        rows = [self.encode_pair(*request.args) for request in requests]
        self.cut += sum(len(tokens) - 1 > self.context for tokens, _ in rows)
        return self.score(rows)

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of whole texts, each token scored once, in the windows of the honest bits per byte."""
        ids, offsets = self.tokenizer.encode_arrow([request.args[0] for request in requests])
        found = list(document_windows(ids, offsets, self.bos, self.context, max(1, self.context // 2)))
        totals = [0.0] * len(requests)
        scores = self.score([(tokens, first + 1) for _, tokens, first in found])
        for (number, _, _), (value, _) in zip(found, scores, strict=True):
            totals[number] += value
        return totals

    def score(self, rows: Sequence[tuple[np.ndarray, int]]) -> list[tuple[float, bool]]:
        """The same for rows of tokens, of which those from the given place on are scored."""
        losses, misses = np.zeros(len(rows)), np.zeros(len(rows))
        longest = self.context + 1  # the last token of a row is never fed
        units = [unit for i, row in enumerate(rows) for unit in make_units([Row(i, 0, *row)], longest, branches=False)]
        for batch in batch_units(units, self.scorer.batch_tokens):
            loss, hits = self.scorer.predict(batch)
            number = batch.asked[3].numpy()
            np.add.at(losses, number, loss.double().numpy())
            np.add.at(misses, number, ~hits.numpy())
        return [(-loss, not missed) for loss, missed in zip(losses.tolist(), misses.tolist(), strict=True)]

    def encode_pair(self, context: str, continuation: str) -> tuple[np.ndarray, int]:
        """BOS, context and continuation as tokens, and where the continuation begins, by lm-eval's rule: spaces at the
        end of the context belong to the continuation, and what the context alone is encoded to is its share of the
        whole.
        """
        if context in self.chats:
            before = self.chats[context]
            return np.array([*before, *self.tokenizer.encode(continuation)]), len(before)
        stem = context.rstrip()
        whole = [self.bos, *self.tokenizer.encode(context + continuation)]
        return np.array(whole), 1 + len(self.tokenizer.encode(stem))

    # -------------------------------------------------------------------------
    # Texts

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """The text after each context, up to the first of the strings in options["until"], of at most max_gen_toks
        tokens (default 256); greedy unless do_sample and a temperature are given. A context that leaves no room for
        them, or for half the model's context if they are more, loses its beginning.
        """
        answers = [""] * len(requests)
        alike: dict[str, list[int]] = {}  # requests with the same options are answered together
        for i, request in enumerate(requests):
            alike.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(i)
        for text, numbers in alike.items():
            options = json.loads(text)
            limit = options.get("max_gen_toks", 256)
            prompts = [self.prompt(requests[i].args[0], self.context - min(limit, self.context // 2)) for i in numbers]
            temperature = options.get("temperature", 1.0) if options.get("do_sample") else 0.0
            sampling = Sampling(limit, temperature, options.get("top_k"), options.get("top_p"))
            sequences, _ = self.engine.generate_batch(prompts, sampling, slots=self.batch_size, first=numbers)
            until = options.get("until") or []
            stops = [until] if isinstance(until, str) else until
            for i, tokens in zip(numbers, sequences, strict=True):
                answers[i] = cut_at(parts_text(decode_parts(tokens, self.tokenizer)), stops)
        return answers

    def prompt(self, context: str, room: int) -> list[int]:
        tokens = self.chats.get(context) or [self.bos, *self.tokenizer.encode(context)]
        self.cut += len(tokens) > room
        return tokens[-room:]

    # -------------------------------------------------------------------------
    # Chats

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A name for the tokens of this chat: it is JSON, and stands for them wherever it is the whole context. Text
        never becomes a special token, whatever it says. Raises UserError for an answer that is already begun.
        """
        if not add_generation_prompt:
            raise UserError(
                "a task that begins the assistant's answer (gen_prefix) has no tokens in a chat; drop --chat"
            )
        check_messages(chat_history)
        name = json.dumps(chat_history, ensure_ascii=False)
        self.chats[name] = render_for_completion(chat_history, self.tokenizer)
        return name

    def chat_template(self, chat_template: bool | str = False) -> str:
        return "nanochat" if chat_template else ""

    @property
    def tokenizer_name(self) -> str:
        return f"nanochat-{self.tokenizer.fingerprint[:12]}"


def cut_at(text: str, stops: Sequence[str]) -> str:
    """The text before the first of the stop strings."""
    return text[: min((text.find(stop) for stop in stops if stop and stop in text), default=len(text))]


def as_lm(*values: Any) -> Any:
    """An Adapter that is an lm_eval.api.model.LM; UserError where lm-eval is not installed."""
    try:
        from lm_eval.api.model import LM
    except ImportError as error:
        raise UserError(f"lm-eval is not installed ({error}); get it with: pip install -e '.[eval]'") from None

    class NanochatLM(Adapter, LM):  # type: ignore[misc]
        def __init__(self, *values: Any):
            LM.__init__(self)
            Adapter.__init__(self, *values)

    return NanochatLM(*values)


def main() -> None:
    if not tasks:
        raise UserError("--tasks= is empty; give names of lm-eval's tasks, such as --tasks=arc_easy,hellaswag")
    compute = compute_init(device_type, dtype)
    if compute.world_size > 1:
        raise UserError("this runs in one process; start it with: python -m dev.lm_eval_adapter", everywhere=True)
    checkpoint = find_checkpoint(source, model_tag, step)
    lm = as_lm(*open_model(checkpoint, compute.device), compute, device_batch_size, chat)
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import make_table

    record = open_record("lm_eval", f"{source}-{checkpoint.tag}", settings)
    manager = TaskManager(include_path=include_path)
    asked = {"tasks": tasks.split(","), "limit": max_problems, "num_fewshot": num_fewshot, "apply_chat_template": chat}
    outcome = simple_evaluate(lm, task_manager=manager, **asked)
    print0(make_table(outcome))
    print0(f"contexts that were too long and lost their beginning: {lm.cut:,}")
    record.write("results", source=source, cut=lm.cut, results=outcome["results"], n=outcome["n-samples"])
    record.write("end")
    record.close()
    compute_cleanup()


if __name__ == "__main__":
    run_main(main)
