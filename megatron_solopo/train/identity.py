"""What a run may not change while it continues.

What goes in is compared exactly: what settings mean, however they are written, and hashes of the model's weights, of
the reference model's weights and of the tokens. Numbers that any layout may compute again, the reference log-probs, are
compared within a tolerance.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist

from megatron_solopo.architecture.adapters import target_modules
from megatron_solopo.architecture.model_directory import huggingface_directory
from megatron_solopo.checkpoint.fingerprint import unread_weights, weights_fingerprint
from megatron_solopo.checkpoint.peft_directory import adapter_fingerprint
from megatron_solopo.checksums import FILES_AT_ONCE, KnownFile, read_checksums
from megatron_solopo.config import Config, LoRAConfig, ModelConfig
from megatron_solopo.data.mixture import shares
from megatron_solopo.errors import UserError
from megatron_solopo.files import sha256_file, sha256_json
from megatron_solopo.model.build import precision_defaults, precision_settings
from megatron_solopo.parallel.agreement import from_rank, on_every_rank, on_rank_0
from megatron_solopo.train.policy import decay_iters
from megatron_solopo.train.run_data import RunSource
from megatron_solopo.train.step import ReferenceLogprobs

_DECAY = "optimizer.lr_decay_iters"
_CONFIG, WEIGHTS = "model.path (its config.json)", "model.path (its weights)"
_ADAPTER = "model.adapter (its weights)"
_TOKENS, _REFERENCE = "data.path (its tokens)", "reference.model_path (its weights)"
_REFERENCE_CONTEXT = "reference.context"
_SOURCES = "sources"
"""A key without a section: its settings are called sources.NAME.weight, for example."""
_WEIGHT = ".weight"
"""The end of the name of a source's weight."""
_SHARING = "data.share_prompts"
_HASHES = {
    _CONFIG: "model.path={} has another config.json",
    WEIGHTS: "model.path={} holds other weights",
    _ADAPTER: "model.adapter={}: the run began with other adapters",
    _TOKENS: "data.path={} holds other tokens",
    _REFERENCE: "reference.model_path={} holds other weights",
}
# Of checkpoints before format 2 of prepared data: a hash of what the tokens were made from, and one of all numbers.
_OLD_DATA, _OLD_NUMBERS = "data.path (its content)", "reference.cache (its numbers)"
_SAMPLED_ROWS = 64
# Layouts round differently. Relative and absolute, of a sum over the tokens of one answer.
_TOLERANCES = {"float32": (1e-4, 1e-3), "bfloat16": (2e-2, 0.5)}


