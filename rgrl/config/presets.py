"""Settings that come with the package, by name: data sets and tasks that a file of settings can name in `extends`."""

import difflib
from pathlib import Path

from rgrl.config.explain import short
from rgrl.errors import ConfigError

FOLDER = Path(__file__).parents[1] / "presets"


def names() -> list[str]:
    """Every preset."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def is_name(text: str) -> bool:
    """Whether an entry of `extends` means a preset, and not a file: no slash, no `.yaml`, no `~`, no variable."""
    return not (
        "/" in text or "$" in text or text.startswith((".", "~")) or Path(text).suffix.lower() in (".yaml", ".yml")
    )


def find(name: str) -> Path:
    """The file of a preset. Raises `ConfigError` for a name that is none, with the nearest one."""
    if name in names():
        return FOLDER / f"{name}.yaml"
    near = difflib.get_close_matches(name.lower().replace("-", "_"), names(), n=1, cutoff=0.5)
    raise ConfigError(
        f"there is no preset {short(name)}; "
        + (f"did you mean {near[0]}?" if near else f"there are {', '.join(names())}")
    )


def about(name: str) -> str:
    """The first sentence of a preset's comment. Raises `ConfigError`."""
    lines = find(name).read_text(encoding="utf-8").splitlines()
    comment = " ".join(line.removeprefix("#").strip() for line in lines if line.startswith("#"))
    return comment.partition(". ")[0].rstrip(".")
