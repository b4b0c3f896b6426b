"""The diffusion LM behind one contract: token ids in, logits of hidden tokens out. Callers never see a family."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from rgrl.errors import ConfigError
from rgrl.models.dropout import RowKeys
from rgrl.models.families import Family
from rgrl.models.reader import Reader
from rgrl.models.readout import Readout, read_out, token_logp
from rgrl.models.sharding import Lockstep, shard_layers
from rgrl.models.text import count_positions, pad_left, token_rows
from rgrl.types import PrefixCache, Prompt

FLASH = frozenset({"flash_attention_2", "flash_attention_3"})


class Policy(nn.Module):
    """A masked diffusion LM, its tokenizer and its token ids.

    `vocab_size` V counts the tokens that can be decoded. A model's table may have more rows; those are never projected,
    and so never sampled.
    """

    def __init__(
        self,
        causal_lm: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        family: Family,
        mask_id: int,
        path: str,
        fingerprint: dict[str, str] | None = None,
    ) -> None:
        super().__init__()
        self.causal_lm = causal_lm
        self.peft_model: PeftModel | None = None
        self.row_keys = RowKeys()
        self.lockstep: Lockstep | None = None
        self._dummies: list[Tensor] = []  # zeros that depend on dummy forward passes, until `backward`
        self.tokenizer = tokenizer
        self.family = family
        self.mask_id = mask_id
        self.path = path  # where it was loaded from, for the adapter's config
        self.fingerprint = fingerprint or {}  # what was loaded (models/fingerprint.py), and its `family`
        self.names = {name: name for name, _ in causal_lm.named_parameters()}  # tensors: here -> in the checkpoint
        self.reader = Reader(
            tokenizer, family, mask_id, causal_lm.config.vocab_size, causal_lm.config.max_position_embeddings
        )
        self.eos_id, self.vocab_size = self.reader.eos_id, self.reader.vocab_size

    @property
    def end_ids(self) -> tuple[int, ...]:
        """The tokens that end a completion, the end-of-text token first."""
        return self.reader.end_ids

    @property
    def device(self) -> torch.device:
        return self.causal_lm.device

    @property
    def max_length(self) -> int:
        """Longest canvas, in tokens, that the model has positions for."""
        return self.causal_lm.config.max_position_embeddings

    def logits(
        self, canvas_BL: Tensor, attention_BL: Tensor, at: Tensor | None = None, prefix: PrefixCache | None = None
    ) -> Tensor:
        """Scores of the token at each position: logits_BLV, or logits_NV with `at`. Float32.

        `at` names positions: bool BL (the result is in row-major order), or int64 N, positions in the flattened canvas.
        `canvas_BL` holds token ids, `attention_BL` is False on padding. Position l scores token l in every family, and
        the mask token scores -inf: it is never written. A filled `prefix` replaces its tokens, and `at` may then only
        name later positions; an empty one is filled.
        """
        states_BLH = self.states(canvas_BL, attention_BL, prefix)
        if at is not None:
            states_BLH = states_BLH[at] if at.dtype == torch.bool else states_BLH.flatten(0, 1)[at]
        return self.project(states_BLH)

    def states(self, canvas_BL: Tensor, attention_BL: Tensor, prefix: PrefixCache | None = None) -> Tensor:
        """Final hidden states_BLH; the state at l scores token l. Zero at positions that a filled `prefix` replaces."""
        # Rotary positions are relative, so counting real tokens from 0 suits every family and makes padding inert.
        position_BL = count_positions(attention_BL)
        cache, start = None, 0
        if prefix is not None:
            cache = DynamicCache(config=self.causal_lm.config)
            for i, (keys, values) in enumerate(prefix.layers):
                cache.update(keys, values, i)
                start = prefix.length
        config = self.causal_lm.config
        mask = mask_for(config._attn_implementation, attention_BL, canvas_BL.shape[1] - start, self.causal_lm.dtype)
        # By position: transformers renamed the argument that takes the cache in 5.24.
        states_BLH = self.causal_lm.base_model(
            canvas_BL[:, start:], mask, position_BL[:, start:], cache, use_cache=cache is not None
        ).last_hidden_state
        if prefix is not None and cache is not None and not prefix.layers:
            prefix.layers = [
                (layer.keys[:, :, : prefix.length], layer.values[:, :, : prefix.length]) for layer in cache.layers
            ]
        if start > 0:
            states_BLH = F.pad(states_BLH, (0, 0, start, 0))
        if not self.family.shifted:
            return states_BLH
        # A row's first token has no state before it and uses its own.
        before_BLH = torch.cat([states_BLH[:, :1], states_BLH[:, :-1]], dim=1)
        return torch.where((position_BL == 0)[..., None], states_BLH, before_BLH)

    def project(self, states: Tensor) -> Tensor:
        """Logits (..., V) of final hidden states (..., H), float32, -inf for the mask token."""
        logits = self.family.head(self.causal_lm, states, self.vocab_size).float()
        logits[..., self.mask_id] = float("-inf")
        return logits

    forward = logits

    def read_out(
        self,
        canvas_BL: Tensor,
        attention_BL: Tensor,
        at_BL: Tensor,
        token_N: Tensor,
        readouts: Mapping[str, Readout],
        given: Mapping[str, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """Values by name, first dimension N, at the positions `at_BL` (bool, row-major). One forward pass.

        `token_N` is the token asked about at each position, `given` holds further inputs of the readouts (first
        dimension N). Logits exist for a chunk of positions at a time, and are computed again for the gradient
        (models/readout.py).
        """
        states_NH = self.states(canvas_BL, attention_BL)[at_BL]
        return read_out(self.project, states_NH, token_N, readouts, given, vocab_size=self.vocab_size)

    def logp(self, canvas_BL: Tensor, attention_BL: Tensor, at_BL: Tensor, token_N: Tensor) -> Tensor:
        """Log-probability in nats, float32, of one token at each position of `at_BL` (bool, row-major): logp_N."""
        return self.read_out(canvas_BL, attention_BL, at_BL, token_N, {"logp": token_logp})["logp"]

    def reference(self) -> AbstractContextManager:
        """Context in which the adapter is off: the frozen base model."""
        return self.peft_model.disable_adapter() if self.peft_model is not None else nullcontext()

    def shard(self, device: torch.device, size: int, timeout: timedelta | None = None) -> None:
        """Move to `device`, with the frozen layers sharded among `size` neighbouring processes. Collective."""
        self.lockstep = shard_layers(self.causal_lm.model, device, size, timeout)
        self.causal_lm.to(device)

    @contextmanager
    def forward_passes(self, dropout_key_B: Tensor | None = None) -> Iterator[None]:
        """Context in which processes that share weights may make different numbers of forward passes.

        It ends for all of them together (see `Lockstep`). `dropout_key_B` are the keys of the rows in training mode
        (`rgrl.seeds.row_keys`). A backward pass through it must be `backward`, before the next such context.
        """
        self.row_keys.key_B = dropout_key_B
        if self.lockstep is None:
            yield
            return
        with self.lockstep() as dummies:
            yield
        self._dummies = dummies

    def backward(self, loss: Tensor) -> None:
        """Backpropagate, also through dummy forward passes, so that processes that share weights stay in step."""
        sum(self._dummies, loss).backward()
        self._dummies = []

    def encode(
        self, texts: Sequence[str], limit: int | None = None, quoted: Sequence[str] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Left-padded token ids of texts as they are: ids_BL int64 and attention_BL bool, on the model's device.

        Control tokens in a text become the real ones, but for those that `format_prompt` found in a prompt. Raises
        `ConfigError` for a text of more than `limit` tokens (None: no limit). The message quotes the text's
        entry of `quoted`, such as the prompt without its template (None: the text itself).
        """
        rows = token_rows(self.tokenizer, texts)
        for text, ids in zip(texts if quoted is None else quoted, rows, strict=True):
            if limit is not None and len(ids) > limit:
                raise ConfigError(
                    f"a prompt has {len(ids)} tokens, more than `data.max_prompt_length` = {limit}: {text[:60]!r}"
                )
        return pad_left(rows, self.device, fill=self.eos_id)

    def format_prompt(self, prompt: Prompt) -> str:
        """A user turn, or a chat, in the model's chat format, up to where the answer begins, for `encode`.

        A control token that the text spells, such as the mask or the end of a turn, stays text.
        """
        return self.reader.format_prompt(prompt)

    def is_end(self, ids: Tensor) -> Tensor:
        """True where a token ends the completion."""
        ended = ids == self.end_ids[0]
        for end_id in self.end_ids[1:]:
            ended = ended | (ids == end_id)
        return ended

    def decode(self, completion_BC: Tensor) -> list[str]:
        """Text of each completion up to its first end token."""
        ended_BC = self.is_end(completion_BC).cumsum(1) > 0
        return [
            self.tokenizer.decode(ids[~ended].tolist(), skip_special_tokens=True)
            for ids, ended in zip(completion_BC, ended_BC, strict=True)
        ]


def mask_for(implementation: str, attention_BL: Tensor, queries: int, dtype: torch.dtype) -> Tensor:
    """The mask that lets the last `queries` positions see every attended position, as a kernel takes it.

    `attention_BL` is False on padding. For `sdpa` bool_B1QL, for `eager` what is added to the scores, in `dtype`; flash
    attention takes bool_BL.
    """
    if implementation in FLASH:
        return attention_BL
    # In the shape that attention takes: transformers would inspect a mask by token, and a GPU would have to wait.
    mask_B1QL = attention_BL[:, None, None].expand(-1, 1, queries, -1)
    if implementation == "sdpa":
        return mask_B1QL
    return torch.zeros_like(mask_B1QL, dtype=dtype).masked_fill(~mask_B1QL, torch.finfo(dtype).min)
