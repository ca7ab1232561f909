"""SoLoPO in Megatron-LM's own `pretrain()`: three arguments of the call in `pretrain_gpt.py` change.

    from megatron_solopo.integrations.megatron_lm import Solopo

    solopo = Solopo()
    pretrain(
        solopo.datasets,                                          # was train_valid_test_datasets_provider
        solopo.model_provider(partial(model_provider, gpt_builder)),  # was partial(model_provider, gpt_builder)
        ModelType.encoder_or_decoder,
        solopo.forward_step,                                      # was forward_step
        extra_args_provider=solopo.add_arguments,
    )

`Solopo.pretrain` makes that call for a script that needs nothing else, also in the form of Megatron-LM 0.19.

`Solopo` gives `pretrain()` what it asks of its caller. `PackStream` is the iterator of micro-batches that its loop
reads. `StepLog` writes every metric of every training step to `metrics.jsonl`: Megatron-LM's console line leaves out
negative ones. The file has the names and the form of our own trainer's. What Megatron-LM alone knows (gradient norm,
learning rate, times, evaluation) is in its own log, TensorBoard and W&B.
"""

import argparse
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.utils import get_attr_wrapped_model
from torch import Tensor
from tqdm import tqdm

from megatron_solopo.architecture.adapters import ADAPTER, read_lora
from megatron_solopo.architecture.model_directory import (
    ADAPTER_CONFIG,
    HUGGINGFACE_FOLDER,
    is_megatron_checkpoint,
    parse_model_json,
)
from megatron_solopo.checkpoint.load import load_weights
from megatron_solopo.checkpoint.megatron_reader import read_metadata
from megatron_solopo.checkpoint.model_files import write_files
from megatron_solopo.config import Config
from megatron_solopo.data.loader import GlobalBatch, GlobalBatchLoader
from megatron_solopo.data.packing import Pack
from megatron_solopo.errors import UserError
from megatron_solopo.files import atomic_path
from megatron_solopo.integrations.arguments import add_arguments, config_from_args, flags_for_keys
from megatron_solopo.integrations.task import PreferenceTask
from megatron_solopo.model.adapters import StoresAdapters
from megatron_solopo.model.build import build_chunk
from megatron_solopo.parallel.agreement import on_every_rank, on_rank_0
from megatron_solopo.parallel.megatron_internals import add_base_class, call_pretrain, count_sequence_lengths
from megatron_solopo.parallel.topology import Topology
from megatron_solopo.train.metrics import computed_tokens, keep_before


@dataclass(frozen=True, eq=False)
class StepPack:
    """A pack and its place in the step, which Megatron-LM's loop does not tell a forward step."""

    pack: Pack
    split: str
    number: int
    """Number among this rank's packs of the step, from 0."""
    batch: GlobalBatch
    """The global batch of the step."""

    @property
    def is_last(self) -> bool:
        """Whether the step ends with this pack."""
        return self.number == len(self.batch.packs) - 1


class PackStream:
    """Endless iterator over this rank's packs, `num_packs` for every global batch.

    Megatron-LM fixes the number of micro-batches of a step beforehand: global batch size / (micro-batch size x DP).
    So its micro-batch size is the mean number of triplets in a pack. The triplets of a global batch are packed into
    exactly that many packs, which cost as equally as possible.

    Args:
        loader: made with `packs_multiple=num_packs`.
        consumed_triplets: where to start in the loader's stream.
        num_batches: how many batches the caller will read. Their lengths are checked now.

    Raises UserError if one of these batches needs more packs under the token budget of a pack.
    """

    def __init__(
        self, loader: GlobalBatchLoader, split: str, num_packs: int, *, consumed_triplets: int, num_batches: int
    ) -> None:
        loader.load_state_dict(loader.state_dict() | {"consumed_triplets": consumed_triplets})
        self._loader, self._split, self._num_packs = loader, split, num_packs
        self._step: Iterator[StepPack] = iter(())
        for start, needed in loader.packs_needed(num_batches):
            self._check(start, needed)

    def __iter__(self) -> "PackStream":
        return self

    def __next__(self) -> StepPack:
        """The next pack."""
        item = next(self._step, None)
        if item is None:
            self._step = self._read()
            item = next(self._step)
        return item

    def _read(self) -> Iterator[StepPack]:
        start = self._loader.consumed_triplets
        batch = self._loader.next_batch()
        self._check(start, len(batch.packs))
        return (StepPack(pack, self._split, number, batch) for number, pack in enumerate(batch.packs))

    def _check(self, start: int, needed: int) -> None:
        if needed > self._num_packs:
            raise UserError(
                f"the batch of the {self._split} stream that starts with triplet {start} needs {needed} packs on each "
                f"data-parallel rank, but has {self._num_packs} (global batch size / (micro-batch size x DP)): raise "
                "data.max_tokens_per_pack (micro-batch size x the largest triplet always suffices) or "
                "data.max_triplets_per_pack, or lower --micro-batch-size"
            )


