"""How long prompts are to the policy, and what becomes of those that are too long, too short, or nothing to it."""

import json
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerBase

from rgrl.data.prompts import BATCH, Cut, PromptSet, too_many_bad
from rgrl.errors import ConfigError
from rgrl.models.reader import Reader
from rgrl.types import Prompt, Prompts, turns_of, with_last, without_oldest

MANY = 20_000  # prompts from which on not all are tokenised whose length is beyond doubt


@dataclass
class _Found:
    """What measuring found so far; numbers are those of prompts, in their order."""

    kept: array = field(default_factory=lambda: array("q"))
    cuts: dict[int, Cut] = field(default_factory=dict)
    longest: int = 0
    blank: list[int] = field(default_factory=list)
    short: int = 0
    too_long: list[tuple[int, int, str]] = field(default_factory=list)  # number, tokens, text of the first ones
    over: int = 0  # how many are too long
    dropped: int = 0


def fit(prompts: PromptSet, reader: Reader, room: int, most: int | None = None) -> PromptSet:
    """The prompts in the policy's template, without those that are too long or too short, or with these cut.

    `room` tokens are for the completion; `most` prompts are looked at and kept (None: all). Raises `ConfigError` for a
    chat that the template does not show, too many bad rows, a prompt that is too long where `data.too_long` is `error`,
    and a canvas beyond the model's positions.
    """
    check_shapes(prompts, reader.check_shape)
    prompts = prompts.formatted(reader.format_prompt)
    found, start = _Found(), 0
    longest = min(prompts.config.max_prompt_length, reader.max_length - room)
    bound = bound_of(reader.tokenizer) if len(prompts) >= MANY and prompts.config.min_prompt_length <= 1 else None
    base = reader.lengths([reader.format_prompt("a")])[0]
    while start < len(prompts) and (most is None or len(found.kept) < most):
        numbers = range(start, min(start + (BATCH if most is None else most - len(found.kept)), len(prompts)))
        batch = replace(prompts, template=None).take(numbers)
        sure = [bound is not None and bound(reader, chat, longest) for chat in batch.chats]
        _look(found, prompts, batch, (numbers, sure), reader, base)
        start = numbers.stop
    return _result(prompts, found, reader, room)


def fit_both(
    training: PromptSet, evaluation: PromptSet | None, reader: Reader, room: int
) -> tuple[PromptSet, PromptSet | None]:
    """`fit` of the training prompts and of the first `data.eval_prompts` of the others. Raises `ConfigError`.

    Where the settings keep the two apart, no text is on both sides once prompts are cut. It is left out of evaluation,
    so that what is trained on does not depend on what is evaluated.
    """
    c = training.config
    training = fit(training, reader, room)
    if evaluation is None:
        return training, None
    evaluation = fit(evaluation, reader, room, c.eval_prompts)
    if not (c.deduplicate or c.eval_fraction) or not (training.cuts or evaluation.cuts):
        return training, evaluation
    changed_P = np.isin(training.number_P, list(training.cuts))
    seen = training if evaluation.cuts else training.only(changed_P)  # whole texts were compared before
    held_out = set(evaluation.texts)  # few, where those of training may be millions
    trained = {text for batch in seen.batches() for text in batch.texts if text in held_out}
    apart_P = np.array([text not in trained for text in evaluation.texts])
    if not apart_P.any():
        raise ConfigError(f"{evaluation.source}: every evaluation prompt is trained on too, once they are cut")
    return training, evaluation.only(apart_P, trained=int((~apart_P).sum()))


def _look(
    found: _Found,
    prompts: PromptSet,
    batch: Prompts,
    which: tuple[range, list[bool]],
    reader: Reader,
    base: int,
) -> None:
    """Measure a batch of prompts, but for those that are `sure` to be neither too long nor blank."""
    c, (numbers, sure) = prompts.config, which
    at = [i for i, known in enumerate(sure) if not known]
    tokens = dict(zip(at, reader.lengths([reader.format_prompt(batch.chats[i]) for i in at]), strict=True))
    # Few, so that little is tokenised twice.
    brief = [i for i in at if not isinstance(batch.chats[i], str) or tokens[i] <= base + c.min_prompt_length + 8]
    own = dict(zip(brief, reader.text_lengths([turns_of(batch.chats[i])[-1]["content"] for i in brief]), strict=True))
    for i, number in enumerate(numbers):
        length = tokens.get(i, 0)
        if own.get(i) == 0:
            found.blank.append(number)
        elif i in own and own[i] < c.min_prompt_length:
            found.short += 1
        elif length <= c.max_prompt_length:
            found.longest = max(found.longest, length)
            found.kept.append(number)
        else:
            found.over += 1
            if c.too_long == "error":
                found.too_long = found.too_long or [(number, length, batch.texts[i])]
                found.kept.append(number)
            elif c.too_long == "truncate" and (cut := shorten(batch.chats[i], reader, c.max_prompt_length)) is not None:
                length = reader.lengths([reader.format_prompt(cut.of(batch.chats[i]))])[0]
                found.longest = max(found.longest, length)
                found.cuts[int(prompts.number_P[number])] = cut
                found.kept.append(number)
            else:
                found.dropped += 1


