"""The diffusion LM behind one contract: text in, logits for hidden tokens out. Callers never see a family."""

import json
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from pathlib import Path

import torch
import torch.nn.functional as F
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, StrictDataclassError
from peft import PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from rgrl.config import ConfigError, ModelConfig
from rgrl.models.dropout import RowKeys
from rgrl.models.families import Family, find_family
from rgrl.models.shards import Lockstep, shard_layers
from rgrl.types import PrefixCache

ScoreFn = Callable[[Tensor, Tensor], Tensor]  # logits_NV, token_N -> logp_N
_FILES = ["*.json", "*.safetensors", "*.txt", "*.jinja"]


def fetch_checkpoint(path: str, what: str) -> Path:
    """A local checkpoint folder as it is, or a hub id downloaded (weights in safetensors only).

    Raises `ConfigError` when there is neither.
    """
    folder = Path(path)
    if folder.exists():
        if not (folder / "config.json").is_file():
            raise ConfigError(f"{what} {path} has no config.json; expected a checkpoint folder")
        return folder
    if path.startswith((".", "/", "~")) or path.count("/") != 1:
        raise ConfigError(f"{what} {path}: no such folder")
    try:
        return Path(snapshot_download(path, allow_patterns=_FILES))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ConfigError(
            f"{what} {path}: neither a folder nor to be had from the hub ({type(error).__name__})"
        ) from error


