"""The bundles that pass between modules. Each checks its shapes when it is made.

Shape legend, used in every name: P prompts, G completions per prompt, B = P*G rows, L canvas length
(prompt + completion), C completion length, N masked positions in the batch, V policy vocabulary,
D reward-model embedding width, T denoising steps, M guidance steps per denoising step.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor


def _expect(tensor: Tensor | None, shape: tuple[int, ...], name: str) -> None:
    if tensor is not None and tuple(tensor.shape) != shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {shape}")


@dataclass(frozen=True)
class Prompts:
    """P prompts: the user's text, the data-set rows, and what the policy is given to read.

    `inputs` is the text with the chat template applied. Left out, it is the plain text: a raw prompt.
    """

    texts: list[str]
    rows: list[dict[str, Any]]
    inputs: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if len(self.texts) != len(self.rows):
            raise ValueError(f"{len(self.texts)} texts for {len(self.rows)} rows")
        if not self.inputs:
            object.__setattr__(self, "inputs", list(self.texts))
        if len(self.texts) != len(self.inputs):
            raise ValueError(f"{len(self.texts)} texts for {len(self.inputs)} inputs")

    def __len__(self) -> int:
        return len(self.texts)

    def formatted(self, template: Callable[[str], str]) -> "Prompts":
        """The same prompts with `template` applied to each text, such as `Policy.format_prompt`."""
        return replace(self, inputs=[template(text) for text in self.texts])

    def take(self, index: list[int]) -> "Prompts":
        """The prompts with these numbers."""
        return Prompts([self.texts[i] for i in index], [self.rows[i] for i in index], [self.inputs[i] for i in index])

    def repeat(self, times: int) -> "Prompts":
        """Each prompt `times` times in a row: the rows of one group stand together."""
        return self.take([i for i in range(len(self)) for _ in range(times)])


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
        """Some rows, as a slice or by number (int64)."""
        return Rollout(**{name: value[index] for name, value in vars(self).items()})

    @staticmethod
    def join(rollouts: list["Rollout"]) -> "Rollout":
        """The rows of all rollouts, one after another."""
        return Rollout(**{name: torch.cat([getattr(r, name) for r in rollouts]) for name in vars(rollouts[0])})

    @property
    def completion_BC(self) -> Tensor:
        return self.canvas_BL[:, -self.completion_mask_BC.shape[1] :]

    @property
    def decided_BC(self) -> Tensor:
        """Tokens (bool) committed up to the step that fixed the row's final text.

        The reward depends on these tokens and no others. Besides the text they include tokens after its end that
        were committed earlier, because the policy could attend to them.
        """
        last_B1 = torch.where(self.completion_mask_BC, self.unmask_step_BC, -1).amax(1, keepdim=True)
        return self.unmask_step_BC <= last_B1


@dataclass
class PrefixCache:
    """Keys and values of a canvas's first `length` tokens, from the last forward pass over the whole canvas.

    An approximation: in a bidirectional model they depend on later tokens (Fast-dLLM, arXiv 2505.22618).
    """

    length: int
    layers: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # empty: the next pass is whole and fills it

    def rows(self, keep_B: Tensor) -> "PrefixCache":
        """The cache of some rows (bool)."""
        return PrefixCache(self.length, [(keys[keep_B], values[keep_B]) for keys, values in self.layers])


@dataclass(frozen=True)
class NoiseDraw:
    """K canvases, given as masks, and the weight of each token there.

    Drawn once as data and shared by the old, reference and new estimates.
    """

    hidden_KBL: Tensor  # bool, one slice per forward pass
    weight_KBC: Tensor  # float32, weight of the token's value on that canvas; 0: it is not evaluated
    count_BC: Tensor  # bool, tokens included in the loss

    def __post_init__(self) -> None:
        K, B, _ = self.hidden_KBL.shape
        _expect(self.weight_KBC, (K, B, self.count_BC.shape[1]), "weight_KBC")

    def rows(self, index: slice) -> "NoiseDraw":
        """The draw of some rows."""
        return NoiseDraw(self.hidden_KBL[:, index], self.weight_KBC[:, index], self.count_BC[index])


@dataclass(frozen=True)
class LossInputs:
    """Everything an objective may use. What it did not declare as needed is None, or absent from `readouts`."""

    logp_BC: Tensor  # float32 with gradient
    mask_BC: Tensor  # bool, tokens included in the loss
    advantage_B: Tensor  # float32
    by_sequence: bool = False  # log-probabilities only have a meaning summed over a row (`Estimator.level`)
    old_logp_BC: Tensor | None = None  # before the first update on this rollout
    ref_logp_BC: Tensor | None = None  # adapter off
    correction_BC: Tensor | None = (
        None  # float32, importance weights (corrections.py); constant in a row at sequence level
    )
    readouts: Mapping[str, Tensor] = field(default_factory=dict)  # BC..., values by name, as `Objective.readouts` asks

    def __post_init__(self) -> None:
        shape = tuple(self.logp_BC.shape)
        _expect(self.advantage_B, shape[:1], "advantage_B")
        for name in ("mask_BC", "old_logp_BC", "ref_logp_BC", "correction_BC"):
            _expect(getattr(self, name), shape, name)
        for name, value in self.readouts.items():
            if tuple(value.shape[:2]) != shape:
                raise ValueError(f"readout {name} has shape {tuple(value.shape)}, expected {shape} first")


@dataclass(frozen=True)
class LossOutputs:
    """The loss is `loss_sum / denominator`, each summed over all micro-batches and ranks first."""

    loss_sum: Tensor  # scalar with gradient
    denominator: Tensor  # scalar
    metrics: dict[str, Tensor] = field(default_factory=dict)  # sums over the same items that `denominator` counts
    samples: dict[str, Tensor] = field(default_factory=dict)  # 1-D values whose quantiles are logged

    def __post_init__(self) -> None:
        _expect(self.loss_sum, (), "loss_sum")
        _expect(self.denominator, (), "denominator")


def masked_mean(value_BC: Tensor, mask_BC: Tensor) -> Tensor:
    """Each row's mean over the mask, 0 for an empty mask; infinite values outside the mask are ignored."""
    return torch.where(mask_BC, value_BC, 0.0).sum(1) / mask_BC.sum(1).clamp(min=1)
