"""One run: training by `megatron-solopo train`, export, accuracy against length."""

from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM

from megatron_solopo.checkpoint.conversion import export_model
from megatron_solopo.config import Config, parse_config
from megatron_solopo.files import read_jsonl, remove
from megatron_solopo.train.trainer import precompute_reference, train
from miniature.evaluate import LENGTHS, accuracy, eval_set
from miniature.pairs import make_pairs

LONG_LENGTH = 128
STEPS, BATCH, LEARNING_RATE = 100, 8, 5e-4
EVAL_QUESTIONS = 128
EVAL_SEED = 77
"""The questions that all models answer."""
TEMPERATURE = 1.5
NUM_QUESTIONS, LONGS_PER_QUESTION = 400, 4
LORA_ALPHA = 32
"""For every rank. An adapter's output is multiplied by alpha / rank, so that one learning rate fits several ranks."""
_TRAJECTORIES = ("rewards/chosen", "nll_loss", "solo_ra/gap_abs")
_LOSS_SETTINGS: dict[str, dict[str, Any]] = {"simpo": {"beta": 2.5}, "dpo": {}, "orpo": {}}


@dataclass(frozen=True)
class Run:
    """What is trained: from which base, with which objective."""

    strength: int
    """Short accuracy of the base, in percent."""
    seed: int
    method: str
    """base (nothing is trained), short_po, long_po, solopo."""
    loss_type: str = "none"
    alpha: float | None = None
    """None is the loss type's default."""
    align: str = "chosen"
    detach_short: bool = False
    learning_rate: float = LEARNING_RATE
    rank: int | None = None
    """Of adapters beside all linear layers; None trains the whole model."""
    token_weight: float | None = None
    """Of the divergence per token (`objective.token_alignment`); None has no such term."""

    @property
    def name(self) -> str:
        """Unique, and fit for a folder."""
        alpha = "" if self.alpha is None else f"-alpha{self.alpha:g}"
        both = "-both" if self.align == "both" else ""
        detached = "-detached" if self.detach_short else ""
        rate = "" if self.learning_rate == LEARNING_RATE else f"-lr{self.learning_rate:g}"
        lora = "" if self.rank is None else f"-lora{self.rank}"
        tokens = "" if self.token_weight is None else f"-tokens{self.token_weight:g}"
        objective = f"{self.loss_type}-{self.method}{both}{alpha}{detached}{tokens}"
        return f"base{self.strength}-seed{self.seed}-{objective}{lora}{rate}"


def base_directory(work: Path, strength: int, seed: int) -> Path:
    """The Hugging Face directory of a base model."""
    return work / f"seed{seed}" / f"base{strength}"


def data_directory(work: Path, strength: int, seed: int) -> Path:
    """Pairs of a base model: contexts, responses, triplets, prepared data, reference log-probs."""
    return work / f"seed{seed}" / f"data{strength}"


def prepare_data(work: Path, strength: int, seed: int) -> None:
    """Pairs from the base's own answers, and the reference log-probs that DPO's runs share."""
    folder = data_directory(work, strength, seed)
    make_pairs(
        base_directory(work, strength, seed),
        folder,
        long_length=LONG_LENGTH,
        num_questions=NUM_QUESTIONS,
        longs_per_question=LONGS_PER_QUESTION,
        temperature=TEMPERATURE,
        seed=seed,
    )
    precompute_reference(make_config(work, Run(strength, seed, "solopo", "dpo", align="both")), overwrite=True)


def make_config(work: Path, run: Run) -> Config:
    """The run's configuration."""
    data = data_directory(work, run.strength, run.seed)
    objective = {"name": run.method, "loss_type": run.loss_type, "align": run.align, "detach_short": run.detach_short}
    if run.token_weight is not None:
        objective |= {"token_alignment": "reverse_kl", "token_alignment_weight": run.token_weight}
    return parse_config(
        {
            "run_dir": work / "runs" / run.name,
            "seed": run.seed,
            "model": {"path": base_directory(work, run.strength, run.seed)},
            "data": {"path": data / "prepared", "max_tokens_per_pack": 16384},
            "objective": objective
            | _LOSS_SETTINGS[run.loss_type]
            | ({} if run.alpha is None else {"alpha": run.alpha}),
            "reference": {"cache": data / "reference"},
            "training": {"global_batch_size": BATCH, "max_steps": STEPS},
            "optimizer": {"lr": run.learning_rate, "lr_decay_style": "constant", "lr_warmup_iters": 5},
            "logging": {"tensorboard": False},
            "lora": None if run.rank is None else {"rank": run.rank, "alpha": LORA_ALPHA},
        },
        source=run.name,
    )


def execute(work: Path, run: Run) -> dict[str, Any]:
    """Train, export, evaluate; the run's line of `runs.jsonl`. What it wrote is removed but its metrics."""
    if run.method == "base":
        return asdict(run) | {"name": run.name, "accuracy": measure(base_directory(work, run.strength, run.seed))}
    config = make_config(work, run)
    train(config)
    exported = config.run_dir / "exported"
    remove(exported)
    checkpoint = config.run_dir / "checkpoints" / f"iter_{STEPS:07}"
    export_model(checkpoint, exported, dtype=None, verification="tensors", merge=run.rank is not None)
    found = asdict(run) | {"name": run.name, "accuracy": measure(exported)} | costs(config.run_dir)
    remove(exported)
    remove(config.run_dir / "checkpoints")
    return found


def measure(model_directory: Path) -> dict[str, float]:
    """Accuracy by context length in words, of a Hugging Face directory."""
    model = AutoModelForCausalLM.from_pretrained(model_directory).eval()
    return {str(length): accuracy(model, _questions(length)) for length in LENGTHS}


@cache
def _questions(length: int) -> Any:
    return eval_set(length, EVAL_QUESTIONS, EVAL_SEED)


def costs(run_dir: Path) -> dict[str, Any]:
    """Tokens, FLOPs and time of a run, and what its warning is judged by."""
    steps = read_jsonl(run_dir / "metrics.jsonl")
    return {
        "tokens": sum(step["num_tokens"] for step in steps),
        "flops": sum(step["flops"] for step in steps),
        "step_seconds": min(step["step_time"] for step in steps),
        "trajectories": {name: [round(step[name], 4) for step in steps] for name in _TRAJECTORIES if name in steps[0]},
    }
