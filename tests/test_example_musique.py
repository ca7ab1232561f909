"""The example's tokenizer and model: loadable, small, the same every time."""

import pytest
import torch
from click.testing import CliRunner
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_solopo.data.tokenizer import load_tokenizer
from tests.triplets.musique_example import first_lines, load_script


@pytest.fixture(scope="module")
def script():
    return load_script()


def test_directory_is_the_same_every_time_and_loads(script, tmp_path) -> None:
    output = tmp_path / "model"
    runs = []
    for _ in range(2):
        result = CliRunner().invoke(script.main, ["--output", str(output)])
        assert result.exit_code == 0, result.output
        runs.append({path.name: path.read_bytes() for path in output.iterdir()})
    assert runs[0] == runs[1] and set(runs[0]) == script.OWN_FILES
    assert [path.name for path in tmp_path.iterdir()] == ["model"]

    tokenizer, model = AutoTokenizer.from_pretrained(output), AutoModelForCausalLM.from_pretrained(output)
    assert len(tokenizer) == model.config.vocab_size == load_tokenizer(output).vocab_size == 4096
    assert model.config.model_type == "qwen2" and model.config.tie_word_embeddings
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    logits = model(torch.tensor([tokenizer.encode("Who was the father of Robert Peel?")])).logits
    assert logits.isfinite().all() and logits.std() > 0


def test_tokenizer_round_trips_and_renders_chat(script) -> None:
    tokenizer = script.make_tokenizer()
    text = first_lines(1)[0] + " \u4f60\n\n\t!"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    messages = [{"role": "user", "content": "Who?"}]
    chat = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert chat == "<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("<|im_end|>")) == [tokenizer.eos_token]
    assert tokenizer.pad_token_id != tokenizer.eos_token_id


def test_a_directory_with_other_files_is_left_alone(script, tmp_path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    result = CliRunner().invoke(script.main, ["--output", str(tmp_path)])
    assert result.exit_code == 1 and "thesis.tex" in result.output
    assert (tmp_path / "thesis.tex").read_text() == "precious"
