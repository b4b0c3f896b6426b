"""What a token of a vocabulary says: the bytes it adds to a text, whatever way its tokenizer writes them down.

`Ġthe` of a byte-level vocabulary, `▁the` of SentencePiece and `the` of WordPiece all say ` the`; `Ġ` in a vocabulary
that is not byte-level is a letter. Only what two tokens say is ever compared, not how they are written.
"""

import json
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any

from transformers import PreTrainedTokenizerBase

from rgrl.models.text import control_tokens, guarded, token_ids

# A text is put behind each in turn to see how it is spelled mid-text: nothing, and what seldom joins a word.
ANCHORS = ("", "\n", "x", "0", ".")
Says = Callable[[str], bytes | None]


class Surfaces:
    """A tokenizer's tokens below `size` by what they say.

    `bytes_of[i]` is None for a special token, for a hole in the vocabulary, and for what has no text of its own; with
    `is_read` for every control token, as what a model reads as one is never text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, size: int, is_read: bool = False) -> None:
        self.tokenizer, self.size = tokenizer, size
        self.tokens: list[str | None] = [None] * size
        for token, i in tokenizer.get_vocab().items():
            if i < size:
                self.tokens[i] = token
        self.specials = special_ids(tokenizer)
        silent = self.specials | (set(tokenizer.convert_tokens_to_ids(control_tokens(tokenizer))) if is_read else set())
        added = {i: str(token) for i, token in tokenizer.added_tokens_decoder.items()}
        self.kinds = kinds_of(tokenizer)
        says = way_of_writing(tokenizer, self.kinds)
        self.bytes_of = [
            None if token is None or i in silent else added[i].encode() if i in added else says(token)
            for i, token in enumerate(self.tokens)
        ]

    @cached_property
    def ids_of(self) -> dict[bytes, int]:
        """The token that says some bytes; of several the first, and one that is written as text before a lone byte."""
        found: dict[bytes, int] = {}
        for lone in (False, True):
            for i, said in enumerate(self.bytes_of):
                if said and (str(self.tokens[i]).startswith("<0x") and len(said) == 1) == lone:
                    found.setdefault(said, i)
        return found

    def says(self, ids: Sequence[int]) -> bytes | None:
        """What a row of tokens says; None where one of them says nothing."""
        said = [self.bytes_of[i] if i < self.size else None for i in ids]
        return None if None in said else b"".join(piece for piece in said if piece is not None)

    def normal(self, text: str) -> str:
        """The text as the tokenizer's normaliser, which may lower its case, leaves it inside of a longer one."""
        normalizer = getattr(getattr(self.tokenizer, "backend_tokenizer", None), "normalizer", None)
        if normalizer is None:
            return text
        return normalizer.normalize_str("x" + text).removeprefix(normalizer.normalize_str("x")).replace("▁", " ")

    # ---------------------------------------------------------------------------------------------- spelling
    def spell(self, texts: Sequence[str]) -> list[list[int] | None]:
        """The tokens that this tokenizer writes for each text where it stands inside of a longer one.

        Empty where it writes none, and None where they don't say the text (as `normal` leaves it): it is unknown.
        """
        spelled: list[list[int] | None] = [None] * len(texts)
        for anchor in ANCHORS:
            left = [t for t, found in enumerate(spelled) if found is None]
            for t, ids in zip(left, self._behind(anchor, [texts[t] for t in left]), strict=True):
                spelled[t] = ids
        controls = control_tokens(self.tokenizer)
        for t in (t for t, found in enumerate(spelled) if found is None):
            # Control tokens that are spelled out, and words where the vocabulary knows nothing of spaces.
            ids = token_ids(self.tokenizer, guarded(texts[t], controls))
            said = self.says(ids)
            if said is not None and (not ids or _bare(said.decode("utf-8", "replace")) == _bare(self.normal(texts[t]))):
                spelled[t] = ids
        return spelled

    def _behind(self, anchor: str, texts: list[str]) -> Iterator[list[int] | None]:
        if not texts:
            return
        head = self.tokenizer(anchor, add_special_tokens=False)["input_ids"] if anchor else []
        rows = self.tokenizer([anchor + text for text in texts], add_special_tokens=False, verbose=False)["input_ids"]
        for text, row in zip(texts, rows, strict=True):
            ids = row[len(head) :]
            said = self.says(ids) if ids and row[: len(head)] == head else None
            same = said is not None and (said == text.encode() or said == self.normal(text).encode())
            yield ids if same else None

    def spell_bytes(self, said: bytes) -> list[int] | None:
        """The tokens for bytes that are no text, such as half of a character; None where there are none for them."""
        if "ByteLevel" in self.kinds:
            model = self.tokenizer.backend_tokenizer.model
            ids = [token.id for token in model.tokenize("".join(BYTE_LETTERS[byte] for byte in said))]
            return ids if self.says(ids) == said else None
        single = [self.ids_of.get(bytes([byte])) for byte in said]
        return None if None in single else [i for i in single if i is not None]


