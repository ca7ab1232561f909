"""The loop that the README shows, against our own trainer: the same losses and gradient norms."""

import json
import runpy
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from megatron_solopo import checksums
from megatron_solopo.architecture.model_directory import ADAPTER_BASE, HUGGINGFACE_FOLDER
from megatron_solopo.checkpoint.conversion import export_adapter
from megatron_solopo.checkpoint.fingerprint import weights_fingerprint
from megatron_solopo.checkpoint.load import load_weights
from megatron_solopo.checkpoint.model_files import write_files
from megatron_solopo.checkpoint.peft_directory import ADAPTER_WEIGHTS
from megatron_solopo.config import Config
from megatron_solopo.data.loader import GlobalBatch, GlobalBatchLoader
from megatron_solopo.errors import UserError
from megatron_solopo.integrations import PreferenceTask
from megatron_solopo.model import routing
from megatron_solopo.model.adapters import begin_dropout
from megatron_solopo.model.build import build_model
from megatron_solopo.model.head import ResponseModel
from megatron_solopo.parallel.agreement import on_rank_0
from megatron_solopo.train.step import logprob_report, run_schedule
from megatron_solopo.train.trainer import precompute_reference, train
from tests.distributed import run_distributed
from tests.integrations.megatron_runs import BATCH, STEPS, config, recorded, with_experts
from tests.ranks import layout
from tests.tiny_models import make_model
from tests.train.runs import make_inputs

pytestmark = pytest.mark.parity

EXAMPLE = Path(__file__).parents[2] / "examples" / "megatron_lm" / "own_loop.py"
LAYOUTS: dict[str, dict[str, Any]] = {
    "tp2": {"tensor_model_parallel_size": 2},
    "pp2": {"pipeline_model_parallel_size": 2},
    "cp2": {"context_parallel_size": 2},
    "dp2": {},
}
CONSTANT = {"lr": 1e-3, "lr_decay_style": "constant"}
EP2 = {"expert_model_parallel_size": 2}
# The same with experts.
EXPERTS: dict[str, dict[str, Any]] = {
    "ep2": EP2,
    "ep2-tp2": EP2 | {"tensor_model_parallel_size": 2, "expert_tensor_parallel_size": 1},
}
LAYERS_WITH_EXPERTS = 2
# Layouts that also train adapters.
ADAPTERS = ("tp2", "pp2")
LORA = {"rank": 4, "alpha": 8.0, "dropout": 0.3}


def run_all(folder: Path) -> dict[str, Any]:
    """Both trainers on every rank, and evaluation beside training steps."""
    precompute_reference(config(folder, "unused", {}), overwrite=False)
    example = runpy.run_path(str(EXAMPLE))
    found: dict[str, Any] = {}
    for name, parallel in LAYOUTS.items():
        settings = config(folder, name, parallel, optimizer=CONSTANT)
        train(settings)
        found[name] = example["train"](settings)
        parallel_state.destroy_model_parallel()
    found |= run_with_adapters(folder, example["train"])
    found["files read"] = files_read(folder)
    sections = with_experts(folder) | {"optimizer": CONSTANT}
    precompute_reference(config(folder, "unused", EP2, **sections), overwrite=False)
    example["train"].__globals__["build_model"] = model_with_experts  # the example's has none
    for name, parallel in EXPERTS.items():
        settings = config(folder, name, parallel, **sections)
        train(settings)
        found[name] = example["train"](settings)
        parallel_state.destroy_model_parallel()
    for name, moe in {"own": {}, "replayed": {"replay": "short"}}.items():
        reference = sections["reference"] | {"cache": folder / f"reference-{name}"}
        settings = config(folder, "unused", EP2, **sections | {"moe": moe, "reference": reference})
        precompute_reference(settings, overwrite=False)
        found[f"routes {name}"] = routes_beside_evaluation(settings)
    return found


