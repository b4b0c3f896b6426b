"""The bundles that pass between the parts, with their shapes checked where they are made.

Shape legend, used in every name: P prompts, G completions per prompt, B = P*G rows, L canvas length
(prompt + completion), C completion length, N masked positions in the batch, V policy vocabulary,
D reward-model embedding width, T denoising steps, M guidance steps per denoising step.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


def _expect(tensor: Tensor | None, shape: tuple[int, ...], name: str) -> None:
    if tensor is not None and tuple(tensor.shape) != shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {shape}")


@dataclass(frozen=True)
class Prompts:
    """P prompts: their text and the data-set rows they come from."""

    texts: list[str]
    rows: list[dict[str, Any]]

    def __post_init__(self) -> None:
        if len(self.texts) != len(self.rows):
            raise ValueError(f"{len(self.texts)} texts for {len(self.rows)} rows")

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, index: list[int]) -> "Prompts":
        """Those of the given numbers."""
        return Prompts([self.texts[i] for i in index], [self.rows[i] for i in index])

    def repeat(self, times: int) -> "Prompts":
        """Each prompt `times` times in a row: the rows of one group stand together."""
        return Prompts([t for t in self.texts for _ in range(times)], [r for r in self.rows for _ in range(times)])


@dataclass(frozen=True)
class Rollout:
    """What denoising leaves behind. Log-probabilities are of the tempered, truncated sampling distribution."""

    canvas_BL: Tensor  # int64, fully unmasked
    attention_BL: Tensor  # bool, False on left padding
    completion_mask_BC: Tensor  # bool, True up to and including the first end token
    unmask_step_BC: Tensor  # int64, denoising step 0 ... T-1 at which each token was committed
    behaviour_logp_BC: Tensor  # float32, nats, under the guided logits it was sampled from
    policy_logp_BC: Tensor  # float32, nats, under the policy's own logits; -inf outside its support

    def __post_init__(self) -> None:
        B, L = self.canvas_BL.shape
        C = self.completion_mask_BC.shape[1]
        _expect(self.attention_BL, (B, L), "attention_BL")
        for name in ("completion_mask_BC", "unmask_step_BC", "behaviour_logp_BC", "policy_logp_BC"):
            _expect(getattr(self, name), (B, C), name)

    def rows(self, index: slice | Tensor) -> "Rollout":
        """Those rows, as a slice or by number (int64)."""
        return Rollout(**{name: value[index] for name, value in vars(self).items()})

    @staticmethod
    def join(rollouts: list["Rollout"]) -> "Rollout":
        """The rows of all of them, one after another."""
        return Rollout(**{name: torch.cat([getattr(r, name) for r in rollouts]) for name in vars(rollouts[0])})

    @property
    def completion_BC(self) -> Tensor:
        return self.canvas_BL[:, -self.completion_mask_BC.shape[1] :]

    @property
    def decided_BC(self) -> Tensor:
        """Tokens (bool) written up to the step that settled the row's text: with it, all that the reward depends on.

        Beside the text these are the tokens after its end that were written before and could be seen.
        """
        last_B1 = torch.where(self.completion_mask_BC, self.unmask_step_BC, -1).amax(1, keepdim=True)
        return self.unmask_step_BC <= last_B1


@dataclass
class PrefixCache:
    """Keys and values of a canvas's first `length` tokens, as they were when the canvas was last read whole.

    An approximation: in a bidirectional model they depend on what comes after them (Fast-dLLM, arXiv 2505.22618).
    """

    length: int
    layers: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # empty: the next reading is whole and fills it

    def rows(self, keep_B: Tensor) -> "PrefixCache":
        """Of some rows (bool)."""
        return PrefixCache(self.length, [(keys[keep_B], values[keep_B]) for keys, values in self.layers])


@dataclass(frozen=True)
class NoiseDraw:
    """K canvases and how much what is read there counts: drawn once as data, shared by old, reference and new."""

    hidden_KBL: Tensor  # bool, one slice per forward pass
    weight_KBC: Tensor  # float32, weight of the token's log-probability on that canvas; 0: it isn't read
    count_BC: Tensor  # bool, tokens that count

    def __post_init__(self) -> None:
        K, B, _ = self.hidden_KBL.shape
        _expect(self.weight_KBC, (K, B, self.count_BC.shape[1]), "weight_KBC")

    def rows(self, index: slice) -> "NoiseDraw":
        return NoiseDraw(self.hidden_KBL[:, index], self.weight_KBC[:, index], self.count_BC[index])


@dataclass(frozen=True)
class LossInputs:
    """Everything an objective may read; what it did not declare as needed is None."""

    logp_BC: Tensor  # float32 with gradient
    mask_BC: Tensor  # bool, tokens that count
    advantage_B: Tensor  # float32
    by_sequence: bool = False  # only the rows' sums of log-probabilities mean something (`Estimator.level`)
    old_logp_BC: Tensor | None = None  # before the first update on this rollout
    ref_logp_BC: Tensor | None = None  # adapter off
    correction_BC: Tensor | None = None  # float32, weights of `corrections.py`; a row's are equal at sequence level

    def __post_init__(self) -> None:
        shape = tuple(self.logp_BC.shape)
        _expect(self.advantage_B, shape[:1], "advantage_B")
        for name in ("mask_BC", "old_logp_BC", "ref_logp_BC", "correction_BC"):
            _expect(getattr(self, name), shape, name)


@dataclass(frozen=True)
class LossOutputs:
    """`loss_sum / denominator`, both summed over all micro-batches and ranks first, is the loss."""

    loss_sum: Tensor  # scalar with gradient
    denominator: Tensor  # scalar
    metrics: dict[str, Tensor] = field(default_factory=dict)  # sums over what `denominator` counts
    samples: dict[str, Tensor] = field(default_factory=dict)  # 1-D, whose quantiles are worth logging

    def __post_init__(self) -> None:
        _expect(self.loss_sum, (), "loss_sum")
        _expect(self.denominator, (), "denominator")


def masked_mean(value_BC: Tensor, mask_BC: Tensor) -> Tensor:
    """Each row's mean where the mask holds, 0 if it holds nowhere; an infinite value outside it has no part."""
    return torch.where(mask_BC, value_BC, 0.0).sum(1) / mask_BC.sum(1).clamp(min=1)
