"""How a step is divided (processes, micro-batches, shared weights) changes none of its numbers."""

import json
import re

import bench
import pytest
import torch
from accelerate import Accelerator
from checkpoints import REPO, shortened
from launched_step import step
from processes import FSDP2, HELPERS, finish, free_port, launch_file, left_by, start
from training import changed, resolved, write

from rgrl.metrics import Clock
from rgrl.setup import set_up
from rgrl.step import rollout_step

# What a step reports about how it was done, not about its results.
HOW = ("ranks", "calls", "held", "split", "completions")


@pytest.fixture(scope="module")
def reviews(tmp_path_factory) -> dict:
    """The shipped models, whose rows end at different lengths, with everything that draws random numbers turned on.

    Of their layers the first and the last: how a step is divided does not hang on their number, its time does.
    """
    folder = REPO / "recipes" / "reviews"
    models = {name: shortened(folder / name, tmp_path_factory.mktemp(name)) for name in ("policy", "reward", "judge")}
    data = {"path": str(folder / "train.jsonl"), "eval_path": str(folder / "eval.jsonl")}
    return {
        "model": {"path": str(models["policy"])},
        "lora": {"r": 4, "alpha": 8, "dropout": 0.2},
        "data": data | {"max_prompt_length": 24, "eval_prompts": 3},
        "reward": {"path": str(models["reward"])},
        "judge": {"path": str(models["judge"])},
        "rollout": {"num_generations": 2, "max_completion_length": 12, "steps": 8, "position_temperature": 0.1},
        "objective": {"name": "grpo", "beta": 0.1, "kl": "full", "prompt_mask": 0.3},
        "gradient": {"weight": 0.5, "kl": 0.4, "states": "late"},
        "optim": {"learning_rate": 1e-3, "max_grad_norm": 1e6, "updates": 2},
        "run": {"output_dir": str(tmp_path_factory.mktemp("run")), "prompts_per_device": 4},
    }


@pytest.fixture(scope="module")
def whole(reviews, tmp_path_factory) -> tuple[dict, dict]:
    """The step in one process and one piece: 4 prompts x 2 completions, 2 updates."""
    return step(resolved(reviews, tmp_path_factory.mktemp("whole")))


def assert_same_step(left: dict, told: dict, whole: tuple[dict, dict], rows: slice = slice(None)) -> None:
    """Same tokens, and everything else to 1e-6 until Adam's first step, which divides gradients by their own size."""
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
        atol = {"adapter": 1e-4, "gradient 1": 1e-5}.get(re.match(r"gradient \d|\w+", name)[0], 1e-6)
        atol = 2e-5 if "logp" in name else atol
        torch.testing.assert_close(value, other, rtol=1e-5, atol=atol, msg=lambda text, name=name: f"{name}: {text}")
    numbers = {k: v for k, v in metrics.items() if k not in HOW}
    told = {k: v for k, v in told.items() if k not in HOW}
    # The mean over both updates: it hangs on the adapter after Adam's first step.
    assert told.pop("loss") == pytest.approx(numbers.pop("loss"), rel=1e-5, abs=1e-5)
    assert told == pytest.approx(numbers, rel=1e-5, abs=1e-6)


def test_the_step_itself_is_one_that_could_tell(whole):
    left, told = whole
    assert told["completions/min_length"] < told["completions/max_length"], "rows leave the loop at different steps"
    lengths_B = left["rollout completion_mask_BC"].sum(1)
    assert lengths_B[:4].sum() != lengths_B[4:].sum(), "a mean of the ranks' means would be right"
    assert told["grad_norm"] > 0.1 and told["kl"] > 1e-4 and told["reward_std"] > 0.1
    assert (left["rollout attention_BL"][:, 0] != left["rollout attention_BL"][0, 0]).any(), "no padding"
    # The reference, and two updates, the first of which also gives the old log-probabilities; for the reward's gradient
    # reference and policy at each update.
    assert told["calls"]["update"] == 3 + 4 and told["gradient/kl"] > 0
    assert sum(name.startswith("gradient 1") for name in left) > 10


