"""The installed TRL: its own code computes the same losses, and the page "From TRL" maps every key that it has."""

import dataclasses
import json
import re
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch
from datasets import Dataset
from torch import Tensor
from transformers import AutoTokenizer
from trl import DPOConfig, DPOTrainer

from megatron_solopo.config import LOSS_ALIASES, Config, LossType, ObjectiveConfig, dotted
from megatron_solopo.data.prepared import load_prepared
from megatron_solopo.objective import compute_objective
from tests.data.conversations import write_tokenizer
from tests.data.sample_rows import prepare, write_rows
from tests.test_documentation import REQUIRED, ROOT

PAGE = (ROOT / "docs" / "guides" / "from-trl.md").read_text(encoding="utf-8")
CHOSEN, REJECTED = [1, 6, 4, 9], [3, 2, 9, 4]
"""Response tokens of four pairs."""
WIDTH = 12
HERE = {**LOSS_ALIASES, **{name: name for name in get_args(LossType)}}


class Batch:
    """Random log-probabilities of response tokens, [8, WIDTH]: four chosen answers, then four rejected ones."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(3)
        self.lengths = torch.tensor(CHOSEN + REJECTED)
        self.mask = torch.arange(WIDTH) < self.lengths[:, None]
        shared = torch.tensor([min(pair) for pair in zip(CHOSEN, REJECTED, strict=True)] * 2)
        self.verbose = self.mask & (torch.arange(WIDTH) >= shared[:, None])
        values, references, squares = (-2 * torch.rand(8, WIDTH, generator=generator) for _ in range(3))
        self.values = values.requires_grad_()
        self.logps, self.reference_logps, self.log_squares = (
            each * self.mask for each in (values, references, squares)
        )


class Scores(torch.nn.Module):
    """A model that gives these log-probabilities, as TRL patches models to."""

    is_gradient_checkpointing = False

    def __init__(self, logps: Tensor, log_squares: Tensor) -> None:
        super().__init__()
        others = torch.zeros_like(logps)
        self.outputs = SimpleNamespace(
            log_probs=logps, log_sum_sq_probs=log_squares, entropy=others, mean_logits=others, is_top1=others.bool()
        )

    def forward(self, **_: Any) -> Any:
        return self.outputs


def trls_loss(batch: Batch, settings: dict[str, Any]) -> Tensor:
    """The loss of TRL's `DPOTrainer` on models that give these log-probabilities."""
    policy, reference = (Scores(logps, batch.log_squares) for logps in (batch.logps, batch.reference_logps))

    def same(value: Any) -> Any:
        return value

    trainer = SimpleNamespace(
        model=policy,
        ref_model=reference,
        accelerator=SimpleNamespace(device=torch.device("cpu"), gather=same, gather_for_metrics=same),
        args=SimpleNamespace(gradient_checkpointing_kwargs=None),
        aux_loss_enabled=False,
        precompute_ref_logps=False,
        f_divergence_type="reverse_kl",
        loss_types=[settings["loss_type"]],
        loss_weights=[1.0],
        beta=settings["beta"],
        ld_alpha=settings.get("ld_alpha"),
        label_smoothing=settings.get("label_smoothing", 0.0),
        use_weighting=settings.get("use_weighting", False),
        _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0,
        _tp_size=1,
    )
    before = torch.zeros(8, 1, dtype=torch.bool)
    mask = torch.cat([before, batch.mask], dim=1).long()  # one token of a prompt before the answers
    inputs = {"input_ids": torch.ones_like(mask), "attention_mask": torch.ones_like(mask), "completion_mask": mask}
    return DPOTrainer._compute_loss(trainer, policy, inputs, False)


def our_loss(batch: Batch, settings: dict[str, Any]) -> Tensor:
    config = ObjectiveConfig(name="short_po", **settings)
    roles = config.roles.all

    def by_role(values: Tensor) -> dict[Any, Tensor]:
        return dict(zip(roles, values.chunk(2), strict=True))

    verbose = 1.0 if config.ld_alpha is None else config.ld_alpha
    weights = torch.where(batch.verbose, verbose, 1.0)
    further = {"verbose_logps": batch.logps * batch.verbose, "log_squares": batch.log_squares}
    return compute_objective(
        config,
        by_role(batch.logps.sum(dim=1)),
        by_role(batch.lengths),
        by_role((batch.reference_logps * weights).sum(dim=1)),
        {name: by_role(values.sum(dim=1)) for name, values in further.items()},
    ).loss_T.mean()


LOSSES = ["sigmoid", "sigmoid_norm", "hinge", "ipo", "robust", "exo_pair", "nca_pair", "sppo_hard", "apo_zero"]
LOSSES += ["apo_down"]


WEIGHTS = [{}, {"ld_alpha": 0.3}, {"use_weighting": True}]
# TRL 1.16.0 multiplies what relu has returned in place, which autograd refuses.
CASES = [(loss, weights) for loss in LOSSES for weights in WEIGHTS if loss != "hinge" or "use_weighting" not in weights]


