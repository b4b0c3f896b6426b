"""One YAML file plus dotted overrides (`--optim.learning_rate 1e-4`) make a `Config`.

A file may extend others and say only what differs: `extends: rgrl.yaml` (a file beside it), `extends: gsm8k` (a preset,
presets.py), or a list of both, of which later ones win. Scalars stay text here, and each setting reads its own
(kinds.py). An unknown key, a value of the wrong type or a setting that cannot work raises `ConfigError` with one line:
what is wrong and what would be right.
"""

import dataclasses
import typing
import warnings
from pathlib import Path
from typing import Any

import yaml

from rgrl.config import presets
from rgrl.config.explain import short, unknown
from rgrl.config.kinds import SECTIONS, Null, Plain, read_anything, read_path
from rgrl.config.paths import expanded
from rgrl.config.rules import check
from rgrl.config.schema import Config, to_dict
from rgrl.errors import ConfigError

MOST_BYTES, MOST_VALUES = 10**6, 10**5  # of a file; aliases count each time they are used
_NULL = "tag:yaml.org,2002:null"
_NULLS = ("", "~", "null", "Null", "NULL")
_PARTS = ("reward", "functions")  # where a number stands for a mapping that says only `weight`
_MERGE = "tag:yaml.org,2002:merge"
RENAMED = {"objective.iterations": "optim.updates"}
# Settings of release 0.1.0 that did not pay (experiments/LOG.md), and the value under which each did nothing (None:
# any): that is dropped, as the config.yaml of every run of that release has it.
REMOVED: dict[str, str | float | None] = {
    "gradient.loss": "first_order",
    "gradient.eta": None,
    "gradient.centre": "none",
    "gradient.marginal": 0.0,
    "gradient.reuse": False,
    "gradient.measure_steps": None,
}
GONE = (
    "was removed in 0.2.0, as it did not pay in our experiments (experiments/LOG.md); "
    "release 0.1.0 (commit cc2d4ec) has it"
)


def load_config(path: str | Path, overrides: list[str] | None = None) -> Config:
    """The file at `path` with `overrides` (["--a.b", "value", "--c.d=value", ...]) laid over it, checked.

    Raises `ConfigError`.
    """
    renamed: set[str] = set()
    tree = _read(path, (), {}, renamed)
    for key, text in _current_overrides(_parse_overrides(overrides or []), renamed):
        _override(tree, key, text)
    for old in sorted(renamed):
        warnings.warn_explicit(f"`{old}` is called `{RENAMED[old]}` now", FutureWarning, str(path), lineno=0)
    # A section with nothing in it is one where every line is a comment.
    config = Config(**{key: {} if isinstance(value, Null) else value for key, value in tree.items()})
    check(config)
    return config


def _read(
    path: str | Path, below: tuple[Path, ...], known: dict[Path, dict[str, Any]], renamed: set[str]
) -> dict[str, Any]:
    """The settings in a file, laid over those of what its key `extends` names.

    `below`: the files that extend this one; `known`: what has been read already, by file; `renamed`: as in `_current`.
    """
    by = f" (which {below[-1]} extends)" if below else ""
    path, text = _read_text(path, by)
    place = path.resolve()
    if place in below:
        raise ConfigError(f"{path} extends itself, by way of {' and '.join(map(str, below))}")
    if place in known:
        return known[place]
    tree = parse(text, str(path))
    if isinstance(tree, Null):
        tree = {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} must hold sections such as `model:` and `run:`, not {short(tree)}")
    tree = _current(tree, str(path), renamed)
    above: dict[str, Any] = {}
    for parent in _parents(tree.pop("extends", Null()), path):
        above = _overlay(above, _read(parent, (*below, place), known, renamed))
    known[place] = _overlay(above, tree)
    return known[place]


def _current(tree: dict[str, Any], where: str, renamed: set[str]) -> dict[str, Any]:
    """Settings as they are called today, without those that were removed. `where` names them in messages.

    Adds the older names that it meets to `renamed`. Raises `ConfigError` for a removed setting that did something, and
    for two names of one setting that disagree.
    """
    tree = {name: dict(values) if isinstance(values, dict) else values for name, values in tree.items()}
    for key, harmless in REMOVED.items():
        section, _, name = key.partition(".")
        if isinstance(tree.get(section), dict) and name in tree[section]:
            value = tree[section].pop(name)
            if harmless is not None and _value(value) != harmless:
                raise ConfigError(f"`{key}` {GONE}")
    for old, new in RENAMED.items():
        (section, _, name), (now, _, name_now) = old.partition("."), new.partition(".")
        if isinstance(tree.get(section), dict) and name in tree[section]:
            renamed.add(old)
            value = tree[section].pop(name)
            if isinstance(tree.get(now, Null()), Null):
                tree[now] = {}
            if not isinstance(tree[now], dict):
                continue  # refused with its own message
            given = tree[now].setdefault(name_now, value)
            if _value(given) != _value(value):
                raise ConfigError(
                    f"{where}: `{old}` ({short(value)}) is called `{new}` now, which is given too ({short(given)})"
                )
    return tree


