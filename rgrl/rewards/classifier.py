"""A reward model from transformers: one number for a prompt and its completion, with a gradient.

Its score is the model's forward pass on token ids. Two backends compute it, with a gradient, for completions given as
embeddings. `verify` tries both when a model is loaded, and keeps the first whose numbers equal the score's.
"""

import inspect
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import DynamicCache, DynamicLayer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from rgrl.config import GuidanceConfig
from rgrl.errors import ConfigError
from rgrl.models.text import count_positions, guarded, token_ids, unseen_tokens
from rgrl.plugins import describe_exception
from rgrl.rewards.bridge import Coverage, bridge_embeddings
from rgrl.rewards.template import EncodedText, make_template
from rgrl.rollout.guidance import Guidance, RewardFromEmbeddings
from rgrl.types import Prompts

# The texts and the tolerance of `verify`.
PROMPTS = ["Hello", "Tell me at some length, please, what the second of these two prompts is about; it is longer."]
COMPLETIONS = [" one", " of two answers, the longer one"]
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 1e-1}  # of the score, or of 1 if it is less


@dataclass(frozen=True)
class ClassifierScores:
    """The scores of some completions, and how many of their prompts lost their beginning to the length limit."""

    reward_B: Tensor  # float32
    truncated: int


class ClassifierReward(nn.Module):
    """`AutoModelForSequenceClassification` with one label, frozen; it scores text and guides through embeddings.

    `backend` is the one of `GRADIENT_BACKENDS` that guides, None if the model cannot guide; `reasons` says why a
    backend is not exact for this model. Both are set by `verify`.
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
        self.template = make_template(model, tokenizer, name, max_length)
        self.pad_id: int | None = model.config.get_text_config().pad_token_id
        if self.pad_id is None:
            # Without one, transformers reads the last token and takes one text at a time. This means the same, for
            # several texts of one length.
            model.config.get_text_config().pad_token_id = -1
        # Type ids are passed where the tokenizer makes them, as users do: GPT-2 embeds them as further tokens.
        typed = "token_type_ids" in tokenizer("text")
        self.takes = {name for name in inspect.signature(model.forward).parameters if typed or name != "token_type_ids"}
        self.backend: str | None = None
        self.reasons: dict[str, str] = {}
        self.embedding_VD: Tensor | None = None
        self.unseen_V: Tensor | None = None  # the policy's tokens that its text lacks
        self.coverage: Coverage | None = None

    @property
    def device(self) -> torch.device:
        return self.model.device

    # -------------------------------------------------------------------------------------------------- guidance
    def bind(
        self,
        policy_tokenizer: PreTrainedTokenizerBase,
        vocab_size: int,
        mode: str = "compose",
        end_ids: Collection[int] = (),
    ) -> "ClassifierReward":
        """Arrange this model's input embeddings in the policy's vocabulary, as guidance needs; returns itself.

        `mode` as in `RewardConfig.bridge`; `end_ids` end a completion, besides the tokenizer's end token. Raises
        `ConfigError` for a model that cannot guide.
        """
        if self.backend is None:
            why = "; ".join(f"{backend}: {reason}" for backend, reason in self.reasons.items())
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
        """embedding_UD: the output of the embedding layer for each token. Some layers scale their weights."""
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

    def for_prompts(self, prompts: Prompts, backend: str | None = None) -> RewardFromEmbeddings:
        """This reward as a function of completions of `prompts`, given as embeddings."""
        return GRADIENT_BACKENDS[backend or self.backend or "full"](self, prompts)

    def forward_embeddings(self, embeds_BLD: Tensor, shown_BL: Tensor, at_B: Tensor, type_BL: Tensor) -> Tensor:
        """r_B, float32: the model's forward pass on embeddings, padded on the right.

        A decoder is read at `at_B`; it would take the last position, as it cannot see padding in embeddings.
        """
        heads: list[Tensor] = []
        hook = None
        if isinstance(getattr(self.model, "score", None), nn.Module):
            hook = self.model.score.register_forward_hook(lambda module, given, out: heads.append(out))
        try:
            logits = self._forward(inputs_embeds=embeds_BLD, attention_mask=shown_BL.long(), token_type_ids=type_BL)
        finally:
            if hook is not None:
                hook.remove()
        if heads and heads[-1].ndim == 3:
            logits = heads[-1][torch.arange(len(at_B), device=at_B.device), at_B]
        return logits[:, 0].float()

    def retokenised(self, prompts: Prompts, tokens: list[list[int]], completions: list[str]) -> list[bool]:
        """Whether scoring reads each completion as other tokens than guidance did. After `bind`.

        `tokens` are the policy's, up to the end; `completions` is their text.
        """
        assert self.coverage is not None and self.unseen_V is not None
        differs, unseen_V = [], self.unseen_V.cpu()
        for prompt, ids, completion in zip(prompts.chats, tokens, completions, strict=True):
            at = torch.tensor(ids, dtype=torch.long)
            guided = self.coverage.token_V[at[~unseen_V[at]]].tolist()
            before, after = self.template.around(prompt)
            differs.append(before.ids + guided + after.ids != self.template.encode(prompt, completion).ids)
        return differs

    # -------------------------------------------------------------------------------------------------- scoring
    @torch.no_grad()
    def score(self, prompts: Prompts, completions: list[str]) -> ClassifierScores:
        """The model's score of each prompt with its completion in the template, tokenised as text."""
        rows = [self.template.encode(p, c) for p, c in zip(prompts.chats, completions, strict=True)]
        return ClassifierScores(self.score_rows(rows), sum(row.truncated for row in rows))

    @torch.no_grad()
    def score_rows(self, rows: list[EncodedText]) -> Tensor:
        """r_B, float32. Padding on the right leaves every token at its position, in any architecture.

        A model without padding token gets texts of one length at a time.
        """
        r_B = torch.zeros(len(rows), device=self.device)
        lengths = [len(row) if self.pad_id is None else 0 for row in rows]
        for length in dict.fromkeys(lengths):
            same = [b for b, other in enumerate(lengths) if other == length]
            ids_BL, type_BL, shown_BL = _padded([rows[b] for b in same], self.device, fill=self.pad_id or 0)
            logits = self._forward(input_ids=ids_BL, attention_mask=shown_BL.long(), token_type_ids=type_BL)
            r_B[same] = logits[:, 0].float()
        return r_B

    def _forward(self, **inputs: Tensor) -> Tensor:
        return self.model(**{name: value for name, value in inputs.items() if name in self.takes}).logits


