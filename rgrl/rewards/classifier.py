"""A reward model from transformers: one number for a prompt and its completion, with a gradient."""

from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from peft import PeftModel
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DynamicCache,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from rgrl.config import GuidanceConfig
from rgrl.errors import ConfigError
from rgrl.hub import fetch_checkpoint
from rgrl.models.batch import count_positions, pad_left
from rgrl.models.fingerprint import adapter_fingerprint, fingerprint
from rgrl.rewards.bridge import bridge_embeddings
from rgrl.rollout.guidance import Guidance
from rgrl.types import Prompts

_MARK = "\u241f"  # stands for the completion while the chat template is cut in two


class ClassifierReward(nn.Module):
    """`AutoModelForSequenceClassification` with one label, frozen; it scores text and guides through embeddings."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        name: str,
        fingerprint: dict[str, str] | None = None,
    ) -> None:
        super().__init__()
        self.model = model.requires_grad_(False).eval()
        self.tokenizer = tokenizer
        self.name = name
        self.fingerprint = fingerprint or {}  # what was loaded (models/fingerprint.py), with its `adapter` if any
        self.embedding_VD: Tensor | None = None
        self.bridge_share: dict[str, float] = {}

    @property
    def device(self) -> torch.device:
        return self.model.device

    def bind(
        self, policy_tokenizer: PreTrainedTokenizerBase, vocab_size: int, mode: str = "compose"
    ) -> "ClassifierReward":
        """Lay out this model's input embeddings in the policy's vocabulary, as guidance needs; returns itself.

        `mode` as in `RewardConfig.bridge`.
        """
        table_UD = self.model.get_input_embeddings().weight.detach()
        self.embedding_VD, self.bridge_share = bridge_embeddings(
            policy_tokenizer, self.tokenizer, table_UD, vocab_size, mode
        )
        return self

    def guidance(self, config: GuidanceConfig, attend_eos: bool = False) -> Guidance:
        """Guidance of rollouts by this model. Raises `ConfigError` before `bind`."""
        if self.embedding_VD is None:
            raise ConfigError("this reward model has no embeddings of the policy's tokens yet: call `bind` first")
        return Guidance(self.for_prompts, self.embedding_VD, config, attend_eos)

    def frame(self, prompt: str) -> tuple[str, str]:
        """The text before and after the completion, by the model's chat template if it has one."""
        if not self.tokenizer.chat_template:
            return prompt + "\n", ""
        turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": _MARK}]
        text = self.tokenizer.apply_chat_template(turns, tokenize=False)
        before, _, after = text.rpartition(_MARK)  # the last one: the prompt may hold it too
        return before, after

    def token_ids(self, text: str) -> list[int]:
        """The tokens of a piece of text, without special tokens around it."""
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    @torch.no_grad()
    def score(self, prompts: Prompts, completions: list[str]) -> Tensor:
        """r_B, float32: the model's score of prompt, completion and template, tokenised as text."""
        rows = []
        for prompt, completion in zip(prompts.texts, completions, strict=True):
            before, after = self.frame(prompt)
            rows.append(self.token_ids(before) + self.token_ids(completion) + self.token_ids(after))
        ids_BL, attention_BL = pad_left(rows, self.device)
        return self.score_embeddings(self.model.get_input_embeddings()(ids_BL), attention_BL)

    def score_embeddings(self, embeds_BLD: Tensor, attention_BL: Tensor, cache: DynamicCache | None = None) -> Tensor:
        """r_B, float32: the score at each row's last attended position. `attention_BL` covers cached positions too."""
        backbone = getattr(self.model, self.model.base_model_prefix)
        new = embeds_BLD.shape[1]
        # By position: transformers renamed the argument that takes the cache in 5.24.
        position_BL = count_positions(attention_BL)[:, -new:]
        states_BLD = backbone(
            None, attention_BL.long(), position_BL, cache, embeds_BLD, use_cache=cache is not None
        ).last_hidden_state
        index_L = torch.arange(new, device=embeds_BLD.device)
        last_B = torch.where(attention_BL[:, -new:], index_L, -1).amax(1)
        state_BD = states_BLD[torch.arange(len(last_B), device=last_B.device), last_B]
        return self.model.score(state_BD)[:, 0].float()

    def for_prompts(self, prompts: Prompts) -> "PromptedReward":
        """This reward of completions of fixed prompts, with the prompts' keys and values computed once."""
        return PromptedReward(self, prompts)

    def from_embeddings(self, response_BCD: Tensor, attention_BC: Tensor, prompts: Prompts) -> Tensor:
        """r_B of responses given as embeddings, with gradient; equals `score` where they spell the same tokens."""
        return self.for_prompts(prompts)(response_BCD, attention_BC, torch.arange(len(prompts), device=self.device))


