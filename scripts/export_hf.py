"""Write a checkpoint as a folder that Hugging Face's transformers opens, or as a file for llama.cpp and Ollama.

    python -m scripts.export_hf --source=sft --model-tag=d4 --out=d4-hf
    python -m scripts.export_hf --source=sft --model-tag=llama-d4 --to=gguf --out=d4.gguf

The folder has weights (fp32), configuration, tokenizer, chat template, generation settings and a model card from the
records. It appears whole, and only if transformers computes from it what we do: logits, greedy tokens, the ids of text
and of chats. The file is made of such a folder, and only a Llama or a GPT-2 has one.
"""

from typing import Literal

from nanochat.configurator import Natural, configure

SHORT = {"i": "source", "g": "model_tag", "s": "step", "o": "out"}

# Checkpoint
source: Literal["base", "mid", "sft", "rl"] = "sft"  # stage of the checkpoint
model_tag: str | None = None  # name of the checkpoint directory (None = the one saved last)
step: Natural | None = None  # checkpoint step (None = the last)
# Export
to: Literal["hf", "gguf"] = "hf"  # hf: a folder for transformers; gguf: a file for llama.cpp
out: str | None = None  # the folder or file to write, which must not exist
corpus: str | None = None  # directory name in $NANOCHAT_BASE_DIR/data with the text to compare on (None = any there)
settings = configure(__name__)

import json
import random
from collections.abc import Iterable, Sequence
from importlib import import_module
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import save_file

from nanochat import report
from nanochat import report_page as page
from nanochat.checkpoint_manager import Checkpoint, find_checkpoint, open_checkpoint, open_model, saved_steps
from nanochat.common import STAGES, UserError, get_base_dir, print0, run_main
from nanochat.conversation import Message, render_conversation, render_for_completion
from nanochat.corpus import iter_text, load_corpus
from nanochat.engine import Engine, Sampling
from nanochat.files import whole
from nanochat.gguf_export import find_pattern, write_gguf
from nanochat.hf_export import settings_files, tokenizer_json
from nanochat.model import LanguageModel
from nanochat.tokenizer import Tokenizer

FRONT = "---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags:\n- nanochat\n---\n\n"
USE_CHAT = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

model, tokenizer = (kind.from_pretrained({folder}) for kind in (AutoModelForCausalLM, AutoTokenizer))
chat = [{{"role": "user", "content": "Who are you?"}}]
inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
answer = model.generate(**inputs, max_new_tokens=64)[0, inputs["input_ids"].shape[1] :]
print(tokenizer.decode(answer, skip_special_tokens=True))"""
USE_BASE = """\
from transformers import pipeline