def model_fingerprint(path: Path, progress: Callable[[], None] = lambda: None) -> str:
    """`weights_fingerprint` on every rank; all ranks call it together, and each reads some of the files.

    Args:
        progress: called on every rank, at the latest when all ranks have read a few files each.
    """
    unread = list(on_rank_0(partial(unread_weights, path)).items())
    read: dict[str, KnownFile] = {}
    ranks = dist.get_world_size()
    for start in range(0, len(unread), ranks * FILES_AT_ONCE):
        part = unread[start : start + ranks * FILES_AT_ONCE]
        # Neighbours share a host, so the readers are far from each other.
        readers = [number * ranks // len(part) for number in range(len(part))]
        own = dict(item for item, reader in zip(part, readers, strict=True) if reader == dist.get_rank())
        found = on_every_rank(partial(read_checksums, own, path, progress, show_bar=dist.get_rank() == 0))
        for reader in sorted(set(readers)):
            read |= from_rank(reader, found)
        progress()
    return on_rank_0(partial(weights_fingerprint, path, read))


def differing_parts(
    now: Mapping[str, Any], kept: Mapping[str, Any], defaults: Mapping[str, Any]
) -> dict[str, tuple[Any, Any]]:
    """The settings of a section that differ, by name: the value of now, and the kept one.

    Args:
        defaults: the value of a setting that one side lacks: it is of a version that did not have it.
    """
    pairs = {
        name: (now.get(name, defaults.get(name)), kept.get(name, defaults.get(name))) for name in sorted({*now, *kept})
    }
    return {name: (value, former) for name, (value, former) in pairs.items() if value != former}


def verbose_weight(ld_alpha: float | None) -> float:
    """What `objective.ld_alpha` means."""
    return 1.0 if ld_alpha is None else ld_alpha


class RunIdentity:
    """What one run is. All ranks create it together.

    Attributes:
        values: JSON values by the key that sets each, as a checkpoint keeps them.
    """

    def __init__(
        self, config: Config, sources: Sequence[RunSource], max_steps: int, progress: Callable[[], None] = lambda: None
    ) -> None:
        """Read the weights if their checksums are not known yet.

        Args:
            max_steps: the run's last step.
            progress: called again and again while weights are read.
        """
        self._config, self._max_steps = config, max_steps
        self._data = sources[0].datasets.manifest if config.data.sources is None else None
        sections = {"objective": config.objective, "optimizer": config.optimizer, "moe": config.moe}
        self._defaults = {
            f"{name}.{key}": field.default
            for name, section in sections.items()
            for key, field in type(section).model_fields.items()
        }
        keys = {f"{name}.{key}": value for name, section in sections.items() for key, value in section}
        self._defaults |= {"lora": None, _REFERENCE_CONTEXT: None, _SOURCES: None}
        self._part_defaults = {
            _SOURCES: {},
            "lora": {key: field.default for key, field in LoRAConfig.model_fields.items()},
            "model.fp8": precision_defaults(),
        }
        self._meanings: dict[str, Callable[[Any], Any]] = {
            "lora.target_modules": lambda value: target_modules(LoRAConfig(target_modules=value)),
            "objective.alpha": lambda value: config.objective.model_copy(update={"alpha": value}).alignment_weight,
            "objective.ld_alpha": verbose_weight,
        }
        has_decay = config.optimizer.lr_decay_style != "constant"
        self.values: dict[str, Any] = keys | {
            _DECAY: decay_iters(config.optimizer, max_steps) if has_decay else None,
            "model.dtype": config.model.dtype,
            "model.fp8": precision_settings(config.model) or None,
            _CONFIG: on_rank_0(lambda: sha256_file(huggingface_directory(config.model.path) / "config.json")),
            WEIGHTS: model_fingerprint(config.model.path, progress),
            "lora": None if config.lora is None else config.lora.model_dump(mode="json"),
            _SOURCES: None if config.data.sources is None else _source_values(sources),
            _SHARING: config.data.share_prompts,
        }
        if self._data is not None:
            self.values[_TOKENS] = self._data.fingerprint
        if config.lora is not None:
            start = config.model.adapter
            self.values[_ADAPTER] = None if start is None else on_rank_0(partial(adapter_fingerprint, start))
        if config.needs_reference:
            path = config.reference.model_path or config.model.path
            self.values[_REFERENCE] = model_fingerprint(path, progress)
            self.values[_REFERENCE_CONTEXT] = config.reference.context

    def check(self, saved: Mapping[str, Any], checkpoint: Path) -> list[str]:
        """Compare with what a checkpoint of this run keeps; returns lines to say.

        Args:
            saved: its trainer state.

        Raises UserError naming the values that differ, or if the run has done more steps than it shall have.
        """
        self._check_steps(saved["step"])
        kept = saved["identity"]
        may_change = (_DECAY, _SHARING)
        changed = [problem for key in self.values if key not in may_change for problem in self._problems(key, kept)]
        if self._data is not None and _TOKENS not in kept and self._data.format_version == 1:
            # The checkpoint and the data are of the same age.
            changed += (
                [] if kept.get(_OLD_DATA) == sha256_json(self._data.fingerprint_parts) else [self._named(_TOKENS)]
            )
        if changed:
            raise UserError(
                f"{checkpoint}: a run keeps its objective, optimizer, model, data and reference, but now "
                f"{', '.join(changed)}; restore that, or set run_dir to another directory"
            )
        self._check_decay(kept, checkpoint)
        notes = []
        if kept.get(_SHARING, self.values[_SHARING]) != self.values[_SHARING]:
            notes.append(f"note: {self._problem(_SHARING, kept)}: the run computes the same, but rounds otherwise")
        if unknown := [key for key in (*_HASHES, _DECAY) if key in self.values and key not in kept]:
            kind = f"{checkpoint.name} is of an older version, which did not keep {', '.join(unknown)}"
            notes.append(f"note: {kind}: not compared")
        return notes

    def redrawn_decay(self, saved: Mapping[str, Any]) -> int | None:
        """The former number of decay steps, if the run draws the decay of its learning rate anew."""
        former = saved["identity"].get(_DECAY)
        return None if former is None or former == self.values[_DECAY] else int(former)

    def _check_steps(self, done: int) -> None:
        if done > self._max_steps:
            raise UserError(
                f"{self._length_key}: {self._config.run_dir} has done {done} steps already; raise the key to at least "
                "that (then nothing is left to do), or set run_dir to another directory"
            )

    @property
    def _length_key(self) -> str:
        """The key that sets the length of the run, with its value."""
        training = self._config.training
        if training.max_steps is not None:
            return f"training.max_steps={training.max_steps}"
        return f"training.num_train_epochs={training.num_train_epochs:g} ({self._max_steps} steps)"

    def _problems(self, key: str, kept: Mapping[str, Any]) -> list[str]:
        """How a value differs from the kept one. The settings of a section are compared one by one."""
        value, former = self.values[key], kept.get(key)
        if isinstance(value, dict) and isinstance(former, dict):
            section = key.partition(".")[0]
            differing = differing_parts(value, former, self._part_defaults[key])
            same_shares = key == _SOURCES and _shares(value) == _shares(former)
            return [
                f"{section}.{name}={_shown(now)} (it was {_shown(was)})"
                for name, (now, was) in differing.items()
                if not (self._mean_the_same(f"{section}.{name}", now, was) or (same_shares and name.endswith(_WEIGHT)))
            ]
        problem = self._problem(key, kept)
        return [] if problem is None else [problem]

    def _problem(self, key: str, kept: Mapping[str, Any]) -> str | None:
        """How a value differs from the kept one; None if it does not."""
        value = self.values[key]
        if key in _HASHES:
            if key not in kept or kept[key] == value:
                return None
            is_policy = key == _REFERENCE and self._config.reference.model_path is None
            # One cause, one message: the policy is its own reference, and its weights are named already.
            return None if is_policy and self._problem(WEIGHTS, kept) else self._named(key)
        if key not in kept:
            # Versions that did not have the key worked as its default says.
            default = self._defaults.get(key)
            is_default = self._mean_the_same(key, value, default)
            return None if is_default else f"{key}={_shown(value)} (it was not set, which means {_shown(default)})"
        same = self._mean_the_same(key, value, kept[key])
        return None if same else f"{key}={_shown(value)} (it was {_shown(kept[key])})"

    def _mean_the_same(self, key: str, now: Any, former: Any) -> bool:
        meaning = self._meanings.get(key)
        return now == former or (meaning is not None and meaning(now) == meaning(former))

    def _named(self, key: str) -> str:
        config = self._config
        paths = {
            _CONFIG: config.model.path,
            WEIGHTS: config.model.path,
            _ADAPTER: _shown(config.model.adapter),
            _TOKENS: _shown(config.data.path),
            _REFERENCE: config.reference.model_path or config.model.path,
        }
        return _HASHES[key].format(paths[key])

    def _check_decay(self, kept: Mapping[str, Any], checkpoint: Path) -> None:
        """Refuse to draw the decay of the learning rate anew, unless the config asks for it."""
        former, now = kept.get(_DECAY), self.values[_DECAY]
        if former is None or former == now or self._config.optimizer.lr_decay_iters is not None:
            return
        raise UserError(
            f"{checkpoint}: the learning rate of this run falls until step {former}, and {self._length_key} would move "
            f"that to step {now}; set {_DECAY}={former} to keep the learning rate as planned (afterwards it stays at "
            f"optimizer.min_lr), or {_DECAY}={now} to draw its decay anew from here"
        )


def _source_values(sources: Sequence[RunSource]) -> dict[str, Any]:
    """What decides which rows a run draws from its sources, and what it computes of them."""
    values: dict[str, Any] = {}
    for place, source in enumerate(sources):
        found = {
            "place": place,
            "weight": source.source.weight,
            "objective": source.config.objective.name,
            "tokens": source.datasets.manifest.fingerprint,
        }
        values |= {f"{source.name}.{name}": value for name, value in found.items()}
    return values


def _shares(values: Mapping[str, Any]) -> dict[str, float]:
    """The share of each source in a batch, of what `_source_values` returns."""
    weights = {key.removesuffix(_WEIGHT): value for key, value in values.items() if key.endswith(_WEIGHT)}
    names = sorted(weights, key=lambda name: values[f"{name}.place"])
    return dict(zip(names, shares([weights[name] for name in names]).tolist(), strict=True))


def summarise_reference(references: Mapping[str, ReferenceLogprobs]) -> dict[str, Any]:
    """What a checkpoint keeps of the reference log-probs, as JSON: the hash of all, and up to 64 rows of each split."""
    digest = hashlib.sha256()
    rows = {}
    for name, logprobs in sorted(references.items()):
        numbers = logprobs.logps.contiguous().numpy()
        digest.update(f"{name} {tuple(map(str, logprobs.roles))}".encode() + numbers.tobytes())
        rows[name] = numbers[np.linspace(0, len(numbers) - 1, min(len(numbers), _SAMPLED_ROWS)).astype(int)].tolist()
    return {"sha256": digest.hexdigest(), "rows": rows}


def check_reference(summary: Mapping[str, Any], saved: Mapping[str, Any], config: ModelConfig) -> str | None:
    """Compare the reference log-probs with those that a checkpoint was trained with.

    Args:
        summary: of the log-probs of now, from `summarise_reference`.
        saved: the checkpoint's trainer state.

    Returns a line to say if they are not the same bits.

    Raises UserError, without a place, if they differ by more than the rounding of another layout.
    """
    kept = saved.get("reference")
    if (kept or {"sha256": saved["identity"].get(_OLD_NUMBERS)})["sha256"] == summary["sha256"]:
        return None
    unequal = "so the continued run will not have the same bits as one that was never stopped"
    if kept is None:
        return f"note: the reference log-probs are not the same bits as before, {unequal}; their size is not compared"
    relative, absolute = _TOLERANCES["bfloat16" if config.fp8 else config.dtype]
    allowed = f"{relative:g} of a number plus {absolute:g}"
    largest = 0.0
    for name, rows in kept["rows"].items():
        former, now = np.asarray(rows), np.asarray(summary["rows"].get(name, []))
        if former.shape != now.shape or not np.allclose(now, former, rtol=relative, atol=absolute):
            raise UserError(
                f"the reference log-probs of the {name} split are others than this run was trained with, beyond the "
                f"rounding of another layout ({allowed}), although model, data and precision are the same"
            )
        largest = max(largest, float(np.abs(now - former).max(initial=0.0)))
    return (
        f"note: the reference log-probs were computed again and differ by up to {largest:.1e} (allowed: {allowed}), "
        f"{unequal}"
    )


def _shown(value: Any) -> str:
    """As YAML writes it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)
