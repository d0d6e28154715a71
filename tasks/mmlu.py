"""MMLU: multiple-choice questions on 57 subjects (Hendrycks et al. 2021, arXiv:2009.03300).

Splits: train is the published auxiliary_train (99,842 questions from other benchmarks), dev is validation (1,531), test
is test (14,042). The published "dev", five examples per subject to show in a prompt, is not used.
"""

from typing import Any

from nanochat.common import UserError
from tasks.common import (
    Conversation,
    Rows,
    Task,
    assistant,
    check_split,
    load_rows,
    render_choices,
    rows_path,
    user,
)

DATASET = "cais/mmlu"
PUBLISHED = {"train": ("auxiliary_train", "train"), "dev": ("all", "validation"), "test": ("all", "test")}
LETTERS = ("A", "B", "C", "D")
# The 57 subjects in four groups, as in the paper's appendix (and in lm-eval).
GROUPS = {
    "STEM": "abstract_algebra anatomy astronomy college_biology college_chemistry college_computer_science "
    "college_mathematics college_physics computer_security conceptual_physics electrical_engineering "
    "elementary_mathematics high_school_biology high_school_chemistry high_school_computer_science "
    "high_school_mathematics high_school_physics high_school_statistics machine_learning",
    "humanities": "formal_logic high_school_european_history high_school_us_history high_school_world_history "
    "international_law jurisprudence logical_fallacies moral_disputes moral_scenarios philosophy prehistory "
    "professional_law world_religions",
    "social sciences": "econometrics high_school_geography high_school_government_and_politics "
    "high_school_macroeconomics high_school_microeconomics high_school_psychology human_sexuality "
    "professional_psychology public_relations security_studies sociology us_foreign_policy",
    "other": "business_ethics clinical_knowledge college_medicine global_facts human_aging management marketing "
    "medical_genetics miscellaneous nutrition professional_accounting professional_medicine virology",
}
GROUP_OF = {subject: group for group, subjects in GROUPS.items() for subject in subjects.split()}


class MMLU(Task):
    """A conversation also has its `subject`, such as "astronomy" ("" in train)."""

    name = "MMLU"
    groups = tuple(GROUPS)
    eval_type = "categorical"
    baseline = 0.25

    def __init__(self, split: str = "train", start: int = 0, stop: int | None = None, step: int = 1):
        super().__init__(start, stop, step)
        check_split(self.name, split)
        self.rows = load_questions(split)
        self.files = (self.rows.path,)

    def num_examples(self) -> int:
        return len(self.rows)

    def get_example(self, index: int) -> Conversation:
        row: dict[str, Any] = self.rows[index]
        row = row.get("train", row)  # the hub wraps the rows of auxiliary_train in a column of that name
        messages = [user(render_choices(row["question"], LETTERS, row["choices"])), assistant(LETTERS[row["answer"]])]
        return {"messages": messages, "letters": list(LETTERS), "subject": row["subject"]}

    def labels(self, index: int) -> tuple[str, ...]:
        """Group and subject; nothing in train, whose questions have no subject."""
        subject = self.rows[self.indices()[index]].get("subject")
        return (GROUP_OF[subject], subject) if subject in GROUP_OF else ()

    def evaluate(self, conversation: Conversation, answer: str) -> bool:
        return bool(answer.strip() == conversation["messages"][-1]["content"])


def load_questions(split: str) -> Rows:
    """The rows of one of our splits. Raises UserError, which says so where only the few-shot rows are at hand."""
    try:
        return load_rows(DATASET, *PUBLISHED[split])
    except UserError as error:
        if split == "dev" and rows_path(DATASET, "all", "dev").exists():
            fewshot = "the few-shot rows that are here (*_dev.csv) are another split; the files *_val.csv are needed"
            raise UserError(f"{error} ({fewshot})") from None
        raise
