"""A reward model from transformers: one number for a prompt and its completion, with a gradient."""

import inspect
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from rgrl.config import GuidanceConfig
from rgrl.errors import ConfigError
from rgrl.hub import fetch_checkpoint
from rgrl.models.adapter import merge_adapter
from rgrl.models.fingerprint import adapter_fingerprint, fingerprint
from rgrl.models.text import guarded, token_ids, unseen_tokens
from rgrl.models.weights import check_finite
from rgrl.rewards.bridge import Coverage, bridge_embeddings
from rgrl.rewards.frame import Frame, Framed
from rgrl.rewards.guide import WAYS, CachedReward, WholeReward
from rgrl.rewards.honoured import UNBUILT, check_used, read_config
from rgrl.rewards.probe import probe
from rgrl.rollout.guidance import Guidance
from rgrl.types import Prompts


class ClassifierReward(nn.Module):
    """`AutoModelForSequenceClassification` with one label, frozen; it scores text and guides through embeddings.

    Scores are the model's own forward pass on token ids. `way` says how it guides (`WAYS`), None that it cannot, and
    `reasons` why a way is not exact for this model; `probe.py` finds out.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        name: str,
        fingerprint: dict[str, str] | None = None,
        max_length: int = 0,
    ) -> None:
        super().__init__()
        self.model = model.requires_grad_(False).eval()
        self.model.config.use_cache = False
        self.tokenizer = tokenizer
        self.name = name
        self.fingerprint = fingerprint or {}  # what was loaded (models/fingerprint.py), with its `adapter` if any
        self.frame = make_frame(model, tokenizer, name, max_length)
        self.pad_id: int | None = model.config.get_text_config().pad_token_id
        if self.pad_id is None:
            # Without one, transformers reads the last token and takes one text at a time. This means the same, for
            # several texts of one length.
            model.config.get_text_config().pad_token_id = -1
        # Types of tokens are passed where the tokenizer makes them, as users do: GPT-2 embeds them as further tokens.
        typed = "token_type_ids" in tokenizer("text")
        self.takes = {name for name in inspect.signature(model.forward).parameters if typed or name != "token_type_ids"}
        self.way: str | None = None
        self.reasons: dict[str, str] = {}
        self.embedding_VD: Tensor | None = None
        self.unseen_V: Tensor | None = None  # the policy's tokens that its text lacks
        self.coverage: Coverage | None = None

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def ways(self) -> list[str]:
        """The ways to guide that are worth trying, the fastest first."""
        decodes = "position_ids" in inspect.signature(self.model.base_model.forward).parameters
        cached = decodes and hasattr(self.model, "score") and window_of(self.model.config) is None
        return ["cached", "whole"] if cached else ["whole"]

    # -------------------------------------------------------------------------------------------------- guiding
    def bind(
        self,
        policy_tokenizer: PreTrainedTokenizerBase,
        vocab_size: int,
        mode: str = "compose",
        end_ids: Collection[int] = (),
    ) -> "ClassifierReward":
        """Lay out this model's input embeddings in the policy's vocabulary, as guidance needs; returns itself.

        `mode` as in `RewardConfig.bridge`; `end_ids` end a completion, beside the tokenizer's end token. Raises
        `ConfigError` for a model that cannot guide.
        """
        if self.way is None:
            why = "; ".join(f"{way}: {reason}" for way, reason in self.reasons.items())
            raise ConfigError(
                f"reward model {self.name} scores, but cannot guide ({why}): set `guidance.kind: none` and "
                "`gradient.weight: 0`, or another model as `guidance.path` (with `gradient.of: guide`)"
            )
        ends = {*end_ids, policy_tokenizer.eos_token_id}
        self.embedding_VD, self.coverage = bridge_embeddings(
            policy_tokenizer, self.tokenizer, self.embedding_table(), vocab_size, mode, ends
        )
        unseen = [i for i in unseen_tokens(policy_tokenizer) if i < vocab_size]
        self.unseen_V = torch.zeros(vocab_size, dtype=torch.bool, device=self.device)
        self.unseen_V[torch.tensor(unseen, dtype=torch.long)] = True
        return self

    @torch.no_grad()
    def embedding_table(self) -> Tensor:
        """What the embedding layer puts out for each of its tokens: embedding_UD. Some layers scale their weights."""
        layer = self.model.get_input_embeddings()
        if type(layer) is nn.Embedding:
            return layer.weight.detach()
        ids_U = torch.arange(layer.weight.shape[0], device=self.device)
        return torch.cat([layer(piece) for piece in ids_U.split(4096)])

    def guidance(self, config: GuidanceConfig, attend_eos: bool = False) -> Guidance:
        """Guidance of rollouts by this model. Raises `ConfigError` before `bind`."""
        if self.embedding_VD is None:
            raise ConfigError("this reward model has no embeddings of the policy's tokens yet: call `bind` first")
        return Guidance(self.for_prompts, self.embedding_VD, config, attend_eos, self.unseen_V)

    def for_prompts(self, prompts: Prompts, way: str | None = None) -> CachedReward | WholeReward:
        """This reward of completions of fixed prompts, given as embeddings."""
        return WAYS[way or self.way or "whole"](self, prompts)

    def from_embeddings(self, response_BCD: Tensor, attention_BC: Tensor, prompts: Prompts) -> Tensor:
        """r_B of responses given as embeddings, with gradient; equals `score` where they spell the same tokens."""
        return self.for_prompts(prompts)(response_BCD, attention_BC, torch.arange(len(prompts), device=self.device))

    def forward_embeddings(self, embeds_BLD: Tensor, shown_BL: Tensor, at_B: Tensor, type_BL: Tensor) -> Tensor:
        """r_B, float32: the model's own forward pass on embeddings, padded on the right.

        A decoder is read at `at_B`; it would take the last position, as it cannot see padding in embeddings.
        """
        heads: list[Tensor] = []
        keep = None
        if isinstance(getattr(self.model, "score", None), nn.Module):
            keep = self.model.score.register_forward_hook(lambda module, given, out: heads.append(out))
        try:
            logits = self._forward(inputs_embeds=embeds_BLD, attention_mask=shown_BL.long(), token_type_ids=type_BL)
        finally:
            if keep is not None:
                keep.remove()
        if heads and heads[-1].ndim == 3:
            logits = heads[-1][torch.arange(len(at_B), device=at_B.device), at_B]
        return logits[:, 0].float()

    def retokenised(self, prompts: Prompts, tokens: list[list[int]], completions: list[str]) -> list[bool]:
        """Whether scoring reads each completion as other tokens than guidance was shown. After `bind`.

        `tokens` are the policy's, up to the end; `completions` is their text.
        """
        assert self.coverage is not None and self.unseen_V is not None
        told, cut = [], self.frame.cut
        unseen_V = self.unseen_V.cpu()
        for prompt, ids, completion in zip(prompts.chats, tokens, completions, strict=True):
            at = torch.tensor(ids, dtype=torch.long)
            own = self.coverage.token_V[at[~unseen_V[at]]].tolist()
            before, after = self.frame.around(prompt)
            told.append(before.ids + own + after.ids != self.frame.framed(prompt, completion).ids)
        self.frame.cut = cut  # they were counted when they were scored
        return told

    # -------------------------------------------------------------------------------------------------- scoring
    def tokenise(self, completion: str) -> list[int]:
        """The tokens of a completion by itself."""
        return token_ids(self.tokenizer, guarded(completion, self.frame.controls))

    @torch.no_grad()
    def score(self, prompts: Prompts, completions: list[str]) -> Tensor:
        """r_B, float32: the model's score of prompt, completion and template, tokenised as text."""
        rows = [self.frame.framed(p, c) for p, c in zip(prompts.chats, completions, strict=True)]
        if self.pad_id is not None:
            return self._score_rows(rows)
        r_B = torch.zeros(len(rows), device=self.device)
        for length in {len(row) for row in rows}:
            same = [b for b, row in enumerate(rows) if len(row) == length]
            r_B[same] = self._score_rows([rows[b] for b in same])
        return r_B

    def _score_rows(self, rows: list[Framed]) -> Tensor:
        """Padding on the right leaves every token where it stands in the text alone, in any architecture."""
        L = max(map(len, rows))
        ids_BL = torch.full((len(rows), L), self.pad_id or 0)
        type_BL, shown_BL = torch.zeros_like(ids_BL), torch.zeros_like(ids_BL)
        for b, row in enumerate(rows):
            ids_BL[b, : len(row)], type_BL[b, : len(row)] = torch.tensor(row.ids), torch.tensor(row.types)
            shown_BL[b, : len(row)] = 1
        ids_BL, type_BL, shown_BL = (x.to(self.device) for x in (ids_BL, type_BL, shown_BL))
        return self._forward(input_ids=ids_BL, attention_mask=shown_BL, token_type_ids=type_BL)[:, 0].float()

    @torch.no_grad()
    def forward_alone(self, row: Framed) -> Tensor:
        """The score of one text by itself, without padding: a number (), float32."""
        return self._score_rows([row])[0]

    def _forward(self, **inputs: Tensor) -> Tensor:
        return self.model(**{name: value for name, value in inputs.items() if name in self.takes}).logits


