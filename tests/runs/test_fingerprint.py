"""Fingerprints of models and data: what changes them, what does not, and that large weights are not read whole."""

import datetime
import json
import os
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from checkpoints import TOKENIZER, write_dream, write_llada
from safetensors.torch import load_file, save_file

from rgrl.data import fingerprint as of_data
from rgrl.errors import ConfigError
from rgrl.models.fingerprint import adapter_fingerprint, differing_parts, fingerprint
from rgrl.types import Prompts

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def parts(a: Path, b: Path) -> list[str]:
    return differing_parts(fingerprint(a), fingerprint(b))


def test_paths_times_order_and_other_files_do_not_count(tmp_path):
    here = write_dream(tmp_path / "here", shards=3)
    there = tmp_path / "hub" / "snapshots" / COMMIT
    there.mkdir(parents=True)
    for path in sorted(here.iterdir(), reverse=True):  # another order on the disk
        shutil.copyfile(path, there / path.name)  # another time
    for name in ("README.md", "LICENSE.txt", "generation_config.json", "modeling_dream.py", "training.log"):
        (there / name).write_text("not the model")
    assert parts(here, there) == []
    assert fingerprint(there)["commit"] == COMMIT and "commit" not in fingerprint(here)
    link = tmp_path / "link"
    link.symlink_to(there)
    assert fingerprint(link) == fingerprint(there)


def test_names_of_shards_do_not_count(tmp_path):
    here, there = write_dream(tmp_path / "here", shards=2), write_dream(tmp_path / "there", shards=2)
    index = there / "model.safetensors.index.json"
    for old, new in (("model-00001-of-00002", "z"), ("model-00002-of-00002", "a")):
        (there / f"{old}.safetensors").rename(there / f"{new}.safetensors")
        index.write_text(index.read_text().replace(old, new))
    assert parts(here, there) == []
    (there / "left_over.safetensors").write_bytes(b"not in the index")
    assert parts(here, there) == []


def test_every_tensor_is_looked_at(tmp_path):
    folder = write_llada(tmp_path / "model")
    path, before = folder / "model.safetensors", fingerprint(folder)
    weights = load_file(path)
    assert len(weights) > 20
    for name, tensor in weights.items():
        save_file(weights | {name: tensor + 0.01}, path)
        assert differing_parts(before, fingerprint(folder)) == ["weights"], name
    save_file(weights, path)
    assert fingerprint(folder) == before
    first = next(iter(weights))
    save_file({("other" if name == first else name): t for name, t in weights.items()}, path)
    assert differing_parts(before, fingerprint(folder)) == ["weights"]
    path.write_bytes(path.read_bytes() + b"\0")
    assert differing_parts(before, fingerprint(folder)) == ["weights"]
    path.write_bytes(b"\xff" * 100)
    with pytest.raises(ConfigError, match="not a readable safetensors file"):
        fingerprint(folder)


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("config.json", "config.json"),
        ("vocab.json", "tokenizer"),
        ("merges.txt", "tokenizer"),
        ("tokenizer_config.json", "tokenizer"),
        ("tokenizer.json", "tokenizer"),
        ("added_tokens.json", "tokenizer"),
        ("special_tokens_map.json", "tokenizer"),
        ("chat_template.jinja", "tokenizer"),
        ("tokenizer.model", "tokenizer"),
        ("additional_chat_templates/tool.jinja", "tokenizer"),
    ],
)
def test_what_decides_the_model_or_its_tokens_counts(tmp_path, dream_dir, name, part):
    folder = tmp_path / "model"
    shutil.copytree(dream_dir, folder)
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    with path.open("a") as handle:
        handle.write(" ")
    assert parts(dream_dir, folder) == [part]


