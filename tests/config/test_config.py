"""Layers, defaults and the one line per mistake that a user reads."""

from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from megatron_solopo.config import (
    Config,
    ModelConfig,
    ObjectiveConfig,
    ParallelConfig,
    load_config,
    parse_config,
    save_config,
)
from megatron_solopo.config.load import as_override
from megatron_solopo.errors import UserError

MINIMAL = {
    "run_dir": "runs/one",
    "model": {"path": "model"},
    "data": {"path": "data", "max_tokens_per_pack": 4096},
    "training": {"global_batch_size": 8},
}


def load(tmp_path: Path, extra: str = "", overrides: tuple[str, ...] = ()) -> Config:
    """The minimal config, `extra` YAML lines after it, and the overrides."""
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(MINIMAL) + extra, encoding="utf-8")
    return load_config(path, overrides)


def mistakes(tmp_path: Path, extra: str = "", overrides: tuple[str, ...] = ()) -> list[str]:
    with pytest.raises(UserError) as raised:
        load(tmp_path, extra, overrides)
    return str(raised.value).splitlines()


def test_defaults_are_one_process_and_the_solopo_objective(tmp_path: Path) -> None:
    config = load(tmp_path)
    assert config.run_dir == Path("runs/one") and config.data.max_tokens_per_pack == 4096
    assert config.parallel.model_parallel_size == 1 and not config.parallel.uses_sequence_parallel
    assert (config.objective.name, config.objective.loss_type, config.objective.align) == ("solopo", "dpo", "chosen")


@pytest.mark.parametrize(
    ("loss_type", "alpha"),
    [("dpo", 3), ("simpo", 1), ("orpo", 1), ("ipo", 1), ("cpo", 1), ("hinge", 1), ("robust", 1)],
)
def test_alpha_defaults_to_the_papers_and_yields_to_the_users(loss_type: str, alpha: float) -> None:
    assert ObjectiveConfig(loss_type=loss_type).alignment_weight == alpha
    assert ObjectiveConfig(loss_type=loss_type, alpha=0.25).alignment_weight == 0.25
    assert ObjectiveConfig(loss_type=loss_type, alpha=0).alignment_weight == 0


def test_only_losses_with_a_reference_need_one() -> None:
    need = {each for each in ("dpo", "simpo", "orpo", "ipo", "cpo", "hinge", "robust") if _needs_reference(each)}
    assert need == {"dpo", "ipo", "hinge", "robust"}


def _needs_reference(loss_type: str) -> bool:
    return ObjectiveConfig(loss_type=loss_type).needs_reference


@pytest.mark.parametrize(
    ("tensor", "setting", "expected"),
    [(1, None, False), (2, None, True), (2, False, False), (2, True, True)],
)
def test_sequence_parallel_follows_tensor_parallel_unless_set(
    tensor: int, setting: bool | None, expected: bool
) -> None:
    parallel = ParallelConfig(tensor_model_parallel_size=tensor, sequence_parallel=setting)
    assert parallel.uses_sequence_parallel is expected


def test_model_parallel_size_is_the_product() -> None:
    parallel = ParallelConfig(tensor_model_parallel_size=2, pipeline_model_parallel_size=3, context_parallel_size=5)
    assert parallel.model_parallel_size == 30


def test_overrides_win_over_the_file_and_the_file_over_defaults(tmp_path: Path) -> None:
    extra = "objective: {alpha: 2, beta: 0.5}\n"
    config = load(tmp_path, extra, ("objective.alpha=4", "parallel.context_parallel_size=2", "objective.alpha=5"))
    assert (config.objective.alpha, config.objective.beta, config.objective.gamma) == (5, 0.5, 0.5)
    assert config.parallel.context_parallel_size == 2 and config.parallel.tensor_model_parallel_size == 1


def test_an_override_of_null_takes_the_default_back(tmp_path: Path) -> None:
    config = load(tmp_path, "objective: {alpha: 2}\n", ("objective.alpha=null",))
    assert config.objective.alpha is None and config.objective.alignment_weight == 3


