"""What the installed Megatron really has, entry by entry of `parallel/megatron_internals.py`.

A failure here says that Megatron has changed what the entry relies on, or has mended what the entry works around.
"""

import inspect
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.optimizer import OptimizerConfig
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.moe.router_replay import RouterReplay
from torch.distributed.checkpoint import default_planner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import SavePlan

from megatron_solopo.config import ParallelConfig
from megatron_solopo.parallel import megatron_internals as internals
from megatron_solopo.parallel import topology
from tests.ranks import layout

pytestmark = pytest.mark.parity

SHARDING = {"distrib_optim_sharding_type": "fully_reshardable"}
IS_0_16 = sys.version_info < (3, 12)


@pytest.fixture
def group() -> Iterator[Any]:
    with layout() as groups:
        yield groups.data_group


def make_model(**changes: Any) -> GPTModel:
    """Two layers of width 20: few weights have a multiple of 128 numbers, which buckets are padded to."""
    sizes = {"num_layers": 2, "hidden_size": 20, "num_attention_heads": 2, "normalization": "RMSNorm"}
    sizes |= {"hidden_dropout": 0.0, "attention_dropout": 0.0}
    config = TransformerConfig(**sizes, use_cpu_initialization=True, add_bias_linear=False, **changes)
    spec = get_gpt_layer_local_spec(normalization="RMSNorm")
    return GPTModel(config, spec, vocab_size=40, max_sequence_length=16, position_embedding_type="rope")


def make_optimizer(model: GPTModel, bucket_size: int | None = None) -> tuple[DistributedDataParallel, Any]:
    """Megatron's sharded Adam; its buffer has one bucket, or one for every `bucket_size` numbers."""
    config = DistributedDataParallelConfig(
        use_distributed_optimizer=True, overlap_grad_reduce=bucket_size is not None, bucket_size=bucket_size
    )
    chunk = DistributedDataParallel(model.config, config, model)
    return chunk, internals.make_optimizer(OptimizerConfig(lr=0.1, use_distributed_optimizer=True), [chunk])


class Doubled(internals.OutputOverride):
    """Returns twice the hidden states, where it is told so by a packing that is no packing."""

    def overrides(self, packed_seq_params: Any) -> bool:
        return packed_seq_params == "double"

    def override(self, hidden_states: torch.Tensor, packed_seq_params: Any) -> torch.Tensor:
        return 2 * hidden_states


def test_a_model_that_exists_returns_another_output(group: Any) -> None:
    model = make_model()
    names = list(model.state_dict())
    tokens, positions = torch.arange(6)[None], torch.arange(6)[None]
    mask = torch.ones(1, 1, 6, 6, dtype=torch.bool).triu(diagonal=1)
    logits = model(tokens, positions, mask)
    internals.add_base_class(model, Doubled)
    assert isinstance(model, GPTModel) and list(model.state_dict()) == names
    assert torch.equal(model(tokens, positions, mask), logits)
    hidden = torch.randn(6, 1, 20)
    assert torch.equal(model._postprocess(hidden, *[None] * 6, packed_seq_params="double"), 2 * hidden)
    model.post_process = False
    assert model._postprocess(hidden, *[None] * 6, packed_seq_params="double") is hidden


def test_the_model_calls_postprocess_with_the_packing_by_name() -> None:
    parameters = inspect.signature(GPTModel._postprocess).parameters
    assert list(parameters)[:3] == ["self", "hidden_states", "input_ids"] and "packed_seq_params" in parameters
    assert ("output_processor" in inspect.signature(GPTModel.forward).parameters) is not IS_0_16


def test_the_rotary_embedding_uses_the_frequencies_that_it_is_given(group: Any) -> None:
    model = make_model()
    frequencies = torch.linspace(0.1, 0.6, len(model.rotary_pos_emb.inv_freq))
    internals.set_rotary_frequencies(model, frequencies)
    angles = model.rotary_pos_emb(4)[:, 0, 0]
    torch.testing.assert_close(angles[3, : len(frequencies)], 3 * frequencies)