def special_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """The tokens that decoding leaves out of a text."""
    marked = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return frozenset(marked | set(tokenizer.all_special_ids))


# ----------------------------------------------------------------------------------------------- ways of writing
def _byte_letters() -> list[str]:
    """The letter that a byte-level vocabulary (GPT-2's way) writes for each byte: itself where it can be seen."""
    shown = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(256, 512))
    return [chr(byte) if byte in shown else chr(next(others)) for byte in range(256)]


BYTE_LETTERS = _byte_letters()
_TO_BYTES = {letter: byte for byte, letter in enumerate(BYTE_LETTERS)}


def way_of_writing(tokenizer: PreTrainedTokenizerBase, kinds: dict[str, dict]) -> Says:
    """From a token as the vocabulary has it to what it says, by the kind of the vocabulary."""
    if not kinds:
        return lambda token: _whole(tokenizer.convert_tokens_to_string([token]))
    if "ByteLevel" in kinds:
        return _byte_level
    if "WordPiece" in kinds:
        return lambda token: _word_piece(token, kinds["WordPiece"]["prefix"])
    if "BPEDecoder" in kinds:
        return lambda token: _whole(token.replace(kinds["BPEDecoder"]["suffix"], " "))
    return lambda token: _sentence_piece(token, "ByteFallback" in kinds)


def kinds_of(tokenizer: PreTrainedTokenizerBase) -> dict[str, dict]:
    """The parts of a tokenizer's pre-tokenizer and decoder by type; none of a tokenizer written in Python."""
    found: dict[str, dict] = {}
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return found
    parts = [json.loads(part.__getstate__()) for part in (backend.pre_tokenizer, backend.decoder) if part is not None]
    while parts:
        part = parts.pop(0)
        found[part["type"]] = part
        parts += part.get("decoders", []) + part.get("pretokenizers", [])
    return found


def _whole(text: str) -> bytes | None:
    return None if "\ufffd" in text else text.encode()


def _byte_level(token: str) -> bytes | None:
    try:
        return bytes(map(_TO_BYTES.__getitem__, token))
    except KeyError:
        return token.encode()  # as the decoder does


def _word_piece(token: str, prefix: str) -> bytes:
    """A piece inside of a word has the prefix. Any other begins a word; only marks and ideographs need no space."""
    if token.startswith(prefix) and token != prefix:
        return token.removeprefix(prefix).encode()
    alone = len(token) == 1 and (not token.isalnum() or "IDEOGRAPH" in unicodedata.name(token, ""))
    return token.encode() if alone else b" " + token.encode()


def _sentence_piece(token: str, byte_fallback: bool) -> bytes | None:
    if byte_fallback and len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return bytes([int(token[3:5], 16)])
    return _whole(token.replace("▁", " "))


def _bare(text: str) -> str:
    return "".join(text.split())
