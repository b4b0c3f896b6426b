"""The bundles that pass between modules. Each checks its shapes when it is made.

Shape legend, used in every name: P prompts, G completions per prompt, B = P*G rows, L canvas length
(prompt + completion), C completion length, N masked positions in the batch, V policy vocabulary,
D reward-model embedding width, T denoising steps, M guidance steps per denoising step.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor


def _expect(tensor: Tensor | None, shape: tuple[int, ...], name: str) -> None:
    if tensor is not None and tuple(tensor.shape) != shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {shape}")


# What a model is asked: the text of one user turn, or the turns of a chat, each with its `role` and `content`.
Chat = list[dict[str, str]]
Prompt = str | Chat


def turns_of(prompt: Prompt) -> Chat:
    """The turns of a prompt: a text is one user turn."""
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


def transcript(prompt: Prompt) -> str:
    """A prompt as one text, for people, Python rewards and models without a chat format: `role: content` by turn."""
    if isinstance(prompt, str):
        return prompt
    return "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in prompt)


def without_oldest(prompt: Prompt) -> Prompt | None:
    """A chat without its oldest turn and those that answer it; None where only its system and last turns are left."""
    if isinstance(prompt, str):
        return None
    system = [turn for turn in prompt[:1] if turn["role"] == "system"]
    rest = prompt[len(system) :]
    following = next((i for i, turn in enumerate(rest) if i and turn["role"] == "user"), None)
    return None if following is None else system + rest[following:]


def with_last(prompt: Prompt, text: str) -> Prompt:
    """The prompt with another text as its last turn."""
    return text if isinstance(prompt, str) else [*prompt[:-1], {**prompt[-1], "content": text}]


@dataclass(frozen=True)
class Prompts:
    """P prompts: their texts, the data-set rows, what the policy is given to read, and what any model is asked.

    `chats` goes to chat templates: a text for one user turn, or the turns of a chat. Left out, it is the texts. The
    text of a chat is its `transcript`. `inputs` is the chat in the policy's template. Left out, it is the plain text: a
    raw prompt.
    """

    texts: list[str]
    rows: list[dict[str, Any]]
    inputs: list[str] = field(default_factory=list)
    chats: list[Prompt] = field(default_factory=list)

    def __post_init__(self) -> None:
        if len(self.texts) != len(self.rows):
            raise ValueError(f"{len(self.texts)} texts for {len(self.rows)} rows")
        for name in ("inputs", "chats"):
            if not getattr(self, name):
                object.__setattr__(self, name, list(self.texts))
            if len(self.texts) != len(getattr(self, name)):
                raise ValueError(f"{len(self.texts)} texts for {len(getattr(self, name))} {name}")

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def columns(self) -> list[str]:
        """Every column that some row has."""
        return sorted({name for row in self.rows for name in row})

    def formatted(self, template: Callable[[Prompt], str]) -> "Prompts":
        """The same prompts with `template` applied to each chat, such as `Policy.format_prompt`."""
        return replace(self, inputs=[template(prompt) for prompt in self.chats])

    def take(self, index: Sequence[int]) -> "Prompts":
        """The prompts with these numbers."""
        texts, rows = [self.texts[i] for i in index], [self.rows[i] for i in index]
        return Prompts(texts, rows, [self.inputs[i] for i in index], [self.chats[i] for i in index])

    def repeat(self, times: int) -> "Prompts":
        """Each prompt `times` times in a row: the rows of one group stand together."""
        return self.take([i for i in range(len(self)) for _ in range(times)])

    def batches(self, size: int = 1024) -> Iterator["Prompts"]:
        """All of them in their order, so many at a time."""
        for start in range(0, len(self), size):
            yield self.take(range(start, min(start + size, len(self))))


class SomePrompts(Protocol):
    """Prompts that are in memory (`Prompts`), or read by number (`rgrl.data.PromptSet`)."""

    def __len__(self) -> int: ...

    @property
    def columns(self) -> list[str]: ...

    def take(self, index: Sequence[int]) -> Prompts: ...

    def batches(self) -> Iterator[Prompts]: ...


@dataclass(frozen=True)
class Rollout:
    """What denoising leaves behind. Log-probabilities are of the tempered, truncated sampling distribution."""

    canvas_BL: Tensor  # int64, fully unmasked
    attention_BL: Tensor  # bool, False on left padding
    completion_mask_BC: Tensor  # bool, True up to and including the first end token
    unmask_step_BC: Tensor  # int64, denoising step 0 ... T-1 at which each token was committed
    behaviour_logp_BC: Tensor  # float32, nats, under the guided logits it was sampled from
    policy_logp_BC: Tensor  # float32, nats, under the unsteered logits; -inf outside its support

    def __post_init__(self) -> None:
        B, L = self.canvas_BL.shape
        C = self.completion_mask_BC.shape[1]
        _expect(self.attention_BL, (B, L), "attention_BL")
        for name in ("completion_mask_BC", "unmask_step_BC", "behaviour_logp_BC", "policy_logp_BC"):
            _expect(getattr(self, name), (B, C), name)

    def rows(self, index: slice | Tensor) -> "Rollout":
        """Some rows, as a slice or by number (int64)."""
        return Rollout(**{name: value[index] for name, value in vars(self).items()})

    def to(self, device: torch.device) -> "Rollout":
        """The same on `device`."""
        return Rollout(**{name: value.to(device) for name, value in vars(self).items()})

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


@dataclass
class LossTerm:
    """One term of the loss over this rank's micro-batches: sums, and the gradient of the loss's sum, not yet divided.

    `totals` holds the loss, its metrics, and what each is divided by: `n`, unless `over` names another.
    """

    weight: float
    totals: dict[str, Tensor] = field(default_factory=dict)
    over: Mapping[str, str] = field(default_factory=dict)
    samples: dict[str, list[Tensor]] = field(default_factory=dict)  # values for quantiles
    gradient: Tensor = field(default_factory=lambda: torch.zeros(()))  # of all parameters, flat

    def add(self, values: Mapping[str, Tensor]) -> None:
        """Add to the sums."""
        for name, value in values.items():
            self.totals[name] = self.totals[name] + value.detach() if name in self.totals else value.detach()

    def take_gradient(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        """Move the parameters' gradients here, flat, 0 where there is none; the parameters have none then."""
        gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters]
        self.gradient = torch.cat([gradient.reshape(-1) for gradient in gradients])
        for p in parameters:
            p.grad = None


def masked_mean(value_BC: Tensor, mask_BC: Tensor) -> Tensor:
    """Each row's mean over the mask, 0 for an empty mask; infinite values outside the mask are ignored."""
    return torch.where(mask_BC, value_BC, 0.0).sum(1) / mask_BC.sum(1).clamp(min=1)
