"""chat_rl with a reward that an untrained model earns now and then: to be started by torchrun in test_chat_train.py."""

import runpy

from tasks.arithmetic import Arithmetic


def even_length(self: Arithmetic, conversation: dict, answer: str) -> bool:
    return len(answer) % 2 == 0


if __name__ == "__main__":
    Arithmetic.evaluate = even_length
    runpy.run_module("scripts.chat_rl", run_name="__main__", alter_sys=True)