def test_an_adapter_is_known_by_all_of_its_bytes(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_config.json").write_text("{}")
        (tmp_path / name / "adapter_model.safetensors").write_bytes(bytes(10_000))
    (tmp_path / "b" / "README.md").touch()
    assert adapter_fingerprint(tmp_path / "a") == adapter_fingerprint(tmp_path / "b")
    (tmp_path / "b" / "adapter_model.safetensors").write_bytes(bytes(5000) + b"1" + bytes(4999))
    assert adapter_fingerprint(tmp_path / "a") != adapter_fingerprint(tmp_path / "b")


def write_sparse(folder: Path, gigabytes: int, shards: int, tensors: int) -> Path:
    """A checkpoint of zeros that take no room on the disk."""
    folder.mkdir()
    for name in ("config.json", "vocab.json", "merges.txt"):
        shutil.copy(TOKENIZER / name, folder / name)
    size = (gigabytes << 30) // shards // tensors
    offsets = {f"t{i}": [i * size, (i + 1) * size] for i in range(tensors)}
    entries = {name: {"dtype": "BF16", "shape": [size // 2], "data_offsets": at} for name, at in offsets.items()}
    header = json.dumps(entries).encode()
    places = {f"t{i}.{shard}": f"model-{shard}.safetensors" for i in range(tensors) for shard in range(shards)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    for shard in range(shards):
        with (folder / f"model-{shard}.safetensors").open("wb") as handle:
            handle.write(len(header).to_bytes(8, "little") + header)
            handle.truncate(8 + len(header) + size * tensors)
    return folder


def test_16_gb_take_a_moment(tmp_path, monkeypatch):
    folder, read = write_sparse(tmp_path / "large", gigabytes=16, shards=4, tensors=100), []
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda *arguments: read.append(pread(*arguments)) or read[-1])
    start = time.perf_counter()
    before = fingerprint(folder)
    seconds = time.perf_counter() - start
    print(f"\n{len(read)} pieces, {sum(map(len, read)) / 1e6:.1f} MB, {seconds:.3f} s")
    assert sum(map(len, read)) < 16e6 and seconds < 10  # 0.02 s where nothing else runs
    # A stretch of 16 MiB inside a tensor that changes is seen, wherever it begins.
    path = folder / "model-2.safetensors"
    with path.open("r+b") as handle:
        handle.seek(path.stat().st_size // 2 + 12345)
        handle.write(b"\1" * (16 << 20))
    assert differing_parts(before, fingerprint(folder)) == ["weights"]


# ------------------------------------------------------------------------------------ data
def rows(*values: object) -> Prompts:
    return Prompts([f"p{i}" for i in range(len(values))], [{"prompt": f"p{i}", "x": v} for i, v in enumerate(values)])


def test_texts_and_other_columns_are_told_apart():
    one = of_data(rows(1, 2))
    assert one == of_data(rows(1, 2)) and one["prompts"].startswith("2 prompts (SHA-256 ")
    other = of_data(rows(1, 3))
    assert other["prompts"] == one["prompts"] and other["rows"] != one["rows"]
    swapped = of_data(rows(1, 2).take([1, 0]))
    assert swapped["prompts"] != one["prompts"]
    columns = Prompts(["p"], [{"prompt": "p", "a": 1, "b": 2}]), Prompts(["p"], [{"b": 2, "a": 1, "prompt": "p"}])
    assert of_data(columns[0]) == of_data(columns[1])


class Opaque:
    """Its `repr` is its address."""


UNLIKE = [
    (b"a", b"b"),
    (np.zeros(5000), np.eye(5000, 1)),
    (np.int64(1), np.int64(2)),
    (datetime.date(2024, 1, 1), datetime.date(2024, 1, 2)),
    (float("nan"), 0.0),
    ("\ud800", "\ud801"),
    ([{"role": "user", "content": "a"}], [{"role": "user", "content": "b"}]),
    (None, False),
]


@pytest.mark.parametrize(("value", "other"), UNLIKE)
def test_values_that_json_lacks(value, other):
    assert of_data(rows(value)) == of_data(rows(value)) != of_data(rows(other))
    assert of_data(rows(Opaque())) == of_data(rows(Opaque()))


class Odd:
    """Neither JSON nor text, in a script of the user's."""


RECORDED = {
    "prompts": "1 prompts (SHA-256 148de9c5a7a44d19)",
    "rows": "d08f18267acd196ab3e6dfe2e51b6e7772f064f3469a4a075a42c927c826a4eb",
}


def test_the_same_in_every_process(monkeypatch):
    """Compared with a process of another time: what hangs on addresses or the order of hashes would not be this."""
    monkeypatch.setattr(Odd, "__module__", "__main__")
    row = {"prompt": "p", "o": Odd(), "d": datetime.date(2024, 1, 1), "b": b"x", "s": "text", "set": {"a", "b", "c", 1}}
    assert of_data(Prompts(["p"], [row])) == RECORDED
