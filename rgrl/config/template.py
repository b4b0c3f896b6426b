"""Text with columns in braces. It is never evaluated: a name in braces is the name of a column, letter by letter."""

import re

from rgrl.errors import ConfigError

_PIECE = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")


def pieces(template: str) -> list[tuple[str, str | None]]:
    """What a template is made of: (text, None), or ("", name of a column). Raises `ConfigError` for a lone brace."""
    found: list[tuple[str, str | None]] = []
    end = 0
    for match in _PIECE.finditer(template):
        found.append((template[end : match.start()], None))
        end = match.end()
        if match[0] in ("{{", "}}"):
            found.append((match[0][0], None))
        elif match[1]:
            found.append(("", match[1]))
        else:
            what = "names no column" if match[0] == "{}" else "has no counterpart"
            raise ConfigError(
                f"`data.template`: the brace at character {match.start() + 1} {what}; expected {{column}}, or a "
                "doubled brace, which stands for one"
            )
    found.append((template[end:], None))
    return [(text, name) for text, name in found if text or name]