print(pipeline("text-generation", {folder})("The capital of France is", max_new_tokens=32)[0]["generated_text"])"""
NOTES = """Between `<|python_start|>` and `<|python_end|>` the model asks a calculator, which transformers has none of;
nanochat's own programs put the result behind it. transformers takes the name of a special token in what a user writes
for that token: take such names out of what strangers write."""
TRANSLATORS = {"nanochat.gpt": "nanochat.gpt_hf"}  # the other architectures' files know their names there themselves
TOLERANCE = 1e-4  # between logits in fp32; they differ by the order of sums
ROWS, ROW_TOKENS, GREEDY, TEXT_BYTES, CHATS = 4, 1024, 64, 10_000_000, 500


def main() -> None:
    if out is None or Path(out).expanduser().exists():
        raise UserError(f"--out={out}: " + ("name what to write" if out is None else "it exists; choose another name"))
    transformers = import_transformers()
    checkpoint = find_checkpoint(source, model_tag, step)
    model, tokenizer = open_model(checkpoint, torch.device("cpu"))
    own = type(model).__module__
    config, tensors = import_module(TRANSLATORS.get(own, own)).to_hf(model)
    files = settings_files(tokenizer, model.config.sequence_len, chats=source != "base")
    ends = {name: files["generation_config.json"][name] for name in ("bos_token_id", "eos_token_id")}
    config |= {**ends, "pad_token_id": None, "dtype": "float32"}  # a row that pads would never learn in transformers
    files |= {"config.json": config, "tokenizer.json": tokenizer_json(tokenizer)}
    place = Path(out).expanduser().absolute()
    if to == "gguf":
        find_pattern(files)  # raises where llama.cpp cannot run it
    with whole(place) as building, TemporaryDirectory() as temporary:
        folder = building if to == "hf" else Path(temporary) / place.name
        write_folder(folder, files, tensors)
        compared = gate(folder, model, tokenizer, transformers)
        print0("\n".join(compared))
        if to == "gguf":
            write_gguf(building, files, tensors)
        else:
            (folder / "README.md").write_text(card(checkpoint, compared), encoding="utf-8")
    print0(f"written: {out}, {sum(tensor.nbytes for tensor in tensors.values()) / 1e6:,.1f} MB of weights")


def write_folder(folder: Path, files: dict[str, dict[str, Any]], tensors: dict[str, torch.Tensor]) -> None:
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def import_transformers() -> Any:
    """The package, which must know the model."""
    try:
        import transformers

        transformers.NanoChatForCausalLM  # noqa: B018
    except (ImportError, AttributeError):
        raise UserError("export_hf compares with transformers: pip install 'transformers>=5'") from None
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()  # it warns of texts longer than the context, which we only encode
    return transformers


# -----------------------------------------------------------------------------
# The gate


def gate(folder: Path, model: LanguageModel, tokenizer: Tokenizer, transformers: Any) -> list[str]:
    """What was compared and found equal, a line each. Raises UserError for the first difference."""
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, local_files_only=True
    ).eval()
    their_tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    texts, origin = real_text()
    return [
        same_logits(model, theirs, texts, tokenizer),
        same_tokens(model, theirs, texts, tokenizer),
        same_ids(tokenizer, their_tokenizer, texts, origin),
        *([same_chats(tokenizer, their_tokenizer, texts)] if source != "base" else []),
    ]


def real_text() -> tuple[list[str], str]:
    """About TEXT_BYTES of documents, and where they are from: a corpus, or where there is none this program."""
    text = None
    try:
        text = load_corpus(corpus)
    except UserError:
        if corpus is not None:
            raise
    if text is None or (corpus is None and text.train.tokens):  # no corpus, several, or one of ids alone
        files = sorted(Path(__file__).parents[1].glob("*/*.py"))
        return [file.read_text(encoding="utf-8") for file in files], "the source files of this program"
    taken: list[str] = []
    size = 0
    for documents in chain(iter_text(text.val), iter_text(text.train)):
        for document in documents.to_pylist():
            taken.append(document)
            size += len(document.encode())
            if size >= TEXT_BYTES:
                return taken, f"the corpus {text.name}"
    return taken, f"the corpus {text.name}"


def refuse(what: str) -> UserError:
    return UserError(f"{what}; nothing was written. This is an error of the export: keep the checkpoint, and report it")


@torch.inference_mode()
def same_logits(model: LanguageModel, theirs: Any, texts: Sequence[str], tokenizer: Tokenizer) -> str:
    """Of ROWS rows of text, as long as the context."""
    T, worst = min(ROW_TOKENS, model.config.sequence_len), 0.0
    ids = [token for row in tokenizer.encode(texts[:1000], prepend="<|bos|>") for token in row]
    rows = [ids[start : start + T] for start in range(0, ROWS * T, T) if start < len(ids)]
    for row in rows:
        idx = torch.tensor([row])
        worst = max(worst, (model(idx) - theirs(idx).logits).abs().max().item())
    if not worst <= TOLERANCE:
        raise refuse(f"logits differ by {worst:.3g}, more than {TOLERANCE}")
    return f"logits in fp32 over {sum(map(len, rows)):,} tokens of text: at most {worst:.1e} apart"


def same_tokens(model: LanguageModel, theirs: Any, texts: Sequence[str], tokenizer: Tokenizer) -> str:
    """GREEDY tokens by transformers' generate and by our engine, without an end."""
    prompt = tokenizer.encode(texts[0], prepend="<|bos|>")[: min(32, model.config.sequence_len // 2)]
    n = min(GREEDY, model.config.sequence_len - len(prompt))
    (ours,), _ = Engine(model).generate_batch([prompt], Sampling(max_tokens=n, temperature=0))
    idx = torch.tensor([prompt])
    # The model's own settings would fill what is left open here, and end at an end.
    theirs.generation_config = type(theirs.generation_config)(do_sample=False, pad_token_id=prompt[0])
    generated = theirs.generate(idx, attention_mask=torch.ones_like(idx), max_new_tokens=n)
    if (said := generated[0, len(prompt) :].tolist()) != ours:
        raise refuse(f"greedy tokens differ: {tokenizer.decode(said)!r} there, {tokenizer.decode(ours)!r} here")
    return f"greedy tokens by generate() and by our engine: {n} of {n} the same"


def same_ids(tokenizer: Tokenizer, theirs: Any, texts: Sequence[str], origin: str) -> str:
    theirs.backend_tokenizer.encode_special_tokens = True  # their names are text, as they are here
    encodings = theirs.backend_tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
    theirs.backend_tokenizer.encode_special_tokens = False
    for text, ours, encoding in zip(texts, tokenizer.encode(texts), encodings, strict=True):
        if ours != encoding.ids:
            raise refuse(f"a text becomes other tokens: {text[:80]!r}")
    size = sum(len(text.encode()) for text in texts)
    return f"ids of {size / 1e6:,.2f} MB of text ({origin}): the same"


def same_chats(tokenizer: Tokenizer, theirs: Any, texts: Sequence[str]) -> str:
    """The ids of CHATS conversations made of pieces of text, whole and up to an answer that is to come."""
    rng = random.Random(0)
    tools = 0
    for _ in range(CHATS):
        messages = make_chat(rng, texts)
        tools += any(isinstance(message["content"], list) for message in messages)
        whole_chat = theirs.apply_chat_template(messages, return_dict=False)
        asked = theirs.apply_chat_template(messages[:-1], add_generation_prompt=True, return_dict=False)
        if whole_chat != render_conversation(messages, tokenizer).ids.tolist():
            raise refuse(f"the chat template renders another text: {str(messages)[:200]}")
        if asked != render_for_completion(messages[:-1], tokenizer):
            raise refuse(f"the chat template asks otherwise: {str(messages)[:200]}")
    return f"chat template on {CHATS} conversations, {tools} of them with tools: the same ids"


def make_chat(rng: random.Random, texts: Sequence[str]) -> list[Message]:
    """A conversation of random pieces of text, in which no name of a special token stands."""

    def piece() -> str:
        text = rng.choice(texts)
        start = rng.randrange(len(text) + 1)
        return text[start : start + rng.choice((0, 1, 5, 30, 200))].replace("<|", "<")

    def answer() -> Any:
        kinds = rng.choice((None, ["text"], ["python"], ["text", "python", "python_output", "text"]))
        return [{"type": kind, "text": piece()} for kind in kinds] if kinds else piece()

    messages = [{"role": "system", "content": piece()}] if rng.random() < 0.3 else []
    for _ in range(rng.randint(1, 3)):
        messages += [{"role": "user", "content": piece()}, {"role": "assistant", "content": answer()}]
    return messages


# -----------------------------------------------------------------------------
# The model card


def card(checkpoint: Checkpoint, compared: Sequence[str]) -> str:
    """README.md: how to use the folder, what was compared, and the report of the runs that led to this checkpoint."""
    name, sealed = Path(out or "").name, checkpoint.meta["provenance"]["git"]
    use = (USE_CHAT if source != "base" else USE_BASE).format(folder=repr(name))
    sections: list[tuple[str, Iterable[str]]] = [
        ("Use", [page.fenced("python", use), NOTES if source != "base" else ""]),
        ("Compared with transformers before it was written", ["\n".join(f"- {line}" for line in compared)]),
    ]
    about = f"Exported from {checkpoint.identity}, made by commit {sealed}."
    runs = its_runs(checkpoint)
    record = report.build(runs)[0].split("\n\n", 2)[2] if runs else "There is no record of its training here.\n"
    return FRONT + page.to_markdown(name, about, sections) + "\n" + record


def its_runs(checkpoint: Checkpoint) -> list[report.Events]:
    """What the records say of a checkpoint and of those that it started from: their training up to their steps, scores
    of just these weights, and how corpus and tokenizer were made.
    """
    records = get_base_dir() / "records"
    runs = report.read_runs(records) if any(records.glob("*.jsonl")) else []
    kept = [run for run in runs if run[0]["stage"] in ("dataset", "tok_train")]
    for ancestor in lineage(checkpoint):
        stage, tag, at, saved_at = stage_of(ancestor), ancestor.tag, ancestor.step, ancestor.meta["saved_at"]
        last_step = saved_steps(ancestor.path.parent)[-1]
        scored = (f"{stage}-{tag}", f"{stage}-{tag}-{at:06d}", f"{tag}-step{at}")  # chat_eval, base_eval, base_loss
        for run in runs:
            start, before = run[0], run[0]["time"] <= saved_at
            if before and (start["stage"], start["tag"]) == (stage, tag):
                kept.append([event for event in run if event.get("step", 0) <= at])
            elif not before and start["tag"] in scored and (start["settings"].get("step") or last_step) == at:
                kept.append(run)
    return sorted(kept, key=lambda run: run[0]["time"])


def stage_of(checkpoint: Checkpoint) -> str:
    return next(name for name, stage in STAGES.items() if stage.folder == checkpoint.path.parts[-3])


def lineage(checkpoint: Checkpoint) -> list[Checkpoint]:
    """The checkpoint and those that it started from, as far as they are here and the same."""
    identity = checkpoint.meta.get("started_from", "")
    path = get_base_dir() / identity.partition(" ")[0]
    before = open_checkpoint(path) if (path / "meta.json").is_file() else None
    return [checkpoint, *(lineage(before) if before and before.identity == identity else [])]


if __name__ == "__main__":
    run_main(main)
