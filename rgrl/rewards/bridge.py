"""From the policy's vocabulary to the reward model's embeddings, where their tokenizers differ."""

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rgrl.rewards.surface import Surfaces

EXACT, COMPOSED, UNMATCHED, SPECIAL = KINDS = range(4)
TEXT_KINDS = EXACT, COMPOSED, UNMATCHED
NAMES = ("exact", "composed", "unmatched", "special")


@dataclass(frozen=True)
class Coverage:
    """How the reward model is shown each of the policy's tokens: kind_V, int8, of `KINDS`, and as which token.

    `EXACT`: as a token of its own that says the same bytes. `COMPOSED`: as several, or as what its normaliser makes of
    it. `UNMATCHED`: as unknown, or not at all. `SPECIAL`: not at all, as decoded text leaves it out.
    """

    kind_V: Tensor
    token_V: Tensor  # int64, the reward model's token of the exact ones, -1 of others
    mode: str

    @property
    def same(self) -> bool:
        """Whether every token of text is exact, and special tokens are too or are left out."""
        return not ((self.kind_V == COMPOSED) | (self.kind_V == UNMATCHED)).any()

    def counts(self) -> dict[str, int]:
        """Tokens of each kind, by name."""
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

    A token that says the same bytes takes its own row of `embedding_UD`. For other text `mode` says: `compose` (mean
    over the reward tokens that spell it, mid-text), `unknown` (the unknown or end token) or `zero`; what cannot be
    spelled is unknown. A special token takes the row of the special token of the same name. Without one it is zero, as
    decoding leaves it out; but with `compose` a token of `end_ids` takes the row of the reward model's end token.
    EntRGi (2602.05000) uses the unknown token for Dream and zero for LLaDA; composing is ours.
    """
    theirs = Surfaces(reward_tokenizer, len(embedding_UD), is_read=True)
    kind_V, rows = _match(Surfaces(policy_tokenizer, vocab_size), theirs, mode == "compose")
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


def _match(ours: Surfaces, theirs: Surfaces, compose: bool) -> tuple[list[int], list[list[int] | None]]:
    """The kind of each of our tokens, and their tokens whose mean it is (empty: it says nothing; None: unknown)."""
    named = {token: j for j, token in enumerate(theirs.tokens) if token is not None}
    kinds, texts = [UNMATCHED] * ours.size, dict[int, str]()
    rows: list[list[int] | None] = [None] * ours.size
    for i, (token, said) in enumerate(zip(ours.tokens, ours.bytes_of, strict=True)):
        j = named.get(token) if token is not None else None
        if token is None or i in ours.specials or said == b"":
            kinds[i], rows[i] = (EXACT if j is not None and j in theirs.specials else SPECIAL), []
        elif said is not None:
            # The token of the same name, if it says the same, before another that does.
            j = j if j is not None and theirs.bytes_of[j] == said else theirs.ids_of.get(said)
            kinds[i] = EXACT if j is not None else UNMATCHED
            if j is None and compose:
                try:
                    texts[i] = said.decode()
                except UnicodeDecodeError:
                    rows[i] = theirs.spell_bytes(said)
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
