"""Tokenizers. Hugging Face directories and SentencePiece models have one protocol."""

import json
import traceback
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError
from sentencepiece import SentencePieceProcessor

from megatron_solopo.architecture.model_directory import huggingface_directory, missing_vocabulary
from megatron_solopo.data.messages import TOOL_CALLS, Message
from megatron_solopo.data.template_arguments import NO_ARGUMENTS, TemplateArguments
from megatron_solopo.data.template_clock import FUNCTION, Clock, templates_see
from megatron_solopo.data.tokenizer_contradictions import TokenizerFile, check_tokenizer_files
from megatron_solopo.data.tokenizer_file import CLASSES_OF_THE_FILE, load_by_file
from megatron_solopo.data.tool_calls import Render, arguments_as_objects, arguments_as_text, needs_content, takes_text
from megatron_solopo.errors import UserError
from megatron_solopo.files import sha256_file, sha256_json

# Text that is put before a continuation and cut off again. A tokenizer may merge one of them with what follows.
_ANCHORS = (".", "0", "a", "(", "A", "\n")
_WORD_START = "\N{LOWER ONE EIGHTH BLOCK}"
_NO_LIMIT = 1 << 60
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
"""What bytes that are no text decode to."""


class Tokenizer(ABC):
    """What the project needs of a tokenizer. Token ids are ints in [0, vocab_size)."""

    eos_token_id: int | None
    """The token that ends a text, or None if the tokenizer has none."""
    unk_token_id: int | None
    """The token of text that the tokenizer does not know, or None if it knows every text."""
    vocab_size: int
    """One more than the largest token id, added tokens included."""
    fingerprint: str
    """Hex SHA-256 of everything that decides token ids. The chat template is not part of it."""
    former_fingerprints: frozenset[str] = frozenset()
    """What older versions may have stated for the same tokenizer."""
    chat_template: str | None
    """The text of the chat template, or None if the tokenizer has none."""
    _prefix: list[int]
    """The usual tokens before a text (BOS)."""

    def has_fingerprint(self, stated: str) -> bool:
        """Whether `stated` is the fingerprint of this tokenizer, by this or an older version."""
        return stated == self.fingerprint or stated in self.former_fingerprints

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """The text of tokens."""

    def template_for(self, arguments: TemplateArguments) -> str | None:
        """The text of the chat template that is used with some arguments: there may be another one for tools."""
        return None

    def render_chat(
        self,
        messages: list[Message],
        add_generation_prompt: bool,
        arguments: TemplateArguments = NO_ARGUMENTS,
        clock: Clock | None = None,
    ) -> str | None:
        """Messages as the chat template writes them, or None if the tokenizer has no template.

        Args:
            clock: What a template reads that writes a date. If not given, the time when the program started.

        Raises UserError with the template's reason if it refuses the messages.
        """
        return None

    @abstractmethod
    def _encode(self, text: str) -> list[int]: ...

    @abstractmethod
    def _piece(self, token_id: int) -> str: ...

    def pieces(self, ids: Iterable[int]) -> list[str]:
        """The piece of text that each token stands for, as the tokenizer's own files write it."""
        return [self._piece(token_id) for token_id in ids]

    def drops(self, character: str) -> bool:
        """Whether a character leaves no trace in the tokens: a BPE model without an unknown token has none for it."""
        if character not in self._dropped:
            text = self.decode(self._encode(character))
            self._dropped[character] = not text.strip() or (REPLACEMENT in text and character != REPLACEMENT)
        return self._dropped[character]

    @cached_property
    def _dropped(self) -> dict[str, bool]:
        """What `drops` has found."""
        return {}

    def _count(self, text: str) -> int:
        return len(self._encode(text))

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Tokens of a text that starts a sequence.

        Args:
            add_special_tokens: Put the usual tokens (BOS) before the text. No token is ever put after it.
        """
        ids = self._encode(text)
        return self._prefix + ids if add_special_tokens else ids

    def count(self, text: str, *, add_special_tokens: bool) -> int:
        """Number of tokens that `encode` makes. It takes less time and memory for a long text."""
        return self._count(text) + (len(self._prefix) if add_special_tokens else 0)

    def encode_continuation(self, text: str) -> list[int]:
        """Tokens of a text that follows other text, without special tokens.

        `encode` is not enough: a tokenizer that marks the start of words puts a space before a text that has none.
        That space would come between a prompt and its response. So the text is encoded behind an anchor, whose tokens
        are cut off: encode(anchor + text) begins with encode(anchor), unless tokens of the two merge. The rest is the
        same for every anchor that does not merge, because no merge and no best segmentation crosses that boundary.
        """
        if not self._puts_space_before_text:
            return self._encode(text)
        for anchor, head in self._anchor_heads.items():
            ids = self._encode(anchor + text)
            if ids[: len(head)] == head:
                return ids[len(head) :]
        raise UserError(f"the tokenizer cannot encode {text[:40]!r} without a space before it")

    @cached_property
    def _puts_space_before_text(self) -> bool:
        probe = self._encode("a")
        return bool(probe) and self._piece(probe[0]).startswith(_WORD_START)

    @cached_property
    def _anchor_heads(self) -> dict[str, list[int]]:
        heads = {anchor: self._encode(anchor) for anchor in _ANCHORS}
        return {anchor: head for anchor, head in heads.items() if head and self.decode(head) == anchor}


def load_tokenizer(path: Path | str) -> Tokenizer:
    """Load a SentencePiece `.model` file, a Hugging Face directory or a Megatron checkpoint. Runs no code from it.

    Raises UserError if there is no tokenizer, or if transformers loses text that the directory's tokenizer.json keeps.
    """
    path = Path(path)
    if path.is_dir():
        return _HuggingFaceTokenizer(huggingface_directory(path))
    if path.suffix == ".model" and path.is_file():
        return _SentencePieceTokenizer(path)
    found = "not a tokenizer" if path.exists() else "no such file or directory"
    raise UserError(f"{path}: {found}; expected a Hugging Face directory or a SentencePiece .model file")


def raised_in_template(error: Exception) -> bool:
    """Whether a Jinja template caused an error: one of jinja2's own, or any error inside an expression of it."""
    frames = traceback.extract_tb(error.__traceback__)
    # jinja2 gives the frames of a template's code this file name.
    return isinstance(error, TemplateError) or any(frame.filename == "<template>" for frame in frames)