def read_json(path: Path) -> dict:
    """The JSON object in `path`. Raises `ConfigError`."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} is not readable JSON") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{path} must hold a JSON object")
    return value


def _read_weights(folder: Path) -> dict[str, Tensor]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(read_json(index)["weight_map"].values()))
    else:
        names = [path.name for path in folder.glob("*.safetensors")]
    missing = [name for name in names if not (folder / name).is_file()]
    if missing or not names:
        raise ConfigError(f"{folder} has no weights: expected {', '.join(missing) or 'model.safetensors'}")
    weights: dict[str, Tensor] = {}
    for name in names:
        try:
            weights.update(load_file(folder / name))
        except SafetensorError as error:
            raise ConfigError(f"{folder / name} is not a readable safetensors file: {error}") from error
    return weights


class Policy(nn.Module):
    """A masked diffusion LM, its tokenizer and its token ids.

    `vocab_size` V counts the tokens that can be decoded; a model's table may have more rows, which are
    never projected and so never sampled.
    """

    def __init__(
        self, causal_lm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, family: Family, mask_id: int, path: str
    ) -> None:
        super().__init__()
        self.causal_lm = causal_lm
        self.peft_model: PeftModel | None = None
        self.row_keys = RowKeys()
        self.lockstep: Lockstep | None = None
        self.tokenizer = tokenizer
        self.family = family
        self.mask_id = mask_id
        self.path = path  # where it was loaded from, for the adapter's own config
        if tokenizer.eos_token_id is None:
            raise ConfigError("the policy's tokenizer has no end-of-text token")
        self.eos_id: int = tokenizer.eos_token_id
        turn = tokenizer.convert_tokens_to_ids(family.end_of_turn)
        known = turn is not None and turn != tokenizer.unk_token_id and turn != self.eos_id
        self.end_ids: tuple[int, ...] = (self.eos_id, turn) if known else (self.eos_id,)
        self.vocab_size = min(len(tokenizer), causal_lm.config.vocab_size)
        if not tokenizer.chat_template:
            tokenizer.chat_template = family.chat_template

    @property
    def device(self) -> torch.device:
        return self.causal_lm.lm_head.weight.device

    @property
    def max_length(self) -> int:
        """Longest canvas, in tokens, that the model has positions for."""
        return self.causal_lm.config.max_position_embeddings

    def logits(
        self, canvas_BL: Tensor, attention_BL: Tensor, at: Tensor | None = None, prefix: PrefixCache | None = None
    ) -> Tensor:
        """Scores of the token at each position: logits_BLV, or logits_NV with `at`.

        `at` says where: bool BL (the result is in row-major order), or int64 N, places in the flattened canvas.
        `canvas_BL` holds token ids, `attention_BL` is False on padding. Position l scores token l in every
        family, and the mask token itself scores -inf: it is never written. Float32. With a `prefix` that holds
        something its tokens are not read again, and `at` may only name places after them.
        """
        states_BLH = self.states(canvas_BL, attention_BL, prefix)
        if at is not None:
            states_BLH = states_BLH[at] if at.dtype == torch.bool else states_BLH.flatten(0, 1)[at]
        return self.project(states_BLH)

    def states(self, canvas_BL: Tensor, attention_BL: Tensor, prefix: PrefixCache | None = None) -> Tensor:
        """Final hidden states_BLH: the one at l is the one that scores token l. Zero where `prefix` spares reading."""
        # Rotary positions are relative, so counting real tokens from 0 suits every family and makes padding inert.
        position_BL = (attention_BL.long().cumsum(1) - 1).clamp(min=0)
        cache, start = None, 0
        if prefix is not None:
            cache = DynamicCache(config=self.causal_lm.config)
            for i, (keys, values) in enumerate(prefix.layers):
                cache.update(keys, values, i)
                start = prefix.length
        # As attention itself takes it: transformers would look into a mask by token, and a GPU would have to wait.
        mask_B1QL = attention_BL[:, None, None].expand(-1, 1, canvas_BL.shape[1] - start, -1)
        # By position: transformers renamed the argument that takes the cache in 5.24.
        states_BLH = self.causal_lm.model(
            canvas_BL[:, start:], mask_B1QL, position_BL[:, start:], cache, use_cache=cache is not None
        ).last_hidden_state
        if prefix is not None and not prefix.layers:
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
        logits = F.linear(states, self.causal_lm.lm_head.weight[: self.vocab_size]).float()
        logits[..., self.mask_id] = float("-inf")
        return logits

    forward = logits

    def logp(
        self, canvas_BL: Tensor, attention_BL: Tensor, at_BL: Tensor, token_N: Tensor, score: ScoreFn | None = None
    ) -> Tensor:
        """Log-probability in nats, float32, of one token at each place of `at_BL` (bool, row-major), logp_N.

        `score` turns logits and tokens into it, such as `sampled_logp` for a sampler's; None: the plain softmax.

        Only a chunk of the places is projected to the vocabulary at a time, and again for its gradient, so that
        memory does not grow with the number of places times V.
        """
        states_NH = self.states(canvas_BL, attention_BL)[at_BL]
        places = max(1, (2**26 if states_NH.is_cuda else 2**21) // self.vocab_size)
        chunks = list(zip(states_NH.split(places), token_N.split(places), strict=True))
        if len(chunks) == 1 or not torch.is_grad_enabled():
            return torch.cat([self._token_logp(*chunk, score) for chunk in chunks])
        again = {"use_reentrant": False, "preserve_rng_state": False}
        return torch.cat([checkpoint(self._token_logp, *chunk, score, **again) for chunk in chunks])

    def _token_logp(self, states_NH: Tensor, token_N: Tensor, score: ScoreFn | None) -> Tensor:
        logits_NV = self.project(states_NH)
        return -F.cross_entropy(logits_NV, token_N, reduction="none") if score is None else score(logits_NV, token_N)

    def reference(self) -> AbstractContextManager:
        """Within it, the adapter is off: the frozen base model."""
        return self.peft_model.disable_adapter() if self.peft_model is not None else nullcontext()

    def shard(self, device: torch.device, size: int, timeout: timedelta | None = None) -> None:
        """Move to `device`, the frozen layers in pieces among `size` neighbouring processes. Collective."""
        self.lockstep = shard_layers(self.causal_lm.model, device, size, timeout)
        self.causal_lm.to(device)

    def in_step(self) -> AbstractContextManager[list[Tensor]]:
        """Within it, processes that share weights may call the model a different number of times each.

        What it yields is to be added to a loss whose log-probabilities were read within it (see `Lockstep`).
        """
        return self.lockstep() if self.lockstep is not None else nullcontext([])

    def encode_prompts(self, texts: list[str], limit: int) -> tuple[Tensor, Tensor]:
        """Chat-formatted prompts, left-padded: prompt_BL int64 and attention_BL bool, on the model's device.

        Raises `ConfigError` for a prompt of more than `limit` tokens.
        """
        formatted = [self.format_prompt(text) for text in texts]
        rows = self.tokenizer(formatted, add_special_tokens=False)["input_ids"]
        for text, ids in zip(texts, rows, strict=True):
            if len(ids) > limit:
                raise ConfigError(
                    f"a prompt has {len(ids)} tokens, more than `data.max_prompt_length` = {limit}: {text[:60]!r}"
                )
        width = max(len(ids) for ids in rows)
        prompt_BL = torch.full((len(rows), width), self.eos_id)
        attention_BL = torch.zeros_like(prompt_BL, dtype=torch.bool)
        for i, ids in enumerate(rows):
            prompt_BL[i, width - len(ids) :] = torch.tensor(ids)
            attention_BL[i, width - len(ids) :] = True
        return prompt_BL.to(self.device), attention_BL.to(self.device)

    def format_prompt(self, text: str) -> str:
        """One user turn in the model's chat format, ready for the answer."""
        turn = [{"role": "user", "content": text}]
        return self.tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)

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


