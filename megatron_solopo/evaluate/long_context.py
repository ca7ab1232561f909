"""A whole evaluation: what is asked, answers from a model (kept as they come), scores, table, pictures.

<name>.json               results, see `evaluation_results`
<name>.responses.jsonl    the journal of answers, from which an interrupted evaluation goes on
<name>.predictions.jsonl  every sample with its answer and scores
<name>.length.png         score against length; <name>.depth.png, a heat map of length and depth
"""

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch.distributed as dist
from tqdm import tqdm

from megatron_solopo.config import ParallelConfig
from megatron_solopo.data.tokenizer import Tokenizer, load_tokenizer
from megatron_solopo.errors import UserError
from megatron_solopo.evaluate.generation import Generated, Generator, batched
from megatron_solopo.evaluate.sample_plan import Plan, identity, make_plan
from megatron_solopo.evaluate.samples import Spec
from megatron_solopo.evaluate.scores import Scored, make_results, score
from megatron_solopo.evaluate.settings import LongContextSettings
from megatron_solopo.evaluate.target import Target, resolve, stored_dtype
from megatron_solopo.files import atomic_path, check_writable, read_jsonl, remove
from megatron_solopo.generate.journal import Journal
from megatron_solopo.generate.scoring import Score
from megatron_solopo.progress import bar_style
from megatron_solopo.results.long_context import LongContextResults, read_long_context

_COMMAND = "evaluate long-context"


def evaluate_long_context(settings: LongContextSettings) -> LongContextResults | None:
    """Evaluate one model, on all ranks together; the results on rank 0, None on the others.

    Raises UserError for settings, files or a model that do not fit; answers that came before stay.
    """
    settings.check()
    target = Target(None, "server") if settings.server else resolve(settings.model, settings.backend)
    output = _output(settings, target)
    if target.backend != "megatron" and os.environ.get("WORLD_SIZE", "1") != "1":
        raise UserError(f"torchrun started several processes, but backend {target.backend} runs in one; start it alone")
    if target.backend != "megatron" and settings.model_ranks != 1:
        raise UserError(
            f"--tensor-model-parallel-size and --pipeline-model-parallel-size: backend {target.backend} runs in one "
            "process; leave them out, or start with torchrun"
        )
    tokenizer = load_tokenizer(settings.tokenizer or target.path or "")
    plan = make_plan(settings, target, tokenizer)
    if target.backend != "megatron":
        return _evaluate(settings, target, output, plan, tokenizer, _one_process_model(settings, target, tokenizer))
    from megatron_solopo.evaluate.megatron_model import MegatronModel
    from megatron_solopo.parallel import topology as process_groups

    assert target.path is not None
    parallel = ParallelConfig(
        tensor_model_parallel_size=settings.tensor_model_parallel_size,
        pipeline_model_parallel_size=settings.pipeline_model_parallel_size,
        # Positions come one at a time: there is nothing to shard.
        sequence_parallel=False,
    )
    topology = process_groups.initialize(parallel, seed=1)
    try:
        model = MegatronModel(target.path, tokenizer, _dtype(settings, target.path), parallel, topology)
        return _evaluate(settings, target, output, plan, tokenizer, model)
    finally:
        process_groups.destroy(topology)


def _output(settings: LongContextSettings, target: Target) -> Path:
    output = settings.output or target.output("long_context", settings.name)
    if output is None:
        raise UserError("--output: needed for a model that belongs to no run, such as --output results/base.json")
    check_writable(output.parent, "--output")
    if output.exists():
        try:
            read_long_context(output)
        except ValueError as error:
            raise UserError(f"{error}; it would be lost, set --output or --name") from None
    return output


def _dtype(settings: LongContextSettings, path: Path) -> str:
    return stored_dtype(path) if settings.dtype == "auto" else settings.dtype


def _one_process_model(settings: LongContextSettings, target: Target, tokenizer: Tokenizer) -> Generator:
    if target.path is not None:
        from megatron_solopo.evaluate.transformers_model import TransformersModel

        return TransformersModel(target.path, tokenizer, _dtype(settings, target.path))
    from megatron_solopo.evaluate.server_model import ServerModel, greedy_settings

    return ServerModel(greedy_settings(settings), tokenizer)


def _evaluate(
    settings: LongContextSettings, target: Target, output: Path, plan: Plan, tokenizer: Tokenizer, model: Generator
) -> LongContextResults | None:
    answers = _generate(settings, target, output, plan, tokenizer, model)
    if answers is None:
        return None
    marker = settings.answer_marker if settings.scored_text == "final" else None
    answered = [spec for spec in plan.specs if spec.id in answers]
    scored = [score(spec, answers[spec.id], plan.metrics[spec.task], marker) for spec in answered]
    skipped = [*plan.skipped, *plan.unfit(spec for spec in plan.specs if spec.id not in answers)]
    results = make_results(settings, target, output.stem, plan.metrics, plan.max_positions, scored, skipped, model)
    _write(output, results, scored)
    return results


def _generate(
    settings: LongContextSettings, target: Target, output: Path, plan: Plan, tokenizer: Tokenizer, model: Generator
) -> dict[str, Generated] | None:
    """Answers by their samples, from the journal or new, all but of samples that cannot be made.

    None but on the rank that writes.
    """
    path = output.with_suffix(".responses.jsonl")
    if int(os.environ.get("RANK", "0")):
        model.run(batched(_agreed(plan.specs, None), settings.batch_size), plan.build, lambda answers: None)
        return None
    if settings.overwrite:
        remove(path)
    with Journal(path, identity(settings, target, tokenizer), _COMMAND) as journal:
        missing = _agreed(plan.specs, {spec.id for spec in plan.specs if not journal.received[spec.id]})
        with closing(tqdm(total=len(missing), desc="Evaluating", **bar_style("samples"))) as bar:

            def keep(answers: Sequence[Generated]) -> None:
                journal.append(answers)
                bar.update(len(answers))

            model.run(batched(missing, settings.batch_size), plan.build, keep)
    return {each.question_id: each for each in map(Generated.model_validate, read_jsonl(path)[1:])}


def _agreed(specs: Sequence[Spec], missing: set[str] | None) -> list[Spec]:
    """The samples without an answer; rank 0 looks and tells the others."""
    told: list[Any] = [missing]
    if dist.is_initialized():
        dist.broadcast_object_list(told, src=0)
    return [spec for spec in specs if spec.id in told[0]]


def _write(output: Path, results: LongContextResults, scored: Sequence[Scored]) -> None:
    from megatron_solopo.report.evaluation_pictures import draw_answers

    with atomic_path(output.with_suffix(".predictions.jsonl")) as temporary, temporary.open("w", encoding="utf-8") as f:
        f.writelines(json.dumps(_prediction(each), ensure_ascii=False) + "\n" for each in scored)
    draw_answers(results, output.with_suffix(".length.png"), output.with_suffix(".depth.png"))
    results.write(output)


def _prediction(scored: Scored) -> Mapping[str, Any]:
    spec, generated = scored.spec, scored.generated
    scores: dict[Score, float] = scored.scores
    return {
        "id": spec.id,
        "task": spec.task,
        "length": spec.length,
        "depth": spec.depth,
        "prompt_tokens": spec.prompt_tokens,
        "answers": generated.answers,
        "prediction": generated.text,
        "finish_reason": generated.finish_reason,
        "generated_tokens": generated.tokens,
        "seconds": generated.seconds,
        "marker_found": scored.marked,
        "scores": scores,
    }
