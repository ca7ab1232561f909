"""SoLoPO in a training loop of your own: what is SoLoPO's is numbered. torchrun ... own_loop.py config.yaml"""

import sys
from pathlib import Path

from megatron_solopo.integrations import PreferenceTask  # ahead of megatron, which it lets run without a GPU

# isort: split
import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer import TransformerConfig
from torch.nn import functional

from megatron_solopo.checkpoint.load import load_weights
from megatron_solopo.config import Config, load_config
from megatron_solopo.errors import UserError
from megatron_solopo.model.layers import layer_spec


def build_model(config: Config, task: PreferenceTask) -> GPTModel:
    """Your own model goes here; this one is a dense Qwen2. The comments say what SoLoPO asks of it."""
    transformer = TransformerConfig(
        num_layers=4, hidden_size=32, ffn_hidden_size=48, num_attention_heads=4, num_query_groups=2,
        normalization="RMSNorm", layernorm_epsilon=1e-6, gated_linear_unit=True, activation_func=functional.silu,
        add_bias_linear=False, add_qkv_bias=True, bias_dropout_fusion=False, pipeline_dtype=torch.float32,
        hidden_dropout=0.0, attention_dropout=0.0,      # the reference has none
        calculate_per_token_loss=True,                  # the gradient is that of the mean over triplets
        variable_seq_lengths=True, moe_token_dispatcher_type="alltoall",  # packs differ in length
        tensor_model_parallel_size=config.parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=config.parallel.pipeline_model_parallel_size,
        context_parallel_size=config.parallel.context_parallel_size,
        sequence_parallel=config.parallel.uses_sequence_parallel,
    )  # fmt: skip
    # Or yours: any whose attention takes packed sequences.
    spec = layer_spec(transformer, transformer_engine=task.model.uses_transformer_engine, vp_stage=None)
    first, last = parallel_state.is_pipeline_first_stage(), parallel_state.is_pipeline_last_stage()
    return GPTModel(transformer, spec, 256, 512, pre_process=first, post_process=last, position_embedding_type="rope",
                    share_embeddings_and_output_weights=task.architecture.tied_embeddings)  # fmt: skip


def train(config: Config) -> list[dict[str, float]]:
    sizes = config.parallel  # those of experts are for a model of yours that has some
    parallel_state.initialize_model_parallel(
        sizes.tensor_model_parallel_size, sizes.pipeline_model_parallel_size,
        context_parallel_size=sizes.context_parallel_size,
        expert_model_parallel_size=sizes.expert_model_parallel_size,
        expert_tensor_parallel_size=sizes.expert_tensor_size,
    )  # fmt: skip
    model_parallel_cuda_manual_seed(config.seed)
    task = PreferenceTask(config)  # 1. data, objective, reference
    model = task.prepare_model(build_model(config, task))  # 2. the response-only head
    load_weights([model], task.architecture, config.model.path)
    model.config.finalize_model_grads_func = finalize_model_grads  # or gradients are not summed over ranks
    model = DistributedDataParallel(model.config, DistributedDataParallelConfig(use_distributed_optimizer=True), model)
    optimizer_config = OptimizerConfig(lr=config.optimizer.lr, weight_decay=0.0, adam_beta2=config.optimizer.adam_beta2,
                                       clip_grad=1.0, use_distributed_optimizer=True)  # fmt: skip
    optimizer = get_megatron_optimizer(optimizer_config, [model])
    loader, history = task.batches(), []  # 3. whole triplets, packed for this rank
    if config.training.max_steps is None:
        raise UserError("training.max_steps: is null; set the number of steps")
    for _ in range(config.training.max_steps):
        model.zero_grad_buffer()
        optimizer.zero_grad()
        batch = loader.next_batch()
        reports = get_forward_backward_func()(
            forward_step_func=task.forward_step,  # 4. this stage's output, and its loss
            data_iterator=iter(batch.packs), model=model, num_microbatches=len(batch.packs),
            seq_length=1, micro_batch_size=1, forward_only=False,
        )  # fmt: skip
        _, grad_norm, _ = optimizer.step()
        history.append(task.mean_metrics(reports, batch.num_triplets) | {"grad_norm": float(grad_norm)})  # 5.
    return history


if __name__ == "__main__":
    torch.distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    for metrics in train(load_config(Path(sys.argv[1]), sys.argv[2:])):
        print(metrics)
