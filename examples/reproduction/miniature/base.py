"""The base model: a small Llama, trained from scratch on short contexts alone, in plain PyTorch."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from megatron_solopo.files import atomic_path
from miniature.evaluate import accuracy, eval_set
from miniature.task import ASK_ID, END_ID, KEY_0, VALUE_0, WORDS, draw_facts, make_tokenizer, place_facts

TRAINED_LENGTHS = (16, 32)
"""Words of the contexts that the base model is trained on, from and to."""
_FACTS, _QUESTIONS, _BATCH = 6, 8, 64
_WARM_UP, _LEARNING_RATE, _CHECK_EVERY, _MAX_STEPS = 50, 3e-3, 10, 4000
_CHECKED = 512
_IGNORED = -100


def new_model(seed: int) -> LlamaForCausalLM:
    """Random weights: RoPE, RMSNorm, SwiGLU, grouped queries; fp32."""
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=8192,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=END_ID,
        pad_token_id=0,
        dtype="float32",
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def train_base(directories: Mapping[float, Path], seed: int) -> None:
    """Train until the short accuracy (16 words, greedy) reaches each level, and save the model there.

    Args:
        directories: short accuracy -> Hugging Face directory, model and tokenizer, to write.
        seed: of weights and data.
    """
    model, rng = new_model(seed), np.random.default_rng(seed)
    optimizer = torch.optim.AdamW(model.parameters(), _LEARNING_RATE, weight_decay=0.01, betas=(0.9, 0.98))
    waiting, checked = sorted(directories), eval_set(TRAINED_LENGTHS[0], _CHECKED, seed + 1)
    for step in range(1, _MAX_STEPS + 1):
        for group in optimizer.param_groups:
            group["lr"] = _LEARNING_RATE * min(1, step / _WARM_UP)
        loss = _loss(model, rng)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % _CHECK_EVERY == 0:
            reached = accuracy(model, checked)
            print(f"base {seed}: step {step}, loss {loss.item():.3f}, short accuracy {reached:.3f}", flush=True)
            while waiting and reached >= waiting[0]:
                _save(model, directories[waiting.pop(0)])
        if not waiting:
            return
    raise RuntimeError(f"base {seed}: no short accuracy of {waiting[0]} after {_MAX_STEPS} steps")


def _loss(model: LlamaForCausalLM, rng: np.random.Generator) -> torch.Tensor:
    """Cross-entropy of the answers and their ends, of several questions on each of the contexts."""
    length = int(rng.integers(TRAINED_LENGTHS[0], TRAINED_LENGTHS[1] + 1))
    contexts = place_facts(rng, *draw_facts(rng, _BATCH, _FACTS), length)
    asked = rng.integers(_FACTS, size=(_BATCH, _QUESTIONS))
    keys, values = (np.take_along_axis(each, asked, axis=1) for each in (contexts.keys_BF, contexts.values_BF))
    ask, end = np.full_like(keys, ASK_ID), np.full_like(keys, END_ID)
    turns_BQ4 = np.stack([ask, KEY_0 + keys, VALUE_0 + values, end], axis=-1)
    ids_BT = torch.from_numpy(np.concatenate([contexts.words_BT, turns_BQ4.reshape(_BATCH, -1)], axis=1))
    # Of a turn's four tokens, the second predicts the answer and the third the end; only they meet the vocabulary.
    hidden_BQ4H = model.model(ids_BT).last_hidden_state[:, length:].unflatten(1, (_QUESTIONS, 4))
    logits = model.lm_head(hidden_BQ4H[:, :, 1:3])
    return F.cross_entropy(logits.flatten(0, 2), torch.from_numpy(turns_BQ4[..., 2:]).flatten())


def _save(model: LlamaForCausalLM, directory: Path) -> None:
    with atomic_path(directory) as temporary:
        model.save_pretrained(temporary)
        make_tokenizer().save_pretrained(temporary)
