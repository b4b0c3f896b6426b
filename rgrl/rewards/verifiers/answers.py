r"""Where in a text its answer stands: between <answer> tags, in \boxed{}, or after ####. Time is linear in the text."""

from typing import Literal

Where = Literal["auto", "tags", "boxed", "hashes", "text"]
OPEN, CLOSE = "<answer>", "</answer>"
_BOXES = ("\\boxed", "\\fbox")


def marked(text: str, where: Where = "auto") -> str | None:
    """The part of a text that is marked as its answer, None where nothing is.

    `auto`: within the last <answer> tags, else the whole text, the last `\\boxed{}`; without tags and box, the rest of
    the line after the last `####` that a number or sign follows. A mark that is not closed ends with the text. `text`:
    the whole.
    """
    if where == "text":
        return text.strip()
    if where == "tags":
        return in_tags(text)
    if where == "boxed":
        return in_box(text)
    if where == "hashes":
        return after_hashes(text, number=False)
    tagged = in_tags(text)
    boxed = in_box(text if tagged is None else tagged)
    if boxed is not None:
        return boxed
    return tagged if tagged is not None else after_hashes(text, number=True)


def in_tags(text: str, opening: str = OPEN, closing: str = CLOSE) -> str | None:
    """What follows the last opening tag, up to its closing one."""
    start = text.rfind(opening)
    if start < 0:
        return None
    start += len(opening)
    end = text.find(closing, start)
    return text[start : len(text) if end < 0 else end].strip()


def in_box(text: str) -> str | None:
    r"""What the last \boxed or \fbox holds: of nested ones the innermost."""
    start, command = max((text.rfind(name), name) for name in _BOXES)
    if start < 0:
        return None
    rest = text[start + len(command) :].lstrip()
    if not rest.startswith("{"):
        word = rest.split(maxsplit=1)
        return word[0].rstrip("$.,") if word else ""
    depth = 0
    for i, character in enumerate(rest):
        escaped = i > 0 and rest[i - 1] == "\\"
        if character == "{" and not escaped:
            depth += 1
        elif character == "}" and not escaped:
            depth -= 1
            if depth == 0:
                return rest[1:i].strip()
    return rest[1:].strip()


def after_hashes(text: str, number: bool) -> str | None:
    """The rest of the line after the last ####, where GSM8K has its answers; `number`: not of a heading in words."""
    start = text.rfind("####")
    if start < 0:
        return None
    line = text[start + 4 :].lstrip(" \t").split("\n", 1)[0].strip()
    begins = line.lstrip("+-\u2212$\u20ac\u00a3\u00a5\\ ")[:1]
    return line if not number or begins.isdigit() or begins == "." else None
