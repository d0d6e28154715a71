"""Talk to a trained model in the browser, or with any client of OpenAI's API at /v1.

    python -m scripts.chat_web -i sft
    python -m scripts.chat_web --host=0.0.0.0               # for the network; prints the token that opens it
    python -m scripts.chat_web --public-host=chat.example   # behind a proxy or a tunnel of that name

Where others than this machine can reach it every request needs a token: --token, or NANOCHAT_TOKEN (which `ps` doesn't
show), or one that is made up and printed. docs/how-to/serve.md says more.
"""

from typing import Literal

from nanochat.configurator import Natural, Port, Positive, Rate, configure

SHORT = {
    "i": "source", "g": "model_tag", "s": "step", "t": "temperature", "k": "top_k", "m": "max_tokens", "p": "port",
    "n": "num_gpus", "d": "dtype",
}  # fmt: skip

# Model
source: Literal["mid", "sft", "rl"] = "sft"  # stage of the checkpoint
model_tag: str | None = None  # name of the checkpoint directory (None = the one saved last)
step: Natural | None = None  # checkpoint step (None = the last)
# Text, where a request doesn't say
temperature: Rate = 0.8  # 0 = always the most likely token
top_k: Natural = 50  # draw from the k most likely tokens only (0 = from all)
max_tokens: Positive = 512  # length of a reply
# Server
host = "127.0.0.1"  # address to listen on; 0.0.0.0 = all of this machine's
port: Port = 8000  # of the page and the API (0 = any free one)
token: str | None = None  # what a request must know (None = nothing on this machine, else made up and printed)
public_host: str | None = None  # name, or names with commas, of a proxy or tunnel through which others come
root_path = ""  # prefix under which a proxy shows the server, such as /chat
slots: Positive = 32  # replies that each GPU writes at the same time; 64 more wait, others are told to come back
# Machine
num_gpus: Positive = 1  # copies of the model, one per GPU
device_type: Literal["auto", "cuda", "mps", "xpu", "cpu"] = "auto"  # cuda also stands for AMD's ROCm
dtype: Literal["auto", "bfloat16", "float32"] = "auto"  # what matmuls compute in
compile = True  # on a CPU: a faster decoding step, which the first start makes in the background in a minute or two
settings = configure(__name__)

import os
import re
import secrets
import sys

import torch

from nanochat.access import Access, is_loopback
from nanochat.checkpoint_manager import find_checkpoint, load_model
from nanochat.common import UserError, run_main
from nanochat.compute import compute_init
from nanochat.decode_step import compile_decoding
from nanochat.engine import Engine
from nanochat.server import Defaults, create_app, listen, make_server
from nanochat.serving import Serving


def choose_access() -> Access:
    """Who may ask, from the settings and NANOCHAT_TOKEN. Raises UserError for what is no name or no token."""
    names = frozenset(name.strip().lower() for name in (public_host or "").split(",") if name.strip())
    for name in names:
        if not re.fullmatch(r"[\w.-]+", name, re.ASCII):
            raise UserError(f"--public-host={name}: expected a name such as chat.example, without https:// and port")
    given = token if token is not None else os.environ.get("NANOCHAT_TOKEN") or None
    if given is not None and not re.fullmatch(r"[!-~]{8,}", given):
        raise UserError("the token (--token or NANOCHAT_TOKEN): expected 8 or more letters, digits and signs of ASCII")
    open_to_others = names or not is_loopback(host)
    return Access(host, names, given or (secrets.token_urlsafe(24) if open_to_others else None))


def open_engines() -> tuple[list[Engine], str]:
    """An engine for each GPU, and the model's name."""
    checkpoint = find_checkpoint(source, model_tag, step)
    tag = checkpoint.path.parent.name
    compute = compute_init(device_type, dtype)
    there = torch.cuda.device_count() if compute.device.type == "cuda" else 1
    if num_gpus > there:
        raise UserError(f"--num-gpus={num_gpus}: expected {there} at most, as many as this machine has")
    devices = [torch.device("cuda", n) for n in range(num_gpus)] if compute.device.type == "cuda" else [compute.device]
    engines = []
    for device in devices:
        model, tokenizer, _ = load_model(source, device, "eval", tag, checkpoint.step)
        engines.append(Engine(model, tokenizer, compute.dtype))
        if compile:
            compile_decoding(engines[-1], [rows for rows in (1, 8, 32) if rows <= slots])
    return engines, f"nanochat-{source}-{tag}"


def main() -> None:
    defaults, access = Defaults(temperature, top_k, max_tokens), choose_access()
    listener = listen(host, port)  # before the model is loaded: a port that is taken should not cost that time
    engines, name = open_engines()
    tokenizer, context = engines[0].tokenizer, engines[0].model.config.sequence_len
    assert tokenizer
    sys.setswitchinterval(0.001)  # s; an engine's thread waits this long for the interpreter, by default 5 ms a step
    serving = Serving(engines, slots)
    app = create_app(serving, tokenizer, context, name, defaults, access, root_path.rstrip("/"))
    address = f"http://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}/"
    given = token or os.environ.get("NANOCHAT_TOKEN")  # not printed, as logs are kept; the page asks for it
    fragment = f"#token={access.token}" if access.token and not given else ""
    print(f"chat: {address}{fragment}  (Ctrl-C ends it; OpenAI's clients: {address}v1)", flush=True)
    for public in sorted(access.public):
        print(f"chat: https://{public}{root_path.rstrip('/')}/{fragment}", flush=True)
    make_server(app).run(sockets=[listener])


if __name__ == "__main__":
    run_main(main)
