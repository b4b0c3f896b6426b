"""A run that was killed and resumed is the run that was not: the same bytes, the same metrics, the same tables."""

import json
import shutil
import signal
import time

import pytest
import torch
from conftest import TINY_DREAM, TINY_LLADA
from peft import PeftModel
from processes import TRAIN, adapter, finish, saved, start, tables, untimed, write
from safetensors.torch import load_file

from rgrl.checkpoint import load_adapter
from rgrl.config import load_config
from rgrl.models import add_lora, load_policy
from rgrl.models.families import FAMILIES
from rgrl.tracking import read_metrics
from rgrl.trainer import train

VARIANTS = {
    "everything": {
        "lora": {"dropout": 0.2},
        "objective": {"name": "grpo", "beta": 0.05, "iterations": 3},
        "optim": {"schedule": "linear", "warmup_steps": 4, "weight_decay": 0.1},
        "run": {"gradient_accumulation_steps": 2},
    },
    "reinforce": {},
    "dropout": {"lora": {"dropout": 0.2}},
    "grpo": {"objective": {"name": "grpo", "beta": 0.05, "iterations": 3}},
}


@pytest.mark.parametrize(
    "variant", [name if name == "everything" else pytest.param(name, marks=pytest.mark.slow) for name in VARIANTS]
)
def test_killed_in_step_7_and_resumed_is_the_uninterrupted_run(tiny, tmp_path, variant):
    for section, changes in VARIANTS[variant].items():
        tiny[section] |= changes
    tiny["reward"]["functions"] = {"processes:die_at_call": 0.5}
    tiny["run"] |= {"steps": 10, "save_steps": 3, "eval_steps": 5}
    config = write(tiny, tmp_path / "config.yaml")
    whole, broken = tmp_path / "whole", tmp_path / "broken"

    undisturbed = start(TRAIN, "--config", config, "--run.output_dir", whole)
    # One call a step, and two for each of the evaluations at steps 0 and 5 (guided too): the eleventh is in step 7.
    killed = start(TRAIN, "--config", config, "--run.output_dir", broken, DIE_AT="0:11")
    finish(killed, -signal.SIGKILL)
    finish(undisturbed)
    assert [line["step"] for line in untimed(broken)] == list(range(7))
    assert saved(broken) == ["step_000003", "step_000006"]
    finish(start(TRAIN, "--config", config, "--run.output_dir", broken, "--run.resume_from_checkpoint", "latest"))

    assert adapter(broken, 10) == adapter(whole, 10)
    assert adapter(whole, 10) != adapter(whole, 9)
    assert untimed(broken) == untimed(whole)
    assert [line["step"] for line in untimed(whole)] == list(range(11))
    assert tables(broken) == tables(whole)


@pytest.mark.slow
def test_killed_while_saving_again_and_again(tiny, tmp_path):
    tiny["run"] |= {"steps": 6, "save_steps": 1, "eval_steps": 0, "keep_checkpoints": 1}
    config = write(tiny, tmp_path / "config.yaml")
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    finish(start(TRAIN, "--config", config, "--run.output_dir", whole))
    words = ["--config", config, "--run.output_dir", broken]
    cut_short = 0
    for step, delay in ((2, 0.0), (3, 0.02), (4, 0.05)):
        process = start(TRAIN, *words)
        partial = broken / "checkpoints" / f".partial_{step:06d}"
        while process.poll() is None and not partial.exists():
            time.sleep(0.0005)
        time.sleep(delay)
        process.kill()
        finish(process, -signal.SIGKILL)
        cut_short += partial.exists()
        words[4:] = ["--run.resume_from_checkpoint", "latest"]
    assert cut_short, "no kill came in the middle of a save"
    finish(start(TRAIN, *words))
    assert adapter(broken, 6) == adapter(whole, 6)
    assert untimed(broken) == untimed(whole)
    assert saved(broken) == ["step_000006"]


def go(config: dict, folder, **run) -> None:
    """Train in this process, with some settings of `run` changed."""
    train(load_config(write(config | {"run": config["run"] | run}, folder / "config.yaml")))


def test_only_the_newest_checkpoints_are_kept(tiny, tmp_path):
    tiny["run"]["eval_steps"] = 0
    go(tiny, tmp_path, steps=5, save_steps=1, keep_checkpoints=2)
    assert saved(tmp_path / "run") == ["step_000004", "step_000005"]
    go(tiny, tmp_path, steps=7, save_steps=1, keep_checkpoints=3, resume_from_checkpoint="latest")
    assert saved(tmp_path / "run") == ["step_000005", "step_000006", "step_000007"]


