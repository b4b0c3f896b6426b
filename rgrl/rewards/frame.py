"""How a reward model is shown a prompt and its completion: its chat template, or its tokenizer's form for pairs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from rgrl.errors import ConfigError
from rgrl.models.text import BREAK, check_shape, control_tokens, guarded, render, template_of, token_ids, wants_parts
from rgrl.types import Prompt, transcript, turns_of, with_last, without_oldest

_MARK = "\ufdd1"  # stands for a text while the chat template is cut around it; like BREAK, no text has it
_WORD = "x"  # stands for a completion while the frame around it is tokenised


@dataclass(frozen=True)
class Framed:
    """Tokens around or of a text, and their types (segments A and B) where the model has them."""

    ids: list[int]
    types: list[int]

    def __add__(self, other: "Framed") -> "Framed":
        return Framed(self.ids + other.ids, self.types + other.types)

    def __len__(self) -> int:
        return len(self.ids)


class Frame:
    """Puts prompts and completions into the form that a reward model's users give it.

    With a chat template: the rendered conversation, tokenised whole. Without one: the tokenizer's form for a pair of
    texts where it has one (`[CLS] prompt [SEP] completion [SEP]`), else `prompt, new line, completion`; with the
    special tokens that the tokenizer adds. Such a model reads the `transcript` of a chat. Control tokens that a text
    spells stay text.

    `limit` is the longest text in tokens, None for any; of a longer one the prompt loses its beginning: a chat its
    oldest turns, but for the system's, and then the last turn its beginning. Raises `ConfigError` for a template that
    no frame can be cut from.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, name: str, limit: int | None = None) -> None:
        self.tokenizer, self.name, self.limit, self.reserve = tokenizer, name, limit, 0
        self.cut = 0  # scored texts whose prompt lost its beginning, since whoever counts them set it to 0
        self.controls = control_tokens(tokenizer)
        self.in_parts = False
        self.affixes: tuple[Framed, Framed, Framed] | None = None
        if template_of(tokenizer):
            self.in_parts = wants_parts(tokenizer, ("user", "assistant"))
            self._check_order()
        else:
            self.affixes = _affixes(tokenizer)

    def _check_order(self) -> None:
        """Refuse a template that shows the answer twice, or before the prompt."""
        text = self._rendered("prompt here", _MARK)
        if text.count(_MARK) != 1 or text.find("prompt here") > text.find(_MARK):
            raise ConfigError(
                f"reward model {self.name}: its chat template does not show the prompt and then the answer, once"
            )

    def check_shape(self, roles: Sequence[str]) -> None:
        """Raise `ConfigError` unless the template shows every turn of a chat of these roles, and then the answer."""
        if self.affixes is None:
            check_shape(self.tokenizer, [*roles, "assistant"], self.in_parts, answer=True)

    @property
    def forgeable(self) -> bool:
        """Whether only plain text stands between prompt and answer, so that a completion can write a turn itself."""
        if self.affixes is not None:
            return not self.affixes[1].ids
        text = self._rendered(_MARK, _MARK)
        return not any(control in text[text.find(_MARK) : text.rfind(_MARK)] for control in self.controls)

    def framed(self, prompt: Prompt, completion: str) -> Framed:
        """Everything that the model is shown of a prompt and its completion. Raises `ConfigError` if it is too long."""
        shown = self.shown(prompt)
        made = self._framed(shown, completion)
        if self.limit is not None and len(made) > self.limit:  # the completion takes more than was kept free for it
            shown = self._shortened(shown, lambda text: len(self._framed(text, completion)))
            made = self._framed(shown, completion)
        self.cut += shown != prompt
        return made

    def around(self, prompt: Prompt) -> tuple[Framed, Framed]:
        """What stands before and after a completion of the prompt, whatever it says."""
        return self._around(self.shown(prompt))

    def shown(self, prompt: Prompt) -> Prompt:
        """What is left of a prompt that would be too long."""
        return self._shortened(prompt, self._longest)

    # ------------------------------------------------------------------------------------------------ one text
    def _rendered(self, prompt: Prompt, completion: str) -> str:
        """The conversation in the chat template, with control tokens in the prompt broken."""
        turns = [{**turn, "content": guarded(turn["content"], self.controls)} for turn in turns_of(prompt)]
        return render(self.tokenizer, [*turns, {"role": "assistant", "content": completion}], self.in_parts)

    def _framed(self, prompt: Prompt, completion: str) -> Framed:
        completion = guarded(completion, self.controls)
        if self.affixes is None:
            return _plain(token_ids(self.tokenizer, self._rendered(prompt, completion)))
        text = guarded(transcript(prompt), self.controls)
        before, between, after = self.affixes
        if between.ids:
            first, second = token_ids(self.tokenizer, text), token_ids(self.tokenizer, completion)
            last = after.types[-1] if after.types else between.types[-1]
            return before + _plain(first) + between + Framed(second, [last] * len(second)) + after
        return before + _plain(token_ids(self.tokenizer, f"{text}\n{completion}")) + after

    def _around(self, prompt: Prompt) -> tuple[Framed, Framed]:
        if self.affixes is None:
            text_before, _, text_after = self._rendered(prompt, _MARK).rpartition(_MARK)
            ids_before, ids_after = _cut(self.tokenizer, text_before, text_after)
            return _plain(ids_before), _plain(ids_after)
        text = guarded(transcript(prompt), self.controls)
        before, between, after = self.affixes
        if between.ids:
            return before + _plain(token_ids(self.tokenizer, text)) + between, after
        return before + _plain(_cut(self.tokenizer, f"{text}\n", "")[0]), after

    def answer_type(self) -> int:
        """The type of a completion's tokens: 1 in the second segment of a pair."""
        return self.affixes[2].types[-1] if self.affixes is not None and self.affixes[1].ids else 0

    # ------------------------------------------------------------------------------------------------ its length
    def make_room(self, completion_length: int, empty: Prompt = "") -> None:
        """Keep as many tokens of the limit free for completions. Raises `ConfigError` if there are fewer.

        `empty` is what every prompt has beside its last turn. So a prompt is cut in the same place whatever its
        completion, whether it is scored or guides.
        """
        self.reserve = completion_length
        self._shortened(empty, self._longest)

    def _longest(self, prompt: Prompt) -> int:
        return sum(map(len, self._around(prompt))) + self.reserve

    def _shortened(self, prompt: Prompt, length: Callable[[Prompt], int]) -> Prompt:
        """The end of the prompt with which the text, of this length in tokens, stays within the limit."""
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
                f"longer than the {self.limit} tokens that it can be shown (its positions, or `max_length`)",
                on_one_rank=True,
            )
        return prompt


