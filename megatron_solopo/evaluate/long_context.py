"""A whole evaluation: samples, answers of a model (kept as they come), scores, table, pictures.

<name>.json               results, see `results.long_context`
<name>.responses.jsonl    the journal of answers, from which an interrupted evaluation goes on
<name>.predictions.jsonl  every sample with its answer and scores
<name>.length.png         score against length; <name>.depth.png, a heat map of length and depth
"""

import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tqdm import tqdm

from megatron_solopo.architecture.model_directory import has_tokenizer
from megatron_solopo.command_settings import flag
from megatron_solopo.config import ParallelConfig
from megatron_solopo.cpu_features import is_cpu
from megatron_solopo.data.model_fit import same_tokens
from megatron_solopo.data.tokenizer import Tokenizer, load_tokenizer
from megatron_solopo.errors import UserError
from megatron_solopo.evaluate.sample_set import SampleSet, collect_samples, journal_header
from megatron_solopo.evaluate.samples import SampleSpec
from megatron_solopo.evaluate.scores import EvaluatedResponse, ScoredResponse, make_results, score, server_notes
from megatron_solopo.evaluate.target import Target, find_target, stored_dtype
from megatron_solopo.evaluation_settings import LongContextSettings
from megatron_solopo.files import atomic_path, check_writable, read_jsonl, remove
from megatron_solopo.generate.journal import Journal, read_header, read_refusals
from megatron_solopo.generate.model import Answer, Model, Request
from megatron_solopo.generate.refusals import Refusals
from megatron_solopo.parallel.agreement import on_rank_0
from megatron_solopo.progress import bar_style
from megatron_solopo.results.long_context import LongContextResults, read_long_context

_COMMAND = "evaluate long-context"


def evaluate_long_context(settings: LongContextSettings) -> LongContextResults | None:
    """Evaluate one model, on all ranks together.

    Returns the results on rank 0, None on the other ranks.

    Raises UserError for settings, files or a model that do not fit. Answers that came before stay.
    """
    target = Target(None, "server") if settings.server else find_target(settings.model, settings.backend)
    output = _output(settings, target)
    if target.backend != "megatron":
        _refuse_ranks(settings, target)
    tokenizer = load_tokenizer(settings.tokenizer or target.path or "")
    _check_tokenizer(settings, target, tokenizer)
    samples = collect_samples(settings, target, tokenizer)
    with _load(settings, target, tokenizer) as runner:
        journal = _answer(settings, target, output, samples, tokenizer, runner.model)
    if journal is None:
        return None
    answers = {
        row["question_id"]: EvaluatedResponse.model_validate(row)
        for row in read_jsonl(journal)[1:]
        if "refused" not in row
    }
    refused = {each.question_id: each.refused for each in read_refusals(journal)}
    marker = settings.answer_marker if settings.scored_text == "final" else None
    answered = [spec for spec in samples.specs if spec.id in answers]
    scored = [score(spec, answers[spec.id], samples.metrics[spec.task], marker) for spec in answered]
    unmade = [spec for spec in samples.specs if spec.id not in answers and spec.id not in refused]
    skipped = [*samples.skipped, *samples.count_unmade(unmade), *samples.count_refused(refused)]
    header = read_header(journal)
    assert header is not None, "the journal was just written"
    device, layout = runner.device, runner.layout
    results = make_results(settings, target, output.stem, samples, scored, skipped, header["files"], device, layout)
    if settings.server is not None:
        results = results.model_copy(update={"notes": server_notes(scored, runner.model.traffic)})
    _write(output, results, scored)
    return results


