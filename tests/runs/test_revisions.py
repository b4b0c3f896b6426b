"""Checkpoints of the Hub by revision, from a cache as the Hub's client lays it out; no network."""

import json
import shutil

import datasets
import huggingface_hub.constants
import pytest
import torch
import yaml
from checkpoints import write_dream, write_reward
from training import adapter, changed, go, untimed

from rgrl.config import ConfigError, DataConfig, ModelConfig
from rgrl.data import load_data
from rgrl.hub import fetch_checkpoint
from rgrl.models import load_policy
from rgrl.rewards import load_classifier

OLD, NEW = "0123456789abcdef0123456789abcdef01234567", "89abcdef0123456789abcdef0123456789abcdef"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An offline cache. `add(name, commit, folder, *refs)` puts a checkpoint into it."""
    root = tmp_path / "hub"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(root))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)

    def add(name, commit, folder, *refs):
        repo = root / f"models--{name.replace('/', '--')}"
        shutil.copytree(folder, repo / "snapshots" / commit)
        for ref in refs:
            path = repo / "refs" / ref
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(commit)

    return add


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """`add(name, commit, rows, ref)`: a data set as `datasets` keeps it, and what the Hub's client remembers of it."""
    root, hub = tmp_path / "datasets", tmp_path / "hub"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(root))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)

    def add(name, commit, rows, ref=None):
        file = tmp_path / f"{commit}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        files = {"train": str(file), "test": str(file)}
        made = datasets.load_dataset_builder("json", data_files=files, cache_dir=tmp_path / f"made_{commit}")
        made.download_and_prepare()
        place = root / name.replace("/", "___") / "default" / "0.0.0" / commit
        shutil.copytree(made.cache_dir, place)
        about = json.loads((place / "dataset_info.json").read_text())
        (place / "dataset_info.json").write_text(json.dumps(about | {"config_name": "default"}))
        for arrow in place.glob("json-*.arrow"):
            arrow.rename(place / arrow.name.replace("json", name.partition("/")[2], 1))
        if ref is not None:
            repo = hub / f"datasets--{name.replace('/', '--')}"
            (repo / "refs").mkdir(parents=True, exist_ok=True)
            (repo / "refs" / ref).write_text(commit)
            (repo / "snapshots" / commit).mkdir(parents=True)
            (repo / "snapshots" / commit / "README.md").write_text("---\n---\n")

    return add


@pytest.fixture
def models(cache, tmp_path):
    cache("org/policy", OLD, write_dream(tmp_path / "old", seed=1), "v1.0")
    cache("org/policy", NEW, write_dream(tmp_path / "new", seed=2), "main", "pr/2")
    cache("org/reward", OLD, write_reward(tmp_path / "reward"), "main")
    cache("org/judge", NEW, write_reward(tmp_path / "judge", seed=5), "release/a")


def test_a_branch_a_tag_and_a_commit(models):
    heads = {}
    for revision, commit in ((None, NEW), ("main", NEW), ("pr/2", NEW), ("v1.0", OLD), (OLD, OLD), (NEW, NEW)):
        policy = load_policy(ModelConfig(path="org/policy", revision=revision))
        assert policy.fingerprint["commit"] == commit
        heads.setdefault(commit, policy.causal_lm.lm_head.weight)
        assert torch.equal(policy.causal_lm.lm_head.weight, heads[commit])
    assert not torch.equal(heads[OLD], heads[NEW])
    assert load_classifier("org/judge", revision="release/a").fingerprint["commit"] == NEW


def test_what_cannot_be_pinned_is_one_line(models, tmp_path):
    for revision in ("v9", "f" * 40):
        with pytest.raises(ConfigError, match=f"model.path org/policy: neither .* at revision {revision} "):
            load_policy(ModelConfig(path="org/policy", revision=revision))
    with pytest.raises(ConfigError, match=r"reward model org/judge: neither a folder nor found on the Hub \("):
        load_classifier("org/judge")  # it has no main
    folder = tmp_path / "old"
    with pytest.raises(ConfigError, match=r"old is a folder, .* \(v1.0\): set the revision to null"):
        load_policy(ModelConfig(path=str(folder), revision="v1.0"))
    assert fetch_checkpoint(str(folder), "x") == folder


