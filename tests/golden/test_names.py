"""What users rely on by name: the resolved settings of every recipe and preset, metrics, columns, the schema.

names.json holds them as they were recorded. Settings are those that differ from the defaults, and the defaults.

After a change that is meant to change them, record them again and say so in the commit: `make golden`.
"""

import json
import os
from pathlib import Path

from checkpoints import REPO

from rgrl.config import Config, as_yaml, load_config, presets
from rgrl.config.schema import to_dict
from rgrl.metrics import METRICS
from rgrl.tracking.columns import OURS

NAMES = Path(__file__).with_name("names.json")


def flat(tree: dict, at: str = "") -> dict:
    """Settings by dotted name."""
    found = {}
    for key, value in tree.items():
        found |= flat(value, f"{at}{key}.") if isinstance(value, dict) and value else {at + key: value}
    return found


def changed(config: Config) -> dict:
    """The settings that differ from the defaults."""
    defaults = flat(to_dict(Config()))
    return {key: value for key, value in flat(to_dict(config)).items() if key not in defaults or defaults[key] != value}


def test_names_are_as_recorded(tmp_path):
    recipes = sorted((REPO / "recipes").glob("*/*.yaml"))
    found = {"defaults": flat(to_dict(Config()))}
    found |= {str(path.relative_to(REPO)): changed(load_config(path)) for path in recipes}
    for name in presets.names():
        path = tmp_path / f"{name}.yaml"
        path.write_text(f"extends: {name}\nmodel: {{path: m}}\nrun: {{output_dir: r}}\nreward: {{path: w}}\n")
        found[f"preset {name}"] = changed(load_config(path))
        (tmp_path / "again.yaml").write_text(as_yaml(load_config(path)))
        assert load_config(tmp_path / "again.yaml") == load_config(path)
    now = json.loads(json.dumps({"settings": found, "metrics": sorted(METRICS), "columns": sorted(OURS)}))
    if os.environ.get("RGRL_WRITE_GOLDEN"):
        NAMES.write_text(json.dumps(now, indent=1, sort_keys=True) + "\n")
    recorded = json.loads(NAMES.read_text())
    assert recorded["settings"].keys() == now["settings"].keys()
    for name, settings in recorded["settings"].items():
        assert now["settings"][name] == settings, name
    assert now == recorded
