"""Whole evaluations: a run, its export and a server's model; resumed, refused, counted."""

import functools
import json
import shutil
import tempfile
from pathlib import Path

import pytest
import torch.distributed as dist

from megatron_solopo import cpu_features
from megatron_solopo.errors import UserError
from megatron_solopo.evaluate.long_context import evaluate_long_context
from megatron_solopo.evaluate.scores import render
from megatron_solopo.evaluation_settings import LongContextSettings
from megatron_solopo.files import sha256_file
from megatron_solopo.generate.scoring import SCORERS
from megatron_solopo.results.long_context import SkippedSamples, read_long_context
from tests.evaluate.evaluation_models import CHECKPOINT, MAX_POSITIONS, make_model, make_run
from tests.generate.completion_server import completion_server
from tests.ranks import two_ranks
from tests.triplets.musique_example import read, write

ASKED = {"tasks": ("needle_single", "variable_tracking"), "lengths": (700, 900), "depths": (0.0, 1.0), "samples": 2}
ASKED |= {"max_new_tokens": 12, "batch_size": 2}
_SINGLE = {"tensor_model_parallel_size": 1, "pipeline_model_parallel_size": 1}
PARALLEL = {
    "tp2": {"tensor_model_parallel_size": 2},
    "pp2": {"pipeline_model_parallel_size": 2},
    "dp2": {"data_parallel_size": 2},
}
SHARED_EXPERTS = {"expert_model_parallel_size": 2, "expert_tensor_parallel_size": 1}


def evaluate_here(folder: Path, model: Path, **options):
    """Evaluate with our model on the present ranks. Returns its layout, and the predictions by sample."""
    settings = LongContextSettings(
        model=str(model), output=folder / "r.json", **ASKED | {"backend": "megatron"} | options
    )
    results = evaluate_long_context(settings)
    if results is None:
        return None
    return results.layout, {key: row["prediction"] for key, row in predictions(settings.output).items()}


def on_two_ranks() -> dict:
    """The evaluations of every layout. The model lies in the folder of rank 0, where transformers saves it."""
    found = {}
    with tempfile.TemporaryDirectory() as own:
        shared = [str(make_model(Path(own) / "model").parent)]
        dist.broadcast_object_list(shared, src=0)
        for key, sizes in PARALLEL.items():
            options = {name: size for name, size in sizes.items() if name in _SINGLE}
            found[key] = evaluate_here(Path(shared[0]) / key, Path(shared[0]) / "model", **options)
            dist.barrier()
        experts = Path(shared[0]) / "experts"
        if dist.get_rank() == 0:
            make_model(experts, with_experts=True)
        dist.barrier()
        found["ep2"] = evaluate_here(Path(shared[0]) / "ep2", experts, samples=1, **SHARED_EXPERTS)
        dist.barrier()
        found["unfit"] = evaluate_unfit(Path(shared[0]) / "unfit", Path(shared[0]) / "model")
        dist.barrier()
    return found