class _HuggingFaceTokenizer(Tokenizer):
    """A tokenizer directory as `save_pretrained` writes it."""

    def __init__(self, path: Path) -> None:
        try:
            file = TokenizerFile(path)
            check_tokenizer_files(path, file)
            self._tokenizer: Any = load_by_file(
                path, file, local_files_only=True, trust_remote_code=False, model_max_length=_NO_LIMIT
            )
            has_template = bool(self._tokenizer.chat_template)
            self.chat_template = self._tokenizer.get_chat_template() if has_template else None
        except UserError:
            raise
        # Each kind of damaged file leads to another error, and the Rust library raises plain Exceptions.
        except Exception as error:
            if missing := missing_vocabulary(path):
                raise UserError(f"{path}: {missing}") from error
            raise UserError(f"{path}: no loadable tokenizer: {' '.join(str(error).split())}") from error
        self._path = path
        self.eos_token_id = self._tokenizer.eos_token_id
        rules = self._rules()
        self.unk_token_id = self._tokenizer.unk_token_id if rules is None else self._unknown_of(rules["model"])
        self.vocab_size = max(self._tokenizer.get_vocab().values()) + 1
        identity = self._identity(rules)
        self.fingerprint = sha256_json(identity)
        self.former_fingerprints = frozenset(
            sha256_json(identity | {"class": name}) for name in self._class_names() if "class" not in identity
        )
        self._prefix = self._usual_prefix()

    def decode(self, ids: Sequence[int]) -> str:
        """The text, with special tokens as text."""
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text

    def template_for(self, arguments: TemplateArguments) -> str | None:
        if self.chat_template is None:
            return None
        text: str = self._tokenizer.get_chat_template(tools=arguments.tools)
        return text

    def render_chat(
        self,
        messages: list[Message],
        add_generation_prompt: bool,
        arguments: TemplateArguments = NO_ARGUMENTS,
        clock: Clock | None = None,
    ) -> str | None:
        template = self.template_for(arguments)
        if template is None:
            return None
        if any(TOOL_CALLS in message for message in messages):
            as_text = self._takes_text(template, arguments)
            messages = arguments_as_text(messages) if as_text else arguments_as_objects(messages)
        try:
            with templates_see(clock or Clock()) if FUNCTION in template else nullcontext():
                return self._apply(messages, arguments, add_generation_prompt=add_generation_prompt)
        except Exception as error:
            if not raised_in_template(error):
                raise
            reason = " ".join(str(error).split())
            if isinstance(error, TemplateSyntaxError):
                raise UserError(f"the chat template of {self._path} is broken: {reason}; mend the template") from error
            way_out = ""
            if "system" in reason.lower() and any(message["role"] == "system" for message in messages):
                way_out = "; write the system text into the first user message, or use another template"
            elif any(TOOL_CALLS in message and message["content"] is None for message in messages) and needs_content(
                self._trial_of(arguments)
            ):
                way_out = '; a message with tool_calls has no content: write "content": "", or use another template'
            raise UserError(f"the chat template of {self._path} refuses the messages: {reason}{way_out}") from error

    def _apply(self, messages: list[Message], arguments: TemplateArguments, *, add_generation_prompt: bool) -> str:
        text: str = self._tokenizer.apply_chat_template(
            messages,
            tools=arguments.tools,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            **arguments.kwargs,
        )
        return text

    def _takes_text(self, template: str, arguments: TemplateArguments) -> bool:
        """Whether a template needs the arguments of tool calls as text."""
        if template not in self._needs_text:
            self._needs_text[template] = takes_text(self._trial_of(arguments))
        return self._needs_text[template]

    def _trial_of(self, arguments: TemplateArguments) -> Render:
        def render(messages: list[Message]) -> str:
            try:
                return self._apply(messages, arguments, add_generation_prompt=False)
            except Exception as error:
                if not raised_in_template(error):
                    raise
                return ""

        return render

    @cached_property
    def _needs_text(self) -> dict[str, bool]:
        """What `_takes_text` has found, by template."""
        return {}

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False)
        return ids

    def _count(self, text: str) -> int:
        """Count without offsets and strings of tokens, which take most of the time and memory for a long text."""
        if not self._tokenizer.is_fast:
            return super()._count(text)
        backend = self._tokenizer.backend_tokenizer
        # tokenizer.json may ask for both. `encode` turns them off as well.
        backend.no_truncation()
        backend.no_padding()
        return len(backend.encode_batch_fast([text], add_special_tokens=False)[0])

    def _piece(self, token_id: int) -> str:
        return str(self._tokenizer.convert_ids_to_tokens(token_id))

    def _usual_prefix(self) -> list[int]:
        """The special tokens that the tokenizer puts before a text."""
        body = self._encode("a")
        whole: list[int] = self._tokenizer.encode("a", add_special_tokens=True)
        starts = (start for start in range(len(whole)) if whole[start : start + len(body)] == body)
        return whole[: next(starts, 0)]

    def _rules(self) -> dict[str, Any] | None:
        """What decides the token ids, as tokenizer.json states it; None for a slow tokenizer."""
        if not self._tokenizer.is_fast:
            return None
        rules: dict[str, Any] = json.loads(self._tokenizer.backend_tokenizer.to_str())
        for unused in ("truncation", "padding"):
            rules.pop(unused, None)
        return rules

    def _unknown_of(self, model: dict[str, Any]) -> int | None:
        """The unknown token of the model in tokenizer.json. Settings beside it may name another one, or none."""
        if (token := model.get("unk_token")) is not None:
            number: int | None = self._tokenizer.backend_tokenizer.token_to_id(token)
            return number
        return model.get("unk_id")

    def _identity(self, rules: dict[str, Any] | None) -> dict[str, Any]:
        """A JSON value that differs if token ids can differ. It does not depend on the directory's name."""
        if rules is not None:
            # The rules decide alone. transformers' name for their class changes between its versions.
            return {"rules": rules, "eos_token_id": self.eos_token_id}
        files = [self._path / name for name in sorted(set(self._tokenizer.vocab_files_names.values()))]
        rules = {file.name: sha256_file(file) for file in files if file.is_file()}
        return {"rules": rules, "eos_token_id": self.eos_token_id, "class": type(self._tokenizer).__name__}

    def _class_names(self) -> set[str]:
        """Names that versions of transformers give the class."""
        name = type(self._tokenizer).__name__.removesuffix("Fast")
        return {name, f"{name}Fast", *CLASSES_OF_THE_FILE}


class _SentencePieceTokenizer(Tokenizer):
    """A `.model` file. It normalises text (many models collapse spaces). The usual prefix is BOS, if it exists."""

    chat_template = None

    def __init__(self, path: Path) -> None:
        try:
            self._processor = SentencePieceProcessor(model_file=str(path))
        except (OSError, RuntimeError) as error:
            raise UserError(f"{path}: not a SentencePiece model: {' '.join(str(error).split())}") from error
        self.eos_token_id = self._known(self._processor.eos_id())
        self.unk_token_id = self._known(self._processor.unk_id())
        self.vocab_size = self._processor.get_piece_size()
        self.fingerprint = sha256_file(path)
        bos = self._known(self._processor.bos_id())
        self._prefix = [] if bos is None else [bos]

    def decode(self, ids: Sequence[int]) -> str:
        """The text, without special tokens."""
        text: str = self._processor.decode(list(ids))
        return text

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self._processor.encode(text)
        return ids

    def _piece(self, token_id: int) -> str:
        return str(self._processor.id_to_piece(token_id))

    @staticmethod
    def _known(token_id: int) -> int | None:
        return token_id if token_id >= 0 else None