def test_what_a_crash_leaves_behind_is_not_resumed_from(tiny, tmp_path):
    whole, output = tmp_path / "whole", tmp_path / "run"
    go(tiny, tmp_path, steps=3, output_dir=str(whole))
    go(tiny, tmp_path, steps=2)
    partial = output / "checkpoints" / ".partial_000003"
    shutil.copytree(output / "checkpoints" / "step_000002", partial)
    (partial / "state.pt").write_bytes(b"cut")
    (partial / "left.over").touch()
    with (output / "metrics.jsonl").open("a") as handle:
        handle.write('{"step": 3, "reward": 0.5}\n{"step": 4, "rew')
    go(tiny, tmp_path, steps=3, resume_from_checkpoint="latest")
    assert saved(output) == ["step_000002", "step_000003"]
    assert not (output / "checkpoints" / "step_000003" / "left.over").exists()
    assert adapter(output, 3) == adapter(whole, 3)
    assert untimed(output) == untimed(whole)


def test_going_back_to_an_older_checkpoint_keeps_what_follows_from_it(tiny, tmp_path):
    output, backup = tmp_path / "run", tmp_path / "backup"
    go(tiny, tmp_path, steps=1)
    shutil.copytree(output / "checkpoints" / "step_000001", backup)
    go(tiny, tmp_path, steps=4, resume_from_checkpoint="latest")
    before = adapter(output, 4)
    tiny["objective"]["beta"] = 1.0
    go(tiny, tmp_path, steps=2, resume_from_checkpoint=str(backup))
    assert saved(output) == ["step_000002"], "the steps after it belong to the run that was given up"
    go(tiny, tmp_path, steps=4, resume_from_checkpoint="latest")
    assert [line["step"] for line in untimed(output)] == list(range(5))
    assert adapter(output, 4) != before


def test_what_a_run_watches_does_not_change_what_it_learns(tiny, tmp_path):
    go(tiny, tmp_path, steps=4, output_dir=str(tmp_path / "whole"))
    go(tiny, tmp_path, steps=2)
    tiny["tracking"]["completions_steps"] = 0
    del tiny["judge"]
    go(tiny, tmp_path, steps=4, eval_steps=0, save_steps=0, keep_checkpoints=5, resume_from_checkpoint="latest")
    assert adapter(tmp_path / "run", 4) == adapter(tmp_path / "whole", 4)
    assert saved(tmp_path / "run") == ["step_000001", "step_000002", "step_000004"]


def test_resumed_run_follows_its_own_learning_rate(tiny, tmp_path):
    tiny["run"]["eval_steps"] = 0
    go(tiny, tmp_path, steps=1)
    tiny["optim"] |= {"learning_rate": 4e-3, "schedule": "linear", "weight_decay": 0.5}
    go(tiny, tmp_path, steps=4, resume_from_checkpoint="latest")
    rates = [line["learning_rate"] for line in read_metrics(tmp_path / "run" / "metrics.jsonl")]
    assert rates == pytest.approx([1e-3, 3e-3, 2e-3, 1e-3])
    state = torch.load(tmp_path / "run" / "checkpoints" / "step_000004" / "state.pt")
    assert state["optimizer"]["param_groups"][0]["weight_decay"] == 0.5


@pytest.mark.parametrize("name", ["dream", "llada"])
def test_adapter_loads_in_plain_peft(tiny, tmp_path, name, request):
    folder = request.getfixturevalue(f"{name}_dir")
    tiny["model"]["path"] = str(folder)
    tiny["optim"]["learning_rate"] = 0.02
    go(tiny, tmp_path, eval_steps=0)
    path = tmp_path / "run" / "checkpoints" / "step_000002"
    assert json.loads((path / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(folder)

    # The base in transformers' own class: only the names and the settings need translating.
    family = FAMILIES[name]
    made = family.make_config({"dream": TINY_DREAM, "llada": TINY_LLADA}[name])
    made.is_causal = False
    base = family.model_class(made).eval()
    base.load_state_dict({family.rename(k): v for k, v in load_file(folder / "model.safetensors").items()})
    ids_BL = torch.randint(0, 4000, (3, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        untrained_BLV = base(input_ids=ids_BL).logits
        plain_BLV = PeftModel.from_pretrained(base, path / "adapter").eval()(input_ids=ids_BL).logits

    config = load_config(tmp_path / "config.yaml")
    policy = add_lora(load_policy(config.model), config.lora, seed=9).eval()
    load_adapter(path, policy)
    with torch.no_grad():
        ours_BLV = policy.logits(ids_BL, torch.ones_like(ids_BL, dtype=torch.bool))
    if name == "dream":  # whose state at l-1 scores token l
        plain_BLV, untrained_BLV, ours_BLV = plain_BLV[:, :-1], untrained_BLV[:, :-1], ours_BLV[:, 1:]
    usable = torch.arange(policy.vocab_size) != policy.mask_id
    plain_BLV, untrained_BLV = (x[..., : policy.vocab_size][..., usable] for x in (plain_BLV, untrained_BLV))
    torch.testing.assert_close(plain_BLV, ours_BLV[..., usable], rtol=1e-5, atol=1e-5)
    assert (plain_BLV - untrained_BLV).abs().max() > 1e-2