@pytest.mark.parametrize("text", ["1e-5", "1.0e-05", "0.00001", "1E-5"])
def test_a_learning_rate_is_a_float_in_every_notation(tmp_path: Path, text: str) -> None:
    for config in (load(tmp_path, f"optimizer: {{lr: {text}}}\n"), load(tmp_path, "", (f"optimizer.lr={text}",))):
        assert isinstance(config.optimizer.lr, float) and config.optimizer.lr == 1e-5


@pytest.mark.parametrize(
    ("override", "unknown", "suggested"),
    [
        ("objective.alpah=2", "objective.alpah", "objective.alpha"),
        ("objectives.alpha=2", "objectives", "objective"),
        ("parallel.tensor_parallel_size=2", "parallel.tensor_parallel_size", "parallel.tensor_model_parallel_size"),
        ("context_parallel_size=2", "context_parallel_size", "parallel.context_parallel_size"),
        ("alpha=2", "alpha", "lora.alpha or objective.alpha"),
        ("optimizer.beta=0.1", "optimizer.beta", "objective.beta"),
        ("lora.rnk=8", "lora.rnk", "lora.rank"),
    ],
)
def test_an_unknown_key_suggests_the_nearest(tmp_path: Path, override: str, unknown: str, suggested: str) -> None:
    (line,) = mistakes(tmp_path, "", (override,))
    assert f"unknown key {unknown};" in line and f"did you mean {suggested}?" in line


def test_an_unknown_key_like_no_other_lists_the_legal_ones(tmp_path: Path) -> None:
    (line,) = mistakes(tmp_path, "", ("logging.zzz=1",))
    assert "unknown key logging.zzz" in line and "legal here: console_steps, tensorboard, wandb_project" in line
    (line,) = mistakes(tmp_path, "", ("optimizer.foo=1",))
    assert "did you mean" not in line and "min_lr" in line and "clip_grad" in line
    (line,) = mistakes(tmp_path, "", ("lora.r=8",))
    assert "unknown key lora.r; legal here: rank, alpha, use_rslora, dropout, target_modules" in line


@pytest.mark.parametrize(
    ("overrides", "complaint"),
    [
        (("loss_type=exo_pair",), "label_smoothing=0.0 is not in (0, 0.5), which loss_type=exo_pair needs"),
        (("loss_type=robust", "label_smoothing=0.5"), "label_smoothing=0.5 is not in [0, 0.5)"),
        (("loss_type=nca_pair", "label_smoothing=0.1"), "set it to 0, or loss_type to dpo, robust, exo_pair"),
        (("loss_type=[sigmoid,sft]",), "['sigmoid', 'sft'] is not one loss; name one of dpo, simpo"),
        (("loss_type=bco_pair",), "'nca_pair' or 'sppo_hard'"),
        (("loss_type=simpo", "ld_alpha=0.5"), "ld_alpha=0.5 needs a loss_type with a reference; loss_type=simpo has"),
        (("ld_alpha=1.5",), "less than or equal to 1; for example objective.ld_alpha=0.5, or null (1)"),
        (("loss_type=orpo", "use_weighting=true"), "use_weighting=true would also weight the likelihood"),
    ],
)
def test_losses_and_their_weights_that_do_not_go_together(
    tmp_path: Path, overrides: tuple[str, ...], complaint: str
) -> None:
    (line,) = mistakes(tmp_path, "", tuple(f"objective.{each}" for each in overrides))
    assert complaint in line


def test_an_illegal_value_in_a_section_that_may_be_null_has_an_example(tmp_path: Path) -> None:
    (line,) = mistakes(tmp_path, "", ("lora.rank=0",))
    assert "lora.rank=0: Input should be greater than 0; for example lora.rank=16" in line and "null" not in line
    (line,) = mistakes(tmp_path, "", ("lora=16",))
    assert "for example lora={rank: 16}, or null (train the whole model)" in line


