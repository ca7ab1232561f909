"""Starts of large worlds: what one rank opens, reads and exchanges does not grow with the number of ranks."""

import shutil
from datetime import timedelta
from threading import Thread
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from megatron_solopo import checksums
from megatron_solopo.config import Config, LoRAConfig
from megatron_solopo.plan.answer import startup_text
from megatron_solopo.plan.startup import WORLDS, StartupCounts
from megatron_solopo.plan.startup_dry_run import count_startup, count_startups
from megatron_solopo.train.trainer import precompute_reference
from tests.prepared import make_prepared, make_tokenizer
from tests.tiny_models import make_model
from tests.train.runs import small_config

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="the ranks are built on the CPU"),
    pytest.mark.filterwarnings("ignore::FutureWarning:torch"),
]
EIGHT = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2, "context_parallel_size": 2}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A run with a tokenizer, a reference cache and weights, eight ranks to a replica."""
    folder = tmp_path_factory.mktemp("startup")
    make_model(folder / "model", "llama3", seed=0)
    make_prepared(folder / "prepared", rows=140, eval_count=4, seed=0)
    make_tokenizer(folder / "model")
    training = {"global_batch_size": 128, "max_steps": 2}
    with mock.patch.object(checksums, "_SETTLED_NS", 0):  # the weights were written just now
        precompute_reference(small_config(folder, "reference", {}, training=training), overwrite=False)
    return small_config(folder, "run", EIGHT, training=training)


@pytest.fixture(scope="module")
def counts(config: Config) -> list[StartupCounts]:
    """After one start that is not counted, because it imports libraries."""
    counts = [count_startup(config, ranks, builds_model=True) for ranks in (8, *WORLDS)][1:]
    shutil.rmtree(config.run_dir)
    return counts


def test_what_a_rank_exchanges_is_the_same_in_every_world(counts: list[StartupCounts]) -> None:
    assert [each.exchanges for each in counts] == [counts[0].exchanges] * len(WORLDS)
    sizes = [each.exchanged_bytes for each in counts]
    assert min(sizes) > 1000, "the config at least"
    # pickle writes the address of a tensor's memory in decimal, twice, and addresses have 14 or 15 digits.
    assert max(sizes) - min(sizes) <= 8


def test_a_rank_opens_its_own_files_and_those_alone(counts: list[StartupCounts]) -> None:
    """config.json, the manifest, three files of each split, and the weights that it reads."""
    assert [each.files_opened for each in counts] == [9, 8, 8]
    assert max(each.bytes_read for each in counts) < 1.01 * min(each.bytes_read for each in counts)


def test_replicas_share_the_weights(config: Config, counts: list[StartupCounts]) -> None:
    """Two replicas (of context parallelism) among 8 ranks; with 16 and more, the last one has nothing to read."""
    stored = (config.model.path / "model.safetensors").stat().st_size
    assert 0 < counts[0].weight_bytes < stored / 4
    assert counts[1].weight_bytes <= counts[0].weight_bytes / 4 and counts[2].weight_bytes == 0


def test_adapters_start_from_the_weights_of_their_base(config: Config, counts: list[StartupCounts]) -> None:
    adapted = count_startup(config.model_copy(update={"lora": LoRAConfig(rank=2)}), 8, builds_model=True)
    shutil.rmtree(config.run_dir)
    assert (adapted.weight_bytes, adapted.files_opened) == (counts[0].weight_bytes, counts[0].files_opened)
    assert adapted.exchanges == counts[0].exchanges


def test_store_and_connections_grow_slower_than_the_number_of_ranks(counts: list[StartupCounts]) -> None:
    small, _, large = counts
    assert large.store_keys <= small.store_keys + 2
    assert small.gloo_groups == (8,) and large.gloo_groups == (32, 32), "those for signals"
    assert large.gloo_bytes < 2 * small.gloo_bytes * (large.ranks / small.ranks) ** 0.5


def test_a_plan_prints_the_counts_and_writes_nothing_into_the_run_directory(config: Config) -> None:
    rows = startup_text(count_startups(config)).splitlines()[2:]
    assert [row.split()[0] for row in rows] == ["8", "64", "1,024"]
    assert rows[1].split()[1:5] == rows[2].split()[1:5], "files, bytes read, exchanges, bytes exchanged"
    assert not config.run_dir.exists()


def test_a_plan_says_why_nothing_is_counted() -> None:
    assert startup_text("no weights") == "Start-up: not counted: no weights"
    assert "no world of 8, 64, 1024 ranks is a multiple" in startup_text([])


class CountingStore(dist.Store):
    """Counts the keys that are set and the bytes that are read."""

    def __init__(self, store: dist.Store) -> None:
        super().__init__()
        self._store, self.keys, self.bytes_read = store, 0, 0

    def set(self, key: str, value: Any) -> None:
        self.keys += 1
        self._store.set(key, value)

    def get(self, key: str) -> bytes:
        value = self._store.get(key)
        self.bytes_read += len(value)
        return value

    def wait(self, keys: list[str], *timeout: timedelta) -> None:
        self._store.wait(keys, *timeout)


@pytest.mark.parametrize("ranks", [2, 8, 24])
def test_a_gloo_group_reads_as_many_bytes_as_are_counted(ranks: int) -> None:
    common = dist.HashStore()
    stores, groups = [CountingStore(common) for _ in range(ranks)], []

    def join(rank: int) -> None:
        groups.append(dist.ProcessGroupGloo(stores[rank], rank, ranks, timedelta(seconds=60)))

    threads = [Thread(target=join, args=(rank,)) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    counted = StartupCounts(ranks, 0, 0, 0, 0, 0, 1, gloo_groups=(ranks,))
    assert len(groups) == ranks and {store.keys for store in stores} == {counted.store_keys}
    for store in stores:  # addresses differ in length with the host's
        assert store.bytes_read == pytest.approx(counted.gloo_bytes, rel=0.15)
