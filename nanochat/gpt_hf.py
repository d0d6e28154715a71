"""Our GPT under the names that transformers has for it: NanoChatForCausalLM.

transformers computes what gpt.py does, in the same order: RMSNorm without a gain (eps 1e-6) after the embedding and in
each block, rotary by minus the angle and then QK-norm, ReLU squared, softcap 15. It has no windows.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from nanochat.common import UserError
from nanochat.gpt import GPT, GPTConfig
from nanochat.model import SOFTCAP

LAYER = {  # of blocks.0 and model.layers.0
    "attn.c_q": "self_attn.q_proj",
    "attn.c_k": "self_attn.k_proj",
    "attn.c_v": "self_attn.v_proj",
    "attn.c_proj": "self_attn.o_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
FIXED = {  # what gpt.py does, and a config.json could say otherwise
    "hidden_act": "relu2",
    "rms_norm_eps": 1e-6,
    "final_logit_softcapping": SOFTCAP,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "tie_word_embeddings": False,
}


def hf_names(n_layer: int) -> dict[str, str]:
    """{our name: theirs} of every tensor."""
    names = {"wte.weight": "model.embed_tokens.weight", "lm_head.weight": "lm_head.weight"}
    for i in range(n_layer):
        names |= {f"blocks.{i}.{ours}.weight": f"model.layers.{i}.{theirs}.weight" for ours, theirs in LAYER.items()}
    return names


def to_hf(model: GPT) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """config.json and the tensors under their names there. Raises UserError for a model with windows."""
    config = model.config
    if min(config.windows()) < config.sequence_len:
        full = "in transformers' NanoChat every layer sees the full context; train one with --window-pattern=L"
        raise UserError(f"window_pattern={config.window_pattern}: this model cannot leave: {full}")
    weights = model.state_dict()
    tensors = {theirs: weights[ours] for ours, theirs in hf_names(config.n_layer).items()}
    return {
        "architectures": ["NanoChatForCausalLM"],
        "model_type": "nanochat",
        "vocab_size": config.vocab_size,
        "hidden_size": config.n_embd,
        "intermediate_size": 4 * config.n_embd,
        "num_hidden_layers": config.n_layer,
        "num_attention_heads": config.n_head,
        "num_key_value_heads": config.n_kv_head,
        "max_position_embeddings": config.sequence_len,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_base},
        **FIXED,
    }, tensors


def from_hf(found: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> tuple[GPTConfig, dict[str, Tensor]]:
    """Our config and weights, by our names, of a config.json and the tensors beside it, which are not copied. Neither
    names nor shapes are compared. Raises UserError for a config.json that our GPT has no place for.
    """
    rope = found.get("rope_parameters") or {}
    fixed = FIXED | {"intermediate_size": 4 * found["hidden_size"]}
    other = [f"{name}={found[name]!r}" for name, value in fixed.items() if found.get(name, value) != value]
    other += [f"rope_type={rope['rope_type']!r}"] if rope.get("rope_type", "default") != "default" else []
    if other:
        raise UserError(f"config.json has {', '.join(other)}, and our GPT knows only {fixed}")
    config = GPTConfig(
        sequence_len=found["max_position_embeddings"],
        vocab_size=found["vocab_size"],
        n_layer=found["num_hidden_layers"],
        n_head=found["num_attention_heads"],
        n_kv_head=found["num_key_value_heads"],
        n_embd=found["hidden_size"],
        rope_base=float(rope["rope_theta"]),
    )
    names = {theirs: ours for ours, theirs in hf_names(config.n_layer).items()}
    return config, {names.get(name, name): tensor for name, tensor in tensors.items()}
