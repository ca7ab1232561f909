"""`data select`: from contexts and responses to triplets.

For each question: score the responses, choose a right one, reject a wrong one, and write a triplet for each of its
contexts. Contexts are read once, question by question. Of the responses only their places in the file are in memory.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from tqdm import tqdm

from megatron_solopo.config import Context
from megatron_solopo.data.messages import Content
from megatron_solopo.data.rendering import check_arguments, check_template, template_of
from megatron_solopo.data.row_files import check_plain_lines
from megatron_solopo.data.template_arguments import KWARGS_FIELD
from megatron_solopo.data.tokenizer import Tokenizer, load_tokenizer
from megatron_solopo.errors import UserError
from megatron_solopo.files import atomic_path
from megatron_solopo.generate.journal import (
    PROMPTS_FIELD,
    SIDE_FIELD,
    StoredResponse,
    parse_response,
    read_header,
    read_offsets,
)
from megatron_solopo.generate.scoring import SCORERS, final_answer, token_f1
from megatron_solopo.progress import bar_style
from megatron_solopo.triplets.context_rows import ContextFile, ContextRow, prompts_hash, read_by_question, to_line
from megatron_solopo.triplets.prompt import Measure
from megatron_solopo.triplets.report import Bars, Chart, Histogram, check_output, provenance, write_stage_report
from megatron_solopo.triplets.seeds import generator
from megatron_solopo.triplets.settings import SelectSettings

_CUT = "length"


@dataclass(frozen=True)
class Candidate:
    """A response that may be trained on."""

    index: int
    text: str
    """With the thought, if the response has one."""
    tokens: int
    """With the end token, as in training."""
    score: float
    """Of the text behind the thought."""
    f1: float
    """`token_f1` of what is scored, which policies compare."""
    marked: bool
    """Whether the response has the answer marker, or needs none."""


@dataclass(frozen=True)
class Pair:
    """The answers of a triplet."""

    chosen: Candidate
    rejected: Candidate


class Judge:
    """Scores and pairs responses by the settings."""

    def __init__(self, settings: SelectSettings) -> None:
        self._settings = settings

    def candidates(
        self, responses: Sequence[StoredResponse], row: ContextRow, measure: Measure
    ) -> tuple[list[Candidate], Counter[str]]:
        """The responses that may be trained on, and the number of others by reason."""
        excluded: Counter[str] = Counter()
        seen: set[str] = set()
        found = []
        for response in sorted(responses, key=lambda each: each.index):
            text = response.text.strip()
            trained = _with_thought(response.reasoning, text)
            if reason := self._reason_to_exclude(response, text, trained in seen):
                excluded[reason] += 1
                continue
            seen.add(trained)
            tokens = measure.response(row.prompt_short, trained)
            if tokens > row.response_tokens:
                excluded["longer than the room that the contexts leave"] += 1
                continue
            scored, marked = self._scored_text(text)
            score = SCORERS[self._settings.score](scored, row.answers)
            found.append(Candidate(response.index, trained, tokens, score, token_f1(scored, row.answers), marked))
        return found, excluded

    def divide(self, candidates: Sequence[Candidate]) -> tuple[list[Candidate], list[Candidate]]:
        """Right and wrong responses."""
        right = [each for each in candidates if each.score >= self._settings.threshold]
        return right, [each for each in candidates if each.score < self._settings.threshold]

    def pairs(self, right: Sequence[Candidate], wrong: Sequence[Candidate], rng: np.random.Generator) -> Iterator[Pair]:
        """Pairs, best first. No response is in two of them."""
        unused = _shuffled(wrong, rng)
        made = 0
        for chosen in sorted(_shuffled(right, rng), key=self._chosen_key()):
            allowed = [each for each in unused if self._allowed(chosen, each)]
            if allowed and made < self._settings.max_pairs_per_question:
                rejected = min(allowed, key=self._rejected_key(chosen))
                unused.remove(rejected)
                made += 1
                yield Pair(chosen, rejected)

    def is_tied(self, right: Sequence[Candidate]) -> bool:
        """Whether the policy calls two right responses equal, so that chance decides between them."""
        if self._settings.chosen == "random" or len(right) < 2:
            return False
        first, second = sorted(map(self._chosen_key(), right))[:2]
        return first == second

    def _reason_to_exclude(self, response: StoredResponse, text: str, repeated: bool) -> str:
        if response.finish_reason == _CUT:
            return "cut at --max-tokens"
        if not text:
            return "empty"
        return "the same as another" if repeated else ""

    def _scored_text(self, text: str) -> tuple[str, bool]:
        """The text to score, and whether the response has the marker or needs none."""
        if self._settings.scored_text == "whole":
            return text, True
        return final_answer(text, self._settings.answer_marker)

    def _chosen_key(self) -> Callable[[Candidate], float]:
        keys: dict[str, Callable[[Candidate], float]] = {
            "shortest": lambda each: each.tokens,
            "random": lambda each: 0,
            "highest_f1": lambda each: -each.f1,
        }
        return keys[self._settings.chosen]

    def _rejected_key(self, chosen: Candidate) -> Callable[[Candidate], float]:
        keys: dict[str, Callable[[Candidate], float]] = {
            "random": lambda each: 0,
            "highest_f1": lambda each: -each.f1,
            "nearest_length": lambda each: abs(np.log(each.tokens / chosen.tokens)),
        }
        return keys[self._settings.rejected]

    def _allowed(self, chosen: Candidate, rejected: Candidate) -> bool:
        ratio = chosen.tokens / rejected.tokens
        low, high = self._settings.min_length_ratio, self._settings.max_length_ratio
        return (low is None or ratio >= low) and (high is None or ratio <= high)


def _with_thought(thought: str | None, text: str) -> str:
    """The response as the model wrote it, in the marks that most chat templates know."""
    return text if thought is None else f"<think>\n{thought.strip()}\n</think>\n\n{text}"


def _shuffled(candidates: Sequence[Candidate], rng: np.random.Generator) -> list[Candidate]:
    return [candidates[place] for place in rng.permutation(len(candidates))]


@dataclass
class SelectReport:
    """What a selection read, wrote and left out, as `report.json` holds it."""

    provenance: dict[str, Any]
    side: Context = "short"
    """Which contexts the responses answer. With long, each row counts as a question."""
    questions: int = 0
    questions_with_pairs: int = 0
    triplets_written: int = 0
    questions_without_pair: Counter[str] = field(default_factory=Counter)
    """Number of questions by reason."""
    questions_tied: int = 0
    """Questions where chance decided between right responses that the policy calls equal."""
    responses: int = 0
    excluded: Counter[str] = field(default_factory=Counter)
    """Responses that cannot be trained on, by reason."""
    responses_right: int = 0
    responses_without_marker: int = 0
    """Responses without the answer marker, which are scored whole."""
    responses_to_other_questions: int = 0
    mean_length_ratio: float = 0.0
    """Tokens of chosen over tokens of rejected, mean over the pairs. Far from 1, length gives the answer away."""

    def to_json(self) -> dict[str, Any]:
        """The same as plain dictionaries, lists and numbers."""
        # Not dataclasses.asdict: Python 3.11's makes Counters of pairs.
        return {name: dict(value) if isinstance(value, Counter) else value for name, value in vars(self).items()}

    def __str__(self) -> str:
        used = self.responses - self.excluded.total()
        lines = [
            f"{self.side} contexts: {self.questions}, {self.questions_with_pairs} of them with pairs, "
            f"{self.questions_tied} of these by chance between equals",
            *(f"  without, {reason}: {count}" for reason, count in sorted(self.questions_without_pair.items())),
            f"responses: {self.responses}, {used} scored, {self.responses_right} of them right",
            *(f"  not used, {reason}: {count}" for reason, count in sorted(self.excluded.items())),
        ]
        if self.responses_without_marker:
            lines.append(f"  scored whole, without the answer's marker: {self.responses_without_marker}")
        if self.responses_to_other_questions:
            lines.append(f"  to questions that the contexts do not have: {self.responses_to_other_questions}")
        lines.append(
            f"triplets: {self.triplets_written}, chosen {self.mean_length_ratio:.2f} times as long as rejected"
        )
        return "\n".join(lines)


def select(settings: SelectSettings) -> SelectReport:
    """Write triplets. A row has id, prompt_short, prompt_long, chosen, rejected, and for analysis what led to them.

    Raises UserError if a file is not what it should be, if the responses belong to other contexts, or if no pair could
    be made.
    """
    check_output(settings.output, settings.overwrite, [settings.contexts, settings.responses])
    tokenizer = load_tokenizer(settings.tokenizer)
    header = _checked_header(settings)
    inputs = [settings.contexts, settings.responses]
    made = provenance(inputs, settings.seed, settings, (settings.tokenizer, tokenizer))
    selection = _Selection(settings, tokenizer, header, SelectReport(made))
    with atomic_path(settings.output) as temporary:
        with temporary.open("w", encoding="utf-8") as stream:
            for text in selection.lines():
                stream.write(text)
        if not selection.report.triplets_written:
            raise UserError(f"--responses {settings.responses}: no pair could be made\n{selection.report}")
    selection.write_report()
    return selection.report


def _checked_header(settings: SelectSettings) -> dict[str, Any]:
    """What the responses were sampled with. Raises UserError if they belong to other contexts."""
    check_plain_lines(settings.responses)
    header = read_header(settings.responses)
    if not header:
        return {SIDE_FIELD: "short"}
    header = {SIDE_FIELD: "short"} | header
    if header.get(PROMPTS_FIELD) != prompts_hash(ContextFile(settings.contexts), header[SIDE_FIELD]):
        raise UserError(
            f"--responses {settings.responses}: were sampled from other {header[SIDE_FIELD]} contexts than those of "
            f"{settings.contexts}; pass the file that they were sampled from, or sample again"
        )
    return header


class _Selection:
    """One pass over the contexts."""

    def __init__(
        self, settings: SelectSettings, tokenizer: Tokenizer, header: dict[str, Any], report: SelectReport
    ) -> None:
        self.report = report
        self._settings = settings
        self._tokenizer = tokenizer
        self._judge = Judge(settings)
        # What the prompts were sampled with is what they are trained with.
        self._kwargs: dict[str, Any] = header.get(KWARGS_FIELD, {})
        report.side = self._side = header[SIDE_FIELD]
        self._places: defaultdict[str, list[int]] = defaultdict(list)
        self._scores: list[float] = []
        self._ratios: list[float] = []
        self._tokens: list[tuple[int, int]] = []
        self._depths: list[float] = []

    def lines(self) -> Iterator[str]:
        """The triplets as lines, in the order of the contexts."""
        for offset, response in read_offsets(self._settings.responses):
            self._places[response.question_id].append(offset)
        known: set[str] = set()
        for rows in tqdm(read_by_question(self._settings.contexts), desc="Selecting", **bar_style("questions")):
            if rows[0].question_id in known:
                raise UserError(
                    f"--contexts {self._settings.contexts}: the rows of question {rows[0].question_id!r} do not stand "
                    "together, as data build writes them"
                )
            known.add(rows[0].question_id)
            for same_prompt in [rows] if self._side == "short" else [[row] for row in rows]:
                yield from self._triplets(same_prompt)
        self.report.responses_to_other_questions = sum(map(len, self._places.values()))
        self.report.mean_length_ratio = sum(self._ratios) / max(1, len(self._ratios))

    def _triplets(self, rows: Sequence[ContextRow]) -> Iterator[str]:
        """The triplets of rows whose responses answer the same prompt."""
        for number, pair in enumerate(self._pairs(rows[0])):
            for row in rows:
                self.report.triplets_written += 1
                self._depths += row.evidence_depths
                yield to_line(_triplet(row, pair, number, self._settings) | row.arguments(self._kwargs).fields())

    def _pairs(self, row: ContextRow) -> list[Pair]:
        """The pairs from the responses to one prompt. Counts them in the report."""
        report = self.report
        name = row.asked_as(self._side)
        responses = self._responses(name)
        candidates, excluded = self._judge.candidates(responses, row, self._measure(row))
        right, wrong = self._judge.divide(candidates)
        pairs = list(self._judge.pairs(right, wrong, generator(self._settings.seed, name)))
        report.questions += 1
        report.responses += len(responses)
        report.excluded += excluded
        report.responses_right += len(right)
        report.responses_without_marker += sum(not each.marked for each in candidates)
        self._scores += [each.score for each in candidates]
        if pairs:
            report.questions_with_pairs += 1
            report.questions_tied += self._judge.is_tied(right)
        else:
            report.questions_without_pair[_why_none(responses, right, wrong)] += 1
        self._ratios += [pair.chosen.tokens / pair.rejected.tokens for pair in pairs]
        self._tokens += [(pair.chosen.tokens, pair.rejected.tokens) for pair in pairs]
        return pairs

    def _measure(self, row: ContextRow) -> Measure:
        template = template_of(row.prompt_short)
        check_template(template, self._tokenizer, self._settings.tokenizer)
        arguments = row.arguments(self._kwargs)
        check_arguments(template, self._tokenizer, arguments, f"{self._settings.contexts}: row {row.id}")
        return Measure(self._tokenizer, template, arguments)

    def _responses(self, name: str) -> list[StoredResponse]:
        """Take the responses to a prompt. If two have one number, as in a file made by hand, the first counts."""
        path = self._settings.responses
        found: dict[int, StoredResponse] = {}
        with path.open("rb") as stream:
            for place in self._places.pop(name, ()):
                stream.seek(place)
                response = parse_response(path, place, stream.readline())
                found.setdefault(response.index, response)
        return list(found.values())

    def write_report(self) -> None:
        """`report.json` and the page."""
        charts: list[Chart] = [
            Histogram(f"Score of a response ({self._settings.score})", "score", self._scores, (0, 1)),
            Histogram("Chosen", "tokens", [chosen for chosen, _ in self._tokens]),
            Histogram("Rejected", "tokens", [rejected for _, rejected in self._tokens]),
            Histogram("Chosen over rejected", "ratio of tokens", self._ratios),
            Histogram("Evidence in the long context", "depth, 0 is the start", self._depths, (0, 1)),
            Bars("Questions without a pair", self.report.questions_without_pair),
            Bars("Responses that were not used", self.report.excluded),
        ]
        name = self._settings.output.name
        write_stage_report(self._settings.output, f"Triplets: {name}", str(self.report), self.report.to_json(), charts)


def _why_none(responses: list[StoredResponse], right: list[Candidate], wrong: list[Candidate]) -> str:
    if not responses:
        return "no response"
    if not right and not wrong:
        return "no response that can be used"
    if not right:
        return "every response is wrong"
    return "no pair within the length ratio" if wrong else "every response is right"


def _triplet(row: ContextRow, pair: Pair, number: int, settings: SelectSettings) -> dict[str, Any]:
    """A row of the triplet file, in the form of its prompts."""
    chosen, rejected = (_content(row.prompt_short, each.text) for each in (pair.chosen, pair.rejected))
    return {
        "id": f"{row.id}#{number}" if settings.max_pairs_per_question > 1 else row.id,
        "prompt_short": row.prompt_short,
        "prompt_long": row.prompt_long,
        "chosen": chosen,
        "rejected": rejected,
        "question_id": row.question_id,
        "question": row.question,
        "answers": row.answers,
        "evidence_depths": row.evidence_depths,
        "score": settings.score,
        "scores": [pair.chosen.score, pair.rejected.score],
        "samples": [pair.chosen.index, pair.rejected.index],
    }


def _content(prompt: Content, response: str) -> Content:
    return response if isinstance(prompt, str) else [{"role": "assistant", "content": response}]
