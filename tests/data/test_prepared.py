import json
import shutil

import pytest
from datasets import Dataset

from megatron_solopo.data.loader import TripletDataset
from megatron_solopo.data.prepared import load_prepared, token_fingerprint, token_lengths
from megatron_solopo.errors import UserError
from megatron_solopo.files import sha256_json
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


def test_a_directory_of_format_1_has_the_fingerprint_of_its_tokens(tmp_path, triplets, hugging_face):
    written = prepare(triplets, tmp_path / "out", hugging_face, eval_count=3)
    older = written.fingerprint_parts | {"format_version": 1}
    spoil_manifest(tmp_path / "out", format_version=1, fingerprint=sha256_json(older), fingerprint_parts=older)
    read = load_prepared(tmp_path / "out").hashed_manifest()
    assert read.fingerprint == written.fingerprint and read.fingerprint_parts == older


def test_the_fingerprint_tells_every_id_token_and_split(tmp_path, triplets, hugging_face):
    prepare(triplets, tmp_path / "out", hugging_face)
    rows = load_prepared(tmp_path / "out").train.to_list()

    def fingerprint(rows, held_out=None):
        make = Dataset.from_list
        return token_fingerprint("triplet", make(rows), None if held_out is None else make(held_out))

    first = fingerprint(rows)
    assert first == load_prepared(tmp_path / "out").manifest.fingerprint
    assert first == fingerprint([row | {"evidence_depths": []} for row in rows]), "no token"

    def with_row(**changes):
        return [*rows[:5], rows[5] | changes, *rows[6:]]

    moved = {
        "chosen": [*rows[5]["chosen"], rows[5]["rejected"][0]],
        "rejected": rows[5]["rejected"][1:],
    }
    others = [
        fingerprint(with_row(id="another")),
        fingerprint(with_row(prompt_long=[*rows[5]["prompt_long"][:-1], 0])),
        fingerprint(with_row(**moved)),
        fingerprint(rows[::-1]),
        fingerprint([with_masks(row, 0) for row in rows]),
        fingerprint([with_masks(row, 1) for row in rows]),
        fingerprint(rows[:-2], rows[-2:]),
        fingerprint(rows[2:], rows[:2]),
    ]
    assert len({first, *others}) == 1 + len(others)


def with_masks(row, place):
    masks = {f"{name}_mask": [True] * len(row[name]) for name in ("chosen", "rejected")}
    masks["chosen_mask"][place] = False
    return row | masks


def spoil_manifest(out, **changes):
    manifest = json.loads((out / "manifest.json").read_text())
    (out / "manifest.json").write_text(json.dumps(manifest | changes))


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (shutil.rmtree, "no manifest.json there"),
        (lambda out: (out / "manifest.json").unlink(), "no manifest.json there"),
        (lambda out: (out / "manifest.json").write_text("{"), "manifest.json is damaged"),
        (lambda out: spoil_manifest(out, format_version=99, new_key=1), "format version 99, this program reads 1 to 2"),
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