@pytest.mark.parametrize(
    ("override", "key", "legal"),
    [
        ("objective.loss_type=kto", "objective.loss_type='kto'", "'dpo', 'simpo', 'orpo', 'ipo', 'cpo', 'hinge'"),
        ("objective.distance=l3", "objective.distance='l3'", "'l1', 'l2' or 'huber'"),
        ("parallel.recompute_granularity=some", "parallel.recompute_granularity='some'", "'selective' or 'full'"),
        ("model.dtype=float16", "model.dtype='float16'", "'float32' or 'bfloat16'"),
        ("model.fp8_recipe=nvfp4", "model.fp8_recipe='nvfp4'", "'delayed', 'tensorwise', 'blockwise' or 'mxfp8'"),
        ("parallel.tensor_model_parallel_size=0", "parallel.tensor_model_parallel_size=0", "greater than 0"),
        ("optimizer.lr=-1e-5", "optimizer.lr=-1e-05", "greater than 0"),
        ("optimizer.lr=.nan", "optimizer.lr=nan", "finite"),
        ("training.global_batch_size=many", "training.global_batch_size='many'", "valid integer"),
        ("training.max_steps=1.5", "training.max_steps=1.5", "valid integer"),
        ("seed=[1,2]", "seed=[1, 2]", "valid integer"),
        ("checkpoint.resume=perhaps", "checkpoint.resume='perhaps'", "valid boolean"),
        ("objective=3", "objective=3", "dictionary"),
    ],
)
def test_a_wrong_value_names_key_value_and_what_is_legal(tmp_path: Path, override: str, key: str, legal: str) -> None:
    (line,) = mistakes(tmp_path, "", (override,))
    assert line.startswith(f"{tmp_path / 'config.yaml'} and the command line: ") and key in line and legal in line


@pytest.mark.parametrize(
    ("override", "example"),
    [
        ("checkpoint.every_minutes=1h", "for example checkpoint.every_minutes=60, or null (never)"),
        ("checkpoint.keep_last=0", "for example checkpoint.keep_last=3, or null (all)"),
        ("checkpoint.must_save_by=18:00", "for example checkpoint.must_save_by=2030-01-31T18:00"),
        ("profile.steps=10", "for example profile.steps=[10,12], or null (none)"),
        ("profile.steps=[0,2]", "for example profile.steps=[10,12], or null (none)"),
        ("profile.steps=[12,10]", "for example [10,12]"),
        ("profile.ranks=all", "for example profile.ranks=[0]"),
        ("profile.ranks=[]", "for example profile.ranks=[0]"),
        ("parallel.recompute_modules=mlp", "for example parallel.recompute_modules=[core_attn]"),
        (
            "parallel.pipeline_model_parallel_layout=3",
            "pipeline_model_parallel_layout='Et*7|(t*8|)*2t*7L', or null (all",
        ),
        ("training.global_batch_size=0", "for example training.global_batch_size=64"),
    ],
)
def test_a_wrong_value_is_answered_by_a_legal_one(tmp_path: Path, override: str, example: str) -> None:
    (line,) = mistakes(tmp_path, "", (override,))
    assert example in line and override.split("=")[0].split(".")[1] in line


@pytest.mark.parametrize("path", ["", "3"])
def test_a_path_that_is_none_is_called_so_in_plain_words(tmp_path: Path, path: str) -> None:
    (line,) = mistakes(tmp_path, "", (f"model.path={path}",))
    assert line.endswith(f"model.path={path or 'null'}: Input should be a path")


def test_every_example_of_the_schema_is_legal(tmp_path: Path) -> None:
    """Each with the keys that it needs besides."""
    needed = {
        "hierarchical_context_parallel_sizes": ("parallel.cp_comm_type=a2a+p2p", "parallel.context_parallel_size=8"),
        "sources": ("data.path=null",),
    }
    for section, field in Config.model_fields.items():
        for name, key in getattr(field.annotation, "model_fields", {}).items():
            for example in key.examples or ():
                override = f"{section}.{name}={as_override(example).strip(chr(39))}"
                loaded = load(tmp_path, "", (*needed.get(name, ()), override))
                assert getattr(getattr(loaded, section), name) is not None


