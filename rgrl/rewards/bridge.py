"""From the policy's vocabulary to the reward model's embeddings, where their tokenizers differ.

Tokens are compared by the bytes that they stand for, not by how a vocabulary writes them: `Ġthe` of a byte-level
vocabulary, `▁the` of SentencePiece and `the` of WordPiece are all ` the`; `Ġ` elsewhere is a letter.
"""

import json
import unicodedata
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rgrl.models.text import control_tokens, guarded, token_ids

EXACT, COMPOSED, UNMATCHED, SPECIAL = KINDS = range(4)
TEXT_KINDS = EXACT, COMPOSED, UNMATCHED
NAMES = ("exact", "composed", "unmatched", "special")
# Each text is tokenised behind these in turn, to see its tokens mid-text: nothing, and what seldom merges with a word.
ANCHORS = ("", "\n", "x", "0", ".")


@dataclass(frozen=True)
class Coverage:
    """How the reward model sees each of the policy's tokens: kind_V, int8, of `KINDS`, and as which token.

    `EXACT`: as one token with the same bytes. `COMPOSED`: as several, or as what its normaliser makes of it.
    `UNMATCHED`: as unknown, or not at all. `SPECIAL`: not at all, as decoded text leaves it out.
    """

    kind_V: Tensor
    token_V: Tensor  # int64, the reward model's token for the exact ones, -1 for the others
    mode: str

    @property
    def same(self) -> bool:
        """Whether every token of text is exact, and special tokens are too or are left out."""
        return not ((self.kind_V == COMPOSED) | (self.kind_V == UNMATCHED)).any()

    def counts(self) -> dict[str, int]:
        """The number of tokens of each kind, by name."""
        return {name: int((self.kind_V == kind).sum()) for kind, name in zip(KINDS, NAMES, strict=True)}

    def __str__(self) -> str:
        counts, V = self.counts(), len(self.kind_V)
        parts = [f"{counts[name]} {name} ({100 * counts[name] / V:.1f} %)" for name in NAMES[:3]]
        return f"bridge {self.mode}: of {V} policy tokens {', '.join(parts)}, {counts['special']} special"


@torch.no_grad()
def bridge_embeddings(
    policy_tokenizer: PreTrainedTokenizerBase,
    reward_tokenizer: PreTrainedTokenizerBase,
    embedding_UD: Tensor,
    vocab_size: int,
    mode: str,
    end_ids: Collection[int] = (),
) -> tuple[Tensor, Coverage]:
    """embedding_VD: row i is the reward model's embedding of policy token i; and the kind of each row.

    A token with the same bytes takes its row of `embedding_UD`. For other text there is `mode`: `compose` (the mean
    over the reward tokens that spell it mid-text), `unknown` (the unknown or end token) or `zero`; what cannot be
    spelled is unknown. A special token takes the row of the special token of the same name. Without one it is zero, as
    decoding leaves it out; but with `compose` a token of `end_ids` takes the row of the reward model's end token.
    EntRGi (2602.05000) uses the unknown token for Dream and zero for LLaDA; composing is ours.
    """
    theirs = TokenBytes(reward_tokenizer, len(embedding_UD), skip_controls=True)
    kind_V, rows = _match(TokenBytes(policy_tokenizer, vocab_size), theirs, mode == "compose")
    unknown_id, end_id = reward_tokenizer.unk_token_id, reward_tokenizer.eos_token_id
    unknown_id = end_id if unknown_id is None else unknown_id
    U = len(embedding_UD)
    for i, kind in enumerate(kind_V):
        if rows[i] is None and mode != "zero" and unknown_id is not None and unknown_id < U:
            rows[i] = [unknown_id]
        elif kind == SPECIAL and mode == "compose" and i in end_ids and end_id is not None and end_id < U:
            rows[i] = [end_id]
    same = [ids[0] if kind == EXACT and ids else -1 for kind, ids in zip(kind_V, rows, strict=True)]
    coverage = Coverage(torch.tensor(kind_V, dtype=torch.int8), torch.tensor(same), mode)
    return _means(embedding_UD, [ids or [] for ids in rows]), coverage