@pytest.mark.parametrize("interleaved", [False, True])
def test_megatron_takes_the_pipeline_settings(interleaved: bool) -> None:
    settings = internals.pipeline_settings(interleaved=interleaved)
    stages = {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2 if interleaved else None}
    sizes = {"num_layers": 4, "hidden_size": 8, "num_attention_heads": 2, "pipeline_dtype": torch.float32}
    config = TransformerConfig(**sizes, **stages, **settings)
    assert {name: getattr(config, name) for name in settings} == settings
    with pytest.raises(ValueError, match="alltoall"):
        TransformerConfig(**sizes, **stages, **settings | {"moe_token_dispatcher_type": "allgather"})


def test_a_router_takes_the_experts_that_are_replayed(group: Any) -> None:
    """Its own logits weigh them, and it chooses itself again afterwards. Megatron's list of all stays as it was."""
    sizes = {"num_layers": 1, "hidden_size": 8, "num_attention_heads": 2}
    config = TransformerConfig(
        **sizes,
        num_moe_experts=4,
        moe_router_topk=2,
        moe_router_load_balancing_type="none",
        moe_router_pre_softmax=True,
    )
    router = TopKRouter(config, ProcessGroupCollection.use_mpu_process_groups())
    known = list(RouterReplay.global_router_replay_instances)
    internals.allow_replay(router)
    assert config.moe_enable_routing_replay and RouterReplay.global_router_replay_instances == known
    logits = torch.tensor([[[4.0, 3.0, 2.0, 1.0]]], requires_grad=True)
    with internals.replayed(router, torch.tensor([[3, 0]])):
        probabilities, chosen = router.routing(logits)
    assert chosen.tolist() == [[True, False, False, True]]
    torch.testing.assert_close(probabilities, logits.softmax(dim=-1)[0] * chosen)
    assert router.routing(logits)[1].tolist() == [[True, True, False, False]]


@pytest.mark.parametrize("kind", ["alltoall", "flex"])
def test_megatron_takes_the_dispatchers_settings(kind: Any) -> None:
    sizes = {"num_layers": 4, "hidden_size": 8, "num_attention_heads": 2, "variable_seq_lengths": True}
    settings = internals.dispatcher_settings(kind)
    config = TransformerConfig(**sizes, num_moe_experts=2, **settings)
    assert {name: getattr(config, name) for name in settings} == settings
    assert config.moe_token_dispatcher_type == kind


def test_the_cache_advances() -> None:
    context = StaticInferenceContext(1, 16)
    assert context.sequence_len_offset == 0 and not context.is_decode_only()
    internals.advance_cache(context, 5)
    assert context.sequence_len_offset == 5 and context.is_decode_only()


def test_fp8_parameters_wait_for_the_version_that_dequantizes_them() -> None:
    source = inspect.getsource(filesystem_async)
    assert ("dequantize" in source) is (internals.installed_version() >= internals.FP8_PARAMETERS_SINCE)


class QuantizedParameter(torch.nn.Parameter):
    """A weight as Transformer Engine makes it: coarse values, and the exact ones until somebody asks for them."""

    _quantizer = SimpleNamespace()  # of a recipe without scales of its own

    def get_high_precision_init_val(self) -> torch.Tensor:
        return self._high_precision_init_val


def test_an_fp8_parameter_keeps_the_exact_value_for_its_master_weight() -> None:
    parameter = QuantizedParameter(torch.zeros(3, dtype=torch.float8_e4m3fn), requires_grad=False)
    parameter._high_precision_init_val = torch.zeros(3, dtype=torch.bfloat16)
    value = torch.tensor([1.0, 1.01171875, -3.03125], dtype=torch.bfloat16)
    internals.assign(parameter, value)
    assert torch.equal(parameter.get_high_precision_init_val(), value)
    assert not torch.equal(parameter.detach().to(torch.bfloat16), value)  # or the test would show nothing
    assert "get_high_precision_init_val" in inspect.getsource(sys.modules[DistributedOptimizer.__module__])