class StepLog:
    """Sums the reports of a step's packs, and writes their means after the last pack.

    Only the last pipeline stage uses it, because losses exist there alone. The ranks of a data-parallel group do one
    all-reduce per step. The first rank of all writes.
    """

    def __init__(self, run_dir: Path, names: Sequence[str], topology: Topology, first_step: int) -> None:
        """Continue at `first_step`. Later lines of an interrupted run are dropped, because those steps run again."""
        self._path, self._names, self._topology = run_dir / "metrics.jsonl", names, topology
        self._step = first_step - 1
        self._batch: GlobalBatch | None = None
        self._reports: list[Tensor] = []
        groups = (topology.data_group, topology.context_group, topology.tensor_group)
        self._writes = topology.is_last_stage and all(group.rank() == 0 for group in groups)
        if self._writes:
            run_dir.mkdir(parents=True, exist_ok=True)
            keep_before(self._path, first_step)

    def add(self, item: StepPack, report: Tensor) -> None:
        """Add the report of one pack, fp32 sums [M] of the metrics."""
        if item.number == 0:
            self._reports = []
        self._reports.append(report)
        if not item.is_last:
            return
        sums = torch.stack(self._reports).double().sum(dim=0)
        dist.all_reduce(sums, group=self._topology.data_group)
        # Megatron-LM may run a step again, with the same batch, to tell a faulty GPU from a faulty program.
        is_new = item.batch is not self._batch
        self._batch = item.batch
        self._step += is_new
        if self._writes and is_new:
            self._write((sums / item.batch.num_triplets).tolist(), item.batch)

    def _write(self, means: list[float], batch: GlobalBatch) -> None:
        metrics = dict(zip(self._names, means, strict=True))
        counted = ("num_triplets", "num_tokens", "num_sequence_tokens", "pack_fill")
        counts = {name: getattr(batch, name) for name in counted}
        # JSON has no NaN, so null stands for it. Megatron-LM's own checks stop such a run.
        line = {name: value if value - value == 0 else None for name, value in (metrics | counts).items()}
        with self._path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps({"step": self._step} | line, allow_nan=False) + "\n")
        shown = [f"{name} {value:+.4f}" for name, value in metrics.items()] + computed_tokens(counts)
        tqdm.write(f" solopo iteration {self._step} | {' | '.join(shown)}")


_LOADED = ("load", "pretrained_checkpoint")
"""Arguments that name a checkpoint, in the order in which Megatron-LM takes one."""
ReportingLossFunction = Callable[[Tensor], tuple[Tensor, Tensor, dict[str, Tensor]]]


def _check_description(now: Mapping[str, bytes], flag: str, folders: Sequence[Path], *, is_needed: bool) -> None:
    """Raise UserError if the first of the folders with a description of adapters describes others.

    Args:
        now: the description of this run's adapters, by file.
        flag: the option that names the checkpoint.
        is_needed: whether one of the folders must have it.
    """
    for file, content in now.items():
        kept = next((folder / file for folder in folders if (folder / file).is_file()), None)
        if kept is None and is_needed:
            raise UserError(
                f"{flag}: nothing says what its adapters belong to; bring {file} back into {folders[0]}, where --save "
                "had put it"
            )
        if kept is not None and _meaning(kept.read_bytes(), kept) != _meaning(content, kept):
            raise UserError(
                f"{flag}: its adapters belong to other weights or to other --solopo-lora flags ({kept} differs); bring "
                "those back, or give another --load and --save"
            )


def _meaning(content: bytes, file: Path) -> Any:
    """What a file of `adapter_files` says: the settings of the adapters wherever their base is, or the base's hash."""
    found = parse_model_json(content, file)
    return read_lora(found, file) if file.name == ADAPTER_CONFIG else found


