"""TRL's DPO trainer on transformers for `benchmark.py`: the long pair, in every variant that could be the fastest.

A process of its own; see `bench_case.worker_main`. At the first length every variant is measured. At each later one
they are tried from the fastest to the slowest until one survives; what ran out of memory is not tried again.
"""

import tempfile
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict
from itertools import count
from pathlib import Path
from statistics import median
from typing import Any

import torch
import trl.trainer.dpo_trainer as dpo_trainer
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedTokenizerFast, PrinterCallback, TrainerCallback
from transformers.models.qwen2 import modeling_qwen2
from trl import DPOConfig, DPOTrainer

from tools.benchmarks.bench_case import (
    FAILED,
    OUT_OF_MEMORY,
    TRL,
    Emit,
    Measurement,
    Plan,
    StepMeter,
    first_line,
    free_memory,
    is_out_of_memory,
    random_model,
    random_tensor,
    worker_main,
)
from tools.benchmarks.bench_profile import StepProfiler
from tools.benchmarks.bench_variants import Search, Variant, possible_variants
from tools.benchmarks.cpu_counts import optimizer_tensors

_ON_GPU = torch.cuda.is_available()
_MODEL_NUMBERS = count(1)


@contextmanager
def kernels(variant: Variant) -> Iterator[None]:
    """Whatever liger replaces in transformers' module is put back afterwards."""
    before = dict(vars(modeling_qwen2))
    preferred = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION]
    fallback = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    cudnn = variant.attention == "cudnn"
    try:
        with sdpa_kernel([*preferred, *fallback], set_priority=True) if cudnn else nullcontext():
            yield
    finally:
        vars(modeling_qwen2).update(before)


class UntouchedTokensTrainer(DPOTrainer):  # type: ignore[misc]
    """Takes the data set as token ids, as they are."""

    def _prepare_dataset(self, dataset: Dataset, *arguments: Any) -> Dataset:
        return dataset


