"""What a row says to a model: the text of one user turn, or a chat."""

import json
from functools import cache
from typing import Any

from rgrl.config import DataConfig
from rgrl.config.template import pieces
from rgrl.data.rows import Bad, Row
from rgrl.types import Chat, Prompt

ROLES = ("system", "user", "assistant")
_NAMES = {"human": "user", "gpt": "assistant"}  # what they are called where messages are `from` and `value`


def prompt_of(row: Row, config: DataConfig) -> Prompt | Bad:
    """The prompt in a row, or what is wrong with it. A chat is a list of turns only where it is more than one."""
    if config.template is not None:
        prompt: Prompt | Bad = _filled(config.template, row)
    else:
        value = row.get(config.column)
        prompt = _of_messages(value, config.turns == "first_user") if isinstance(value, list) else _text(value)
        if isinstance(prompt, Bad) and config.column not in row:
            prompt = Bad(f"has no prompt text (no column {config.column!r})")
    if isinstance(prompt, Bad) or config.system is None:
        return prompt
    if not isinstance(prompt, str):
        own = prompt[0]["role"] == "system"
        return prompt if own else [{"role": "system", "content": config.system}, *prompt]
    return [{"role": "system", "content": config.system}, {"role": "user", "content": prompt}]


def empty_prompt(config: DataConfig) -> Prompt:
    """A prompt without text, with what `data.system` puts before every one: the least that a model is shown."""
    if config.system is None:
        return ""
    return [{"role": "system", "content": config.system}, {"role": "user", "content": ""}]


def _text(value: Any) -> str | Bad:
    if not isinstance(value, str):
        return Bad("has no prompt text" + ("" if value is None else f" (its prompt is {_kind(value)})"))
    if not value.strip():
        return Bad("has no prompt text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        return Bad(f"has a prompt with half a surrogate pair (character {error.start}), which is no text")
    return value


def _kind(value: Any) -> str:
    return f"of the type {type(value).__name__}"


# ---------------------------------------------------------------------------------------------------- messages
def _of_messages(value: list[Any], first_user: bool) -> Prompt | Bad:
    """The turns up to the user's last one, or the text of the user's first."""
    if first_user:
        first = next((number for number, message in enumerate(value) if _role(message) == "user"), None)
        if first is None:
            return _text(None)
        said = _turn(value[first])  # one that is no text must not make the next one the first
        return (
            Bad(f"has no prompt text: message {first} {said.why}") if isinstance(said, Bad) else _text(said["content"])
        )
    chat: Chat = []
    for number, message in enumerate(value):
        turn = _turn(message)
        if isinstance(turn, Bad):
            return Bad(f"has no prompt text: message {number} {turn.why}")
        if turn["role"] == "system" and number:
            return Bad(f"has a chat whose message {number} is the system's, which can only be the first")
        chat.append(turn)
    while chat and chat[-1]["role"] == "assistant":
        chat.pop()
    if not chat or chat[-1]["role"] != "user":
        return Bad("has no prompt text: its chat has no user turn")
    for turn in chat:
        if isinstance(text := _text(turn["content"]), Bad):
            return Bad(f"{text.why}: that is in the {turn['role']} turn")
    return chat[0]["content"] if len(chat) == 1 else chat


def _role(message: Any) -> Any:
    """Who speaks in a message, by one of `ROLES` where that is known."""
    role = message.get("role", message.get("from")) if isinstance(message, dict) else None
    return _NAMES.get(role, role) if isinstance(role, str) else role


def _turn(message: Any) -> dict[str, str] | Bad:
    """A message's role and text, in either of the two ways that data sets write them."""
    if not isinstance(message, dict):
        return Bad(f"is {_kind(message)}, not one with `role` and `content`")
    role, content = _role(message), message.get("content", message.get("value"))
    if role not in ROLES:
        return Bad(f"has the role {role!r:.40}; expected one of {', '.join(ROLES)}")
    if isinstance(content, list):  # of parts
        parts = [part.get("text") if isinstance(part, dict) else part for part in content]
        texts = [part for part in parts if isinstance(part, str)]
        if len(texts) < len(parts):
            return Bad("has parts that are not text")
        content = "".join(texts)
    if not isinstance(content, str):
        return Bad(f"has a content {_kind(content)}, not text")
    return {"role": role, "content": content}


# ---------------------------------------------------------------------------------------------------- template
_pieces = cache(pieces)  # the same for every row


def columns_in(template: str) -> list[str]:
    """The columns that a template names."""
    return [name for _, name in pieces(template) if name is not None]


def _filled(template: str, row: Row) -> str | Bad:
    """A template with the row's values in it: text as it is, other values as JSON."""
    made = []
    for text, name in _pieces(template):
        if name is None:
            made.append(text)
            continue
        value = row.get(name)
        if value is None:
            return Bad(f"has no prompt text: its column {name!r} is {'empty' if name in row else 'missing'}")
        if not isinstance(value, str):
            try:
                value = json.dumps(value, ensure_ascii=False, allow_nan=False)
            except (TypeError, ValueError):
                return Bad(f"has no prompt text: its column {name!r} is {_kind(value)}, which is no text")
        elif not value.strip():
            return Bad(f"has no prompt text: its column {name!r} is empty")
        made.append(value)
    return _text("".join(made))
