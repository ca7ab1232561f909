"""The same function over many items, on one process or several, results in order.

Short and long contexts around the same evidence, from a question answering corpus.

1. Read the corpus row by row into a store on disk; refuse or report what is not of the format.
2. Tokenize every distinct document once.
3. Per question, from random streams of its own: the short context, the answers if they are constructed, and the long
   contexts, each measured exactly. What cannot be built is dropped, counted and listed.

Steps 2 and 3 run on several processes; none holds the corpus or the output in memory.

Method: SoLoPO (arXiv 2505.11166) over RULER's way of hiding evidence among distractors (arXiv 2404.06654), but with a
random stream per question, so that evidence moves between samples.
"""

import json
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import cached_property
from itertools import chain
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from tqdm import tqdm

from megatron_solopo.data.encode import check_template
from megatron_solopo.data.tokenizer import Tokenizer, load_tokenizer
from megatron_solopo.errors import UserError
from megatron_solopo.files import atomic_path, remove
from megatron_solopo.progress import bar_style
from megatron_solopo.triplets.build_row import Built, Drop, MeasuredContext, RowBuilder
from megatron_solopo.triplets.corpus.formats import Document, Question
from megatron_solopo.triplets.corpus.read import BadRow, read_distractors, read_questions
from megatron_solopo.triplets.corpus.store import Corpus, CorpusWriter
from megatron_solopo.triplets.prompt import Measure, PromptTemplate, read_template
from megatron_solopo.triplets.report import BuildReport, Tally, check_output, provenance
from megatron_solopo.triplets.settings import BuildSettings

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")

# Finished results that wait for an earlier one are held; this bounds them.
_WAITING_PER_PROCESS = 4


class Workers:
    """Processes that share a set-up; with one, everything runs in the caller. Use as a context manager.

    Args:
        num_proc: Processes.
        initialise: Called once in each, with `arguments`, before any work.
        arguments: Picklable.
    """

    def __init__(self, num_proc: int, initialise: Callable[..., None], arguments: tuple[Any, ...]) -> None:
        self._executor: ProcessPoolExecutor | None = None
        self._waiting = num_proc * _WAITING_PER_PROCESS
        if num_proc == 1:
            initialise(*arguments)
        else:
            # A forked process would inherit the threads of torch and the tokenizer in an unknown state.
            context = multiprocessing.get_context("spawn")
            self._executor = ProcessPoolExecutor(num_proc, context, _begin, (initialise, arguments))

    def __enter__(self) -> "Workers":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._executor is not None:
            self._executor.shutdown(wait=True, cancel_futures=True)

    def map(self, function: Callable[[_Item], _Result], items: Iterable[_Item]) -> Iterator[_Result]:
        """`function` of every item, in order. A process that was killed is a ValueError."""
        if self._executor is None:
            yield from map(function, items)
            return
        waiting: deque[Future[_Result]] = deque()
        try:
            for item in items:
                waiting.append(self._executor.submit(function, item))
                if len(waiting) >= self._waiting:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except ValueError as error:
            # Raised here again: what another process raised has lost the place that it came from.
            raise UserError(str(error)) from None
        except BrokenProcessPool:
            raise UserError("a worker process was killed, most likely for want of memory; lower --num-proc") from None