@pytest.mark.parametrize("override", ["seed=true", "objective.alpha=true", "training.global_batch_size=true"])
def test_true_is_not_a_number(tmp_path: Path, override: str) -> None:
    (line,) = mistakes(tmp_path, "", (override,))
    assert override.split("=")[0] in line


def test_a_beta_for_orpo_is_refused_and_told_its_name_here(tmp_path: Path) -> None:
    (line,) = mistakes(tmp_path, "", ("objective.loss_type=orpo", "objective.beta=0.2"))
    assert "beta=0.2" in line and "orpo_lambda" in line
    assert load(tmp_path, "", ("objective.loss_type=orpo", "objective.orpo_lambda=0.2")).objective.beta == 0.1


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("parallel.tp_comm_overlap=true",), ["tp_comm_overlap=true", "packs differ in length", "false"]),
        (
            ("parallel.overlap_param_gather=true", "parallel.overlap_grad_reduce=false"),
            ["overlap_param_gather=true", "overlap_grad_reduce=true"],
        ),
        (
            ("parallel.overlap_param_gather=true", "optimizer.use_distributed_optimizer=false"),
            ["parallel.overlap_param_gather=true", "optimizer.use_distributed_optimizer=true"],
        ),
        (
            ("parallel.num_distributed_optimizer_instances=2", "optimizer.use_distributed_optimizer=false"),
            ["parallel.num_distributed_optimizer_instances=2", "optimizer.use_distributed_optimizer=true"],
        ),
        (
            ("parallel.context_parallel_size=8", "parallel.cp_comm_type=a2a+p2p"),
            ["cp_comm_type=a2a+p2p", "hierarchical_context_parallel_sizes", "context_parallel_size=8"],
        ),
        (
            (
                "parallel.context_parallel_size=8",
                "parallel.cp_comm_type=a2a+p2p",
                "parallel.hierarchical_context_parallel_sizes=[2,2]",
            ),
            ["whose product is context_parallel_size=8"],
        ),
        (
            ("parallel.hierarchical_context_parallel_sizes=[2,2]",),
            ["hierarchical_context_parallel_sizes=[2, 2]", "no effect", "cp_comm_type=p2p"],
        ),
    ],
)
def test_communication_that_cannot_work_is_refused_with_the_reason(tmp_path: Path, overrides, words) -> None:
    (line,) = mistakes(tmp_path, "", overrides)
    assert all(word in line for word in words)


def test_an_offloaded_optimizer_must_be_the_distributed_one(tmp_path: Path) -> None:
    overrides = ("optimizer.optimizer_offload_fraction=0.5", "optimizer.use_distributed_optimizer=false")
    (line,) = mistakes(tmp_path, "", overrides)
    assert "optimizer_offload_fraction=0.5" in line and "use_distributed_optimizer=true" in line
    assert load(tmp_path, "", overrides[:1]).optimizer.optimizer_offload_fraction == 0.5


def test_one_virtual_chunk_is_no_interleaving(tmp_path: Path) -> None:
    (line,) = mistakes(tmp_path, "", ("parallel.virtual_pipeline_model_parallel_size=1",))
    assert "parallel.virtual_pipeline_model_parallel_size=1" in line and "greater than or equal to 2" in line


def test_every_mistake_has_a_line_of_its_own(tmp_path: Path) -> None:
    lines = mistakes(tmp_path, "", ("objective.beta=-1", "objective.typo_key=1", "seed=x", "optimizer.lr=0"))
    assert len(lines) == 4
    for key in ("objective.beta", "objective.typo_key", "seed", "optimizer.lr"):
        assert sum(key in line for line in lines) == 1


def test_required_keys_are_named(tmp_path: Path) -> None:
    path = tmp_path / "empty.yaml"
    path.write_text("data: {path: d}\nmodel: {}\n")
    with pytest.raises(UserError) as raised:
        load_config(path)
    required = [
        f"{path}: {key} is required" for key in ("run_dir", "model.path", "data.max_tokens_per_pack", "training")
    ]
    assert str(raised.value).splitlines() == required


