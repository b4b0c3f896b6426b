"""How a step is laid out (processes, micro-batches, shared weights) changes none of its numbers."""

import json
import re
import sys
import time

import pytest
import torch
from accelerate import Accelerator
from conftest import REPO
from launched_step import step
from processes import TESTS, finish, free_port, start, write
from safetensors.torch import load_file

from rgrl.config import load_config
from rgrl.parts import set_up
from rgrl.step import Clock, rollout_step

sys.path.insert(0, str(REPO / "recipes"))
import bench

# Of what a step reports, what says how it was done and not what came out.
HOW = ("ranks", "calls", "held", "cut", "completions")


@pytest.fixture(scope="module")
def reviews(tmp_path_factory) -> dict:
    """The shipped models, whose rows end at different lengths, with everything that draws random numbers turned on."""
    folder = REPO / "recipes" / "reviews"
    return {
        "model": {"path": str(folder / "policy")},
        "lora": {"r": 4, "alpha": 8, "dropout": 0.2},
        "data": {
            "path": str(folder / "train.jsonl"),
            "eval_path": str(folder / "eval.jsonl"),
            "max_prompt_length": 24,
            "eval_prompts": 3,
        },
        "reward": {"path": str(folder / "reward")},
        "judge": {"path": str(folder / "judge")},
        "rollout": {"num_generations": 2, "max_completion_length": 12, "steps": 12, "position_temperature": 0.1},
        "objective": {"name": "grpo", "beta": 0.1, "prompt_mask": 0.3},
        "optim": {"learning_rate": 1e-3, "max_grad_norm": 1e6},
        "run": {"output_dir": str(tmp_path_factory.mktemp("run")), "prompts_per_device": 4},
    }


@pytest.fixture(scope="module")
def whole(reviews, tmp_path_factory) -> tuple[dict, dict]:
    """The step in one process and one piece: 4 prompts x 2 completions."""
    return step(load_config(write(reviews, tmp_path_factory.mktemp("whole") / "config.yaml")))


def changed(config: dict, **sections: dict) -> dict:
    return config | {name: config[name] | values for name, values in sections.items()}


def assert_same_step(left: dict, told: dict, whole: tuple[dict, dict], rows: slice = slice(None)) -> None:
    """Same tokens, and everything else to 1e-6; Adam makes more of it in the adapter."""
    expected, metrics = whole
    assert left.keys() == expected.keys()
    own = metrics["completions"][rows]
    assert told["completions"] == own
    length = expected["rollout canvas_BL"].shape[1] - left["rollout canvas_BL"].shape[1]
    for name, value in left.items():
        other = expected[name]
        if name in ("rollout canvas_BL", "rollout attention_BL"):  # padded to its longest prompt
            other = other[:, length:]
        if not name.startswith(("gradient", "adapter")):
            other = other[rows]
        atol = 1e-4 if name.startswith("adapter") else 2e-5 if "logp" in name else 1e-6
        torch.testing.assert_close(value, other, rtol=1e-5, atol=atol, msg=lambda text, name=name: f"{name}: {text}")
    numbers = {k: v for k, v in metrics.items() if k not in HOW}
    assert {k: v for k, v in told.items() if k not in HOW} == pytest.approx(numbers, rel=1e-5, abs=1e-6)


def test_the_step_itself_is_one_that_could_tell(whole):
    left, told = whole
    assert told["completions/min_length"] < told["completions/max_length"], "rows leave the loop at different steps"
    assert told["grad_norm"] > 0.1 and told["kl"] > 1e-4 and told["reward_std"] > 0.1
    assert (left["rollout attention_BL"][:, 0] != left["rollout attention_BL"][0, 0]).any(), "no padding"