def test_data_are_of_the_revision_asked_for_or_refused(cache, kept):
    """Without the Hub, `datasets` takes the newest that it has kept, whatever the revision."""
    kept("org/data", OLD, [{"prompt": "old"}], "v1.0")
    only, _ = load_data(DataConfig(path="org/data", revision="v1.0"))
    assert (only.texts, only.data.commit) == (["old"], OLD)
    kept("org/data", NEW, [{"prompt": "new"}], "main")
    for revision in (None, "main", NEW):
        training, evaluation = load_data(DataConfig(path="org/data", revision=revision, eval_split="test"))
        assert (training.texts, evaluation.texts) == (["new"], ["new"])
        assert training.data.commit == evaluation.data.commit == NEW
    for revision in ("v1.0", OLD, "v2"):
        with pytest.raises(ConfigError, match=f"cannot be reached for revision {revision}, .* is commit {NEW}"):
            load_data(DataConfig(path="org/data", revision=revision))


def test_every_model_of_a_run_is_pinned_as_it_was_loaded(models, cache, kept, tiny, tmp_path):
    """What a run wrote loads the same models and data later, when the branches and the tag are other commits."""
    kept("org/data", OLD, [{"prompt": f"the plot of film {i}"} for i in range(4)])
    kept("org/held_out", NEW, [{"prompt": "the plot of a film"}])
    data = {"path": "org/data", "eval_path": "org/held_out"}
    config = changed(
        tiny,
        data=data,
        model={"path": "org/policy", "revision": "v1.0"},
        reward={"path": "org/reward"},
        judge={"path": "org/judge", "revision": "release/a"},
        guidance={"path": "org/judge", "revision": "release/a"},
    )
    run = go(config, tmp_path, output_dir="run", steps=1)
    written = yaml.safe_load((run / "config.yaml").read_text())
    commits = {"model": OLD, "reward": OLD, "judge": NEW, "guidance": NEW}
    assert {name: written[name]["revision"] for name in commits} == commits
    assert (written["data"]["revision"], written["data"]["eval_revision"]) == (OLD, NEW)
    assert yaml.safe_load((run / "checkpoints" / "step_000001" / "config.yaml").read_text()) == written
    cache("org/policy", "a" * 40, write_dream(tmp_path / "other", seed=9), "v1.0")
    for name in ("org/reward", "org/judge"):
        cache(name, "a" * 40, write_reward(tmp_path / name.replace("/", "_"), seed=9), "main", "release/a")
    again = go(written, tmp_path, output_dir="again", steps=1)
    assert adapter(run, 1) == adapter(again, 1) and untimed(run) == untimed(again)
    other = go(config, tmp_path, output_dir="other_run", steps=1)
    assert untimed(run)[0].keys() == untimed(other)[0].keys() and untimed(run) != untimed(other)
    for section in ("reward", "judge"):
        with pytest.raises(ConfigError, match="is a folder"):
            go(
                changed(config, **{section: {"path": str(tmp_path / "reward"), "revision": "x"}}),
                tmp_path,
                output_dir="never",
            )
    assert not (tmp_path / "never").exists()


def test_a_snapshot_named_by_its_folder_stays_a_folder(models, tiny, tmp_path):
    """Its commit is known, but a revision beside a folder would be refused when the run is resumed."""
    path = tmp_path / "hub" / "models--org--policy" / "snapshots" / OLD
    run = go(changed(tiny, model={"path": str(path)}), tmp_path, steps=1, eval_steps=0)
    written = yaml.safe_load((run / "config.yaml").read_text())
    assert written["model"]["revision"] is None
    assert load_policy(ModelConfig(**written["model"])).fingerprint["commit"] == OLD
