"""Talk to a trained model in the browser.

    python -m scripts.chat_web -i sft

The page has no password: it is for this machine alone unless --host says otherwise.
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
# Machine
num_gpus: Positive = 1  # replicas of the model; only 1 for now
device_type: Literal["auto", "cuda", "mps", "xpu", "cpu"] = "auto"  # cuda also stands for AMD's ROCm
dtype: Literal["auto", "bfloat16", "float32"] = "auto"  # what matmuls compute in
settings = configure(__name__)

import contextlib

from nanochat.checkpoint_manager import find_checkpoint, load_model
from nanochat.common import UserError, run_main
from nanochat.compute import compute_init
from nanochat.engine import Engine
from nanochat.server import Defaults, allowed_hosts, create_app, is_loopback, listen, make_server


def main() -> None:
    if num_gpus != 1:
        raise UserError(
            f"--num-gpus={num_gpus}: expected 1; for more, start one server per GPU, each with its own --port"
        )
    defaults = Defaults(temperature, top_k, max_tokens)
    listener = listen(host, port)  # before the model is loaded: a port that is taken should not cost that time
    checkpoint = find_checkpoint(source, model_tag, step)
    tag = checkpoint.path.parent.name
    compute = compute_init(device_type, dtype)
    model, tokenizer, _ = load_model(source, compute.device, "eval", tag, checkpoint.step)
    engine = Engine(model, tokenizer, compute.dtype)
    name = f"{source} {tag} step {checkpoint.step}"
    app = create_app(engine, tokenizer, model.config.sequence_len, name, defaults, allowed_hosts(host))
    address = f"[{host}]" if ":" in host else host
    print(f"chat: http://{address}:{listener.getsockname()[1]}/  (Ctrl-C ends it)", flush=True)
    if not is_loopback(host):
        print("anybody in the network who reaches this address can use it: there is no password", flush=True)
    with contextlib.suppress(KeyboardInterrupt):  # the usual end of a server, not a failure
        make_server(app).run(sockets=[listener])


if __name__ == "__main__":
    run_main(main)