def window_of(config: PreTrainedConfig) -> str | None:
    """The setting that makes some layers see only a part of what comes before, if there is one.

    `verify` cannot find out: its short texts fit into the window.
    """
    kinds = re.compile("window|local_attention|attention_types|chunk_size|attention_type$")
    for name, value in config.get_text_config().to_dict().items():
        counts = value not in (None, False, 0, "full_attention", "original_full") and "max_window" not in name
        if kinds.search(name) and counts:
            return name
    return None


# ------------------------------------------------------------------------------------------------ gradient backends
class FullReward:
    """The whole text at every call: response_ACD, attention_AC, rows_A -> r_A, float32, differentiable.

    `rows_A` says which prompt each response answers. Positions without attention are left out of the text, so that a
    row is exactly the sequence that its tokens would make, whatever the model does with positions.
    """

    def __init__(self, reward: ClassifierReward, prompts: Prompts) -> None:
        self.reward = reward
        affixes = [reward.template.around(chat) for chat in prompts.chats]
        self.before = _Piece.of(reward, [before for before, _ in affixes], left=True)
        self.after = _Piece.of(reward, [after for _, after in affixes], left=False)

    def __call__(self, response_ACD: Tensor, attention_AC: Tensor, rows_A: Tensor) -> Tensor:
        before, after, reward = self.before.rows(rows_A), self.after.rows(rows_A), self.reward
        embeds_ALD = torch.cat([before.embeds, response_ACD.to(before.embeds.dtype), after.embeds], 1)
        shown_AL = torch.cat([before.shown, attention_AC, after.shown], 1)
        read_AL = torch.cat([before.read, attention_AC, after.read], 1)
        type_AC = torch.full_like(attention_AC, reward.template.completion_type, dtype=torch.long)
        type_AL = torch.cat([before.types, type_AC, after.types], 1)
        # What is shown moves to the left, in its order.
        order_AL = (~shown_AL).to(torch.uint8).argsort(dim=1, stable=True)[:, : int(shown_AL.sum(1).amax())]
        embeds_ALD = embeds_ALD.gather(1, order_AL[..., None].expand(-1, -1, embeds_ALD.shape[-1]))
        shown_AL, read_AL, type_AL = (x.gather(1, order_AL) for x in (shown_AL, read_AL, type_AL))
        return reward.forward_embeddings(embeds_ALD, shown_AL, last_true(read_AL), type_AL)


