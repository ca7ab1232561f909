"""What a user asks of `data select`, and what is illegal about it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_solopo.data.scoring import Score

ChosenPolicy = Literal["shortest", "random", "highest_f1"]
RejectedPolicy = Literal["random", "highest_f1", "nearest_length"]


@dataclass(frozen=True)
class SelectSettings:
    """Everything that decides a selection, and where it goes.

    Attributes:
        contexts: Output of `data build`.
        responses: Output of `data sample`, or JSONL of {"question_id", "index", "text"}.
        output: Triplets to write, JSONL.
        tokenizer: Directory or file of the tokenizer that responses are measured with.
        score: What makes a response right, see `data.scoring`.
        threshold: Least score of a right response.
        scored_text: final is what stands behind `answer_marker`, where the response has it; whole is all of it.
        answer_marker: Text before the final answer, ignoring case; the last one in a response counts.
        chosen: Which of the right responses: the shortest, any, or the one whose answer has most words of a gold one.
        rejected: Which of the wrong ones: any, the nearest miss by words, or the one nearest in length.
        max_pairs_per_question: Pairs per question, each response in one pair at most.
        min_length_ratio: Least tokens of chosen over rejected.
        max_length_ratio: Most tokens of chosen over rejected.
        seed: With a question's id, decides draws and ties.
        overwrite: Replace an existing output.
    """

    contexts: Path
    responses: Path
    output: Path
    tokenizer: str
    score: Score = "sub_em"
    threshold: float = 1.0
    scored_text: Literal["final", "whole"] = "final"
    answer_marker: str = "answer is:"
    chosen: ChosenPolicy = "shortest"
    rejected: RejectedPolicy = "random"
    max_pairs_per_question: int = 1
    min_length_ratio: float | None = None
    max_length_ratio: float | None = None
    seed: int = 0
    overwrite: bool = False

    def check(self) -> None:
        """Raise ValueError with one line per mistake."""
        mistakes = []
        if not 0 < self.threshold <= 1:
            mistakes.append(f"--threshold {self.threshold}: must be above 0 and at most 1")
        if self.max_pairs_per_question < 1:
            mistakes.append(f"--max-pairs-per-question {self.max_pairs_per_question}: must be at least 1")
        if not self.answer_marker.strip():
            mistakes.append("--answer-marker: must not be blank; to score whole responses, pass --scored-text whole")
        ratios = (("--min-length-ratio", self.min_length_ratio), ("--max-length-ratio", self.max_length_ratio))
        mistakes += [
            f"{flag} {value}: must be above 0" for flag, value in ratios if value is not None and not value > 0
        ]
        if not (self.min_length_ratio or 0) <= (self.max_length_ratio or float("inf")):
            mistakes.append("--min-length-ratio: must not be above --max-length-ratio")
        if self.seed < 0:
            mistakes.append(f"--seed {self.seed}: must not be negative")
        if mistakes:
            raise ValueError("\n".join(mistakes))