def window_of(config: PreTrainedConfig) -> str | None:
    """The setting that makes some layers see only a part of what comes before, if there is one.

    A probe of short texts cannot tell: they fit into the window.
    """
    kinds = re.compile("window|local_attention|attention_types|chunk_size|attention_type$")
    for name, value in config.get_text_config().to_dict().items():
        counts = value not in (None, False, 0, "full_attention", "original_full") and "max_window" not in name
        if kinds.search(name) and counts:
            return name
    return None


def longest_text(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Tokens that the model has positions for; None where it has no such limit."""
    limits = [getattr(model.config.get_text_config(), "max_position_embeddings", None), tokenizer.model_max_length]
    for name, module in model.named_modules():
        # RoBERTa and its kin count positions from behind the padding's.
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            limits.append(module.num_embeddings - module.padding_idx - 1)
    known = [limit for limit in limits if limit is not None and 0 < limit < 10**9]
    return min(known, default=None)


def make_frame(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str, max_length: int) -> Frame:
    """How the model is shown texts of at most `max_length` tokens (0: as many as it can read). Raises `ConfigError`."""
    limit = longest_text(model, tokenizer)
    if limit is not None and max_length > limit:
        raise ConfigError(f"reward model {name}: `max_length` {max_length} is more than the {limit} tokens it can read")
    return Frame(tokenizer, name, max_length or limit)


def load_frame(path: str, name: str, max_length: int = 0, revision: str | None = None) -> tuple[Frame, int]:
    """How a reward model is shown texts, and its number of embeddings, without its weights. Raises `ConfigError`."""
    what = f"reward model {path}"
    folder = fetch_checkpoint(path, "reward model", revision, weights=False)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        with torch.device("meta"):
            model = AutoModelForSequenceClassification.from_config(config, trust_remote_code=False)
    except (OSError, *UNBUILT) as error:
        raise ConfigError(
            f"{what}: its config.json describes no model: {' '.join(str(error).split())[:200]}"
        ) from error
    frame = make_frame(model, _load_tokenizer(folder, path), name, max_length)
    return frame, model.get_input_embeddings().weight.shape[0]


def load_classifier(
    path: str | Path,
    device: torch.device | str = "cpu",
    dtype: str = "float32",
    adapter: str | None = None,
    name: str = "model",
    max_length: int = 0,
    revision: str | None = None,
) -> ClassifierReward:
    """Load a one-label sequence classifier (with `adapter` merged) from a folder or the Hub, and try it out.

    `max_length` and `revision` as in `RewardConfig`. Raises `ConfigError` for anything that is not one, or that gives a
    text another score in a batch than alone.
    """
    folder = fetch_checkpoint(str(path), "reward model", revision)
    read_config(folder, f"reward model {path}")
    tokenizer = _load_tokenizer(folder, path)
    model = _load_model(folder, path, dtype)
    identity = fingerprint(folder)
    if adapter is not None:
        model = merge_adapter(model, Path(adapter), f"`reward.adapter` {adapter}")
        identity["adapter"] = adapter_fingerprint(Path(adapter))
    reward = ClassifierReward(model.to(device), tokenizer, name, identity, max_length)
    probe(reward)
    return reward


def _load_tokenizer(folder: Path, path: str | Path) -> PreTrainedTokenizerBase:
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ConfigError(f"reward model {path} has no tokenizer that transformers can load") from error
    if not tokenizer("text", add_special_tokens=False)["input_ids"]:  # what transformers makes of missing files
        raise ConfigError(f"reward model {path} has no tokenizer: it reads no tokens in a word")
    return tokenizer


def _load_model(folder: Path, path: str | Path, dtype: str) -> Any:
    try:
        model, info = AutoModelForSequenceClassification.from_pretrained(
            folder, dtype=getattr(torch, dtype), use_safetensors=True, output_loading_info=True, trust_remote_code=False
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ConfigError(f"reward model {path} cannot be loaded: {error}") from error
    check_used(model, info, f"reward model {path}")
    check_finite(model.state_dict(), f"reward model {path}")
    return model