class PromptedReward:
    """Scores embedded responses to fixed prompts: response_ACD, attention_AC, rows_A -> r_A, float32, differentiable.

    `rows_A` says which prompt each response answers. The prefix (template and prompt) does not depend on the completion
    and the model is causal, so its keys and values are exact for every call. Each distinct prompt's are computed once.
    """

    def __init__(self, reward: ClassifierReward, prompts: Prompts) -> None:
        self.reward = reward
        backbone = getattr(reward.model, reward.model.base_model_prefix)
        frames = [reward.frame(text) for text in prompts.texts]
        prefixes = [reward.token_ids(before) for before, _ in frames]
        suffix = reward.token_ids(frames[0][1])  # a template's ending is the same for every prompt
        unique = {ids: i for i, ids in enumerate(dict.fromkeys(map(tuple, prefixes)))}
        ids_UL, attention_UL = pad_left(list(unique), reward.device)
        which_B = torch.tensor([unique[tuple(ids)] for ids in prefixes], device=reward.device)
        with torch.no_grad():
            embeds_ULD = reward.model.get_input_embeddings()(ids_UL)
            suffix_SD = reward.model.get_input_embeddings()(
                torch.tensor(suffix, dtype=torch.long, device=reward.device)
            )
            cache = DynamicCache(config=reward.model.config)
            if ids_UL.shape[1] > 1:
                position_UL = count_positions(attention_UL)[:, :-1]
                backbone(None, attention_UL[:, :-1].long(), position_UL, cache, embeds_ULD[:, :-1], use_cache=True)
        self.layers = [(layer.keys[which_B], layer.values[which_B]) for layer in cache.layers if layer.is_initialized]
        # Each call includes the prefix's last token, so that an empty response has a position to be scored at.
        self.start_B1D = embeds_ULD[which_B, -1:]
        self.suffix_BSD = suffix_SD[None].expand(len(prefixes), -1, -1)
        self.prefix_BL = attention_UL[which_B]
        self.suffix_BS = torch.ones(self.suffix_BSD.shape[:2], dtype=torch.bool, device=reward.device)

    def __call__(self, response_ACD: Tensor, attention_AC: Tensor, rows_A: Tensor) -> Tensor:
        some = len(rows_A) < len(self.prefix_BL)
        cache = DynamicCache(config=self.reward.model.config)
        for i, (keys, values) in enumerate(self.layers):
            cache.update(keys[rows_A] if some else keys, values[rows_A] if some else values, i)
        start_A1D, suffix_ASD = self.start_B1D[rows_A], self.suffix_BSD[rows_A]
        embeds_ALD = torch.cat([start_A1D, response_ACD.to(start_A1D.dtype), suffix_ASD], 1)
        attention_AL = torch.cat([self.prefix_BL[rows_A], attention_AC, self.suffix_BS[rows_A]], 1)
        return self.reward.score_embeddings(embeds_ALD, attention_AL, cache)


def load_classifier(
    path: str | Path,
    device: torch.device | str = "cpu",
    dtype: str = "float32",
    adapter: str | None = None,
    name: str = "model",
) -> ClassifierReward:
    """Load a one-label sequence classifier (with `adapter` merged) from a folder or the Hub.

    Raises `ConfigError` for anything that is not one.
    """
    folder = fetch_checkpoint(str(path), "reward model")
    try:
        config = AutoConfig.from_pretrained(folder)
    except (OSError, KeyError, TypeError, ValueError, StrictDataclassError) as error:
        raise ConfigError(f"reward model {path}: its config.json cannot be read: {error}") from error
    if config.num_labels != 1:
        raise ConfigError(f"reward model {path} has {config.num_labels} labels; a reward model has exactly 1")
    if not list(folder.glob("*.safetensors")):
        raise ConfigError(f"reward model {path} has no weights: expected model.safetensors")
    tokenizer = _load_tokenizer(folder, path)
    model = _load_model(folder, path, dtype)
    identity = fingerprint(folder)
    if adapter is not None:
        if not (Path(adapter) / "adapter_config.json").is_file():
            raise ConfigError(f"`reward.adapter` {adapter}: no adapter_config.json there")
        model = PeftModel.from_pretrained(model, adapter).merge_and_unload()
        identity["adapter"] = adapter_fingerprint(Path(adapter))
    return ClassifierReward(model.to(device), tokenizer, name, identity)


def _load_tokenizer(folder: Path, path: str | Path) -> PreTrainedTokenizerBase:
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise ConfigError(f"reward model {path} has no tokenizer that transformers can load") from error
    if not tokenizer("text", add_special_tokens=False)["input_ids"]:  # what transformers makes of missing files
        raise ConfigError(f"reward model {path} has no tokenizer: it reads no tokens in a word")
    return tokenizer


def _load_model(folder: Path, path: str | Path, dtype: str) -> Any:
    try:
        model, info = AutoModelForSequenceClassification.from_pretrained(
            folder, dtype=getattr(torch, dtype), use_safetensors=True, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ConfigError(f"reward model {path} cannot be loaded: {error}") from error
    if info["missing_keys"]:
        raise ConfigError(
            f"reward model {path} lacks the weights {sorted(info['missing_keys'])[0]} and so has no score"
        )
    return model
