"""Bits per byte, one document and one window at a time, on logits: what evaluate_bpb must equal."""

import math

import torch


@torch.no_grad()
def bits_and_bytes(model, tokenizer, text: str, sequence_len: int, stride: int) -> tuple[float, int]:
    """Bits and bytes of one document. The first window scores all it holds, each later one its last `stride` tokens;
    each begins with BOS.
    """
    tokens = [tokenizer.get_bos_token_id(), *tokenizer.encode(text)]
    bits, size = 0.0, 0
    last = 0  # place of the last token that was scored; BOS is given
    while last < len(tokens) - 1:
        end = sequence_len if last == 0 else last + stride
        end = min(end, len(tokens) - 1)  # place of the last token to score in this window
        begin = 0 if last == 0 else last + stride - sequence_len
        log_p = model(torch.tensor([[tokens[0], *tokens[begin + 1 : end]]]))[0].log_softmax(-1)
        for place in range(last + 1, end + 1):
            bits -= log_p[place - 1 - begin, tokens[place]].item() / math.log(2)
            size += int(tokenizer.token_bytes[tokens[place]])
        last = end
    return bits, size