def _check_tokenizer(settings: LongContextSettings, target: Target, tokenizer: Tokenizer) -> None:
    """Raise UserError if `--tokenizer` gives a model other tokens than its own tokenizer does."""
    if settings.tokenizer is None or target.path is None:
        return
    if not has_tokenizer(target.path):
        if os.environ.get("RANK", "0") == "0":
            note = f"note: {target.path} has no tokenizer files; that --tokenizer is its own could not be checked"
            tqdm.write(note, file=sys.stderr)
        return
    own = load_tokenizer(target.path)
    shared = min(own.vocab_size, tokenizer.vocab_size)
    if own.fingerprint != tokenizer.fingerprint and not same_tokens(own, tokenizer, shared - 1):
        raise UserError(
            f"--tokenizer {settings.tokenizer}: its tokens are not those of the model {target.path}; leave it out, and "
            "the model's own tokenizer is used"
        )


def _output(settings: LongContextSettings, target: Target) -> Path:
    output = settings.output or target.default_output(settings.name)
    if output is None:
        raise UserError("--output: needed for a model that belongs to no run, such as --output results/base.json")
    check_writable(output.parent, "--output")
    if output.exists():
        try:
            read_long_context(output)
        except UserError as error:
            raise UserError(f"{error}; it would be lost, set --output or --name") from None
    return output


def _refuse_ranks(settings: LongContextSettings, target: Target) -> None:
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise UserError(f"torchrun started several processes, but backend {target.backend} runs in one; start it alone")
    if settings.parallel_sizes:
        raise UserError(
            f"{', '.join(map(flag, settings.parallel_sizes))}: backend {target.backend} runs in one process; leave out "
            "such options, or start with torchrun"
        )


@dataclass(frozen=True)
class _Runner:
    """A loaded model and where it runs."""

    model: Model
    device: str
    """Name of the GPU, cpu, or server."""
    layout: dict[str, int] = field(default_factory=dict)
    """Parallel sizes, empty where there are none."""


@contextmanager
def _load(settings: LongContextSettings, target: Target, tokenizer: Tokenizer) -> Iterator[_Runner]:
    """The model; for a Megatron model the process groups exist until the block ends."""
    if target.path is None:
        yield _Runner(_server(settings), "server")
        return
    dtype = stored_dtype(target.path) if settings.dtype == "auto" else settings.dtype
    if target.backend == "transformers":
        from megatron_solopo.generate.transformers import TransformersModel

        device = torch.device("cpu" if is_cpu() else "cuda")
        yield _Runner(TransformersModel(target.path, tokenizer, device, dtype), _described(device))
        return
    from megatron_solopo.evaluate.megatron_model import MegatronModel
    from megatron_solopo.parallel import topology as process_groups

    parallel = ParallelConfig(
        **settings.parallel_sizes,
        # Positions come one at a time: there is nothing to shard.
        sequence_parallel=False,
    )
    topology = process_groups.initialize(parallel, seed=1)
    try:
        layout = {
            "tensor_model_parallel_size": topology.tensor_group.size(),
            "pipeline_model_parallel_size": topology.pipeline_group.size(),
            "data_parallel_size": topology.data_group.size(),
            **parallel.expert_sizes,
        }
        model = MegatronModel(target.path, tokenizer, dtype, parallel, topology)
        yield _Runner(model, _described(topology.device), layout)
    finally:
        process_groups.destroy(topology)


def _server(settings: LongContextSettings) -> Model:
    from megatron_solopo.generate.server import OpenAIServer

    return OpenAIServer(settings, settings.model, own_tokenizer=True)


