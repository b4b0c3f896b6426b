"""From the policy's vocabulary to the reward model's embeddings, where their tokenizers differ."""

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase


def bridge_embeddings(
    policy_tokenizer: PreTrainedTokenizerBase,
    reward_tokenizer: PreTrainedTokenizerBase,
    embedding_UD: Tensor,
    vocab_size: int,
    mode: str,
) -> tuple[Tensor, dict[str, float]]:
    """embedding_VD: row i is the reward model's embedding of policy token i. And the fraction of each kind of row.

    An identical token string takes its own row of `embedding_UD`. For the rest, `mode` says: `compose` (mean
    over the reward tokens that spell the same text), `unknown` (the unknown or end token) or `zero`.
    EntRGi (2602.05000) uses the unknown token for Dream and zero for LLaDA; composing is ours.
    """
    known = reward_tokenizer.get_vocab()
    specials = set(policy_tokenizer.all_special_ids)
    unknown_id = reward_tokenizer.unk_token_id
    unknown_id = reward_tokenizer.eos_token_id if unknown_id is None else unknown_id
    tokens = policy_tokenizer.convert_ids_to_tokens(list(range(vocab_size)))
    embedding_VD = torch.zeros(vocab_size, embedding_UD.shape[1], dtype=embedding_UD.dtype, device=embedding_UD.device)
    counts = {"same": 0, "composed": 0, "unknown": 0, "zero": 0}
    for i, token in enumerate(tokens):
        j = known.get(token) if token is not None else None
        if j is not None and j < len(embedding_UD):
            embedding_VD[i] = embedding_UD[j]
            counts["same"] += 1
            continue
        if mode == "compose" and token is not None and i not in specials:
            spelled = reward_tokenizer(policy_tokenizer.convert_tokens_to_string([token]), add_special_tokens=False)
            if ids := spelled["input_ids"]:
                embedding_VD[i] = embedding_UD[ids].mean(0)
                counts["composed"] += 1
                continue
        if mode != "zero" and unknown_id is not None:
            embedding_VD[i] = embedding_UD[unknown_id]
            counts["unknown"] += 1
        else:
            counts["zero"] += 1
    return embedding_VD, {kind: count / vocab_size for kind, count in counts.items()}