@pytest.mark.parametrize(("loss_type", "weights"), CASES, ids=str)
def test_trls_own_code_computes_the_same_loss_and_gradient(loss_type: str, weights: dict[str, Any]) -> None:
    smoothing = {"label_smoothing": 0.2} if loss_type in ("robust", "exo_pair") else {}
    settings = {"loss_type": loss_type, "beta": 0.7} | smoothing | weights
    found = {}
    for compute in (trls_loss, our_loss):
        batch = Batch()
        loss = compute(batch, settings)
        loss.backward()
        found[compute] = loss.detach(), batch.values.grad
    torch.testing.assert_close(found[our_loss], found[trls_loss])


def table(heading: str) -> list[list[str]]:
    """The cells of the rows of the table below a heading."""
    part = PAGE.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    rows = [line for line in part.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in rows[1:]]


def quoted(cell: str) -> list[str]:
    return re.findall(r"`([\w.]+)`", cell)


def test_the_page_maps_every_key_once() -> None:
    own = {name for name in vars(DPOConfig)["__annotations__"] if not name.startswith("_")}
    keys = {field.name for field in dataclasses.fields(DPOConfig)}
    parts = {heading: table(heading) for heading in ("Keys of `DPOConfig`", "Keys of `TrainingArguments`")}
    named = {heading: [key for row in rows for key in quoted(row[0])] for heading, rows in parts.items()}
    # TRL declares one of transformers' keys again, for another default.
    assert sorted(named["Keys of `DPOConfig`"]) == sorted(own - {"learning_rate"})
    assert sorted(named["Keys of `TrainingArguments`"]) == sorted(keys - own | {"learning_rate"})
    legal = {key for key, _ in dotted(Config.model_validate(REQUIRED | {"lora": {}}).model_dump(mode="json"))}
    for rows in parts.values():
        for _, here, remark in rows:
            assert here == "-" or set(quoted(here)) <= legal, here
            assert here != "-" or remark


def test_defaults_that_the_page_calls_the_same_are_the_same() -> None:
    ours = dict(dotted(Config.model_validate(REQUIRED).model_dump(mode="json")))
    theirs = DPOConfig(output_dir="unused", report_to="none", use_cpu=True)
    rows = [*table("Keys of `DPOConfig`"), *table("Keys of `TrainingArguments`")]
    called_same = {quoted(one)[0]: quoted(here)[0] for one, here, remark in rows if "the same default" in remark}
    assert {one: getattr(theirs, one) for one in called_same} == {one: ours[key] for one, key in called_same.items()}
    assert len(called_same) == 4


def test_rows_have_the_tokens_of_trls_trainer(tmp_path: Path) -> None:
    (example,) = (json.loads(block) for block in re.findall(r"```json\n(.*?)```", PAGE, re.DOTALL))
    # Calls in one answer alone would give its messages other keys, by which TRL would find no common prompt.
    implicit = {name: [*example["prompt"], example[name][-1]] for name in ("chosen", "rejected")}
    path = write_tokenizer(tmp_path / "tokenizer", "qwen2_5")
    tokenizer = AutoTokenizer.from_pretrained(path)
    trainer = SimpleNamespace(_tokenizer=tokenizer)
    arguments = DPOConfig(output_dir="unused", report_to="none", use_cpu=True)
    ours: list[dict[str, Any]] = []
    for row in (implicit, example):
        # As JSON text, because a table gives every object all keys.
        rows = Dataset.from_list([row | ({"tools": json.dumps(row["tools"])} if "tools" in row else {})])
        (theirs,) = DPOTrainer._prepare_dataset(trainer, rows, tokenizer, arguments, "train")
        out = tmp_path / f"out{len(ours)}"
        prepare(write_rows(tmp_path / "rows.jsonl", [row]), out, path)
        ours.append(load_prepared(out).train[0])
        assert [ours[-1][name] for name in ("prompt_short", "chosen", "rejected")] == [
            theirs[f"{name}_ids"] for name in ("prompt", "chosen", "rejected")
        ]
    counted = zip(ours[-1]["chosen"], ours[-1]["chosen_mask"], strict=True)
    assert "28 degrees" in tokenizer.decode([token for token, counts in counted if not counts])


def test_the_page_names_every_loss_of_trl_and_what_is_taken_is_legal() -> None:
    (described,) = (each.metadata["help"] for each in dataclasses.fields(DPOConfig) if each.name == "loss_type")
    rows = [(quoted(theirs), here) for theirs, here, _ in table("Losses")]
    named = {loss: here for losses, here in rows for loss in losses}
    assert set(named) == set(re.findall(r"'(\w+)'", described))
    for loss, here in named.items():
        if here == "-" or loss == "sft":
            assert loss not in HERE
        else:
            smoothing = {"label_smoothing": 0.1} if loss == "exo_pair" else {}
            assert f"`{HERE[loss]}`" in here or here == "the same names"
            for value in (loss, [loss]):  # as TRL's command line and its files have it
                assert ObjectiveConfig(loss_type=value, **smoothing).loss_type == HERE[loss]
    assert set(LOSSES) == {loss for loss in named if loss in HERE}
