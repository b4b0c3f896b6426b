"""A reward of completions that are given as embeddings, with a gradient: the two ways to compute it.

Both equal the model's own forward pass on the tokens of the same text, which `probe.py` makes sure of.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import DynamicCache, DynamicLayer, PreTrainedModel

from rgrl.models.text import count_positions
from rgrl.rewards.frame import Framed
from rgrl.types import Prompts

if TYPE_CHECKING:
    from rgrl.rewards.classifier import ClassifierReward


class WholeReward:
    """The whole text at every call: response_ACD, attention_AC, rows_A -> r_A, float32, differentiable.

    `rows_A` says which prompt each response answers. What is not attended is left out of the text, so that a row is the
    very sequence that its tokens would make, whatever the model does with positions.
    """

    def __init__(self, reward: ClassifierReward, prompts: Prompts) -> None:
        self.reward = reward
        frames = [reward.frame.around(chat) for chat in prompts.chats]
        self.before = _Piece.of(reward, [before for before, _ in frames], left=True)
        self.after = _Piece.of(reward, [after for _, after in frames], left=False)

    def __call__(self, response_ACD: Tensor, attention_AC: Tensor, rows_A: Tensor) -> Tensor:
        before, after, reward = self.before.rows(rows_A), self.after.rows(rows_A), self.reward
        embeds_ALD = torch.cat([before.embeds, response_ACD.to(before.embeds.dtype), after.embeds], 1)
        shown_AL = torch.cat([before.shown, attention_AC, after.shown], 1)
        read_AL = torch.cat([before.read, attention_AC, after.read], 1)
        type_AC = torch.full_like(attention_AC, reward.frame.answer_type(), dtype=torch.long)
        type_AL = torch.cat([before.types, type_AC, after.types], 1)
        # What is shown moves to the left, in its order.
        order_AL = (~shown_AL).to(torch.uint8).argsort(dim=1, stable=True)[:, : int(shown_AL.sum(1).amax())]
        embeds_ALD = embeds_ALD.gather(1, order_AL[..., None].expand(-1, -1, embeds_ALD.shape[-1]))
        shown_AL, read_AL, type_AL = (x.gather(1, order_AL) for x in (shown_AL, read_AL, type_AL))
        return reward.forward_embeddings(embeds_ALD, shown_AL, last_true(read_AL), type_AL)


class CachedReward:
    """The same with the prompts' keys and values computed once: for causal decoders that attend to everything before.

    Each distinct prompt's are computed once. Padding and what is not attended stay in the batch, and positions count
    attended tokens.
    """

    def __init__(self, reward: ClassifierReward, prompts: Prompts) -> None:
        self.reward, self.backbone = reward, reward.model.base_model
        frames = [reward.frame.around(chat) for chat in prompts.chats]
        prefixes = [tuple(before.ids) for before, _ in frames]
        unique = {ids: i for i, ids in enumerate(dict.fromkeys(prefixes))}
        before = _Piece.of(reward, [Framed([*ids], [0] * len(ids)) for ids in unique], left=True)
        which_B = torch.tensor([unique[ids] for ids in prefixes], device=reward.device)
        cache = DynamicCache(config=reward.model.config)
        if before.shown.shape[1] > 1:
            with torch.no_grad():
                self._backbone(before.embeds[:, :-1], before.shown[:, :-1], cache)
        if any(type(layer) is not DynamicLayer for layer in cache.layers):
            raise ValueError("some of its layers see a window of the text only")
        self.layers = [(layer.keys[which_B], layer.values[which_B]) for layer in cache.layers if layer.is_initialized]
        self.prefix_BL = before.shown[which_B]
        # Each call includes the prefix's last token, so that an empty response has a position to be scored at.
        self.start = before.rows(which_B, slice(-1, None))
        self.after = _Piece.of(reward, [after for _, after in frames], left=False)

    def __call__(self, response_ACD: Tensor, attention_AC: Tensor, rows_A: Tensor) -> Tensor:
        some = len(rows_A) < len(self.prefix_BL)
        cache = DynamicCache(config=self.reward.model.config)
        for i, (keys, values) in enumerate(self.layers):
            cache.update(keys[rows_A] if some else keys, values[rows_A] if some else values, i)
        start, after = self.start.rows(rows_A), self.after.rows(rows_A)
        embeds_ALD = torch.cat([start.embeds, response_ACD.to(start.embeds.dtype), after.embeds], 1)
        attention_AL = torch.cat([self.prefix_BL[rows_A], attention_AC, after.shown], 1)
        states_ALD = self._backbone(embeds_ALD, attention_AL, cache)
        at_A = last_true(torch.cat([start.read, attention_AC, after.read], 1))
        state_AD = states_ALD[torch.arange(len(at_A), device=at_A.device), at_A]
        return self.reward.model.score(state_AD)[:, 0].float()

    def _backbone(self, embeds_BLD: Tensor, attention_BL: Tensor, cache: DynamicCache) -> Tensor:
        """Final hidden states; `attention_BL` covers cached positions too, and `cache` takes the new ones."""
        position_BL = count_positions(attention_BL)[:, -embeds_BLD.shape[1] :]
        return self.backbone(
            inputs_embeds=embeds_BLD,
            attention_mask=attention_BL.long(),
            position_ids=position_BL,
            use_cache=True,
            **{cache_argument(self.backbone): cache},
        ).last_hidden_state


WAYS: dict[str, Callable[[ClassifierReward, Prompts], CachedReward | WholeReward]] = {
    "cached": CachedReward,
    "whole": WholeReward,
}


def cache_argument(model: PreTrainedModel) -> str:
    """The name under which a model takes its cache: transformers renamed it in 5.24."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def last_true(mask_BL: Tensor) -> Tensor:
    """The place of the last True in each row (B); 0 where there is none."""
    return torch.where(mask_BL, torch.arange(mask_BL.shape[1], device=mask_BL.device), 0).amax(1)


class _Piece:
    """Embedded tokens of some rows, padded: which are shown, which can be read, and their types."""

    def __init__(self, embeds: Tensor, shown: Tensor, read: Tensor, types: Tensor) -> None:
        self.embeds, self.shown, self.read, self.types = embeds, shown, read, types

    @classmethod
    def of(cls, reward: ClassifierReward, rows: list[Framed], left: bool) -> _Piece:
        width = max(map(len, rows))
        ids_BL = torch.zeros(len(rows), width, dtype=torch.long)
        type_BL, shown_BL = torch.zeros_like(ids_BL), torch.zeros_like(ids_BL, dtype=torch.bool)
        for b, row in enumerate(rows):
            place = slice(width - len(row), None) if left else slice(0, len(row))
            ids_BL[b, place], type_BL[b, place] = torch.tensor(row.ids).long(), torch.tensor(row.types).long()
            shown_BL[b, place] = True
        ids_BL, type_BL, shown_BL = (x.to(reward.device) for x in (ids_BL, type_BL, shown_BL))
        with torch.no_grad():
            embeds_BLD = reward.model.get_input_embeddings()(ids_BL)
        # A classifier reads the last token that is not padding, even where padding is a token of the text.
        read_BL = shown_BL if reward.pad_id is None else shown_BL & (ids_BL != reward.pad_id)
        return cls(embeds_BLD, shown_BL, read_BL, type_BL)

    def rows(self, rows_A: Tensor, columns: slice = slice(None)) -> _Piece:
        """Some of the rows, some of their columns."""
        return _Piece(*(x[rows_A, columns] for x in (self.embeds, self.shown, self.read, self.types)))