@pytest.mark.parametrize("backend", ["megatron", "transformers"])
def test_a_tokenizer_that_is_not_the_models_is_refused(models, tmp_path: Path, backend: str) -> None:
    other = shutil.copytree(models[1], tmp_path / "other")
    content = json.loads((other / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    first, second = list(vocabulary)[-2:]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (other / "tokenizer.json").write_text(json.dumps(content))
    settings = LongContextSettings(
        model=str(models[1]), tokenizer=str(other), backend=backend, output=tmp_path / "r.json", **ASKED
    )
    with pytest.raises(UserError, match=rf"--tokenizer {other}: its tokens are not those of the model"):
        evaluate_long_context(settings)


def questions(folder: Path) -> Path:
    """Two questions. Most documents give the answer to the second away, so too few are left for its prompt."""
    texts = ["The mill stands in Turin.", "The school stands in Rome.", *["Many a road leads to Rome."] * 20]
    rows = [
        {
            "id": str(place),
            "question": f"Where does the {name} stand?",
            "answer": city,
            "answer_aliases": [],
            "answerable": True,
            "paragraphs": [
                {"idx": n, "title": f"Page {n}", "paragraph_text": f"{text} Page {n}.", "is_supporting": n == place}
                for n, text in enumerate(texts)
            ],
        }
        for place, (name, city) in enumerate((("mill", "Turin"), ("school", "Rome")))
    ]
    return write(folder / "questions.jsonl", [json.dumps(row) for row in rows])


def evaluate_unfit(folder: Path, model: Path, **options):
    """Evaluate one question that can be asked and one that cannot. The second evaluation resumes the first."""
    folder.mkdir(exist_ok=True)
    asked = {"tasks": ("qa",), "lengths": (500,), "corpus": questions(folder), "batch_size": 1, **options}
    found = [evaluate_here(folder, model, **asked) for _ in range(2)]
    if found[0] is None:
        return None
    assert found[0] == found[1]
    results = read_long_context(folder / "r.json")
    return found[0][1], results.samples, results.skipped, render(results)


@functools.cache
def one_process() -> dict[str, str]:
    with tempfile.TemporaryDirectory() as folder:
        return evaluate_here(Path(folder), make_model(Path(folder) / "model"))[1]


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> tuple[Path, Path]:
    return make_run(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def of_run(models):
    """Results of the run's checkpoint, by our model."""
    return evaluate_long_context(LongContextSettings(model=str(models[0]), **ASKED))


def predictions(output: Path) -> dict[str, dict]:
    return {row["id"]: row for row in read(output.with_suffix(".predictions.jsonl"))}


def test_a_run_is_evaluated_into_its_directory(models, of_run) -> None:
    output = models[0] / "evaluation" / f"long_context-{CHECKPOINT}.json"
    assert read_long_context(output) == of_run
    assert (of_run.backend, of_run.step, of_run.run_dir) == ("megatron", 10, str(models[0]))
    assert of_run.lengths == [700, 900] and of_run.depths == [0.0, 1.0] and of_run.max_positions == MAX_POSITIONS
    assert of_run.main_metrics == dict.fromkeys(ASKED["tasks"], "string_match_all")
    found = predictions(output)
    assert len(found) == of_run.samples == 8 and of_run.prompt_tokens == 2 * 2 * (700 + 900)
    for row in found.values():
        assert row["scores"] == {"string_match_all": SCORERS["string_match_all"](row["prediction"], row["answers"])}
    places = {(cell.task, cell.length, cell.depth): cell for cell in of_run.cells}
    lengths, depths = (None, 700, 900), (None, 0.0, 1.0)
    assert set(places) == {("needle_single", length, depth) for length in lengths for depth in depths} | {
        ("variable_tracking", length, None) for length in lengths
    }
    for (task, length, depth), cell in places.items():
        rows = [row for row in found.values() if row["task"] == task and length in (None, row["length"])]
        rows = [row for row in rows if depth in (None, row["depth"])]
        assert cell.n == len(rows) and cell.low <= cell.score <= cell.high
        assert cell.score == pytest.approx(sum(row["scores"]["string_match_all"] for row in rows) / len(rows))
        assert cell.generated_tokens == sum(row["generated_tokens"] for row in rows)
    for kind in ("length", "depth"):
        assert output.with_suffix(f".{kind}.png").read_bytes().startswith(b"\x89PNG")


def test_the_export_gives_the_same_predictions_by_transformers(models, of_run, tmp_path) -> None:
    results = evaluate_long_context(LongContextSettings(model=str(models[1]), output=tmp_path / "hf.json", **ASKED))
    ours = predictions(models[0] / "evaluation" / f"long_context-{CHECKPOINT}.json")
    theirs = predictions(tmp_path / "hf.json")
    assert results.backend == "transformers" and results.run_dir is None
    for row in (*ours.values(), *theirs.values()):
        assert row.pop("seconds") > 0
    assert ours == theirs and len({row["prediction"] for row in ours.values()}) > 1


@pytest.mark.skipif(not cpu_features.is_cpu(), reason="GPUs compute fast in bfloat16")
@pytest.mark.parametrize("backend", ["megatron", "transformers"])
def test_slow_bfloat16_is_told(
    models, tmp_path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], backend: str
) -> None:
    monkeypatch.setattr(cpu_features, "has_bfloat16_kernels", lambda: False)
    asked = ASKED | {"tasks": ("needle_single",), "lengths": (700,), "samples": 1, "backend": backend}
    for dtype in ("float32", "bfloat16"):
        settings = LongContextSettings(model=str(models[1]), output=tmp_path / f"{dtype}.json", dtype=dtype, **asked)
        evaluate_long_context(settings)
        told = "; --dtype float32 is several times as fast\n" in capsys.readouterr().err
        assert told is (dtype == "bfloat16")


@pytest.mark.parametrize("key", PARALLEL)
def test_parallel_ranks_evaluate_as_one_process_does(key) -> None:
    """Data-parallel ranks share the samples; rank 0 alone keeps and returns them."""
    (layout, found), other = (rank[key] for rank in two_ranks(__name__))
    assert other is None and layout == {"data_parallel_size": 1} | _SINGLE | PARALLEL[key]
    assert found == one_process()


def test_ranks_that_share_experts_evaluate_as_one_process_does(tmp_path) -> None:
    """A prompt of 700 and one of 900 tokens at a time, and an odd number of them."""
    (sizes, found), other = (rank["ep2"] for rank in two_ranks(__name__))
    assert other is None and sizes == _SINGLE | SHARED_EXPERTS | {"data_parallel_size": 2}
    assert found == evaluate_here(tmp_path, make_model(tmp_path / "model", with_experts=True), samples=1)[1]


def test_a_sample_that_cannot_be_made_is_counted_and_the_rest_answered(models, tmp_path) -> None:
    """Two ranks give what one process gives, though the second rank has nothing to do. Only rank 0 has results."""
    ours, other = (rank["unfit"] for rank in two_ranks(__name__))
    texts, samples, skipped, table = ours
    assert other is None and samples == len(texts) == 1
    reason = "--corpus holds too few documents"
    assert skipped == [SkippedSamples(task="qa", length=500, n=1, reason=reason)]
    assert f"skipped: 1 of qa at 500: {reason}" in table
    model = make_model(tmp_path / "model")
    for backend in ("megatron", "transformers"):
        assert evaluate_unfit(tmp_path / backend, model, backend=backend)[:3] == ours[:3]
    chosen = {"tasks": ("qa",), "lengths": (500,), "samples": 2, "max_new_tokens": 12}
    with completion_server() as server:
        asked = {"server": server.url, "tokenizer": str(model), "output": tmp_path / "s.json"} | chosen
        results = evaluate_long_context(LongContextSettings(model="m", corpus=questions(tmp_path), **asked))
    assert (results.samples, results.skipped) == (1, skipped)


def test_an_interrupted_evaluation_generates_only_what_is_missing(models, of_run, tmp_path) -> None:
    settings = LongContextSettings(model=str(models[1]), output=tmp_path / "again.json", **ASKED)
    evaluate_long_context(settings)
    journal = tmp_path / "again.responses.jsonl"
    lines = journal.read_bytes().splitlines(keepends=True)
    marked = [json.loads(line) | {"text": "kept"} for line in lines[1:4]]
    kept = b"".join(json.dumps(each).encode() + b"\n" for each in marked)
    journal.write_bytes(lines[0] + kept + lines[4][:30])  # killed while it wrote the fourth
    evaluate_long_context(settings)
    texts = [json.loads(line)["text"] for line in journal.read_text().splitlines()[1:]]
    assert len(texts) == 8 and texts[:3] == ["kept"] * 3 and "kept" not in texts[3:]
    with pytest.raises(UserError, match=r"again\.responses\.jsonl: was begun with max_new_tokens 12, not 13"):
        evaluate_long_context(LongContextSettings(**vars(settings) | {"max_new_tokens": 13}))
    evaluate_long_context(LongContextSettings(**vars(settings) | {"max_new_tokens": 13, "overwrite": True}))
    assert "kept" not in journal.read_text()


def rows_of(tmp_path, lengths) -> Path:
    rows = [
        {
            "id": str(number),
            "prompt_short": f"Which river {number}?",
            "prompt_long": f"Which river {number}? " + "was born " * length,
            "answers": ["Rome"],
            "evidence_depths": [0.9],
            "response_tokens": 16,
        }
        for number, length in enumerate(lengths)
    ]
    return write(tmp_path / "rows.jsonl", [json.dumps(row) for row in rows])


def test_prompts_that_do_not_fit_are_counted_and_left_out(models, tmp_path) -> None:
    path = rows_of(tmp_path, [20, 30, 1500])
    options = {"contexts": (path,), "lengths": (128, 256), "depths": (0.0, 1.0), "output": tmp_path / "r.json"}
    results = evaluate_long_context(LongContextSettings(model=str(models[1]), **options))
    (skipped,) = results.skipped
    assert (skipped.task, skipped.n) == ("rows.long", 1) and skipped.length > MAX_POSITIONS
    assert "exceed the model's 2048 positions" in skipped.reason
    assert results.samples == 5 and set(results.main_metrics.values()) == {"sub_em"}
    assert results.files == {str(path): sha256_file(path)}
    assert results.cell("rows.long", "token_f1", length=128, depth=1.0).n == 2
    assert results.cell("rows.short", "exact_match").n == 3


def test_a_server_is_asked_greedily(models, tmp_path) -> None:
    path = rows_of(tmp_path, [20, 30])
    with completion_server({0: "500"}) as server:
        settings = LongContextSettings(
            model="name", server=server.url, tokenizer=str(models[1]), contexts=(path,), output=tmp_path / "s.json"
        )
        results = evaluate_long_context(settings)
    bodies = [each.body for each in server.log]
    assert len(bodies) == 5 and {body["temperature"] for body in bodies} == {0.0}
    assert {body["max_tokens"] for body in bodies} == {16} and {body["model"] for body in bodies} == {"name"}
    assert results.backend == "server" and results.max_positions is None
    # It says: "... So the answer is: Rome."
    assert results.cell("rows.long", "exact_match").score == results.cell("rows.long", "sub_em").score == 1
    whole = LongContextSettings(**vars(settings) | {"scored_text": "whole"})
    assert evaluate_long_context(whole).cell("rows.long", "exact_match").score == 0  # from the same answers


def test_a_server_is_not_asked_for_more_than_it_says_it_holds(models, tmp_path) -> None:
    """It would take such a prompt, and cut the answer to it."""
    asked = {"tokenizer": str(models[1]), "output": tmp_path / "s.json"}
    with completion_server(positions=200, tokens=5) as server:
        files = {"server": server.url, "contexts": (rows_of(tmp_path, [20, 30, 400]),)}
        results = evaluate_long_context(LongContextSettings(model="tiny", **asked | files))
        with pytest.raises(UserError, match=r"--lengths 700: with 64 tokens .* 200 positions; legal: at most 136"):
            tasks = {"server": server.url, "tasks": ("needle_single",), "lengths": (700,)}
            evaluate_long_context(LongContextSettings(model="tiny", **asked | tasks))
        assert len(server.log) == 5
    assert (results.max_positions, results.samples, results.skipped[0].n) == (200, 5, 1)
    # As the server counts them.
    assert {row["generated_tokens"] for row in predictions(asked["output"]).values()} == {5}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lengths": (2040,)}, r"--lengths 2040: with 12 tokens .* 2048 positions; legal: at most 2036"),
        ({"lengths": ()}, "--tasks: needs --lengths"),
        ({"tasks": ("needles",)}, "--tasks needles: legal: needle_single"),
        ({"depths": (0.5, 1.5)}, "--depths 1.5: must be from 0 to 1"),
        ({"depths": ()}, "--depths: names none"),
        ({"tensor_model_parallel_size": 2}, "backend transformers runs in one process"),
        ({"expert_tensor_parallel_size": 1}, "--expert-tensor-parallel-size: backend transformers runs in one process"),
        ({"server": "http://x", "tokenizer": "t", "backend": "megatron"}, "--backend megatron: has no effect"),
        ({"output": None}, "--output: needed for a model that belongs to no run"),
        ({"output": Path("r.jsonl")}, "must end in .json"),
        ({"server": "localhost"}, "must begin with http"),
        ({"model": "nowhere"}, "--model=nowhere: no such directory"),
    ],
)
def test_mistakes_are_one_line(models, options, message, tmp_path) -> None:
    given = {"model": str(models[1]), "output": tmp_path / "r.json"} | ASKED | options
    with pytest.raises(UserError, match=message):
        evaluate_long_context(LongContextSettings(**given))
    assert not list(tmp_path.iterdir())


def test_another_file_is_not_lost(models, tmp_path) -> None:
    (tmp_path / "config.json").write_text('{"kind": "preference"}')
    with pytest.raises(UserError, match=r"config\.json: .* it would be lost, set --output or --name"):
        evaluate_long_context(LongContextSettings(model=str(models[1]), output=tmp_path / "config.json", **ASKED))
    assert (tmp_path / "config.json").read_text() == '{"kind": "preference"}'


def test_a_checkpoint_is_not_for_transformers(models) -> None:
    with pytest.raises(UserError, match=r"--backend transformers: .* is a Megatron checkpoint; .* export it first"):
        evaluate_long_context(LongContextSettings(model=str(models[0]), backend="transformers", **ASKED))