def _result(prompts: PromptSet, found: _Found, reader: Reader, room: int) -> PromptSet:
    """The prompts that are left. Raises `ConfigError`."""
    c = prompts.config
    if found.blank:
        why = prompts.told(found.blank[0], "has a prompt of no tokens to this policy")
        text = prompts.take(found.blank[:1]).texts[0]
        bad = replace(
            prompts.tally,
            bad=prompts.tally.bad + len(found.blank),
            first_bad=prompts.tally.first_bad or f"{why}: {text[:60]!r}",
        )
        if bad.bad > c.max_bad * bad.rows:
            raise ConfigError(too_many_bad(bad, c))
        prompts = replace(prompts, tally=bad)
    if found.too_long:
        number, length, text = found.too_long[0]
        why = f"has a prompt of {length} tokens, more than `data.max_prompt_length` = {c.max_prompt_length}"
        raise ConfigError(
            f"{prompts.told(number, why)}: {text[:60]!r}; {found.over:,} of {len(prompts):,} prompts are too long: "
            "`data.too_long: drop` leaves them out, and `truncate` cuts them"
        )
    kept = np.array(found.kept, dtype=np.int64)
    truncated = len(found.cuts)
    fitting = prompts.only(kept, short=found.short, dropped=found.dropped, truncated=truncated)
    fitting = replace(fitting, cuts=found.cuts)
    if not len(fitting):
        raise ConfigError(
            f"{prompts.source}: no prompt is left of {prompts.tally.rows:,} rows: {fitting.tally.words()}"
        )
    if found.longest + room > reader.max_length:
        raise ConfigError(
            f"`rollout.max_completion_length` {room} after a prompt of {found.longest} tokens is beyond the model's "
            f"{reader.max_length} positions"
        )
    return fitting


def check_shapes(prompts: PromptSet, check: Callable[[Sequence[str]], None]) -> None:
    """Refuse a chat that a template does not show whole, as `check` finds. Raises `ConfigError`."""
    for roles, number in prompts.shapes.items():
        try:
            check(roles)
        except ConfigError as error:
            why = prompts.data.told(number, f"cannot be shown: {error}")
            remedy = "`data.turns: first_user` takes only the user's first turn"
            if prompts.config.system is not None and "system" in roles:
                remedy = "leave out `data.system`" if len(roles) == 2 else f"{remedy}; `data.system` adds one before it"
            raise ConfigError(f"{prompts.source}: {why}; {remedy}") from error


def shorten(prompt: Prompt, reader: Reader, limit: int) -> Cut | None:
    """The least that a prompt must lose to have at most `limit` tokens in its template; None where no text is left."""

    def fits(shown: Prompt) -> bool:
        return reader.lengths([reader.format_prompt(shown)])[0] <= limit

    turns = 0
    while not fits(prompt) and (fewer := without_oldest(prompt)) is not None:
        prompt, turns = fewer, turns + 1
    text = turns_of(prompt)[-1]["content"]
    if fits(prompt):
        return Cut(turns)
    # By characters: what a tokenizer decodes is not always what it was given. A long text is not tokenised whole again.
    least, most = 0, min(limit, len(text))
    while most < len(text) and fits(with_last(prompt, text[-most:])):
        least, most = most, min(2 * most, len(text))
    while most - least > 1:
        middle = (least + most) // 2
        least, most = (middle, most) if fits(with_last(prompt, text[-middle:])) else (least, middle)
    rest = text[len(text) - least :]
    return Cut(turns, len(text) - least) if rest.strip() and reader.text_lengths([rest])[0] else None


# ------------------------------------------------------------------------------------------- a million of them
def bound_of(tokenizer: PreTrainedTokenizerBase) -> Callable[[Reader, Prompt, int], bool] | None:
    """Tells prompts that need not be tokenised, as they have some text and at most so many tokens; None: no telling.

    Of a byte-level vocabulary every token stands for at least one byte, and every ASCII character is a byte.
    """
    if not tokenizer.is_fast:
        return None
    made = json.loads(tokenizer.backend_tokenizer.to_str())
    model, normalizers, cutters = made["model"], _steps(made["normalizer"]), _steps(made["pre_tokenizer"])
    plain = (
        model["type"] == "BPE"
        and all(step["type"] in ("NFC", "NFD", "NFKC", "NFKD", "Lowercase") for step in normalizers)
        and bool(cutters)
        and cutters[-1]["type"] == "ByteLevel"
        and not cutters[-1]["add_prefix_space"]
        and all(step["type"] == "Split" and step["behavior"] == "Isolated" for step in cutters[:-1])
        and all(byte in model["vocab"] for byte in ByteLevel.alphabet())
    )
    if not plain:
        return None
    around: dict[tuple[str, ...], int] = {}  # bytes of the template, by roles

    def sure(reader: Reader, prompt: Prompt, most: int) -> bool:
        turns = turns_of(prompt)
        roles = tuple(turn["role"] for turn in turns)
        if roles not in around:
            empty = [{"role": role, "content": "a"} for role in roles]
            around[roles] = len(reader.format_prompt(empty).encode())
        texts = [turn["content"] for turn in turns]
        return all(map(str.isascii, texts)) and around[roles] + sum(map(len, texts)) <= most

    return sure


def _steps(part: dict | None) -> list[dict]:
    """The parts of a tokenizer's normaliser or pre-tokenizer, one after another."""
    if part is None:
        return []
    if part["type"] == "Sequence":
        return [step for inner in part.get("normalizers", part.get("pretokenizers", [])) for step in _steps(inner)]
    return [part]
