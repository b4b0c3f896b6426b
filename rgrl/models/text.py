"""Text as a tokenizer's users mean it: control tokens come from a template, never from what somebody wrote.

A control token that stands in a prompt or a completion is text. `guarded` breaks it with a mark that tokenising drops,
so that it never becomes the real one, and everything else is tokenised whole, as the model's users do.
"""

import datetime
import re
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rgrl.errors import ConfigError

# A code point that Unicode keeps for a program's own use: it stands for nothing in any text.
BREAK = "\ufdd0"
_SAID = "."  # ends what a turn of a trial says, so that none is the beginning of another
# The day that templates are told which ask for it: a rollout must not depend on when it was made.
DAY = datetime.datetime(2025, 1, 1)
# In Jinja, as transformers hands nothing but plain data to a template. What it writes by itself is nothing.
_SAME_DAY = (
    "{% macro strftime_now(format) %}{{ format"
    + "".join(
        f" | replace('{part}', '{DAY.strftime(part)}')"
        for part in "%-d %-m %d %m %B %b %Y %y %A %a %H %I %M %S %p".split()
    )
    + " }}{% endmacro %}{{ '' }}"
)


def control_tokens(tokenizer: PreTrainedTokenizerBase, more: Sequence[str] = ()) -> list[str]:
    """What no text may turn into, longest first: special tokens, those that the chat template writes, and `more`."""
    template = template_of(tokenizer) or ""
    added = tokenizer.added_tokens_decoder.values()
    found = {str(token) for token in added if token.special or (str(token).strip() and str(token) in template)}
    found |= {*tokenizer.all_special_tokens, *more}
    return sorted((token for token in found if len(token) > 1), key=lambda token: (-len(token), token))


def unseen_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids of tokens that a completion's text lacks: special ones, which decoding leaves out."""
    known = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    return sorted(i for i in known if not tokenizer.decode([i], skip_special_tokens=True))


def template_of(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The chat template that is used where none is named."""
    template = tokenizer.chat_template
    return template.get("default") if isinstance(template, dict) else template


def guarded(text: str, controls: Sequence[str]) -> str:
    """`text` with each control token in it broken after its first character."""
    text = text.replace(BREAK, "\ufffd")
    if not controls:
        return text
    return _any_of(tuple(controls)).sub(lambda found: found[0][0] + BREAK + found[0][1:], text)


@cache
def _any_of(words: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, words)))


def token_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The tokens of a guarded text, without special tokens around it."""
    return token_rows(tokenizer, [text])[0]


def token_rows(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """The same for many texts, in one call of the tokenizer, which works on several at a time."""
    pieces = [(row, piece) for row, text in enumerate(texts) for piece in text.split(BREAK) if piece]
    rows: list[list[int]] = [[] for _ in texts]
    if pieces:
        found = tokenizer([piece for _, piece in pieces], add_special_tokens=False, verbose=False)["input_ids"]
        for (row, _), ids in zip(pieces, found, strict=True):
            rows[row] += ids
    return rows


def count_tokens(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[int]:
    """The number of tokens of each guarded text, in half the time that it takes to have them."""
    fast = getattr(tokenizer, "backend_tokenizer", None)
    if fast is None or fast.truncation is not None or fast.padding is not None:
        return [len(ids) for ids in token_rows(tokenizer, texts)]
    pieces = [(row, piece) for row, text in enumerate(texts) for piece in text.split(BREAK) if piece]
    counts = [0] * len(texts)
    found = fast.encode_batch_fast([piece for _, piece in pieces], add_special_tokens=False)
    for (row, _), encoded in zip(pieces, found, strict=True):
        counts[row] += len(encoded)
    return counts


def render(
    tokenizer: PreTrainedTokenizerBase, turns: list[dict[str, str]], in_parts: bool = False, answer: bool = False
) -> str:
    """The turns in the tokenizer's chat format, up to where an `answer` begins if one is to be written.

    `in_parts`: each message is a list of parts, as some templates want them. Raises `ConfigError` where the template
    cannot write the turns.
    """
    if in_parts:
        turns = [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in turns]  # type: ignore[dict-item]
    template = template_of(tokenizer)
    if template is not None and "strftime_now" in template:
        template = _SAME_DAY + template
    try:
        return tokenizer.apply_chat_template(
            turns, chat_template=template, tokenize=False, add_generation_prompt=answer
        )
    except Exception as error:  # a template is a program of somebody else's
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"the chat template of {tokenizer.name_or_path} cannot write these turns: {reason}"
        ) from error


def wants_parts(tokenizer: PreTrainedTokenizerBase, roles: Sequence[str]) -> bool:
    """Whether the template shows messages only where they are lists of parts. Raises `ConfigError` if it never does."""
    turns = [{"role": role, "content": f"{role} speaks"} for role in roles]
    problem: ConfigError | None = None
    for in_parts in (False, True):
        try:
            text = render(tokenizer, turns, in_parts)
        except ConfigError as error:
            problem = problem or error
            continue
        if all(turn["content"] in text for turn in turns):
            return in_parts
    if problem is not None:
        raise problem
    shown = "the prompt" if len(roles) == 1 else "the prompt and the answer"
    raise ConfigError(f"the chat template of {tokenizer.name_or_path} does not show {shown}")


def check_shape(
    tokenizer: PreTrainedTokenizerBase, roles: Sequence[str], in_parts: bool = False, answer: bool = False
) -> None:
    """Raise `ConfigError` unless the template shows every turn of a chat of these roles once, in its order.

    With `answer` the last turn is the answer, else one is to begin behind it. What a template leaves out, such as a
    system turn, no model would be shown.
    """
    said = [f"{role} says {i}{_SAID}" for i, role in enumerate(roles)]
    turns = [{"role": role, "content": text} for role, text in zip(roles, said, strict=True)]
    text = render(tokenizer, turns, in_parts, answer=not answer)
    lost = next((role for role, words in zip(roles, said, strict=True) if text.count(words) != 1), None)
    places = [text.find(words) for words in said]
    if lost is None and places == sorted(places):
        return
    problem = f"does not show the {lost} turn, once," if lost is not None else "changes the order"
    raise ConfigError(f"the chat template of {tokenizer.name_or_path} {problem} of a chat ({', '.join(roles)})")


def pad_left(rows: Sequence[Sequence[int]], device: torch.device | str, fill: int = 0) -> tuple[Tensor, Tensor]:
    """ids_BL (int64, `fill` on padding) and attention_BL (bool, False on padding) of token rows."""
    width = max(map(len, rows))
    ids_BL = torch.full((len(rows), width), fill, dtype=torch.long)
    attention_BL = torch.zeros(len(rows), width, dtype=torch.bool)
    for i, ids in enumerate(rows):
        ids_BL[i, width - len(ids) :] = torch.tensor(ids, dtype=torch.long)
        attention_BL[i, width - len(ids) :] = True
    return ids_BL.to(device), attention_BL.to(device)


def count_positions(attention_BL: Tensor) -> Tensor:
    """position_BL, which counts attended tokens from 0, so that padding changes nothing."""
    return (attention_BL.long().cumsum(1) - 1).clamp(min=0)