class Meter(TrainerCallback):
    """Times the trainer's steps: forward, backward, clipping, optimizer; neither data loading nor logging."""

    def __init__(self, measurement: Measurement, plan: Plan, trace_path: Path | None, fastest: float) -> None:
        self.result, self.steps = measurement, plan.warmup + plan.steps
        self.meter = StepMeter(measurement, plan.warmup)
        self.trace_path, self.fastest = trace_path, fastest
        self.profiler: StepProfiler | None = None

    def on_step_begin(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        if state.global_step < self.steps:
            self.meter.begin(lambda: [*rest["model"].parameters(), *optimizer_tensors(rest["optimizer"])])
        elif self.trace_path and median(self.result.seconds) < self.fastest:  # the trace of the best variant stays
            self.profiler = StepProfiler(self.trace_path)
            self.profiler.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        if state.global_step <= self.steps:
            self.meter.end()
        elif self.profiler:
            self.result.profile = self.profiler.stop()

    def on_log(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        logs: dict[str, Any] = rest["logs"]
        if "grad_norm" in logs and state.global_step <= self.steps:
            self.result.losses.append(float(logs["loss"]))
            self.result.grad_norms.append(float(logs["grad_norm"]))


def data_set(plan: Plan, long_tokens: int) -> Dataset:
    rows = plan.batch(long_tokens)
    columns: dict[str, list[list[int]]] = {"prompt_ids": [row.prompts["long"].tolist() for row in rows]}
    for response in ("chosen", "rejected"):
        columns[f"{response}_ids"] = [row.responses[response].tolist() for row in rows]
    return Dataset.from_dict(columns)


def tokenizer() -> PreTrainedTokenizerFast:
    """Never used but for its padding token, which the trainer asks for."""
    plain = Tokenizer(WordLevel({"<pad>": 0}, "<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="<pad>")  # type: ignore[no-untyped-call]


def training_arguments(plan: Plan, variant: Variant, folder: str) -> DPOConfig:
    optimizer, objective = plan.config["optimizer"], plan.config["objective"]
    return DPOConfig(
        output_dir=folder,
        max_steps=plan.warmup + plan.steps + (1 if plan.profile else 0),
        # A pair at a time, as ours: long sequences are what fills the memory.
        per_device_train_batch_size=1,
        gradient_accumulation_steps=plan.triplets,
        max_length=None,
        beta=objective["beta"],
        precompute_ref_log_probs=True,
        learning_rate=optimizer["lr"],
        lr_scheduler_type="constant",
        weight_decay=optimizer["weight_decay"],
        adam_beta1=optimizer["adam_beta1"],
        adam_beta2=optimizer["adam_beta2"],
        adam_epsilon=optimizer["adam_eps"],
        max_grad_norm=optimizer["clip_grad"],
        optim="adamw_torch_fused",
        bf16=plan.config["model"]["dtype"] == "bfloat16",
        use_cpu=not _ON_GPU,
        gradient_checkpointing=variant.checkpointing,
        use_liger_kernel=variant.liger,
        logging_steps=1,
        logging_nan_inf_filter=False,  # it would wait for the device in every step
        disable_tqdm=True,
        report_to="none",
        save_strategy="no",
        seed=1,
    )


def adapters(plan: Plan) -> LoraConfig | None:
    """The configured adapters, in PEFT's words."""
    lora = plan.config["lora"]
    if lora is None:
        return None
    return LoraConfig(
        r=lora["rank"],
        lora_alpha=lora["alpha"],
        use_rslora=lora["use_rslora"],
        lora_dropout=lora["dropout"],
        target_modules=lora["target_modules"],
        task_type="CAUSAL_LM",
    )


@contextmanager
def _unhashed_model() -> Iterator[None]:
    """The trainer names a cache file by a hash over all weights, minutes for a large model; a count names it too."""
    original = getattr(dpo_trainer, "hash_module", None)
    if original is None:
        yield
        return
    name = f"variant {next(_MODEL_NUMBERS)}"
    dpo_trainer.hash_module = lambda module: name
    try:
        yield
    finally:
        dpo_trainer.hash_module = original


def train(plan: Plan, variant: Variant, long_tokens: int, meter: Meter) -> None:
    """Warm up and measure."""
    with ExitStack() as stack:
        stack.enter_context(kernels(variant))
        stack.enter_context(_unhashed_model())
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        trainer = UntouchedTokensTrainer(
            model=random_model(plan, variant.implementation),
            args=training_arguments(plan, variant, folder),
            train_dataset=data_set(plan, long_tokens),
            processing_class=tokenizer(),
            callbacks=[meter],
            peft_config=adapters(plan),
        )
        for name, parameter in trainer.model.named_parameters():
            if ".lora_" in name:
                name = name.replace(".default.", ".")
                parameter.data.copy_(random_tensor(name, parameter.shape, parameter.dtype, parameter.device))
        trainer.remove_callback(PrinterCallback)
        trainer.train()


def measure(plan: Plan, variant: Variant, long_tokens: int, fastest: float) -> Measurement:
    """One variant at one length; whatever goes wrong is its result."""
    result = Measurement(TRL, long_tokens, variant=str(variant))
    meter = Meter(result, plan, plan.trace_path(TRL, long_tokens), fastest)
    try:
        train(plan, variant, long_tokens, meter)
    except Exception as error:
        meter.meter.abandon()
        result.status = OUT_OF_MEMORY if is_out_of_memory(error) else FAILED
        result.detail = first_line(error)
        if result.status == FAILED:
            traceback.print_exc()
    free_memory()
    return result


def run(plan: Plan, emit: Emit) -> None:
    """Measure all lengths."""

    def measure_one(variant: Variant, long_tokens: int, fastest: float) -> Measurement:
        result = measure(plan, variant, long_tokens, fastest)
        emit("variant", **asdict(result))
        return result

    search = Search(possible_variants(plan.trl_variants), measure_one)
    dtype = plan.config["model"]["dtype"]
    emit("facts", name=TRL, text=f"{dtype} weights, gradients and AdamW moments (fused AdamW, no fp32 master weights)")
    for number, long_tokens in enumerate(plan.long_tokens):
        result = search.measure(long_tokens, every_variant=number == 0 or plan.every_variant)
        emit("measurement", **asdict(result))


if __name__ == "__main__":
    worker_main(run)