class PrefixCachedReward:
    """The same with the keys and values of each distinct prompt computed once: for causal decoders.

    Padding and positions without attention stay in the batch, and only attended tokens count as positions.
    """

    def __init__(self, reward: ClassifierReward, prompts: Prompts) -> None:
        self.reward, self.backbone = reward, reward.model.base_model
        affixes = [reward.template.around(chat) for chat in prompts.chats]
        prefixes = [tuple(before.ids) for before, _ in affixes]
        unique = {ids: i for i, ids in enumerate(dict.fromkeys(prefixes))}
        before = _Piece.of(reward, [EncodedText([*ids], [0] * len(ids)) for ids in unique], left=True)
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
        self.after = _Piece.of(reward, [after for _, after in affixes], left=False)

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
        renamed = "cache" in inspect.signature(self.backbone.forward).parameters  # since transformers 5.24
        return self.backbone(
            inputs_embeds=embeds_BLD,
            attention_mask=attention_BL.long(),
            position_ids=count_positions(attention_BL)[:, -embeds_BLD.shape[1] :],
            use_cache=True,
            **{"cache" if renamed else "past_key_values": cache},
        ).last_hidden_state


GRADIENT_BACKENDS: dict[str, Callable[[ClassifierReward, Prompts], RewardFromEmbeddings]] = {  # the fastest first
    "prefix_cached": PrefixCachedReward,
    "full": FullReward,
}


@dataclass(frozen=True)
class _Piece:
    """Embedded tokens of some rows, padded: which are shown, which can be read, and their type ids."""

    embeds: Tensor
    shown: Tensor
    read: Tensor
    types: Tensor

    @classmethod
    def of(cls, reward: ClassifierReward, rows: list[EncodedText], left: bool) -> "_Piece":
        ids_BL, type_BL, shown_BL = _padded(rows, reward.device, left=left)
        with torch.no_grad():
            embeds_BLD = reward.model.get_input_embeddings()(ids_BL)
        # A classifier reads the last token that is not padding, even where padding is a token of the text.
        read_BL = shown_BL if reward.pad_id is None else shown_BL & (ids_BL != reward.pad_id)
        return cls(embeds_BLD, shown_BL, read_BL, type_BL)

    def rows(self, rows_A: Tensor, columns: slice = slice(None)) -> "_Piece":
        """Some of the rows, some of their columns."""
        return _Piece(*(x[rows_A, columns] for x in (self.embeds, self.shown, self.read, self.types)))