@pytest.mark.parametrize(
    ("sections", "rollouts", "updates"),
    [
        pytest.param({"run": {"gradient_accumulation_steps": 8}}, 1, 56, marks=pytest.mark.slow),
        pytest.param(
            {"rollout": {"micro_batch": 3}, "run": {"gradient_accumulation_steps": 4}}, 3, 28, marks=pytest.mark.slow
        ),
        # The activations of both updates are computed again, of both terms.
        ({"rollout": {"micro_batch": 1}, "run": {"gradient_checkpointing": True}}, 8, 11),
    ],
)
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable.*:FutureWarning")
def test_pieces_of_a_batch_make_the_step_of_the_whole(reviews, whole, tmp_path, sections, rollouts, updates):
    left, told = step(resolved(changed(reviews, **sections), tmp_path))
    assert_same_step(left, told, whole)
    calls, once = told["calls"]["rollout"], whole[1]["calls"]["rollout"]
    assert (rollouts - 1) * once / 2 < calls <= rollouts * once and (calls == once) == (rollouts == 1)
    assert told["calls"]["update"] == updates


@pytest.mark.parametrize(
    "sections",
    [
        pytest.param({"objective": {"name": "likelihood"}, "gradient": {"weight": 0.0}}, marks=pytest.mark.slow),
        pytest.param(
            {
                "objective": {"name": "tilt_matching", "advantage": "tilted"},
                "gradient": {"blend": "aps"},
            },
            marks=pytest.mark.slow,
        ),
        # The reward's gradient alone, of two states a row, in blocks.
        {
            "objective": {"weight": 0.0},
            "gradient": {"draws": 2, "places": "block"},
            "rollout": {"block_length": 6, "steps": 12},
            "guidance": {"kind": "none"},
        },
    ],
)
def test_accumulation_changes_no_number_of_others(reviews, tmp_path, sections):
    settings = changed(changed(reviews, **sections), run={"eval_steps": 0})
    whole = step(resolved(settings, tmp_path))
    left, told = step(resolved(changed(settings, run={"gradient_accumulation_steps": 4}), tmp_path))
    assert_same_step(left, told, whole)
    assert told["calls"]["update"] == 4 * whole[1]["calls"]["update"]


