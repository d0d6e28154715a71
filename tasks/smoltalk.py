"""SmolTalk, the selection for small models: general chats written by larger models (Ben Allal et al. 2025,
arXiv:2502.02737). For training only: splits are train (460,341 chats) and dev, the published test rows.
"""

from nanochat.common import UserError
from nanochat.conversation import check_messages
from tasks.common import Conversation, Task, load_rows

PUBLISHED = {"train": "train", "dev": "test"}


class SmolTalk(Task):
    """Conversations of one or more turns, some after a system message."""

    name = "SmolTalk"

    def __init__(self, split: str = "train", start: int = 0, stop: int | None = None, step: int = 1):
        super().__init__(start, stop, step)
        if split not in PUBLISHED:
            raise UserError(f"{self.name}: split={split}: expected {' or '.join(PUBLISHED)}; it is for training only")
        self.rows = load_rows("HuggingFaceTB/smol-smoltalk", "default", PUBLISHED[split])
        self.files = (self.rows.path,)

    def num_examples(self) -> int:
        return len(self.rows)

    def get_example(self, index: int) -> Conversation:
        rows = self.rows[index]["messages"]
        messages = [{"role": message["role"], "content": message["content"]} for message in rows]
        check_messages(messages)
        return {"messages": messages}