@pytest.mark.parametrize(
    "content",
    [b"a: [1\n", b"a: 1\na: 2\n", b"\xff\xfe\x00", b"- 1\n- 2\n", b"3\n", b"seed: ${nowhere}\n"],
    ids=["syntax", "duplicate key", "not UTF-8", "a list", "a number", "interpolation"],
)
def test_a_file_that_is_no_config_is_one_line(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "config.yaml"
    path.write_bytes(content)
    with pytest.raises(UserError) as raised:
        load_config(path)
    assert "\n" not in str(raised.value) and str(raised.value).startswith(str(path))


def test_an_absent_file_and_a_directory_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"absent\.yaml: cannot read the config: No such file"):
        load_config(tmp_path / "absent.yaml")
    with pytest.raises(UserError, match="Is a directory"):
        load_config(tmp_path)


@pytest.mark.parametrize("override", ["objective.alpha", "--alpha", "=3", "objective.alpha=[1"])
def test_a_malformed_override_is_quoted(tmp_path: Path, override: str) -> None:
    (line,) = mistakes(tmp_path, "", (override,))
    assert f"override {override!r}" in line


def test_save_and_load_give_the_same_config(tmp_path: Path) -> None:
    overrides = (
        "objective.loss_type=simpo",
        "optimizer.lr=1e-5",
        "parallel.context_parallel_size=2",
        "reference.cache=c",
    )
    config = load(tmp_path, "logging: {wandb_project: solo}\n", overrides)
    saved = tmp_path / "run" / "config.yaml"
    save_config(config, saved)
    assert load_config(saved) == config
    assert yaml.safe_load(saved.read_text())["optimizer"]["adam_beta2"] == 0.95, "defaults are written out"
    assert [path.name for path in saved.parent.iterdir()] == ["config.yaml"]


def test_a_config_does_not_change_after_loading(tmp_path: Path) -> None:
    config = parse_config(MINIMAL, source="test")
    with pytest.raises(ValidationError, match="frozen"):
        config.objective.alpha = 1


def test_only_models_with_delayed_scales_are_scored_in_another_precision() -> None:
    def scored(recipe: str) -> ModelConfig:
        model = {"path": "model", "dtype": "bfloat16", "fp8": "hybrid", "fp8_recipe": recipe, "fp8_param": True}
        return parse_config(MINIMAL | {"model": model}, source="test").model.without_gradients

    assert (scored("delayed").fp8, scored("delayed").fp8_param) == (None, False)
    assert (scored("blockwise").fp8, scored("blockwise").fp8_param) == ("hybrid", True)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("data.path=null",), "data: needs either path, a directory of data prepare, or sources"),
        (("data.sources=[{path: a}]",), "data: needs either path, a directory of data prepare, or sources"),
        (("data.path=null", "data.sources=[{path: x/a},{path: y/a}]"), "several are called 'a'; give each a name"),
        (("data.path=null", "data.sources=[{path: a b}]"), "the name 'a b' has other characters than A-Z"),
        (("data.path=null", "data.sources=[{path: a,wieght: 2}]"), "did you mean data.sources.weight?"),
        (("data.path=null", "data.sources=[{path: a,weight: 0}]"), "data.sources.0.weight=0: Input should be greater"),
        (
            ("data.path=null", "data.sources=[{path: a}]", "objective.token_alignment=reverse_kl"),
            "objective.token_alignment=reverse_kl works with data.path alone",
        ),
    ],
)
def test_sources_that_cannot_be_are_refused(tmp_path: Path, overrides: tuple[str, ...], words: str) -> None:
    (line,) = mistakes(tmp_path, "", overrides)
    assert words in line


def test_what_reads_one_directory_says_how_to_give_it_one(tmp_path: Path) -> None:
    sources = ("data.path=null", "data.sources=[{path: a}]")
    with pytest.raises(UserError) as error:
        _ = load(tmp_path, "", sources).data.directory
    advice = str(error.value).split("; set ")[1].replace("DIR", "b").split()
    assert load(tmp_path, "", (*sources, *advice)).data.directory == Path("b")