def test_a_plain_parameter_takes_the_value_in_its_precision() -> None:
    parameter = torch.nn.Parameter(torch.zeros(2, dtype=torch.bfloat16))
    internals.assign(parameter, torch.tensor([1.0, 1.001]))
    assert parameter.tolist() == [1.0, 1.0] and not hasattr(parameter, "_high_precision_init_val")


@pytest.mark.parametrize("bucket_size", [None, 1000])
def test_every_part_of_a_parameter_has_its_own_state(group: Any, bucket_size: int | None) -> None:
    """On one rank a part is the whole, also behind the padding of a bucket."""
    model = make_model()
    chunk, optimizer = make_optimizer(model, bucket_size)
    part = internals.optimizer_parts(optimizer)[0]
    assert isinstance(part, DistributedOptimizer)
    (buffer,) = internals.gradient_buffers(chunk)
    assert (len(buffer.buckets) > 2) is (bucket_size is not None)
    assert buffer.grad_data.numel() == buffer.param_data.numel() >= sum(p.numel() for p in model.parameters())
    internals.initialize_adam_state(optimizer)
    found = {owned.parameter: owned for owned in internals.owned_states(part)}
    assert set(found) == set(model.parameters())
    for parameter, owned in found.items():
        assert owned.edges == (0, parameter.numel()) and tuple(owned.tensors) == internals.STATE_NAMES
        assert torch.equal(owned.tensors["param"], parameter.detach().flatten())
        owned.tensors["exp_avg"].fill_(1.5)  # in place
    assert all(float(state["exp_avg"].min()) == 1.5 for state in part.optimizer.state.values())


def test_megatron_gives_all_parameters_one_count_of_steps(group: Any) -> None:
    """And `load_counts` gives each its own."""
    _, optimizer = make_optimizer(make_model())
    part = internals.optimizer_parts(optimizer)[0]
    internals.initialize_adam_state(optimizer)
    part.load_state_dict(part.state_dict())
    counts = [state["step"] for state in part.optimizer.state.values()]
    assert len({count.data_ptr() for count in counts}) == 1 < len(counts)
    internals.load_counts(part, part.state_dict())
    counts = [state["step"] for state in part.optimizer.state.values()]
    assert len({count.data_ptr() for count in counts}) == len(counts)


def test_megatron_makes_no_count_of_steps_for_torchs_adam(group: Any) -> None:
    _, optimizer = make_optimizer(make_model())
    part = internals.optimizer_parts(optimizer)[0]
    part.init_state_fn(part.optimizer, part.config)
    assert all("step" not in state for state in part.optimizer.state.values())
    internals.initialize_adam_state(optimizer)
    assert all("step" in state for state in part.optimizer.state.values())


def hybrid() -> HybridDeviceOptimizer:
    """Megatron's optimizer of parameters on two devices, with all of them on the CPU."""
    parameter = torch.nn.Parameter(torch.ones(4))
    adam = {"cpu_optimizer_cls": torch.optim.AdamW, "gpu_optimizer_cls": torch.optim.AdamW}
    return HybridDeviceOptimizer([parameter], **adam, overlap_cpu_optimizer_d2h_h2d=False, lr=0.1)


def test_a_hybrid_optimizer_makes_its_state_by_a_step_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer = hybrid()
    taken: list[bool] = []
    monkeypatch.setattr(optimizer, "dummy_step", lambda: taken.append(True))  # the real one takes parameters on a GPU
    internals.initialize_adam_state(SimpleNamespace(optimizer=optimizer, config=None))
    assert taken


