"""The input of a reward model: a prompt and its completion in its chat template, or in its tokenizer's pair format."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rgrl.errors import ConfigError
from rgrl.models.text import BREAK, check_shape, control_tokens, guarded, render, template_of, token_ids, wants_parts
from rgrl.types import Prompt, transcript, turns_of, with_last, without_oldest

_MARK = "\ufdd1"  # stands for a text while the chat template is split around it; like BREAK, no text contains it
_WORD = "x"  # stands for a completion while the text around it is tokenised


@dataclass(frozen=True)
class EncodedText:
    """Tokens of a text or of a part of one, with their type ids (segments A and B, 0 where the model has none)."""

    ids: list[int]
    types: list[int]
    truncated: bool = False  # whether the prompt lost its beginning

    def __add__(self, other: "EncodedText") -> "EncodedText":
        return EncodedText(self.ids + other.ids, self.types + other.types, self.truncated or other.truncated)

    def __len__(self) -> int:
        return len(self.ids)


class InputTemplate:
    """Encodes prompts and completions in the format that a reward model was trained on.

    With a chat template: the rendered conversation, tokenised whole. Without one: the tokenizer's format for a pair of
    texts (`[CLS] prompt [SEP] completion [SEP]`) if it has one, else `prompt, new line, completion`, with the special
    tokens that the tokenizer adds. Such a model gets the `transcript` of a chat. Control tokens spelled out in a text
    stay text.

    `limit` is the longest input in tokens, None for no limit. A longer one loses the beginning of its prompt: a chat
    its oldest turns, except the system's, and then the beginning of the last turn. Raises `ConfigError` for a template
    that does not show the prompt and then the answer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, name: str, limit: int | None = None) -> None:
        self.tokenizer, self.name, self.limit, self.reserve = tokenizer, name, limit, 0
        self.controls = control_tokens(tokenizer)
        self.in_parts = False
        self.affixes: tuple[EncodedText, EncodedText, EncodedText] | None = None
        if not template_of(tokenizer):
            self.affixes = _affixes(tokenizer)
            return
        self.in_parts = wants_parts(tokenizer, ("user", "assistant"))
        text = self._render("prompt here", _MARK)
        if text.count(_MARK) != 1 or text.find("prompt here") > text.find(_MARK):
            raise ConfigError(
                f"reward model {name}: its chat template does not show the prompt and then the answer, each once"
            )

    def check_shape(self, roles: Sequence[str]) -> None:
        """Raise `ConfigError` unless the template shows every turn of a chat with these roles, and then the answer."""
        if self.affixes is None:
            check_shape(self.tokenizer, [*roles, "assistant"], self.in_parts, answer=True)

    @property
    def forgeable(self) -> bool:
        """Whether only plain text separates prompt and answer, so that a completion can write another turn."""
        if self.affixes is not None:
            return not self.affixes[1].ids
        text = self._render(_MARK, _MARK)
        return not any(control in text[text.find(_MARK) : text.rfind(_MARK)] for control in self.controls)

    @property
    def completion_type(self) -> int:
        """The type id of a completion's tokens: 1 in the second segment of a pair."""
        return self.affixes[2].types[-1] if self.affixes is not None and self.affixes[1].ids else 0

    def encode(self, prompt: Prompt, completion: str) -> EncodedText:
        """The model's whole input for a prompt and a completion. Raises `ConfigError` if it is too long."""
        kept = self.fit(prompt)
        text = self._encode(kept, completion)
        if self.limit is not None and len(text) > self.limit:  # the completion needs more than was kept free for it
            kept = self._fit(kept, lambda shorter: len(self._encode(shorter, completion)))
            text = self._encode(kept, completion)
        return replace(text, truncated=kept != prompt)

    def around(self, prompt: Prompt) -> tuple[EncodedText, EncodedText]:
        """The tokens before and after any completion of the prompt."""
        return self._around(self.fit(prompt))

    def fit(self, prompt: Prompt) -> Prompt:
        """The prompt, without its beginning if it is too long."""
        return self._fit(prompt, self._longest)

    def make_room(self, completion_length: int, empty: Prompt = "") -> None:
        """Keep this many tokens of the limit free for completions. Raises `ConfigError` if there are fewer.

        `empty` is what every prompt has besides its last turn. With this a prompt is truncated at the same position
        whatever its completion, both in scoring and in guidance.
        """
        self.reserve = completion_length
        self.fit(empty)

    # ------------------------------------------------------------------------------------------------ one text
    def _render(self, prompt: Prompt, completion: str) -> str:
        """The conversation in the chat template, with control tokens in the prompt broken."""
        turns = [{**turn, "content": guarded(turn["content"], self.controls)} for turn in turns_of(prompt)]
        return render(self.tokenizer, [*turns, {"role": "assistant", "content": completion}], self.in_parts)

    def _encode(self, prompt: Prompt, completion: str) -> EncodedText:
        completion = guarded(completion, self.controls)
        if self.affixes is None:
            return _untyped(token_ids(self.tokenizer, self._render(prompt, completion)))
        text = guarded(transcript(prompt), self.controls)
        before, between, after = self.affixes
        if between.ids:
            first, second = token_ids(self.tokenizer, text), token_ids(self.tokenizer, completion)
            last = after.types[-1] if after.types else between.types[-1]
            return before + _untyped(first) + between + EncodedText(second, [last] * len(second)) + after
        return before + _untyped(token_ids(self.tokenizer, f"{text}\n{completion}")) + after

    def _around(self, prompt: Prompt) -> tuple[EncodedText, EncodedText]:
        if self.affixes is None:
            text_before, _, text_after = self._render(prompt, _MARK).rpartition(_MARK)
            ids_before, ids_after = _split(self.tokenizer, text_before, text_after)
            return _untyped(ids_before), _untyped(ids_after)
        text = guarded(transcript(prompt), self.controls)
        before, between, after = self.affixes
        if between.ids:
            return before + _untyped(token_ids(self.tokenizer, text)) + between, after
        return before + _untyped(_split(self.tokenizer, f"{text}\n", "")[0]), after

    # ------------------------------------------------------------------------------------------------ its length
    def _longest(self, prompt: Prompt) -> int:
        return sum(map(len, self._around(prompt))) + self.reserve

    def _fit(self, prompt: Prompt, length: Callable[[Prompt], int]) -> Prompt:
        """The end of the prompt with which the input, whose length in tokens `length` gives, is within the limit."""
        if self.limit is None or (over := length(prompt) - self.limit) <= 0:
            return prompt
        while (fewer := without_oldest(prompt)) is not None and over > 0:
            prompt = fewer
            over = length(prompt) - self.limit
        ids = token_ids(self.tokenizer, guarded(turns_of(prompt)[-1]["content"], self.controls))
        while ids and over > 0:
            ids = ids[over:]
            text = self.tokenizer.decode(ids, clean_up_tokenization_spaces=False).lstrip("\ufffd")  # half a character
            prompt = with_last(prompt, text)
            over = length(prompt) - self.limit
        if over > 0:
            raise ConfigError(
                f"reward model {self.name}: its template and a completion ({self.reserve} tokens are kept free) are "
                f"longer than the limit of {self.limit} tokens (its positions, or `max_length`)",
                on_one_rank=True,
            )
        return prompt