def _padded(
    rows: list[EncodedText], device: torch.device, fill: int = 0, left: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """ids_BL and type_BL (int64), and shown_BL (bool, False on padding)."""
    L = max(map(len, rows))
    ids_BL = torch.full((len(rows), L), fill)
    type_BL, shown_BL = torch.zeros_like(ids_BL), torch.zeros_like(ids_BL, dtype=torch.bool)
    for b, row in enumerate(rows):
        span = slice(L - len(row), None) if left else slice(0, len(row))
        ids_BL[b, span], type_BL[b, span] = torch.tensor(row.ids).long(), torch.tensor(row.types).long()
        shown_BL[b, span] = True
    return ids_BL.to(device), type_BL.to(device), shown_BL.to(device)


def last_true(mask_BL: Tensor) -> Tensor:
    """The position of the last True in each row (B); 0 where there is none."""
    return torch.where(mask_BL, torch.arange(mask_BL.shape[1], device=mask_BL.device), 0).amax(1)


# ------------------------------------------------------------------------------------------------ the trial at load
@torch.no_grad()
def verify(reward: ClassifierReward) -> None:
    """Check that scores and gradients are computed by the forward pass that the model's authors trained.

    The reference is the model's forward pass on the token ids of one text at a time. `score` must give the same for a
    batch of texts of different lengths, else this raises `ConfigError`. Then the first backend is chosen that gives the
    same for the embeddings of the same tokens, one text at a time and in a batch.
    """
    prompts, template = Prompts(PROMPTS, [{}, {}]), reward.template
    try:
        rows = [template.encode(p, c) for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
        alone_B = torch.cat([reward.score_rows([row]) for row in rows])
        scores_B = reward.score(prompts, COMPLETIONS).reward_B
    except Exception as error:  # a class may raise anything for what it was not made for
        raise ConfigError(f"reward model {reward.name} cannot score: {describe_exception(error)}") from error
    if not alone_B.isfinite().all():
        raise ConfigError(
            f"reward model {reward.name} scores a plain text {alone_B[0]:.3g}: its weights are not all finite"
        )
    if (difference := _difference(reward, scores_B, alone_B)) is not None:
        raise ConfigError(
            f"reward model {reward.name} cannot score: a text has another score in a batch than alone, {difference}"
        )
    # What the prefix cache needs of a model, and a short text does not show.
    decodes = "position_ids" in inspect.signature(reward.model.base_model.forward).parameters
    cacheable = decodes and hasattr(reward.model, "score") and window_of(reward.model.config) is None
    for backend in GRADIENT_BACKENDS if cacheable else ("full",):
        try:
            problem = _backend_error(reward, backend, prompts)
        except Exception as error:
            problem = describe_exception(error)
        if problem is None:
            reward.backend = backend
            return
        reward.reasons[backend] = problem


def _backend_error(reward: ClassifierReward, backend: str, prompts: Prompts) -> str | None:
    """How a backend's numbers differ from the forward pass on token ids; None if they do not."""
    template, table_UD = reward.template, reward.embedding_table()
    rows = [token_ids(reward.tokenizer, guarded(completion, template.controls)) for completion in COMPLETIONS]
    C, whole = max(map(len, rows)) + 1, []  # some of a batch is never attended
    response_BCD = table_UD.new_zeros(len(rows), C, table_UD.shape[1])
    shown_BC = torch.zeros(len(rows), C, dtype=torch.bool, device=reward.device)
    for b, (prompt, ids) in enumerate(zip(PROMPTS, rows, strict=True)):
        before, after = template.around(prompt)
        whole.append(before + EncodedText(ids, [template.completion_type] * len(ids)) + after)
        response_BCD[b, : len(ids)] = table_UD[torch.tensor(ids, device=reward.device)]
        shown_BC[b, : len(ids)] = True
    expected_B = torch.cat([reward.score_rows([row]) for row in whole])
    for batch in ([0], [1], [0, 1]):
        at_B = torch.tensor(batch, device=reward.device)
        guided = reward.for_prompts(prompts.take(batch), backend)
        r_B = guided(response_BCD[at_B], shown_BC[at_B], torch.arange(len(batch), device=reward.device))
        if (difference := _difference(reward, r_B, expected_B[at_B])) is not None:
            return difference
    return None


def _difference(reward: ClassifierReward, r_B: Tensor, expected_B: Tensor) -> str | None:
    tolerance = TOLERANCE[next(reward.model.parameters()).dtype] * expected_B.abs().clamp(min=1.0)
    error_B = (r_B - expected_B).abs()
    if bool((error_B <= tolerance).all()):  # false for NaN
        return None
    worst = int(torch.nan_to_num(error_B, nan=float("inf")).argmax())
    return f"{float(r_B[worst]):.6g} instead of {float(expected_B[worst]):.6g}"