def test_the_hybrid_optimizers_state_is_read_in_full_precision_and_handed_out() -> None:
    optimizer = hybrid()
    (parameter,) = optimizer.param_groups[0]["params"]
    part = SimpleNamespace(optimizer=optimizer, load_state_dict=lambda state: None)
    optimizer.state[parameter] = {"exp_avg": torch.zeros(4, dtype=torch.bfloat16), "step": torch.tensor(3.0)}
    internals.load_counts(part, {})
    held = optimizer.state[parameter]
    assert held["exp_avg"].dtype is torch.float32 and held["exp_avg"].shape == (4,) and held["step"] == 3
    held["exp_avg"].fill_(1.001)
    optimizer.param_groups[0]["step"] = 7  # would stand still, and be copied over the counts of those inside
    internals.hand_out_state(part)
    assert all("step" not in group for group in optimizer.param_groups)
    (inside,) = optimizer.sub_optimizers
    (state,) = inside.state.values()
    assert torch.equal(state["exp_avg"], torch.full((4,), 1.001)) and state["step"] == 3


def test_a_plan_is_written_by_this_process_and_read_by_megatron(group: Any, tmp_path: Path) -> None:
    model = make_model()
    state = {"model": model.sharded_state_dict(metadata=SHARDING)}
    files = internals.ShardedFiles(state, tmp_path, {}, internals.SavePlans(2))
    files.stage()
    wanted = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    results = [found for number in range(len(files.names)) for found in files.write(number)]
    assert sorted(files.names) == sorted(path.name for path in tmp_path.glob("*.distcp"))
    files.finish([results])
    (tmp_path / "metadata.json").write_text('{"sharded_backend": "torch_dist", "sharded_backend_version": 1}')
    loaded = dist_checkpointing.load({"model": model.sharded_state_dict(metadata=SHARDING)}, str(tmp_path))["model"]
    assert all(torch.equal(loaded[name], value) for name, value in wanted.items())


def stored(size: Sequence[int], *boxes: tuple[tuple[int, ...], tuple[int, ...]]) -> Metadata:
    chunks = [ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)) for offsets, sizes in boxes]
    return Metadata({"key": TensorStorageMetadata(TensorProperties(), torch.Size(size), chunks)})


LAYERS = (((0, 0), (1, 2)), ((0, 2), (1, 2)), ((1, 0), (1, 4)))


@pytest.mark.parametrize(
    ("is_whole", "boxes"),
    [
        (True, LAYERS),
        (True, (((0, 0), (2, 3)), ((0, 3), (2, 1)))),
        (False, LAYERS[1:]),
        (False, (*LAYERS[:2], ((1, 0), (1, 3)))),
        (False, LAYERS[:2]),
        (False, (*LAYERS[:2], LAYERS[0], LAYERS[1])),
        (False, (*LAYERS[:2], ((1, 0), (1, 5)))),
        (False, (*LAYERS[:2], ((2, 0), (1, 4)))),
        (False, (((0, 0), (1, 3)), ((0, 2), (1, 2)), ((1, 0), (1, 3)))),
        (False, (((0, 0), (2, 3)), ((0, 2), (2, 1)))),
    ],
)
def test_pieces_are_whole_by_layer_if_they_are_whole_together(is_whole: bool, boxes: Any) -> None:
    whole, plans = stored((2, 4), *boxes), [SavePlan([])] * 2
    assert len(internals.by_layer(stored((2, 4), *LAYERS)).state_dict_metadata) == 2
    # Older versions of torch return whether they are whole; newer ones return what is wrong.
    passed = default_planner._validate_global_plan(plans, stored((2, 4), *LAYERS))
    assert (default_planner._validate_global_plan(plans, whole) == passed) is is_whole
    assert (default_planner._validate_global_plan(plans, internals.by_layer(whole)) == passed) is is_whole


def test_a_plan_that_writes_a_number_twice_is_refused(group: Any, tmp_path: Path) -> None:
    boxes = (((0, 0), (1, 3)), ((0, 2), (1, 2)), ((1, 0), (1, 4)))
    state = {
        number: ShardedTensor("key", torch.ones(sizes), torch.float32, sizes, (2, 4), offsets, None)
        for number, (offsets, sizes) in enumerate(boxes)
    }
    with pytest.raises(ValueError, match=r"[Ff]ailed to validate global plan"):
        internals.ShardedFiles(state, tmp_path, {}, internals.SavePlans(1))