def _begin(initialise: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    """Set a process up. Ctrl-C goes to all of them: the caller alone ends the work and tells it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_caller, daemon=True).start()
    initialise(*arguments)


def _end_with_caller() -> None:
    """A caller that was killed tells nobody: without this its processes would wait for work for ever."""
    caller = multiprocessing.parent_process()
    assert caller is not None
    caller.join()
    os._exit(1)


_SHOWN_MISTAKES = 20
_DOCUMENTS_PER_TASK = 256


def build(settings: BuildSettings) -> BuildReport:
    """Write contexts, or triplets where responses are constructed; nothing is ever cut.

    A row has id, question_id, prompt_short, prompt_long, question, answers, evidence_depths (see `data.placement`),
    short_tokens and long_tokens (prompt and room for the response), target_tokens, response_tokens (the room), and
    with constructed responses chosen and rejected. The short side depends on seed and question, and not on the length.

    Raises:
        ValueError: A setting is illegal, a row is not of the format, or no row could be built: one line per mistake.
    """
    check_output(settings.output, settings.overwrite, settings.inputs)
    tokenizer = load_tokenizer(settings.tokenizer)
    _check_prompts(settings, tokenizer)
    made = provenance(settings.inputs, settings.seed, settings.model_dump(mode="json"), (settings.tokenizer, tokenizer))
    tally = Tally(made)
    with atomic_path(settings.output) as temporary:
        store = temporary.with_name(f"{temporary.name}.corpus")
        try:
            _store_corpus(settings, store, tally)
            with Workers(settings.num_proc, _initialise, (store, settings)) as workers:
                _count_documents(workers, store)
                with temporary.open("w", encoding="utf-8") as stream:
                    for text in _rows(workers, store, tally):
                        stream.write(text)
        finally:
            remove(store)
        report = tally.report(settings.input)
    tally.write(report, settings.output)
    return report


def _check_prompts(settings: BuildSettings, tokenizer: Tokenizer) -> None:
    """Make one prompt and one response: what is wrong with a template is told before the corpus is read."""
    check_template(settings.template, tokenizer, settings.tokenizer)
    made = _prompt(settings).prompt([Document("Title", "Text.")], "Question?")
    Measure(tokenizer, settings.template).response(made, "Answer.")


def _prompt(settings: BuildSettings) -> PromptTemplate:
    return PromptTemplate(read_template(settings.prompt_template), titles=settings.titles, template=settings.template)


def _store_corpus(settings: BuildSettings, store: Path, tally: Tally) -> None:
    """Read everything; raises UserError naming the bad rows where they are not to be dropped."""
    found = chain(
        read_questions(settings.input, settings.format), read_distractors(settings.pool) if settings.pool else ()
    )
    with CorpusWriter(store) as writer:
        for line, row in tqdm(found, desc="Reading the corpus", **bar_style("rows")):
            if isinstance(row, Question):
                writer.add_question(line, row)
            elif isinstance(row, Document):
                writer.add_document(row)
            else:
                tally.bad_rows.append(row)
    if tally.bad_rows and settings.bad_rows == "refuse":
        raise UserError(_list_mistakes(tally.bad_rows))
    if not writer.questions:
        raise UserError(f"--input {settings.input}: holds no question, expected --format {settings.format}")


def _list_mistakes(bad_rows: list[BadRow]) -> str:
    lines = [str(bad) for bad in bad_rows[:_SHOWN_MISTAKES]]
    if len(bad_rows) > len(lines):
        lines.append(f"and {len(bad_rows) - len(lines)} mistakes more")
    lines[-1] += "; --bad-rows drop leaves such rows out and lists every one in the report"
    return "\n".join(lines)


class _State:
    """What one process builds with."""

    def __init__(self, store: Path, settings: BuildSettings) -> None:
        self.corpus = Corpus(store)
        self._settings = settings
        self._prompt = _prompt(settings)
        self._measure = Measure(load_tokenizer(settings.tokenizer), settings.template)
        self.count = self._measure.document_counter(self._prompt)

    @cached_property
    def builder(self) -> RowBuilder:
        """Once every document has been counted."""
        return RowBuilder(self.corpus, self._settings, self._prompt, self._measure)


_state: _State


def _initialise(store: Path, settings: BuildSettings) -> None:
    global _state
    _state = _State(store, settings)


def _count(documents: range) -> list[int]:
    return _state.count([_state.corpus.document(index) for index in documents])


def _build(number: int) -> list[tuple[str, MeasuredContext | Drop]]:
    """The lines to write, as text already where there are many processes, and what is to be told of them."""
    results = _state.builder.build(number)
    return [(_line(each), each.measured) if isinstance(each, Built) else ("", each) for each in results]


def _line(built: Built) -> str:
    return json.dumps(built.row, ensure_ascii=False) + "\n"


def _count_documents(workers: Workers, store: Path) -> None:
    corpus = Corpus(store)
    starts = range(0, corpus.num_documents, _DOCUMENTS_PER_TASK)
    tasks = [range(start, min(start + _DOCUMENTS_PER_TASK, corpus.num_documents)) for start in starts]
    counted = tqdm(workers.map(_count, tasks), total=len(tasks), desc="Tokenizing", **bar_style("batches of documents"))
    corpus.save_tokens(chain.from_iterable(counted))


def _rows(workers: Workers, store: Path, tally: Tally) -> Iterator[str]:
    """Every row that can be built, in the order of the corpus; all are told to `tally`."""
    corpus = Corpus(store)
    tally.documents, tally.questions = len(corpus.pool), corpus.num_questions
    results = workers.map(_build, range(corpus.num_questions))
    for pairs in tqdm(results, total=corpus.num_questions, desc="Building contexts", **bar_style("questions")):
        for text, result in pairs:
            tally.add(result)
            yield text