def _described(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def _answer(
    settings: LongContextSettings,
    target: Target,
    output: Path,
    samples: SampleSet,
    tokenizer: Tokenizer,
    model: Model,
) -> Path | None:
    """The complete journal. A sample that cannot be made, or that a server refuses, has no answer in it.

    Returns None on every rank except the one that writes.
    """
    path = output.with_suffix(".responses.jsonl")
    journals: list[Journal] = []

    def begin() -> set[str]:
        """On rank 0: open the journal; returns the ids of the samples that have no answer."""
        if settings.overwrite:
            remove(path)
        header, kept = journal_header(settings, target, tokenizer), read_header(path) if path.is_file() else None
        if kept is not None and tokenizer.has_fingerprint(stated := kept.get("tokenizer", "")):
            header["tokenizer"] = stated
        journals.append(Journal(path, header, _COMMAND, settings.retry_refused))
        return {spec.id for spec in samples.specs if not journals[0].done(spec.id)}

    unanswered = on_rank_0(begin) if dist.is_initialized() else begin()
    missing = [spec for spec in samples.specs if spec.id in unanswered]
    if not journals:
        batches = batched(missing, settings.batch_size)
        model.answer(batches, samples.build, lambda *answered: None, lambda *refused: None)
        return None
    # Prompts of a server's requests are made in another thread, and a tokenizer is for one thread.
    counting = tokenizer if target.path is not None else load_tokenizer(settings.tokenizer or "")
    if settings.server is not None:
        # A server that has no room for the longest prompts, or cuts them, tells so with the first replies.
        missing.sort(key=lambda spec: -spec.prompt_tokens)
    with journals[0] as journal, closing(tqdm(total=len(missing), desc="Evaluating", **bar_style("samples"))) as bar:
        refusals = Refusals(journal, settings, len(samples.specs))

        def keep(request: Request, answers: Sequence[Answer], seconds: float) -> None:
            (answer,) = answers
            journal.append([_stored(request, answer, seconds, counting)])
            bar.update()

        model.answer(batched(missing, settings.batch_size), samples.build, keep, refusals)
        refusals.settle()
    return path


def _stored(request: Request, answer: Answer, seconds: float, tokenizer: Tokenizer) -> EvaluatedResponse:
    # Not every server counts tokens. Without its count, the end token is not counted.
    generated = (answer.reasoning or "") + answer.text
    tokens = answer.tokens if answer.tokens is not None else len(tokenizer.encode_continuation(generated))
    return EvaluatedResponse(
        question_id=request.question_id,
        index=0,
        text=answer.text,
        finish_reason=answer.finish_reason,
        reasoning=answer.reasoning,
        prompt_tokens=answer.prompt_tokens,
        answers=list(request.right_answers),
        tokens=tokens,
        seconds=seconds,
    )


def batched(specs: Iterable[SampleSpec], size: int) -> list[list[SampleSpec]]:
    """Batches of up to `size` neighbours with equally long prompts and answers, which need no padding."""
    batches: list[list[SampleSpec]] = []
    for spec in specs:
        last = batches[-1] if batches else []
        like = last and (last[0].prompt_tokens, last[0].max_new_tokens) == (spec.prompt_tokens, spec.max_new_tokens)
        if like and len(last) < size:
            last.append(spec)
        else:
            batches.append([spec])
    return batches


def _write(output: Path, results: LongContextResults, scored: Sequence[ScoredResponse]) -> None:
    """Write all files; the file of results last, since it tells that the others are there."""
    from megatron_solopo.report.evaluation_pictures import draw_answers

    with atomic_path(output.with_suffix(".predictions.jsonl")) as temporary, temporary.open("w", encoding="utf-8") as f:
        f.writelines(json.dumps(_prediction(each), ensure_ascii=False, allow_nan=False) + "\n" for each in scored)
    draw_answers(results, output.with_suffix(".length.png"), output.with_suffix(".depth.png"))
    results.write(output)


def _prediction(scored: ScoredResponse) -> dict[str, Any]:
    spec, response = scored.spec, scored.response
    return {
        "id": spec.id,
        "task": spec.task,
        "length": spec.length,
        "depth": spec.depth,
        "prompt_tokens": spec.prompt_tokens,
        "answers": response.answers,
        "prediction": response.text,
        "reasoning": response.reasoning,
        "finish_reason": response.finish_reason,
        "generated_tokens": response.tokens,
        "seconds": response.seconds,
        "marker_found": scored.marker_found,
        "scores": scored.scores,
    }
