"""The settings for people and editors: the text of `--help`, and a JSON Schema. Both are made from schema.py."""

import ast
import dataclasses
import functools
import inspect
import json
import textwrap
import typing
from typing import Any, Literal

from pydantic import TypeAdapter

from rgrl.config import presets, schema
from rgrl.config.explain import range_of
from rgrl.config.kinds import SECTIONS

PARTS = "reward.functions.*"  # what a function of the reward may be, where it is a mapping
_STANDARD = {"ge": "minimum", "gt": "exclusiveMinimum", "le": "maximum", "lt": "exclusiveMaximum"}


@functools.cache
def docs() -> dict[str, dict[str, str]]:
    """The string below each field, by section and key."""
    names = {cls.__name__: name for name, cls in SECTIONS.items()} | {schema.PartConfig.__name__: PARTS}
    found: dict[str, dict[str, str]] = {}
    for node in ast.parse(inspect.getsource(schema)).body:
        if isinstance(node, ast.ClassDef) and node.name in names:
            found[names[node.name]] = {
                field.target.id: " ".join(doc.value.value.split())
                for field, doc in zip(node.body, node.body[1:], strict=False)
                if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
                if isinstance(doc, ast.Expr)
                and isinstance(doc.value, ast.Constant)
                and isinstance(doc.value.value, str)
            }
    return found


def settings_help(width: int = 100) -> str:
    """Every setting with its type, limits, default and documentation, as a text of `width` columns."""
    text = ["settings, in the file or as --section.key VALUE (lists and mappings as YAML, such as '[q_proj, v_proj]'):"]
    for section, cls in SECTIONS.items():
        hints = typing.get_type_hints(cls, include_extras=True)
        for name, value in schema.to_dict(cls()).items():
            default = "required" if value == "" else f"default {json.dumps(value)}"
            text += ["", f"  --{section}.{name}  {kind_of(hints[name])}, {default}"]
            text += textwrap.wrap(docs()[section][name], width, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join(text)


def kind_of(hint: Any) -> str:
    """A field's type and limits in words."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return " | ".join(arguments)
    if origin is typing.Annotated:
        limits = range_of(hint) if arguments[0] in (int, float) else ""
        return " ".join(filter(None, [kind_of(arguments[0]), limits]))
    if origin is list:
        return f"list of {kind_of(arguments[0])}"
    if origin is dict:
        return f"mapping of {kind_of(arguments[0])} to {kind_of(arguments[1])}"
    if arguments:  # one of several types, or None
        return " or ".join("null" if inner is type(None) else kind_of(inner) for inner in arguments)
    if dataclasses.is_dataclass(hint):
        return f"mapping ({', '.join(field.name for field in dataclasses.fields(hint))})"
    return {int: "whole number", float: "number", bool: "true | false", str: "text", Any: "anything"}[hint]


def json_schema() -> dict[str, Any]:
    """The JSON Schema of a file of settings, which editors complete and check by."""
    made = TypeAdapter(schema.Config).json_schema()
    for section, cls in (SECTIONS | {PARTS: schema.PartConfig}).items():
        properties = made["$defs"][cls.__name__]["properties"]
        for field in dataclasses.fields(cls):
            properties[field.name]["description"] = docs()[section][field.name]
            properties[field.name].pop("title", None)
            # pydantic keeps a limit's own name where a setting reads its text itself.
            for limited in [properties[field.name], *properties[field.name].get("anyOf", [])]:
                for name, standard in _STANDARD.items():
                    if name in limited:
                        limited[standard] = limited.pop(name)
    made["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    made["title"] = "rgrl settings"
    made["properties"]["extends"] = {
        "anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}],
        "description": "Files of settings, beside this one, and presets by their names, which this one changes; of a "
        f"list later ones win. Presets: {', '.join(presets.names())}.",
    }
    return made