@pytest.mark.parametrize("block_cache", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_blocks_do_not_depend_on_the_rows_beside_them(reviews, tmp_path, block_cache):
    # The whole policy, as texts of one with fewer layers seldom end.
    reviews = changed(reviews, model={"path": str(REPO / "recipes" / "reviews" / "policy")})
    rollouts, rows = [], {"prompts_per_device": 8, "eval_steps": 0}
    for micro_batch in (0, 3):  # all 16 rows, and by threes: the last is alone
        blocks = {"block_length": 6, "block_cache": block_cache}
        sections = {"rollout": blocks | {"micro_batch": micro_batch, "steps": 12}, "run": rows}
        # Unguided, because guidance magnifies the last digits.
        config = resolved(changed(reviews, guidance={"kind": "none"}, **sections), tmp_path)
        rollouts.append(vars(rollout_step(run := set_up(config, Accelerator()), run.prompts(1), 1, Clock()).rollout))
    whole, divided = rollouts
    last_B = torch.where(whole["completion_mask_BC"], whole["unmask_step_BC"], -1).amax(1)
    assert (last_B % 6 < 5).sum() >= 2, "no rows that end inside a block"
    for name, value in whole.items():
        torch.testing.assert_close(divided[name], value, rtol=1e-5, atol=1e-5, msg=lambda text, name=name: name)


def test_micro_batches_bound_the_memory_of_a_rollout(reviews, tmp_path):
    peaks = []
    for micro_batch in (0, 2):
        rollout = {"micro_batch": micro_batch, "steps": 3}
        run = set_up(resolved(changed(reviews, rollout=rollout, run={"eval_steps": 0}), tmp_path), Accelerator())
        peaks.append(
            bench.peak_memory(
                lambda run=run: rollout_step(run, run.prompts(0), 0, Clock()),
                torch.device("cpu"),
            )
        )
    assert peaks[1] < 0.4 * peaks[0], "8 rows against 2 at a time"


def launch(config: dict, folder, *launcher: str) -> list[tuple[dict, dict]]:
    finish(start(HELPERS / "launched_step.py", write(config, folder), folder, launcher=launcher))
    return left_by(folder, 2)


def assert_divided_step(ranks: list[tuple[dict, dict]], whole: tuple[dict, dict]) -> None:
    """Each rank has its rows of the whole step, and everything that ranks have in common."""
    size = 8 // len(ranks)
    for rank, (left, told) in enumerate(ranks):
        assert told["ranks"] == len(ranks)
        assert_same_step(left, told, whole, slice(size * rank, size * (rank + 1)))


@pytest.mark.slow
@pytest.mark.parametrize("accumulation", [1, 4])
def test_two_processes_make_the_step_of_one(reviews, whole, tmp_path, accumulation):
    config = changed(reviews, run={"prompts_per_device": 2, "gradient_accumulation_steps": accumulation})
    ranks = launch(config, tmp_path, *launch_file("cpu"))
    assert_divided_step(ranks, whole)
    for name, value in ranks[0][0].items():
        if name.startswith(("adapter", "gradient")):
            assert torch.equal(value, ranks[1][0][name]), f"the processes' adapters are apart in {name}"


# ---------------------------------------------------------------------------------------------------------- sharding


@pytest.mark.parametrize(
    "settings",
    [{}, {"gradient_checkpointing": True, "gradient_accumulation_steps": 2}],
)
@pytest.mark.slow
def test_shared_weights_make_the_step_of_whole_ones(reviews, tmp_path, settings):
    reviews = changed(reviews, rollout={"commit_above": 0.25})  # so that rollouts end at different steps
    whole = step(resolved(reviews, tmp_path))
    last_B = torch.where(whole[0]["rollout completion_mask_BC"], whole[0]["rollout unmask_step_BC"], -1).amax(1)
    assert last_B[:4].max() != last_B[4:].max(), "one process has finished before the other"
    ranks = launch(changed(reviews, run={"prompts_per_device": 2, **settings}), tmp_path, *FSDP2)
    assert_divided_step(ranks, whole)
    for _, told in ranks:
        assert told["held"] * 2 == told["split"] > 1e6, "a process keeps one half of the layers"
    assert ranks[0][1]["calls"] == ranks[1][1]["calls"], "the processes must put the layers together equally often"


@pytest.mark.slow
def test_processes_that_share_weights_may_make_different_numbers_of_forward_passes(tiny, tmp_path):
    tiny["lora"]["dropout"] = 0.3
    finish(start(HELPERS / "launched_lockstep.py", write(tiny, tmp_path), tmp_path, processes=2))
    idle, busy = (json.loads((tmp_path / f"rank_{rank}.json").read_text()) for rank in range(2))
    assert idle["calls"] == busy["calls"] == 3, "dummy forward passes keep the idle process in step"
    assert idle["apart"] == idle["largest"] == 0 and busy["apart"] < 1e-6 < 1e-2 < busy["largest"]


@pytest.mark.slow
def test_a_process_that_waits_too_long_for_a_shard_gives_up(tiny, tmp_path):
    printed = finish(start(HELPERS / "launched_lockstep.py", write(tiny, tmp_path), tmp_path, "sleep", processes=2), 1)
    assert "Timed out waiting 20000ms" in printed


@pytest.mark.slow
def test_an_evaluation_of_fewer_prompts_than_processes_ends(tiny, tmp_path):
    tiny["data"]["eval_prompts"] = 1
    words = [REPO / "recipes" / "evaluate.py", "--config", write(tiny, tmp_path)]
    printed = [finish(start(*words, launcher=launcher)) for launcher in ((), FSDP2)]
    whole, shared = (json.loads(re.search(r"{.*?}", text, re.S)[0]) for text in printed)
    assert shared == pytest.approx(whole, abs=1e-6) and "eval/judge" in whole


@pytest.mark.slow
def test_sampling_in_several_processes_is_refused(tiny, tmp_path):
    printed = finish(start(REPO / "recipes" / "sample.py", "--config", write(tiny, tmp_path), processes=2), 1)
    assert printed.count("error: sampling runs in one process, and 2 were started") == 1


@pytest.mark.slow
@pytest.mark.parametrize(("config", "processes"), [("multi_node", 2), ("fsdp2", 4)])
def test_two_machines_make_the_step_of_one(reviews, whole, tmp_path, config, processes):
    """Two launchers that know of each other only through an address, as on two machines."""
    path = write(changed(reviews, run={"prompts_per_device": 4 // processes}), tmp_path)
    address = ["--main_process_ip", "127.0.0.1", "--main_process_port", free_port()]
    words = launch_file(config, "--num_machines", "2", "--num_processes", str(processes), *address, "--machine_rank")
    script = HELPERS / "launched_step.py"
    for machine in [start(script, path, tmp_path, launcher=[*words, str(rank)]) for rank in range(2)]:
        finish(machine)
    ranks = left_by(tmp_path, processes)
    assert_divided_step(ranks, whole)
    if config == "fsdp2":
        for _, told in ranks:
            assert told["held"] * 2 == told["split"] > 0, "machines exchange no weights: each holds all of them"
