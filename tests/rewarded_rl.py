"""A reward for RL that an untrained model earns now and then."""

from tasks.arithmetic import Arithmetic


def even_length(self: Arithmetic, conversation: dict, answer: str) -> bool:
    return len(answer) % 2 == 0