def make_template(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str, max_length: int
) -> InputTemplate:
    """The input template for at most `max_length` tokens (0: as many as the model can read). Raises `ConfigError`."""
    limits = [getattr(model.config.get_text_config(), "max_position_embeddings", None), tokenizer.model_max_length]
    for layer, module in model.named_modules():
        # RoBERTa and similar models count positions from behind the padding's.
        if layer.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            limits.append(module.num_embeddings - module.padding_idx - 1)
    limit = min((limit for limit in limits if limit is not None and 0 < limit < 10**9), default=None)
    if limit is not None and max_length > limit:
        raise ConfigError(f"reward model {name}: `max_length` {max_length} is more than the {limit} tokens it can read")
    return InputTemplate(tokenizer, name, max_length or limit)


def _untyped(ids: list[int]) -> EncodedText:
    return EncodedText(ids, [0] * len(ids))


def _affixes(tokenizer: PreTrainedTokenizerBase) -> tuple[EncodedText, EncodedText, EncodedText]:
    """The tokens before, between and after two texts; none between if the tokenizer has no format for pairs."""
    alone = tokenizer(_WORD, add_special_tokens=False)["input_ids"]
    pair = tokenizer(_WORD, _WORD)
    ids, types = pair["input_ids"], pair.get("token_type_ids") or [0] * len(pair["input_ids"])
    starts = [i for i in range(len(ids)) if ids[i : i + len(alone)] == alone]
    if len(starts) >= 2 and starts[-1] > starts[0] + len(alone):
        first, second = (starts[0], starts[0] + len(alone)), (starts[-1], starts[-1] + len(alone))
        spans = (slice(0, first[0]), slice(first[1], second[0]), slice(second[1], None))
        before, between, after = (EncodedText(ids[span], types[span]) for span in spans)
        return before, between, after
    ids = tokenizer(_WORD)["input_ids"]
    start = next((i for i in range(len(ids)) if ids[i : i + len(alone)] == alone), 0)
    return _untyped(ids[:start]), EncodedText([], []), _untyped(ids[start + len(alone) :])


def _split(tokenizer: PreTrainedTokenizerBase, before: str, after: str) -> tuple[list[int], list[int]]:
    """The tokens of the texts before and after a completion, tokenised with a word between them."""
    if not tokenizer.is_fast or BREAK in before + after:
        return token_ids(tokenizer, before), token_ids(tokenizer, after)
    encoded = tokenizer(before + _WORD + after, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    start, end = len(before), len(before) + len(_WORD)
    spans = list(zip(encoded["input_ids"], encoded["offset_mapping"], strict=True))
    return [i for i, (_, e) in spans if e <= start], [i for i, (b, _) in spans if b >= end]