def _plain(ids: list[int]) -> Framed:
    return Framed(ids, [0] * len(ids))


def _affixes(tokenizer: PreTrainedTokenizerBase) -> tuple[Framed, Framed, Framed]:
    """What a tokenizer puts before, between and after two texts; nothing between where it has no form for pairs."""
    alone = tokenizer(_WORD, add_special_tokens=False)["input_ids"]
    pair = tokenizer(_WORD, _WORD)
    ids, types = pair["input_ids"], pair.get("token_type_ids") or [0] * len(pair["input_ids"])
    starts = [i for i in range(len(ids)) if ids[i : i + len(alone)] == alone]
    if len(starts) >= 2 and starts[-1] > starts[0] + len(alone):
        first, second = (starts[0], starts[0] + len(alone)), (starts[-1], starts[-1] + len(alone))
        spans = (slice(0, first[0]), slice(first[1], second[0]), slice(second[1], None))
        before, between, after = (Framed(ids[span], types[span]) for span in spans)
        return before, between, after
    ids = tokenizer(_WORD)["input_ids"]
    start = next((i for i in range(len(ids)) if ids[i : i + len(alone)] == alone), 0)
    return _plain(ids[:start]), Framed([], []), _plain(ids[start + len(alone) :])


def _cut(tokenizer: PreTrainedTokenizerBase, before: str, after: str) -> tuple[list[int], list[int]]:
    """The tokens before and after a completion, tokenised with one in its place."""
    if not tokenizer.is_fast or BREAK in before + after:
        return token_ids(tokenizer, before), token_ids(tokenizer, after)
    made = tokenizer(before + _WORD + after, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    start, end = len(before), len(before) + len(_WORD)
    places = list(zip(made["input_ids"], made["offset_mapping"], strict=True))
    return [i for i, (_, e) in places if e <= start], [i for i, (b, _) in places if b >= end]