def run_with_adapters(folder: Path, train_in_loop: Any) -> dict[str, Any]:
    """Both trainers. Then the loop's model is saved as it is, with our files beside it.

    The loop seeds the masks of dropout as ours does, so both drop the same numbers.
    """
    found: dict[str, Any] = {}
    prepare, kept = PreferenceTask.prepare_model, []

    def spy(task: PreferenceTask, model: Any) -> Any:
        kept.append((task, prepare(task, model)))
        return model

    read = GlobalBatchLoader.next_batch

    def seed_and_read(loader: GlobalBatchLoader) -> GlobalBatch:
        begin_dropout(settings.seed, loader.consumed_triplets // BATCH + 1)
        return read(loader)

    for name in ADAPTERS:
        settings = config(folder, f"lora-{name}", LAYOUTS[name], lora=LORA, optimizer=CONSTANT | {"lr": 1e-2})
        train(settings)
        with (
            mock.patch.object(PreferenceTask, "prepare_model", spy),
            mock.patch.object(GlobalBatchLoader, "next_batch", seed_and_read),
        ):
            found[f"lora-{name}"] = train_in_loop(settings)
        task, model = kept.pop()
        checkpoint = folder / f"lora-{name}-loop"
        if torch.distributed.get_rank() == 0:
            write_files(task.model_files(), checkpoint / HUGGINGFACE_FOLDER)
        torch.distributed.barrier()
        dist_checkpointing.save({"model": model.sharded_state_dict()}, str(checkpoint))
        parallel_state.destroy_model_parallel()
    return found


def files_read(folder: Path) -> tuple[int, int]:
    """Files of weights that this rank reads for the checksum of the adapters' base: by the task, and afterwards."""
    objective = {"loss_type": "simpo"}  # without a reference, which would need the checksum too
    settings = config(folder, "unused", {}, model={"path": folder / "shards"}, lora=LORA, objective=objective)
    with layout(), mock.patch.object(checksums, "_read_file", wraps=checksums._read_file) as reading:
        task = PreferenceTask(settings)
        by_task = reading.call_count
        base = json.loads(task.model_files()[ADAPTER_BASE])["weights_fingerprint"]
        assert base == on_rank_0(lambda: weights_fingerprint(folder / "shards"))
    return by_task, reading.call_count - by_task


def routes_beside_evaluation(settings: Config) -> dict[str, Any]:
    """Metrics of a training step alone, after evaluation, and of evaluation; exchanges of routes per pack and layer."""
    with layout(**EP2) as groups:
        task = PreferenceTask(settings)
        model = task.prepare_model(model_with_experts(settings, task))
        load_weights([model], task.architecture, settings.model.path)
        trained, held_out = task.batches().next_batch(), task.batches("eval", global_batch_size=2).next_batch()

        def reports(batch: GlobalBatch, split: str) -> Any:
            return get_forward_backward_func()(
                forward_step_func=lambda iterator, model: task.forward(next(iterator), model, split),
                data_iterator=iter(batch.packs), model=model, num_microbatches=len(batch.packs),
                seq_length=1, micro_batch_size=1, forward_only=True,
            )  # fmt: skip

        alone = task.mean_metrics(of_step := reports(trained, "train"), trained.num_triplets)
        with mock.patch.object(routing, "_sum_over_shards", wraps=routing._sum_over_shards) as exchange:
            evaluation = task.mean_metrics(reports(held_out, "eval"), held_out.num_triplets)
            in_loop = exchange.call_count
            run_schedule([model], held_out.packs, logprob_report(groups), groups, forward_only=True)
            in_trainer = exchange.call_count - in_loop
        after = task.mean_metrics(reports(trained, "train"), trained.num_triplets)
        uncounted = PreferenceTask(settings, counts_routes=False).mean_metrics(of_step, trained.num_triplets)
        exchanges = [count / len(held_out.packs) / LAYERS_WITH_EXPERTS for count in (in_loop, in_trainer)]
    return {"alone": alone, "after": after, "evaluation": evaluation, "uncounted": uncounted, "exchanges": exchanges}


def model_with_experts(settings: Config, task: PreferenceTask) -> ResponseModel:
    (model,) = build_model(task.model, chunk_tokens=settings.logprob.chunk_tokens, device=task.topology.device)
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = make_inputs(tmp_path_factory.mktemp("own_loop"), rows=12, eval_count=2)
    AutoModelForCausalLM.from_pretrained(path / "model").save_pretrained(path / "shards", max_shard_size="20KB")
    make_model(path / "moe", "qwen2_moe", seed=0)
    make_model(path / "reference_moe", "qwen2_moe", seed=1)
    return path


@pytest.fixture(scope="module")
def found(folder: Path) -> list[dict[str, Any]]:
    """By rank: metrics are the same on all of them."""
    return run_distributed(run_all, 2, folder)


@pytest.mark.parametrize("name", [*LAYOUTS, *EXPERTS, *(f"lora-{name}" for name in ADAPTERS)])
def test_it_gives_our_trainers_losses_and_gradient_norms_on_every_rank(found: Any, folder: Path, name: str) -> None:
    ours = recorded(folder, name)
    assert len(ours) == STEPS
    for rank in found:
        for mine, theirs in zip(ours, rank[name], strict=True):
            assert theirs == pytest.approx({key: mine[key] for key in theirs}, rel=1e-6)
            assert ("moe/route_agreement" in theirs) == (name in EXPERTS)


@pytest.mark.usefixtures("found")
@pytest.mark.parametrize("name", ADAPTERS)
def test_adapters_in_a_checkpoint_of_the_loop_are_exported(folder: Path, name: str) -> None:
    exported = []
    for kind, checkpoint in (("loop", f"lora-{name}-loop"), ("ours", f"lora-{name}/checkpoints/iter_{STEPS:07d}")):
        export_adapter(folder / checkpoint, folder / f"{kind}-{name}", dtype=None)
        exported.append(load_file(folder / f"{kind}-{name}" / ADAPTER_WEIGHTS))
    torch.testing.assert_close(exported[0], exported[1], rtol=1e-4, atol=1e-6)
    assert any(value.any() for key, value in exported[0].items() if "lora_B" in key)


def test_ranks_share_the_reading_of_the_adapters_base(found: Any) -> None:
    (one, again), (other, other_again) = (rank["files read"] for rank in found)
    assert min(one, other) > 0 and again == other_again == 0


@pytest.mark.parametrize("name", ["own", "replayed"])
def test_metrics_of_routes_are_those_of_training_packs_alone(found: Any, name: str) -> None:
    for rank in found:
        routes = rank[f"routes {name}"]
        assert routes["after"] == routes["alone"]
        without = {key: value for key, value in routes["alone"].items() if not key.startswith("moe/")}
        assert len(without) == len(routes["alone"]) - 3
        assert routes["uncounted"] == without
        assert routes["evaluation"].keys() == without.keys()
        # The routes that are replayed; none is counted.
        assert routes["exchanges"] == [int(name == "replayed")] * 2


def test_it_needs_process_groups(folder: Path) -> None:
    with pytest.raises(UserError, match=r"no process groups yet: call .* initialize_model_parallel first"):
        PreferenceTask(config(folder, "unused", {}))


def test_groups_of_other_sizes_than_the_configuration_has_are_refused_by_name(folder: Path) -> None:
    sizes = ("tensor_model", "pipeline_model", "context", "expert_model")
    settings = config(folder, "unused", {f"{size}_parallel_size": 2 for size in sizes})
    with layout(), pytest.raises(UserError) as error:
        PreferenceTask(settings)
    for size in (*sizes, "expert_tensor"):
        assert f"parallel.{size}_parallel_size=2, but the loop made 1" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_reference_cache_that_is_not_there_is_refused_by_name(folder: Path) -> None:
    settings = config(folder, "unused", {}, reference={"cache": folder / "nowhere"})
    with layout(), pytest.raises(UserError, match=r"nowhere: no cached reference log-probs; .*set reference.cache"):
        PreferenceTask(settings)


def test_without_a_reference_model_no_cache_is_needed(folder: Path) -> None:
    settings = config(folder, "unused", {}, reference={"cache": folder / "nowhere"}, objective={"loss_type": "simpo"})
    with layout() as groups:
        task = PreferenceTask(settings)
        assert task.topology == replace(groups, owns_world=False)
        assert task.batches(global_batch_size=2).next_batch().num_triplets == 2