@pytest.mark.parametrize(
    ("sections", "calls"),
    [
        ({"run": {"gradient_accumulation_steps": 8}}, 1),
        ({"rollout": {"micro_batch": 3}}, 3),
        ({"rollout": {"micro_batch": 1}, "run": {"gradient_accumulation_steps": 4}}, 8),
        ({"run": {"gradient_checkpointing": True}}, 1),
    ],
)
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable.*:FutureWarning")
def test_pieces_of_a_batch_make_the_step_of_the_whole(reviews, whole, tmp_path, sections, calls):
    left, told = step(load_config(write(changed(reviews, **sections), tmp_path / "config.yaml")))
    assert_same_step(left, told, whole)
    assert (calls - 1) * whole[1]["calls"] / 2 < told["calls"] <= calls * whole[1]["calls"]
    assert (told["calls"] == whole[1]["calls"]) == (calls == 1)


def test_what_is_kept_of_a_block_does_not_depend_on_the_rows_beside_it(reviews, tmp_path):
    rollouts = []
    for micro_batch in (0, 1, 3):
        sections = {"rollout": {"block_length": 6, "micro_batch": micro_batch}, "run": {"prompts_per_device": 12}}
        config = changed(reviews, **sections) | {"guidance": {"kind": "none"}}  # which makes much of the last digits
        parts = set_up(load_config(write(config, tmp_path / "config.yaml")), Accelerator())
        rollouts.append(vars(rollout_step(parts, 0, Clock()).rollout))
    whole, *others = rollouts
    last_B = torch.where(whole["completion_mask_BC"], whole["unmask_step_BC"], -1).amax(1)
    assert (last_B % 6 < 5).sum() >= 2, "no rows that end inside a block"
    for other in others:
        for name, value in whole.items():
            torch.testing.assert_close(other[name], value, rtol=1e-5, atol=1e-5, msg=lambda text, name=name: name)


def test_micro_batches_bound_the_memory_of_a_rollout(reviews, tmp_path):
    peaks = []
    for micro_batch in (0, 2):
        config = load_config(write(changed(reviews, rollout={"micro_batch": micro_batch}), tmp_path / "config.yaml"))
        parts = set_up(config, Accelerator())
        peaks.append(bench.peak_memory(lambda parts=parts: rollout_step(parts, 0, Clock()), torch.device("cpu")))
    assert peaks[1] < 0.4 * peaks[0], "8 rows against 2 at a time"


def launch(config: dict, folder, *launcher: str) -> list[tuple[dict, dict]]:
    finish(start(TESTS / "launched_step.py", write(config, folder / "config.yaml"), folder, launcher=launcher))
    ranks = [folder / f"rank_{rank}" for rank in range(len(list(folder.glob("rank_*.json"))))]
    return [
        (load_file(path.with_suffix(".safetensors")), json.loads(path.with_suffix(".json").read_text()))
        for path in ranks
    ]


