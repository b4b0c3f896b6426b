"""Recognise prompts and their rows by their content, wherever they were read from."""

import hashlib
import json
import re
from typing import Any

from rgrl.types import Prompts


def fingerprint(prompts: Prompts) -> dict[str, str]:
    """What identifies a set of prompts: `prompts` their number and texts in order, `rows` every column of every row."""
    texts = hashlib.sha256("\0".join(prompts.texts).encode("utf-8", "surrogatepass"))
    rows, encode = hashlib.sha256(), json.JSONEncoder(sort_keys=True, default=_plain).encode
    for row in prompts.rows:
        rows.update(encode(row).encode() + b"\n")
    return {
        "prompts": f"{len(prompts)} prompts (SHA-256 {texts.hexdigest()[:16]})",
        "rows": rows.hexdigest(),
    }


def _plain(value: Any) -> Any:
    """What stands for a value that JSON lacks: the same in every process, so no address in memory."""
    content = value if isinstance(value, bytes) else value.tobytes() if hasattr(value, "tobytes") else None
    if content is not None:  # bytes; arrays and images, whose `repr` leaves most of them out
        return [type(value).__name__, hashlib.sha256(content).hexdigest()]
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))
