"""Where a run begins: which code it is, and which adapter it starts from (`lora.path`)."""

import functools
import subprocess
from pathlib import Path

import rgrl
from rgrl.checkpoint.content import about
from rgrl.config import LoraConfig
from rgrl.hub import read_json
from rgrl.models import Policy
from rgrl.models.fingerprint import adapter_fingerprint, differing_parts


def start_fingerprint(config: LoraConfig) -> dict[str, str]:
    """What `about.json` says of the adapter that a run began with: its `path`, and SHA-256 of its content."""
    assert config.path is not None
    return {"path": config.path, "adapter": adapter_fingerprint(Path(config.path))}


def other_base(config: LoraConfig, policy: Policy) -> str | None:
    """A warning where the adapter seems to be another model's; None otherwise. Shapes alone do not tell.

    In a checkpoint of ours the model is known by its content, elsewhere by the name that peft notes. Raises
    `ConfigError`.
    """
    assert config.path is not None
    folder = Path(config.path)
    if (folder.parent / "about.json").is_file():
        before = about(folder.parent).get("model")
        if before is None or not (changed := differing_parts(before, policy.fingerprint)):
            return None
        what = f"its {' and '.join(changed)} differ"
    else:
        noted = read_json(folder / "adapter_config.json").get("base_model_name_or_path")
        if not noted or Path(noted).name == Path(policy.path).name:
            return None
        what = f"it names {noted}"
    return f"`lora.path` {folder} was trained on another model than `model.path` {policy.path} ({what})"


@functools.cache
def code_commit() -> str | None:
    """The git commit of this package's code, with `-dirty` where files differ from it; None where it is no clone."""
    root = Path(rgrl.__file__).parents[1]
    if not (root / ".git").exists():  # a clone of something else, further up, is not meant
        return None
    words = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
