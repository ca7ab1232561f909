import json
import shutil

import pytest

from megatron_solopo.data.loader import TripletDataset
from megatron_solopo.data.prepared import load_prepared, token_lengths
from megatron_solopo.errors import UserError
from tests.data.sample_rows import prepare
from tests.tiny_models import TINY


def test_prompt_column_of_triplets(tmp_path, triplets, hugging_face):
    prepare(triplets, tmp_path / "out", hugging_face)
    data = load_prepared(tmp_path / "out")
    assert (data.prompt_column("short"), data.prompt_column("long")) == ("prompt_short", "prompt_long")


def test_token_lengths_follow_a_selection(tmp_path, triplets, hugging_face):
    prepare(triplets, tmp_path / "out", hugging_face)
    data = load_prepared(tmp_path / "out").train.select([7, 3, 19])
    assert token_lengths(data, "prompt_long").tolist() == [len(row["prompt_long"]) for row in data]


def test_directories_of_versions_that_carried_no_depths_are_read(tmp_path, triplets, hugging_face):
    prepare(triplets, tmp_path / "out", hugging_face)
    older = load_prepared(tmp_path / "out").train.remove_columns(["evidence_depths"])
    older.save_to_disk(str(tmp_path / "older"))
    shutil.rmtree(tmp_path / "out" / "train")
    (tmp_path / "older").rename(tmp_path / "out" / "train")
    train = load_prepared(tmp_path / "out").train
    assert TripletDataset(train, {"short": "prompt_short"}, TINY).evidence_depths() == [[]] * len(train)


def spoil_manifest(out, **changes):
    manifest = json.loads((out / "manifest.json").read_text())
    (out / "manifest.json").write_text(json.dumps(manifest | changes))


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (shutil.rmtree, "no manifest.json there"),
        (lambda out: (out / "manifest.json").unlink(), "no manifest.json there"),
        (lambda out: (out / "manifest.json").write_text("{"), "manifest.json is damaged"),
        (lambda out: spoil_manifest(out, format_version=99, new_key=1), "format version 99, this program reads 1"),
        (lambda out: spoil_manifest(out, kept="many"), "manifest.json is damaged (kept='many': "),
        (lambda out: spoil_manifest(out, train=3), "train/ has 18 rows, the manifest says 3"),
        (lambda out: shutil.rmtree(out / "eval"), "eval/ is missing or damaged"),
        (lambda out: next((out / "train").glob("*.arrow")).unlink(), "train/ is missing or damaged"),
        (lambda out: next((out / "train").glob("*.arrow")).write_bytes(b"x" * 99), "train/ is missing or damaged"),
        (lambda out: (out / "train" / "state.json").write_text("{"), "train/ is missing or damaged"),
        (lambda out: spoil_manifest(out, kind="pair"), "train/ has columns "),
    ],
)
def test_unusable_directories_are_one_line(tmp_path, triplets, hugging_face, spoil, reason):
    prepare(triplets, tmp_path / "out", hugging_face, eval_count=2)
    spoil(tmp_path / "out")
    with pytest.raises(UserError) as caught:
        load_prepared(tmp_path / "out")
    message = str(caught.value)
    assert reason in message and "\n" not in message
    assert message.startswith(f"{tmp_path / 'out'}: ") and message.endswith("megatron-solopo data prepare")