class Solopo:
    """What `pretrain()` asks of its caller. Parts are made at their first use, when Megatron-LM has its arguments."""

    add_arguments = staticmethod(add_arguments)

    @cached_property
    def args(self) -> argparse.Namespace:
        """Megatron-LM's arguments, parsed and validated by it."""
        from megatron.training import get_args

        parsed: argparse.Namespace = get_args()
        return parsed

    @cached_property
    def config(self) -> Config:
        """Our configuration, made of the arguments. Raises UserError naming flags that do not go together."""
        return config_from_args(self.args)

    @cached_property
    def task(self) -> PreferenceTask:
        """Data, objective and reference."""
        with flags_for_keys():
            # Megatron-LM's log hears of the last pipeline stage alone, which routes through its own layers.
            return PreferenceTask(self.config, counts_routes=False)

    @cached_property
    def _log(self) -> StepLog:
        return StepLog(self.config.run_dir, self.task.metric_names, self.task.topology, self.args.iteration + 1)

    def model_provider(self, provider: Callable[..., Any] | None = None) -> Callable[..., Any]:
        """Return a model provider that gives every chunk of `provider` the response-only head and its weights.

        The weights are those of `--solopo-model-path`. But if `--load` or `--pretrained-checkpoint` holds a
        checkpoint, Megatron-LM loads that instead. With adapters the model is always that of `--solopo-model-path`, and
        checkpoints hold the adapters alone.

        Args:
            provider: the script's own, which returns a GPTModel. None builds a GPTModel of Megatron-LM's arguments,
                with Transformer Engine's layers, or with our plain ones under `--transformer-impl local`.
        """
        build = provider or self._build
        chunks: list[Any] = []

        def provide(*args: Any, **kwargs: Any) -> Any:
            with flags_for_keys():
                chunks.append(self.task.prepare_model(build(*args, **kwargs)))
                # After the last chunk: loading is collective, and so is building tied embeddings.
                if len(chunks) == self.task.topology.num_model_chunks:
                    self._load_weights(chunks)
            return chunks[-1]

        return provide

    def _build(
        self, pre_process: bool = True, post_process: bool = True, vp_stage: int | None = None, **others: Any
    ) -> Any:
        """Later versions also hand over `config` and `pg_collection`, which repeat what is known already."""
        from megatron.training.arguments import core_transformer_config_from_args

        config = core_transformer_config_from_args(self.args)
        config.softmax_scale = self.task.architecture.softmax_scale
        rows = self.config.logprob.chunk_tokens
        return build_chunk(self.task.model, config, chunk_tokens=rows, vp_stage=vp_stage)

    def _load_weights(self, chunks: list[Any]) -> None:
        from megatron.training.checkpointing import checkpoint_exists, get_load_checkpoint_path_by_args

        # All ranks find the path together.
        present = {
            name: Path(get_load_checkpoint_path_by_args(self.args, load_arg=name))
            for name in _LOADED
            if checkpoint_exists(getattr(self.args, name, None))
        }
        has_adapters = self.config.lora is not None
        if has_adapters:
            on_rank_0(lambda: self._keep_base(present))
        if has_adapters or not present:
            load_weights(chunks, self.task.architecture, self.config.model.path)
        if has_adapters:
            for chunk in chunks:
                add_base_class(chunk, StoresAdapters)

    def _keep_base(self, present: Mapping[str, Path]) -> None:
        """Raise UserError if a checkpoint holds no adapters, or those of other settings or weights.

        What they belong to is in two files of `--save`, from the beginning: a run that was killed has no other ones.
        """
        now = self.task.adapter_files
        for name, path in present.items():
            flag = f"--{name.replace('_', '-')}={getattr(self.args, name)}"
            if not any(ADAPTER in key for key in read_metadata(path).state_dict_metadata):
                raise UserError(
                    f"{flag}: {path.name} holds no adapters; give the whole model as --solopo-model-path, and leave "
                    f"out --{name.replace('_', '-')} at the start"
                )
            _check_description(now, flag, [path.parent, path / HUGGINGFACE_FOLDER], is_needed=True)
        if self.args.save is not None:
            save = Path(self.args.save)
            # Checkpoints of a killed run may lie there, which the files describe.
            _check_description(now, f"--save={save}", [save], is_needed=False)
            write_files(now, save)

    def datasets(
        self, train_val_test_num_samples: Any, vp_stage: int | None = None
    ) -> tuple[PackStream, PackStream | None, None]:
        """Return the training and validation iterators of this rank.

        Every virtual stage reads the same packs from iterators of its own.

        Raises UserError if the batch sizes do not fit the layout or the data, or if evaluation has no data.
        """
        args = self.args
        samples = train_val_test_num_samples
        on_every_rank(lambda: self._log)  # one rank writes; if it cannot, all ranks learn of it here
        train = self._stream(
            "train", args.global_batch_size, args.micro_batch_size, args.consumed_train_samples, samples[0]
        )
        if not args.eval_iters:
            return train, None, None
        if "eval" not in self.task.datasets.by_split:
            raise UserError(
                f"--eval-iters={args.eval_iters}, but {self.config.data.path} has no held-out split; "
                "set it to 0, or prepare the data with --eval-count"
            )
        size = getattr(args, "eval_global_batch_size", args.global_batch_size)
        micro = getattr(args, "eval_micro_batch_size", args.micro_batch_size)
        return train, self._stream("eval", size, micro, args.consumed_valid_samples, samples[1]), None

    # Every tensor-parallel rank and pipeline stage reads its packs itself, so Megatron-LM must not broadcast them.
    datasets.is_distributed = True  # type: ignore[attr-defined]

    def _stream(self, split: str, size: int, micro_batch_size: int, consumed: int, total: int) -> PackStream:
        """Return batches of `size` triplets from `consumed` on. Those up to `total` are checked now."""
        num_packs = size // (micro_batch_size * self.task.topology.data_group.size())
        multiple = self.task.topology.packs_multiple
        if num_packs % multiple:
            raise UserError(
                f"{num_packs} micro-batches (global batch size / (micro-batch size x DP)) are no multiple of the "
                f"{multiple} pipeline stages of the interleaved schedule; change --global-batch-size or "
                "--micro-batch-size"
            )
        with flags_for_keys():
            loader = self.task.batches(split, global_batch_size=size, packs_multiple=num_packs)
            num_batches = -(-max(total - consumed, 0) // size)
            return PackStream(loader, split, num_packs, consumed_triplets=consumed, num_batches=num_batches)

    def forward_step(self, data_iterator: Any, model: torch.nn.Module) -> tuple[Tensor, ReportingLossFunction]:
        """Run one pack through a model chunk, as the `forward_step_func` of `pretrain`."""
        with flags_for_keys():
            item: StepPack = next(data_iterator)
        # Once per pack, although it runs through every chunk.
        if item.split == "train" and not get_attr_wrapped_model(model, "vp_stage"):
            count_sequence_lengths(item.pack.block_lengths_B)
        output, loss = self.task.forward(item.pack, model, item.split)
        return output, partial(self._loss, item, loss)

    def _loss(
        self, item: StepPack, loss: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]], output: Tensor
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Return the loss, the number of triplets, and [sum, triplets] by metric, for Megatron-LM to add and divide."""
        value, count, report_M = loss(output)
        if item.split == "train":
            self._log.add(item, report_M)
        pairs = torch.stack([report_M, count.to(report_M.dtype).expand_as(report_M)], dim=1)
        return value, count, dict(zip(self.task.metric_names, pairs.unbind(), strict=True))

    def pretrain(
        self, pretrain: Callable[..., Any], model_provider: Callable[..., Any] | None = None, **keywords: Any
    ) -> None:
        """Call Megatron-LM's `pretrain` in the form that its version has.

        Args:
            pretrain: `megatron.training.pretrain`, or a function of the same form.
            model_provider: see `model_provider`.
            keywords: more arguments of `pretrain`, such as `args_defaults`.
        """
        try:
            call_pretrain(
                pretrain,
                datasets=self.datasets,
                model_provider=self.model_provider(model_provider),
                forward_step=self.forward_step,
                add_arguments=self.add_arguments,
                keywords=keywords,
            )
        finally:  # Megatron-LM may leave through sys.exit
            if "task" in vars(self):
                self.add_model_files()

    def add_model_files(self) -> None:
        """Copy the model's config and tokenizer into every checkpoint under `--save`, to the folder `huggingface/`.

        With them our commands take the checkpoint as a model: `model.path`, `convert export`, `evaluate`. `pretrain`
        does it; scripts that do not use it call this method. All ranks may call it, rank 0 writes.
        """
        if self.args.save is None or self.args.rank != 0:
            return
        files = self.task.model_files()
        for path in sorted(Path(self.args.save).glob("iter_*")):
            folder = path / HUGGINGFACE_FOLDER
            if is_megatron_checkpoint(path) and not folder.exists():
                with atomic_path(folder) as temporary:
                    write_files(files, temporary)