def _current_overrides(pairs: list[tuple[str, str]], renamed: set[str]) -> list[tuple[str, str]]:
    """Overrides as `_current` has them. One of a current name wins over any of a file."""
    tree: dict[str, Any] = {}
    for key, text in pairs:
        if key in {*REMOVED, *RENAMED, *RENAMED.values()}:
            section, _, name = key.partition(".")
            tree.setdefault(section, {})[name] = text
    current = {
        f"{section}.{name}": text
        for section, values in _current(tree, "the command line", renamed).items()
        for name, text in values.items()
    }
    return [(key, text) for key, text in pairs if key not in {*REMOVED, *RENAMED, *current}] + [*current.items()]


def _value(value: Any) -> Any:
    """A scalar as YAML means it, quoted or not, so that `0` is `0.0` and `no` is `false`; anything else as it is."""
    try:
        return read_anything(Plain(value)) if isinstance(value, str) else value
    except ValueError:
        return value


def _read_text(path: str | Path, by: str) -> tuple[Path, str]:
    """A file's path, written out, and its text. `by` says in errors who extends it."""
    try:
        path = Path(expanded(read_path(path), "--config"))
        if not path.is_file():
            raise ConfigError(f"--config {path}{by}: no such file")
        if path.stat().st_size > MOST_BYTES:
            raise ConfigError(f"{path}{by} is no file of settings: it has more than {MOST_BYTES:,} bytes")
        return path, path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}{by} is not valid YAML: it is not text in UTF-8 ({error.reason})") from error
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"--config {short(path)}{by} must be {error}") from error
    except OSError as error:
        raise ConfigError(f"--config {path}{by} cannot be read: {error.strerror}") from error


def _parents(value: Any, path: Path) -> list[Path]:
    """The files that `extends` of the file at `path` names, in its order."""
    entries = value if isinstance(value, list) else [] if isinstance(value, Null) else [value]
    found = []
    for entry in entries:
        if not isinstance(entry, str) or isinstance(entry, Null) or not entry:
            raise ConfigError(
                f"{path}: `extends` must be the path of a file, the name of a preset, or a list of these, not "
                f"{short(entry)}"
            )
        if presets.is_name(entry):
            try:
                found.append(presets.find(entry))
            except ConfigError as error:
                told = "a file is named with a slash, or with .yaml at its end"
                raise ConfigError(f"{path}: `extends`: {error} ({told})") from error
        else:
            found.append(path.parent / expanded(entry, f"{path}: `extends`"))
    return found


def _overlay(tree: dict[str, Any], changes: dict[str, Any], at: tuple[str, ...] = ()) -> dict[str, Any]:
    """`tree` with `changes`, key by key. `at`: the keys above both.

    A section where every line is a comment changes nothing; within one, an empty mapping leaves nothing.
    """
    laid = dict(tree)
    for key, value in changes.items():
        below = tree.get(key)
        if at == _PARTS and key in tree:
            below, value = _as_parts(below, value)
        if isinstance(value, dict) and isinstance(below, dict):
            value = _overlay(below, value, (*at, key)) if value or not at else {}
        elif not at and isinstance(below, dict) and isinstance(value, Null) and value == "":
            value = below
        laid[key] = value
    return laid


def _as_parts(below: Any, value: Any) -> tuple[Any, Any]:
    """Two functions of the reward in the same form: a number is the weight of a mapping."""
    if isinstance(below, dict) == isinstance(value, dict):
        return below, value
    return tuple(one if isinstance(one, dict) else {"weight": one} for one in (below, value))  # type: ignore[return-value]


def _parse_overrides(words: list[str]) -> list[tuple[str, str]]:
    """(dotted key, text) of each override, in their order."""
    pairs, queue = [], list(words)
    while queue:
        word = queue.pop(0)
        key, given, text = word.removeprefix("--").partition("=")
        if not word.startswith("--") or not key:
            raise ConfigError(f"expected --section.key value, got {short(word)}")
        if not given:
            if not queue or queue[0].startswith("--"):
                raise ConfigError(f"--{key} needs a value")
            text = queue.pop(0)
        pairs.append((key, text))
    return pairs