def _match(ours: "TokenBytes", theirs: "TokenBytes", compose: bool) -> tuple[list[int], list[list[int] | None]]:
    """The kind of each policy token, and the reward tokens to average for it (empty: no text; None: unknown)."""
    named = {token: j for j, token in enumerate(theirs.tokens) if token is not None}
    kinds, texts = [UNMATCHED] * ours.size, dict[int, str]()
    rows: list[list[int] | None] = [None] * ours.size
    for i, (token, content) in enumerate(zip(ours.tokens, ours.bytes_of, strict=True)):
        j = named.get(token) if token is not None else None
        if token is None or i in ours.specials or content == b"":
            kinds[i], rows[i] = (EXACT if j is not None and j in theirs.specials else SPECIAL), []
        elif content is not None:
            # The token of the same name, if it has the same bytes, before another that has.
            j = j if j is not None and theirs.bytes_of[j] == content else theirs.ids_of.get(content)
            kinds[i] = EXACT if j is not None else UNMATCHED
            if j is None and compose:
                try:
                    texts[i] = content.decode()
                except UnicodeDecodeError:
                    rows[i] = theirs.spell_bytes(content)
        if kinds[i] == EXACT and j is not None:
            rows[i] = [j]
    for i, ids in zip(texts, theirs.spell(list(texts.values())), strict=True):
        rows[i] = ids
    return [COMPOSED if kinds[i] == UNMATCHED and rows[i] else kinds[i] for i in range(ours.size)], rows


def _means(embedding_UD: Tensor, rows: list[list[int]], chunk: int = 4096) -> Tensor:
    """The mean of some rows of `embedding_UD` for each list of them, in its type; zero for none."""
    out_VD = embedding_UD.new_zeros(len(rows), embedding_UD.shape[1])
    one = [i for i, ids in enumerate(rows) if len(ids) == 1]
    several = [i for i, ids in enumerate(rows) if len(ids) > 1]
    out_VD[one] = embedding_UD[[rows[i][0] for i in one]]
    for start in range(0, len(several), chunk):
        part = several[start : start + chunk]
        n_A = torch.tensor([len(rows[i]) for i in part], device=out_VD.device)
        ids_N = torch.tensor([j for i in part for j in rows[i]], device=out_VD.device)
        to_N = torch.arange(len(part), device=out_VD.device).repeat_interleave(n_A)
        sum_AD = torch.zeros(len(part), out_VD.shape[1], device=out_VD.device)
        sum_AD.index_add_(0, to_N, embedding_UD[ids_N].float())
        out_VD[part] = (sum_AD / n_A[:, None]).to(out_VD.dtype)
    return out_VD


