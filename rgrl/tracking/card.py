"""The model card of what a run has trained: where it comes from, how it was made, and how it did."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from rgrl.config import Config, to_dict

# What a setting holds a path in. A card is published, so only the last name of a local one is shown.
_PATHS = {"path", "eval_path", "adapter"}
_LEFT_OUT = {"tracking", "run.output_dir", "run.resume_from_checkpoint", "run.timeout_minutes", "run.max_hours"}
_LEFT_OUT |= {"run.save_steps", "run.keep_checkpoints", "run.on_write_error", "run.empty_cache"}
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


@dataclass(frozen=True)
class Facts:
    """What a card is written from."""

    config: dict[str, Any]  # the run's settings
    about: dict[str, Any]  # the checkpoint's about.json
    step: int
    table: str | None  # the report's, up to this step; None where the run's metrics are not there
    merged: bool  # a whole model, and not an adapter


def public_name(path: str) -> str:
    """A path as the public may see it: the id of what came from the Hub, else its last name."""
    cached = re.search(r"(?:models|datasets)--([\w.-]+?)--([\w.-]+)/snapshots/", path)
    if cached:
        return f"{cached[1]}/{cached[2]}"
    if _HUB_ID.fullmatch(path) and not Path(path).exists():
        return path
    return Path(path).name or "local"


def card(facts: Facts) -> str:
    """The card, as README.md of a folder that can be uploaded to the Hub."""
    base = public_name(facts.config["model"]["path"])
    front = {
        "base_model": base,
        "base_model_relation": "finetune" if facts.merged else "adapter",
        "library_name": "transformers" if facts.merged else "peft",
        "pipeline_tag": "text-generation",
        "tags": ["rgrl", "diffusion-language-model", "reinforcement-learning", *([] if facts.merged else ["lora"])],
    }
    what = "These are all of its weights, with the adapter merged in" if facts.merged else "This is its adapter"
    steps = facts.config["run"]["steps"]
    parts = [
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---",
        f"# {base}, post-trained with rewards",
        f"A masked diffusion language model, post-trained by reinforcement learning with `rgrl`. {what}, after step "
        f"{facts.step} of {steps}.",
        _table(_origins(facts)),
        f"## Results\n\n{_fenced(facts.table) if facts.table else 'The metrics of the run are not known.'}",
        f"## Settings\n\nThose that differ from the defaults of rgrl {facts.about['versions']['rgrl']}:\n\n"
        + _fenced(yaml.safe_dump(settings(facts.config), sort_keys=False), "yaml"),
        f"## Loading it\n\n{_fenced(_loading(base, facts.merged), 'python')}",
    ]
    return "\n\n".join(parts) + "\n"


def settings(config: dict[str, Any]) -> dict[str, Any]:
    """The settings that differ from the defaults, section by section, with nothing private in their paths."""
    found: dict[str, Any] = {}
    defaults = to_dict(Config())
    for section, values in config.items():
        for name, value in values.items():
            if value == defaults.get(section, {}).get(name) or _LEFT_OUT & {section, f"{section}.{name}"}:
                continue
            found.setdefault(section, {})[name] = _public(name, value)
    return found


def _public(name: str, value: Any) -> Any:
    """A setting with nothing private in the paths that it holds."""
    if isinstance(value, dict):
        return {key: _public(key, each) for key, each in value.items()}
    if isinstance(value, list):
        return [_public("", each) for each in value]
    path = isinstance(value, str) and (name in _PATHS or value.startswith(("/", "~", ".")))
    return public_name(value) if path else value


def _origins(facts: Facts) -> dict[str, str]:
    """What the model was made from, by name."""
    config, about = facts.config, facts.about
    rows = {"base": _model(config["model"]["path"], about.get("model"))}
    if "start" in about:
        rows["started from the adapter"] = _code(public_name(about["start"]["path"]))
    data = config["data"]
    rows["training data"] = f"{_data(data, data['path'])}, {about['prompts']}"
    if data.get("eval_path"):
        rows["held-out data"] = _data(data, data["eval_path"], "eval_")
    elif data.get("eval_split"):
        rows["held-out data"] = f"{_data(data, data['path'])}, split {_code(data['eval_split'])}"
    elif data.get("eval_fraction"):
        rows["held-out data"] = f"{data['eval_fraction']:g} of these rows, by the hash of the prompt"
    rows["rewards"] = "; ".join(_rewards(config["reward"], about)) or "none"
    if config["guidance"]["kind"] != "none":
        guide = config["guidance"].get("path") or config["reward"]["path"]
        rows["guidance"] = f"{config['guidance']['kind']} by {_model(guide, about.get('guide'))}"
    if config["judge"].get("path"):
        rows["judge, never trained against"] = _model(config["judge"]["path"], about.get("judge"))
    libraries = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    commit = f"commit {_code(about['commit'])}" if about.get("commit") else "commit not known"
    return rows | {"code": f"{libraries}; {commit}"}


def _rewards(reward: dict[str, Any], about: dict[str, Any]) -> list[str]:
    terms = []
    if reward.get("path"):
        adapter = f" with the adapter {_code(public_name(reward['adapter']))}" if reward.get("adapter") else ""
        terms.append(f"{_model(reward['path'], about.get('reward'))}{adapter}, weight {reward['weight']:g}")
    for name, part in reward["functions"].items():
        weight = part["weight"] if isinstance(part, dict) else part
        terms.append(f"{_code(name)}, weight {weight:g}")
    return terms


def _model(path: str, found: dict[str, str] | None) -> str:
    """A model by its name and, as far as it is known, its commit of the Hub or the hash of its weights."""
    if found and found.get("commit"):
        return f"{_code(public_name(path))} at commit {_code(found['commit'])}"
    known = f" (fingerprint of its weights: {found['weights'][:16]})" if found and found.get("weights") else ""
    return _code(public_name(path)) + known


def _loading(base: str, merged: bool) -> str:
    own = '"my-org/name"  # the id of this repository, or its folder'
    if merged:
        return (
            f"from transformers import AutoModel\n\nname = {own}\n"
            "model = AutoModel.from_pretrained(name, trust_remote_code=True)  # the code of the base's authors"
        )
    return (
        f"from peft import PeftModel\nfrom transformers import AutoModel\n\nname = {own}\n"
        f'base = AutoModel.from_pretrained("{base}", trust_remote_code=True)  # the code of its authors\n'
        "model = PeftModel.from_pretrained(base, name)"
    )


def _data(data: dict[str, Any], path: str, which: str = "") -> str:
    """A data set by its public name, its configuration and its revision."""
    if not path:
        return f"puzzles: {_code(data['generate'])}, seed {data['generate_seed']}"
    subset, revision = data.get(f"{which}subset"), data.get(f"{which}revision")
    told = [_code(public_name(path))]
    told += [f"{name} {_code(value)}" for name, value in (("subset", subset), ("revision", revision)) if value]
    return ", ".join(told)


def _table(rows: dict[str, str]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {text} |" for name, text in rows.items())])


def _code(text: str) -> str:
    """Text as it is, within a line of a table."""
    return f"`{' '.join(text.split()).replace('`', chr(39)).replace('|', chr(92) + '|')}`"


def _fenced(text: str, language: str = "") -> str:
    """A block of text as it is, whatever backticks it holds."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"
