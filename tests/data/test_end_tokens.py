import json
from types import SimpleNamespace

import pytest
from transformers import LlamaConfig

from megatron_solopo.data.end_tokens import end_tokens
from megatron_solopo.errors import UserError


def test_end_tokens_are_those_of_the_settings_and_of_the_tokenizer(tmp_path):
    tokenizer = SimpleNamespace(eos_token_id=7)
    assert end_tokens(tmp_path, tokenizer) == {7}
    LlamaConfig(eos_token_id=4).save_pretrained(tmp_path)
    assert end_tokens(tmp_path, tokenizer) == {4, 7}
    settings = tmp_path / "generation_config.json"
    settings.write_text(json.dumps({"eos_token_id": [3, 5]}))
    assert end_tokens(tmp_path, tokenizer) == {3, 5, 7}
    settings.write_text("{")
    with pytest.raises(UserError, match=r"settings of generation cannot be read: .*generation_config\.json"):
        end_tokens(tmp_path, tokenizer)
