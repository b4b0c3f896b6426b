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

    @property
    def completion_BC(self) -> Tensor:
        return self.canvas_BL[:, -self.completion_mask_BC.shape[1] :]


@dataclass
class PrefixCache:
    """Keys and values of a canvas's first `length` tokens, as they were when the canvas was last read whole.

    An approximation: in a bidirectional model they depend on what comes after them (Fast-dLLM, arXiv 2505.22618).
    """

    length: int
    layers: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # empty: the next reading is whole and fills it


@dataclass(frozen=True)
class NoiseDraw:
    """Which tokens an estimator hides: drawn once as data, shared by the old, reference and new estimates."""

    hidden_KBL: Tensor  # bool, one slice per forward pass

    def rows(self, index: slice) -> "NoiseDraw":
        return NoiseDraw(self.hidden_KBL[:, index])


@dataclass(frozen=True)
class LossInputs:
    """Everything an objective may read; what it did not declare as needed is None."""

    logp_BC: Tensor  # float32 with gradient
    mask_BC: Tensor  # bool, tokens that count
    advantage_B: Tensor  # float32
    old_logp_BC: Tensor | None = None  # before the first update on this rollout
    ref_logp_BC: Tensor | None = None  # adapter off
    behaviour_logp_BC: Tensor | None = None  # under the guided sampler
    policy_logp_BC: Tensor | None = None  # under the policy, recorded by the sampler

    def __post_init__(self) -> None:
        shape = tuple(self.logp_BC.shape)
        _expect(self.advantage_B, shape[:1], "advantage_B")
        for name in ("mask_BC", "old_logp_BC", "ref_logp_BC", "behaviour_logp_BC", "policy_logp_BC"):
            _expect(getattr(self, name), shape, name)


@dataclass(frozen=True)
class LossOutputs:
    """`loss_sum / denominator`, both summed over all micro-batches and ranks first, is the loss."""

    loss_sum: Tensor  # scalar with gradient
    denominator: Tensor  # scalar
    metrics: dict[str, Tensor] = field(default_factory=dict)  # sums over what `denominator` counts

    def __post_init__(self) -> None:
        _expect(self.loss_sum, (), "loss_sum")
        _expect(self.denominator, (), "denominator")


def masked_sum(value_BC: Tensor, mask_BC: Tensor) -> Tensor:
    """Sum where the mask holds; a value outside it, infinite ones too, has no part."""
    return torch.where(mask_BC, value_BC, 0.0).sum()