def test_a_file_that_cannot_be_written_raises_what_the_file_system_raises(group: Any, tmp_path: Path) -> None:
    files = internals.ShardedFiles(
        {"model": make_model().sharded_state_dict(metadata=SHARDING)}, tmp_path, {}, internals.SavePlans(1)
    )
    files.stage()
    (tmp_path / files.names[0]).mkdir()
    with pytest.raises(IsADirectoryError):
        files.write(0)


def test_saving_has_the_methods_and_arguments_that_are_replaced() -> None:
    assert filesystem_async._results_queue is None or not hasattr(filesystem_async._results_queue, "_manager")
    arguments = inspect.signature(filesystem_async.FileSystemWriterAsync.write_preloaded_data).parameters
    assert list(arguments)[:6] == [
        *("transform_list", "local_proc_idx", "write_bucket", "results_queue", "count_queue", "use_fsync")
    ]
    replaced = inspect.signature(TorchDistSaveShardedStrategy._get_save_and_finalize_callbacks).parameters
    strategy = [] if IS_0_16 else ["async_strategy"]
    assert list(replaced) == ["self", "writer", "save_state_dict_ret", *strategy]
    assert ("async_strategy" in inspect.signature(dist_checkpointing.save).parameters) is not IS_0_16


def test_pretrain_has_one_of_the_two_forms() -> None:
    training = pytest.importorskip("megatron.training.training", reason="0.16's wheel has no megatron.training")
    assert next(iter(inspect.signature(training.pretrain).parameters)) == "cfg_container"
    assert list(inspect.signature(training.update_seqlen_stats_from_cu_seqlens).parameters) == ["cu_seqlens"]
    from megatron.training import argument_utils, arguments

    assert next(iter(inspect.signature(arguments.parse_and_validate_args).parameters)) == "extra_args_provider"
    assert callable(argument_utils.pretrain_cfg_container_from_args)


def test_an_earlier_pretrain_is_called_in_its_own_form() -> None:
    called: dict[str, Any] = {}

    def pretrain(datasets: Any, provider: Any, model_type: Any, step: Any, extra_args_provider: Any, more: int) -> None:
        called.update(datasets=datasets, provider=provider, step=step, arguments=extra_args_provider, more=more)

    parts: dict[str, Any] = dict.fromkeys(("datasets", "model_provider", "forward_step", "add_arguments"), len)
    internals.call_pretrain(pretrain, **parts, keywords={"more": 3})
    assert called == {"datasets": len, "provider": len, "step": len, "arguments": len, "more": 3}


def test_one_rank_of_many_is_built_without_the_others_and_without_memory() -> None:
    sizes = ParallelConfig(tensor_model_parallel_size=2, pipeline_model_parallel_size=4)
    with internals.simulated_rank(5, 64):
        groups = topology.initialize(sizes, seed=1)
        assert (groups.tensor_group.rank(), groups.pipeline_group.size(), groups.data_group.size()) == (1, 4, 8)
        with internals.megatron_on_meta():
            model = make_model(tensor_model_parallel_size=2)
            assert all(parameter.is_meta for parameter in model.parameters())
            assert torch.ones(2).type() == "torch.cuda.FloatTensor"
            assert torch.ones(4, 3).index_select(0, torch.tensor([1, 2], device="cpu")).shape == (2, 3)
        topology.destroy(groups)
    assert torch.ones(2).is_cpu and not torch.distributed.is_initialized()
    assert '"gloo"' in inspect.getsource(sys.modules["megatron.core.parallel_state"])
    assert "torch.cuda.FloatTensor" in inspect.getsource(sys.modules["megatron.core.optimizer.clip_grads"])