@pytest.mark.parametrize("accumulation", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_two_processes_make_the_step_of_one(reviews, whole, tmp_path, accumulation):
    config = changed(reviews, run={"prompts_per_device": 2, "gradient_accumulation_steps": accumulation})
    ranks = launch(config, tmp_path, "--config_file", str(REPO / "launch" / "cpu.yaml"))
    assert [told["ranks"] for _, told in ranks] == [2, 2]
    for rank, (left, told) in enumerate(ranks):
        assert_same_step(left, told, whole, slice(4 * rank, 4 * rank + 4))
    for name, value in ranks[0][0].items():
        if name.startswith("adapter"):
            assert torch.equal(value, ranks[1][0][name]), f"the processes' adapters are apart in {name}"


# ---------------------------------------------------------------------------------------------------------- sharing


FSDP2 = ("--config_file", str(REPO / "launch" / "fsdp2.yaml"), "--num_processes", "2")


@pytest.mark.parametrize(
    "settings",
    [{}, pytest.param({"gradient_checkpointing": True, "gradient_accumulation_steps": 2}, marks=pytest.mark.slow)],
)
def test_shared_weights_make_the_step_of_whole_ones(reviews, tmp_path, settings):
    reviews = changed(reviews, rollout={"commit_above": 0.25})  # so that rollouts end at different steps
    whole = step(load_config(write(reviews, tmp_path / "whole.yaml")))
    last_B = torch.where(whole[0]["rollout completion_mask_BC"], whole[0]["rollout unmask_step_BC"], -1).amax(1)
    assert last_B[:4].max() != last_B[4:].max(), "one process has done before the other"
    ranks = launch(changed(reviews, run={"prompts_per_device": 2, **settings}), tmp_path, *FSDP2)
    for rank, (left, told) in enumerate(ranks):
        assert_same_step(left, told, whole, slice(4 * rank, 4 * rank + 4))
        assert told["held"] * 2 == told["cut"] > 1e6, "a process keeps one half of the layers"
    assert ranks[0][1]["calls"] == ranks[1][1]["calls"], "the processes must put the layers together equally often"


def test_processes_that_share_weights_may_read_the_policy_unequally_often(tiny, tmp_path):
    tiny["lora"]["dropout"] = 0.3
    config = write(tiny, tmp_path / "config.yaml")
    finish(start(TESTS / "launched_lockstep.py", config, tmp_path, processes=2))
    idle, busy = (json.loads((tmp_path / f"rank_{rank}.json").read_text()) for rank in range(2))
    assert idle["calls"] == busy["calls"] == 3, "whoever has nothing to read keeps step"
    assert idle["apart"] == idle["largest"] == 0 and busy["apart"] < 1e-6 < 1e-2 < busy["largest"]


@pytest.mark.slow
def test_a_process_that_waits_too_long_for_its_share_gives_up(tiny, tmp_path):
    config = write(tiny, tmp_path / "config.yaml")
    begun = time.monotonic()
    printed = finish(start(TESTS / "launched_lockstep.py", config, tmp_path, "sleep", processes=2), 1)
    assert "Timed out waiting 20000ms" in printed and time.monotonic() - begun < 120


@pytest.mark.slow
def test_an_evaluation_of_fewer_prompts_than_processes_ends(tiny, tmp_path):
    tiny["data"]["eval_prompts"] = 1
    config = write(tiny, tmp_path / "config.yaml")
    command = REPO / "recipes" / "evaluate.py"
    whole, shared = (
        json.loads(re.search(r"{.*?}", finish(start(command, "--config", config, launcher=launcher)), re.S)[0])
        for launcher in ((), FSDP2)
    )
    assert shared == pytest.approx(whole, abs=1e-6) and "eval/judge" in whole


@pytest.mark.slow
def test_sampling_in_several_processes_is_refused(tiny, tmp_path):
    config = write(tiny, tmp_path / "config.yaml")
    printed = finish(start(REPO / "recipes" / "sample.py", "--config", config, processes=2), 1)
    assert printed.count("error: sampling runs in one process, and 2 were started") == 1


@pytest.mark.slow
@pytest.mark.parametrize(("config", "processes"), [("multi_node", 2), ("fsdp2", 4)])
def test_two_machines_make_the_step_of_one(reviews, whole, tmp_path, config, processes):
    """Two launchers that know of each other only through an address, as on two machines."""
    settings = changed(reviews, run={"prompts_per_device": 4 // processes})
    path, port = write(settings, tmp_path / "config.yaml"), free_port()
    words = [
        "--config_file",
        str(REPO / "launch" / f"{config}.yaml"),
        "--num_machines",
        "2",
        "--main_process_ip",
        "127.0.0.1",
    ]
    words += ["--main_process_port", port, "--num_processes", str(processes)]
    machines = [
        start(TESTS / "launched_step.py", path, tmp_path, launcher=[*words, "--machine_rank", str(rank)])
        for rank in range(2)
    ]
    for machine in machines:
        finish(machine)
    share = 8 // processes
    for rank in range(processes):
        left = load_file(tmp_path / f"rank_{rank}.safetensors")
        told = json.loads((tmp_path / f"rank_{rank}.json").read_text())
        assert_same_step(left, told, whole, slice(share * rank, share * (rank + 1)))
        assert told["ranks"] == processes
        if config == "fsdp2":
            assert told["held"] * 2 == told["cut"] > 0, "machines exchange no weights: each holds all of them"
