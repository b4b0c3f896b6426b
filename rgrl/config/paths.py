"""Where the paths in the settings are, whatever the working folder becomes later."""

import os
import re
from pathlib import Path

from rgrl.config.kinds import read_path
from rgrl.config.schema import Config, to_dict
from rgrl.errors import ConfigError

_FOLDERS = ("run.output_dir", "run.resume_from_checkpoint", "lora.path", "reward.adapter")
_OR_HUB = ("model.path", "data.path", "data.eval_path", "reward.path", "judge.path", "guidance.path")
_VARIABLE = re.compile(r"\$(?:\{(\w+)\}|(\w+))", re.ASCII)


def expanded(text: str, what: str) -> str:
    """A path with `~` and environment variables written out. `what` names it in errors.

    Raises `ConfigError` for a variable or a user that is not there, and for what cannot be a path; but a file that is
    called so is meant as it is.
    """
    try:
        path = os.path.expanduser(read_path(text))
        lacking = [a or b for a, b in _VARIABLE.findall(path) if not os.environ.get(a or b)]
        if (lacking or path.startswith("~")) and os.path.lexists(path):
            return path
        if lacking:
            raise ConfigError(f"{what} {text}: the environment variable {lacking[0]} is not set")
        if path.startswith("~"):
            raise ConfigError(f"{what} {text}: there is no user {path.partition('/')[0]!r}")
        return read_path(os.path.expandvars(path))
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"{what} must be {error}, once `~` and variables are written out") from error


def absolute(text: str, what: str) -> str:
    """`expanded`, from the root on. Raises `ConfigError`."""
    path = expanded(text, what)
    try:
        return read_path(Path.cwd() / path)
    except FileNotFoundError as error:
        raise ConfigError(f"{what} {text}: the working folder, from which it leads on, has been removed") from error
    except ValueError as error:
        raise ConfigError(f"{what} {text} must be {error}, from the root on") from error


def _or_hub(text: str, what: str) -> str:
    """The same for what may be the id of something on the Hub, which stays."""
    path = expanded(text, what)
    try:
        local = path.startswith((".", "/")) or os.path.lexists(path)
    except OSError as error:
        raise ConfigError(f"{what} {text} cannot be read: {error.strerror}") from error
    return absolute(text, what) if local else path


def located(c: Config) -> Config:
    """The settings with every path absolute. Raises `ConfigError`."""
    tree = to_dict(c)
    for key in (*_FOLDERS, *_OR_HUB):
        section, _, name = key.partition(".")
        text = tree[section][name]
        if text and not (key == "run.resume_from_checkpoint" and text in ("latest", "auto")):
            tree[section][name] = (_or_hub if key in _OR_HUB else absolute)(text, f"`{key}`")
    return Config(**tree)