def _override(tree: dict[str, Any], key: str, text: str) -> None:
    """Lay one override over the tree: text as it stands, but for lists and mappings, which are YAML."""
    section, _, name = key.partition(".")
    kinds = typing.get_type_hints(SECTIONS[section]) if section in SECTIONS else {}
    name, _, entry = name.partition(".")
    if name not in kinds:
        raise ConfigError(
            f"`{section}` is a section with keys of its own, not the value {short(text)}"
            if key in SECTIONS
            else unknown(key, SECTIONS)
        )
    if isinstance(tree.get(section), Null) or section not in tree:
        tree[section] = {}
    node = tree[section]
    if not isinstance(node, dict):
        return  # refused with its own message
    origin = typing.get_origin(kinds[name])
    if entry and origin is not dict:
        raise ConfigError(f"--{key}: `{name}` is a value, not a section")
    if entry:
        inner = typing.get_args(kinds[name])[1]
        if any(dataclasses.is_dataclass(kind) for kind in typing.get_args(inner)):
            node[name] = _with_part(node.get(name), entry, parse(text, f"--{key}"))
            return
        value: Any = parse(text, f"--{key}") if inner is Any or typing.get_origin(inner) is dict else text
        found = node.get(name)
        known: dict[str, Any] = found if isinstance(found, dict) else {}
        first, _, rest = entry.partition(".")
        if typing.get_origin(inner) is dict and rest:
            below = known.get(first)
            entry, value = first, (below if isinstance(below, dict) else {}) | {rest: value}
        node[name] = known | {entry: value}
    elif origin in (list, dict):
        node[name] = parse(text, f"--{key}")
    else:
        node[name] = Null(text) if text in _NULLS else text


def _with_part(parts: Any, entry: str, value: Any) -> dict[str, Any]:
    """A mapping such as `reward.functions` with `entry` set: a name, or a name and keys of its mapping.

    A name may be a dotted path, `package.module:function`, which ends at the next dot after its colon.
    """
    module, colon, rest = entry.partition(":")
    first, _, keys = rest.partition(".") if colon else entry.partition(".")
    first, known = f"{module}:{first}" if colon else first, parts if isinstance(parts, dict) else {}
    if not keys:
        return _overlay(known, {first: value}, _PARTS)
    found = known.get(first, {})
    found = dict(found) if isinstance(found, dict) else {"weight": found}
    key, _, below = keys.partition(".")
    if below:
        inner = found.get(key)
        value = (inner if isinstance(inner, dict) else {}) | {below: value}
    return known | {first: found | {key: value}}


# ------------------------------------------------------------------------------------------------ YAML
class _Dumper(yaml.SafeDumper):
    """Quotes text that `_Loader` and a setting that may be anything would take for something else."""


def _quoted(dumper: _Dumper, text: str) -> yaml.Node:
    try:
        same = type(read_anything(Plain(text))) is str
    except ValueError:
        same = False
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=None if same else "'")


_Dumper.add_representer(str, _quoted)


def as_yaml(config: Config) -> str:
    """The settings as a file that `load_config` reads as the same ones."""
    return yaml.dump(to_dict(config), Dumper=_Dumper, sort_keys=False)


class _Loader(yaml.SafeLoader):
    """Reads scalars as text, and refuses a key that stands twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        lines: dict[str, int] = {}
        for key, _ in node.value:
            if key.tag == _MERGE:
                continue
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key must be text", key.start_mark)
            line = key.start_mark.line + 1
            if key.value in lines:
                problem = f"the key {short(key.value)} is there already, in line {lines[key.value]}"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            lines[key.value] = line
        return super().construct_mapping(node, deep)


def _scalar(loader: _Loader, node: yaml.ScalarNode) -> str:
    text = loader.construct_scalar(node)
    return Null(text) if node.tag == _NULL else Plain(text) if node.style is None else text


for _tag in ("null", "bool", "int", "float", "str", "timestamp", "value"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_tag}", _scalar)
for _tag in ("binary", "omap", "pairs", "set"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_tag}", yaml.SafeLoader.construct_undefined)


def parse(text: str, where: str) -> Any:
    """YAML as nested dictionaries and lists of text. `where` names it in errors. Raises `ConfigError`."""
    loader = None
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return Null()
        if _values(node, {}) > MOST_VALUES:
            raise ConfigError(f"{where} holds more than {MOST_VALUES:,} values")
        return loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        mark, problem = error.problem_mark or error.context_mark, error.problem or error.context
        line = f"line {mark.line + 1}: " if mark else ""
        raise ConfigError(f"{where} is not valid YAML: {line}{problem}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{where} is not valid YAML: {' '.join(str(error).split())}") from error
    except RecursionError as error:
        raise ConfigError(f"{where} is not valid YAML for settings: it is nested too deeply") from error
    finally:
        if loader is not None:
            loader.dispose()


def _values(node: yaml.Node, known: dict[int, float]) -> float:
    """The number of values below a node, aliases written out; infinite for one that holds itself."""
    if id(node) not in known:
        known[id(node)] = float("inf")
        pairs = node.value if isinstance(node, yaml.MappingNode) else []
        below = (
            [n for pair in pairs for n in pair] if pairs else node.value if isinstance(node, yaml.SequenceNode) else []
        )
        known[id(node)] = 1.0 + sum(_values(child, known) for child in below)
    return known[id(node)]