# ----------------------------------------------------------------------------------------------------- token bytes
class TokenBytes:
    """The tokens of a tokenizer below `size`, and the bytes that each adds to a text.

    `bytes_of[i]` is None for a special token, for a hole in the vocabulary, and for a token without text of its own;
    with `skip_controls` for every control token, as the text of an input never becomes one.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, size: int, skip_controls: bool = False) -> None:
        self.tokenizer, self.size = tokenizer, size
        self.tokens: list[str | None] = [None] * size
        for token, i in tokenizer.get_vocab().items():
            if i < size:
                self.tokens[i] = token
        marked = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        self.specials = frozenset(marked | set(tokenizer.all_special_ids))  # those that decoding leaves out
        silent = set(self.specials)
        if skip_controls:
            silent |= set(tokenizer.convert_tokens_to_ids(control_tokens(tokenizer)))
        added = {i: str(token) for i, token in tokenizer.added_tokens_decoder.items()}
        self.parts = _parts_of(tokenizer)
        to_bytes = _bytes_function(tokenizer, self.parts)
        self.bytes_of = [
            None if token is None or i in silent else added[i].encode() if i in added else to_bytes(token)
            for i, token in enumerate(self.tokens)
        ]

    @cached_property
    def ids_of(self) -> dict[bytes, int]:
        """The token for some bytes; of several the first, and one that is written as text before a lone byte."""
        found: dict[bytes, int] = {}
        for lone in (False, True):
            for i, content in enumerate(self.bytes_of):
                if content and (str(self.tokens[i]).startswith("<0x") and len(content) == 1) == lone:
                    found.setdefault(content, i)
        return found

    def join(self, ids: Sequence[int]) -> bytes | None:
        """The bytes of several tokens together; None where one of them has none."""
        pieces = [self.bytes_of[i] if i < self.size else None for i in ids]
        return None if None in pieces else b"".join(piece for piece in pieces if piece is not None)

    def normalise(self, text: str) -> str:
        """The text as the tokenizer's normaliser, which may lower its case, leaves it inside a longer one."""
        normalizer = getattr(getattr(self.tokenizer, "backend_tokenizer", None), "normalizer", None)
        if normalizer is None:
            return text
        return normalizer.normalize_str("x" + text).removeprefix(normalizer.normalize_str("x")).replace("▁", " ")

    def spell(self, texts: Sequence[str]) -> list[list[int] | None]:
        """The tokens that this tokenizer makes of each text where it stands inside a longer one.

        Empty where it makes none, and None (unknown) where their bytes are not the text as `normalise` leaves it.
        """
        spelled: list[list[int] | None] = [None] * len(texts)
        for anchor in ANCHORS:
            left = [t for t, found in enumerate(spelled) if found is None]
            for t, ids in zip(left, self._behind(anchor, [texts[t] for t in left]), strict=True):
                spelled[t] = ids
        controls = control_tokens(self.tokenizer)
        for t in (t for t, found in enumerate(spelled) if found is None):
            # Control tokens that are spelled out, and words where the vocabulary has no spaces.
            ids = token_ids(self.tokenizer, guarded(texts[t], controls))
            content = self.join(ids)
            if content is None:
                continue
            if not ids or _bare(content.decode("utf-8", "replace")) == _bare(self.normalise(texts[t])):
                spelled[t] = ids
        return spelled

    def _behind(self, anchor: str, texts: list[str]) -> Iterator[list[int] | None]:
        if not texts:
            return
        head = self.tokenizer(anchor, add_special_tokens=False)["input_ids"] if anchor else []
        rows = self.tokenizer([anchor + text for text in texts], add_special_tokens=False, verbose=False)["input_ids"]
        for text, row in zip(texts, rows, strict=True):
            ids = row[len(head) :]
            content = self.join(ids) if ids and row[: len(head)] == head else None
            same = content is not None and (content == text.encode() or content == self.normalise(text).encode())
            yield ids if same else None

    def spell_bytes(self, content: bytes) -> list[int] | None:
        """The tokens for bytes that are no text, such as half of a character; None where there are none for them."""
        if "ByteLevel" in self.parts:
            model = self.tokenizer.backend_tokenizer.model
            ids = [token.id for token in model.tokenize("".join(BYTE_LETTERS[byte] for byte in content))]
            return ids if self.join(ids) == content else None
        single = [self.ids_of.get(bytes([byte])) for byte in content]
        return None if None in single else [i for i in single if i is not None]


def _byte_letters() -> list[str]:
    """The letter that a byte-level vocabulary (as GPT-2's) writes for each byte: itself where it is visible."""
    visible = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(256, 512))
    return [chr(byte) if byte in visible else chr(next(others)) for byte in range(256)]


BYTE_LETTERS = _byte_letters()
_TO_BYTES = {letter: byte for byte, letter in enumerate(BYTE_LETTERS)}


def _bytes_function(tokenizer: PreTrainedTokenizerBase, parts: dict[str, dict]) -> Callable[[str], bytes | None]:
    """From a token as the vocabulary writes it to its bytes, by the kind of the vocabulary."""
    if not parts:
        return lambda token: _whole(tokenizer.convert_tokens_to_string([token]))
    if "ByteLevel" in parts:
        return _byte_level
    if "WordPiece" in parts:
        return lambda token: _word_piece(token, parts["WordPiece"]["prefix"])
    if "BPEDecoder" in parts:
        return lambda token: _whole(token.replace(parts["BPEDecoder"]["suffix"], " "))
    return lambda token: _sentence_piece(token, "ByteFallback" in parts)


def _parts_of(tokenizer: PreTrainedTokenizerBase) -> dict[str, dict]:
    """The parts of a tokenizer's pre-tokenizer and decoder by type; none for a tokenizer written in Python."""
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
    """A piece inside a word has the prefix. Any other begins a word; only marks and ideographs need no space."""
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
