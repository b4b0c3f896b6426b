"""Vocabulary-sized work at hidden positions, a chunk of positions at a time.

A readout turns the logits of a chunk into one value a position: a log-probability, an entropy, a KL divergence, an
expected embedding. Several readouts share one projection. For the gradient each chunk is computed again, so no tensor
of N x V is kept for the backward pass. To add one, write a function of `Positions` and name it in `READOUTS`, or by
dotted path; an objective asks for it by that name (`Objective.readouts`).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel


def finite_log_softmax(logits_NV: Tensor) -> Tensor:
    """Log-probabilities with the impossible tokens (logit -inf) at a finite -1e4, whose probability is exactly 0.

    So products of probability and log-probability, and their gradients, hold no 0 x inf.
    """
    return logits_NV.log_softmax(-1).clamp(min=-1e4)


def linear_head(causal_lm: PreTrainedModel, states: Tensor, vocab_size: int) -> Tensor:
    """Logits (..., V) of final hidden states (..., H) under the model's `lm_head`, which may have more rows than V."""
    return F.linear(states, causal_lm.lm_head.weight[:vocab_size])


@dataclass(frozen=True)
class Positions:
    """N positions of one chunk: what a readout can use."""

    logits_NV: Tensor  # float32, with gradient where it is enabled; -inf at the mask token
    token_N: Tensor  # int64, the token asked about at each position
    given: Mapping[str, Tensor]  # further inputs by name, first dimension N, such as `reference_NH`
    project: Callable[[Tensor], Tensor]  # final hidden states (..., H) -> logits (..., V), such as the reference's


# -> one value a position, first dimension N; or several, by name
Readout = Callable[[Positions], Tensor | Mapping[str, Tensor]]


def token_logp(positions: Positions) -> Tensor:
    """logp_N = log softmax(logits)[token], nats, untempered."""
    return -F.cross_entropy(positions.logits_NV, positions.token_N, reduction="none")


def kl_to_reference(positions: Positions) -> Tensor:
    """KL_N(p || q) = sum_v p_v (log p_v - log q_v), nats, untempered, over the whole vocabulary.

    q is the reference's distribution, projected without gradient from its final hidden states `given["reference_NH"]`.
    The mask column, -inf on both sides, contributes 0. An objective that uses this needs `reference_states`.
    """
    with torch.no_grad():
        reference_NV = finite_log_softmax(positions.project(positions.given["reference_NH"]))
    logp_NV = finite_log_softmax(positions.logits_NV)
    return (logp_NV.exp() * (logp_NV - reference_NV)).sum(-1)


def cross_entropy_to_old(positions: Positions) -> Tensor:
    """H_N = -sum_v q_v log p_v, nats, untempered, of the policy p with the one before the first update, q.

    q is projected without gradient from its final hidden states `given["old_NH"]`. The mask column contributes 0. An
    objective that uses this needs `old_states`.
    """
    with torch.no_grad():
        old_NV = finite_log_softmax(positions.project(positions.given["old_NH"])).exp_()
    return -(old_NV * finite_log_softmax(positions.logits_NV)).sum(-1)


# Logits of a chunk: 8 MiB and 256 MiB in float32.
CPU_CHUNK, GPU_CHUNK = 2**21, 2**26

READOUTS: dict[str, Readout] = {
    "token_logp": token_logp,
    "kl_to_reference": kl_to_reference,
    "cross_entropy_to_old": cross_entropy_to_old,
}


def read_out(
    project: Callable[[Tensor], Tensor],
    states_NH: Tensor,
    token_N: Tensor,
    readouts: Mapping[str, Readout],
    given: Mapping[str, Tensor] | None = None,
    *,
    vocab_size: int,
) -> dict[str, Tensor]:
    """The value of each readout at N positions, by its name (or the names it returns), first dimension N.

    `project` turns final hidden states (n, H) into logits (n, V); `given` goes to the readouts, chunked as the
    positions. A chunk's logits take at most 8 MiB on a CPU and 256 MiB on a GPU, whatever N is.
    """
    given = given or {}
    extra = list(given)

    def chunk(states_nH: Tensor, token_n: Tensor, *given_n: Tensor) -> dict[str, Tensor]:
        positions = Positions(project(states_nH), token_n, dict(zip(extra, given_n, strict=True)), project)
        values: dict[str, Tensor] = {}
        for name, readout in readouts.items():
            value = readout(positions)
            values |= {name: value} if isinstance(value, Tensor) else value
        return values

    size = positions_per_chunk(states_NH, vocab_size)
    inputs = (states_NH, token_N, *(given[name] for name in extra))
    chunks = list(zip(*(tensor.split(size) for tensor in inputs), strict=True))
    if len(chunks) == 1 or not torch.is_grad_enabled():
        values = [chunk(*tensors) for tensors in chunks]
    else:
        values = [checkpoint(chunk, *tensors, use_reentrant=False, preserve_rng_state=False) for tensors in chunks]
    return {name: torch.cat([piece[name] for piece in values]) for name in values[0]}


def positions_per_chunk(states_NH: Tensor, vocab_size: int) -> int:
    """How many positions' logits are made at a time."""
    return max(1, (GPU_CHUNK if states_NH.is_cuda else CPU_CHUNK) // vocab_size)