def load_policy(config: ModelConfig, device: torch.device | str = "cpu") -> Policy:
    """Load a checkpoint of a known family from a folder or the hub, frozen and in evaluation mode.

    Raises `ConfigError` for an unknown family, absent or ill-fitting weights, or a tokenizer without a mask.
    """
    folder = fetch_checkpoint(config.path, "model.path")
    raw = read_json(folder / "config.json")
    family = find_family(raw.get("model_type"), config.family)
    # Without its files a tokenizer of no words comes out, and no error.
    if not (folder / "tokenizer.json").is_file() and not (
        (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file()
    ):
        raise ConfigError(f"{folder} has no tokenizer: expected tokenizer.json, or vocab.json and merges.txt")
    try:
        tokenizer = family.load_tokenizer(folder)
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"{folder} has no tokenizer that reads as {family.name}'s") from error
    mask_id = raw.get("mask_token_id", tokenizer.mask_token_id)
    if mask_id is None:
        raise ConfigError(f"{folder}: neither config.json nor the tokenizer names a mask token")
    if not 0 <= mask_id < len(tokenizer):
        raise ConfigError(f"{folder}: the mask token {mask_id} is not among the tokenizer's {len(tokenizer)} tokens")
    try:
        qwen_or_llama = family.make_config(raw)
    except (TypeError, StrictDataclassError) as error:
        raise ConfigError(f"{folder / 'config.json'} does not describe a {family.name} model: {error}") from error
    qwen_or_llama.is_causal = False
    weights = {family.rename(name): tensor for name, tensor in _read_weights(folder).items()}
    causal_lm = _fill(family, qwen_or_llama, weights, getattr(torch, config.dtype), folder)
    policy = Policy(causal_lm.to(device), tokenizer, family, mask_id, config.path)
    return policy.requires_grad_(False).eval()


def _fill(
    family: Family, config: PreTrainedConfig, weights: dict[str, Tensor], dtype: torch.dtype, folder: Path
) -> PreTrainedModel:
    tied = config.tie_word_embeddings
    with torch.device("meta"):
        expected = {name: tuple(t.shape) for name, t in family.model_class(config).state_dict().items()}
    if tied:
        expected.pop("lm_head.weight", None)
        weights.pop("lm_head.weight", None)
    missing, extra = sorted(expected.keys() - weights.keys()), sorted(weights.keys() - expected.keys())
    extra = [name for name in extra if not name.endswith("rotary_emb.inv_freq")]
    if missing or extra:
        raise ConfigError(
            f"{folder}: the weights don't fit config.json; {len(missing)} missing (first: {(missing or ['-'])[0]}), "
            f"{len(extra)} unknown (first: {(extra or ['-'])[0]})"
        )
    for name, shape in expected.items():
        if tuple(weights[name].shape) != shape:
            raise ConfigError(f"{folder}: {name} has shape {tuple(weights[name].shape)}, config.json implies {shape}")
    return family.model_class.from_pretrained(None, config=config, state_dict=weights, dtype=dtype)
