"""Recognise prompts and their rows by their content, wherever they were read from."""

import hashlib
import json
import re
from typing import Any

from rgrl.types import SomePrompts


def fingerprint(prompts: SomePrompts) -> dict[str, str]:
    """What identifies a set of prompts: `prompts` their number and texts in order, `rows` every column of every row."""
    texts, rows = hashlib.sha256(), hashlib.sha256()
    encode, between = json.JSONEncoder(sort_keys=True, default=_plain).encode, b""
    for batch in prompts.batches():
        texts.update(between + "\0".join(batch.texts).encode("utf-8", "surrogatepass"))
        rows.update("".join(f"{encode(row)}\n" for row in batch.rows).encode())
        between = b"\0"
    return {
        "prompts": f"{len(prompts)} prompts (SHA-256 {texts.hexdigest()[:16]})",
        "rows": rows.hexdigest(),
    }


def _plain(value: Any) -> Any:
    """What stands for a value that JSON lacks: the same in every process, so no address in memory."""
    if isinstance(value, (set, frozenset)):  # in no order, whatever the process's hash seed
        return [type(value).__name__, *sorted(json.dumps(one, sort_keys=True, default=_plain) for one in value)]
    content = value if isinstance(value, bytes) else value.tobytes() if hasattr(value, "tobytes") else None
    if content is not None:  # bytes; arrays and images, whose `repr` leaves most of them out
        return [type(value).__name__, hashlib.sha256(content).hexdigest()]
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))
