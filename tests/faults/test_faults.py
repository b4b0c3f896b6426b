"""Faults from outside: signals, dead ranks, full disks, NaNs, other people's code and services."""

import ast
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import faulty
import kills
import pytest
import torch
from checkpoints import REPO
from processes import ENV, PAIR, TRAIN, altered_train, finish, start, start_ranks, wait_until
from training import adapter, assert_same_run, go, resolved, saved, tables, untimed, write

from rgrl import checkpoint
from rgrl.errors import ConfigError, RunStoppedError
from rgrl.folder import new_owner
from rgrl.plugins import TimeUpError, time_limit
from rgrl.runtime.stopping import REASONS, StopRequests, first_reason
from rgrl.tracking import Tracker, read_metrics

STEPS = 4


@pytest.fixture(autouse=True)
def fresh():
    faulty.reset()


def risky_in(tiny: dict) -> dict:
    """Settings whose reward calls `faulty.reward` (once in the evaluation at step 0, once a step)."""
    tiny["reward"]["functions"] = {"faulty:reward": 0.5}
    tiny["objective"]["name"] = "faulty:objective"
    tiny["guidance"]["probe_prompts"] = 0
    tiny["run"] |= {"steps": STEPS, "save_steps": 1, "eval_steps": STEPS}
    return tiny


@pytest.fixture
def risky(tiny) -> dict:
    return risky_in(tiny)


@pytest.fixture(scope="module")
def whole(tiny_in, tmp_path_factory) -> Path:
    """The output of the run without a fault."""
    folder = tmp_path_factory.mktemp("whole")
    faulty.reset()
    output = go(risky_in(tiny_in(folder)), folder)
    assert len(untimed(output)) == STEPS + 1
    return output


def stopped(config: dict, folder: Path, **run) -> RunStoppedError:
    with pytest.raises(RunStoppedError) as caught:
        go(config, folder, **run)
    return caught.value


def send(name: str):
    return lambda: os.kill(os.getpid(), getattr(signal, name))


# ------------------------------------------------------------------------------------------------- asked to stop


# One handler takes all three; only Ctrl-C is told apart in what follows.
@pytest.mark.parametrize(
    ("place", "name"),
    [
        ("reward", "SIGTERM"),
        ("loss", "SIGINT"),
        pytest.param("loss", "SIGUSR1", marks=pytest.mark.slow),
        pytest.param("reward", "SIGINT", marks=pytest.mark.slow),
    ],
)
def test_a_signal_ends_the_phase_saves_and_loses_nothing(risky, whole, tmp_path, name, place):
    # The third call of the reward is in the rollout of step 2, the second of the loss in the update of step 2.
    if place == "reward":
        faulty.in_reward[3] = send(name)
    else:
        faulty.in_loss[2] = send(name)
    before = signal.getsignal(getattr(signal, name))
    error = stopped(risky, tmp_path, save_steps=0)
    assert signal.getsignal(getattr(signal, name)) == before
    done = {"reward": 1, "loss": 2}[place]  # a rollout that was just made is made again, an update is kept
    assert error.code == (130 if name == "SIGINT" else 75) and f"stopped at step {done} on {name}" in str(error)
    assert saved(tmp_path / "run") == [f"step_{done:06d}"]
    requeue = tmp_path / "run" / "requeue"
    assert not requeue.exists() if name == "SIGINT" else requeue.read_text() == f"{name}\n"
    go(risky, tmp_path, save_steps=0, resume_from_checkpoint="auto")
    assert not (tmp_path / "run" / "requeue").exists()
    assert_same_run(tmp_path / "run", whole, STEPS)


def test_max_hours_takes_the_same_path_also_before_the_first_step(risky, whole, tmp_path):
    error = stopped(risky, tmp_path, max_hours=1e-9)
    assert error.code == 75 and "step 0 on run.max_hours" in str(error)
    assert saved(tmp_path / "run") == ["step_000000"]
    go(risky, tmp_path, resume_from_checkpoint="latest", max_hours=1.0)
    assert_same_run(tmp_path / "run", whole, STEPS)


def test_a_request_in_the_last_step_asks_for_no_requeue(risky, tmp_path):
    faulty.in_loss[STEPS] = send("SIGTERM")
    go(risky, tmp_path)
    assert not (tmp_path / "run" / "requeue").exists()


def test_a_note_that_cannot_be_written_does_not_hide_that_all_is_saved(risky, tmp_path, capfd):
    faulty.in_reward[3] = lambda: ((tmp_path / "run" / "requeue").mkdir(), send("SIGTERM")())
    assert stopped(risky, tmp_path).code == 75
    assert "warning: cannot write" in capfd.readouterr().err and saved(tmp_path / "run") == ["step_000001"]


def test_all_ranks_stop_when_one_was_asked():
    with StopRequests(0.0) as one, StopRequests(0.0) as other:
        os.kill(os.getpid(), signal.SIGUSR1)  # the inner one has the handler
        told = [a + b for a, b in zip(one.asked(), other.asked(), strict=True)]
    assert told == [0, 0, 1, 0]
    assert first_reason(told) == "SIGUSR1" and first_reason([0] * len(REASONS)) is None


def family(pid: int) -> list[int]:
    """A process and all its descendants, which a launcher gives sessions of their own."""
    found = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True).stdout.split()
    return [pid, *(below for child in found for below in family(int(child)))]


@pytest.mark.slow
def test_what_a_scheduler_sees(risky, tmp_path):
    """Exit codes of plain Python and of the launcher, one process and two, and what becomes of their signals."""
    risky["run"] |= {"save_steps": 0, "prompts_per_device": 1}
    config, waiting = write(risky, tmp_path), tmp_path / "waiting"
    single = [*PAIR[:2], "--num_processes", "1"]
    deaf = ["sh", "-c", 'trap \'\' USR1; exec "$0" "$@"']  # the launcher must survive what is meant for its ranks
    cases = {  # how it starts, which signal, whether to all processes (as a scheduler does), its code
        "plain": ([], signal.SIGTERM, True, 75),
        "launched": ([*deaf, sys.executable, *single], signal.SIGUSR1, True, 1),
        "pair": ([*deaf, sys.executable, *PAIR], signal.SIGUSR1, True, 1),
        "pair, launcher only": ([sys.executable, *PAIR], signal.SIGTERM, False, None),
    }
    for i, (name, (launcher, number, everybody, code)) in enumerate(cases.items()):
        output = tmp_path / f"run_{i}"
        words = [str(TRAIN), "--config", str(config), "--run.output_dir", str(output)]
        process = subprocess.Popen(
            [*(launcher or [sys.executable]), *words],
            env=ENV | {"FAULT": "reward:3:0:wait", "WAITING": str(waiting), "ACCELERATE_USE_CPU": "true"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        wait_until(lambda process=process: process.poll() is not None or waiting.exists())
        waiting.unlink()
        for pid in family(process.pid) if everybody else [process.pid]:
            os.kill(pid, number)
        _, err = process.communicate(timeout=170)
        assert "all is saved: go on with" in err, (name, err[-3000:])
        fits = process.returncode == code if code is not None else process.returncode not in (0, 75)
        assert fits, (name, process.returncode, err[-2000:])
        assert (output / "requeue").read_text() == f"{signal.Signals(number).name}\n", name
        assert saved(output) == ["step_000001"], name


# ------------------------------------------------------------------------------------------------- ranks


@pytest.mark.slow
@pytest.mark.parametrize(("deed", "minutes"), [("SIGKILL", 5.0), ("SIGSTOP", 0.1), ("fail", 5.0)])
def test_a_rank_that_is_gone_ends_the_others_in_time(risky, tmp_path, deed, minutes):
    """Without a launcher, so that nobody else ends them. The timeout is for a rank that stands still."""
    risky["run"] |= {"prompts_per_device": 1, "timeout_minutes": minutes}
    config = write(risky, tmp_path)
    main, other = start_ranks(2, TRAIN, "--config", config, FAULT=f"loss:3:1:{deed}")
    lines = tmp_path / "run" / "metrics.jsonl"
    wait_until(lambda: main.poll() is not None or len(read_metrics(lines)) == 3)
    _, err = main.communicate(timeout=150)
    assert main.returncode == 1 and "Traceback" in err, err[-2000:]
    other.kill()
    _, cause = other.communicate()
    assert ("ZeroDivisionError: this rank has had it" in cause) == (deed == "fail")
    assert saved(tmp_path / "run")[-1] == "step_000002"
    assert not checkpoint.damage(tmp_path / "run" / "checkpoints" / "step_000002")


@pytest.mark.slow
def test_the_launcher_shows_the_traceback_of_the_rank_that_failed(risky, tmp_path):
    risky["run"]["prompts_per_device"] = 1
    config = write(risky, tmp_path)
    printed = finish(start(TRAIN, "--config", config, processes=2, FAULT="loss:2:1:fail"), 1)
    summary = printed[printed.index("Root Cause") :]
    assert "rank      : 1" in summary and "ZeroDivisionError: this rank has had it" in summary


# ------------------------------------------------------------------------------------------------- disks


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 2 MB, and what fills it."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", folder], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"cannot mount a small disk here: {mounted.stderr.strip()}")
    ballast = folder / "ballast"

    def fill() -> None:
        with ballast.open("wb", buffering=0) as handle:
            try:
                while True:
                    handle.write(b"x" * 4096)
            except OSError:
                pass

    yield folder, fill, ballast.unlink
    subprocess.run(["umount", folder], check=True)


def test_a_full_disk_ends_the_run_clearly_and_leaves_the_last_checkpoint(risky, whole, small_disk):
    folder, fill, free = small_disk
    faulty.in_loss[3] = fill
    error = stopped(risky, folder)
    assert error.code == 1 and "cannot write" in str(error) and "No space left on device" in str(error)
    assert "the newest checkpoint is " in str(error) and str(error).endswith(saved(folder / "run")[-1])
    found = checkpoint.checkpoints(folder / "run")
    assert found and not any(map(checkpoint.damage, found))
    free()
    go(risky, folder, resume_from_checkpoint="latest")
    assert_same_run(folder / "run", whole, STEPS)


def test_a_run_goes_on_over_a_full_disk_if_told_so(risky, tmp_path, small_disk, capfd):
    folder, fill, free = small_disk
    risky["tracking"]["completions_steps"] = 0
    whole = go(risky, tmp_path, output_dir="whole")
    faulty.reset()

    def fill_after_the_first_save() -> None:
        wait_until(lambda: (folder / "run" / "checkpoints" / "latest").exists())
        fill()

    def look_and_free() -> None:
        assert saved(folder / "run") == ["step_000001"]
        free()

    faulty.in_loss |= {2: fill_after_the_first_save, 4: look_and_free}
    go(risky, folder, on_write_error="continue")
    assert capfd.readouterr().err.count("the run goes on and tries again") == 1
    assert_same_run(folder / "run", whole, STEPS)
    assert not checkpoint.damage(folder / "run" / "checkpoints" / f"step_{STEPS:06d}")


def test_lines_wait_for_room_and_none_is_written_by_half(risky, small_disk):
    folder, fill, free = small_disk
    risky["run"]["output_dir"] = str(folder / "run")
    tracker = Tracker(resolved(risky, folder), new_owner(), 0, True)
    tracker.log(0, {"reward": 0.0})
    fill()
    for step in range(1, 200):  # what is left of the file's last block takes some
        tracker.log(step, {"reward": step / 3})
    assert "No space left on device" in tracker.failures["lines"]
    path = folder / "run" / "metrics.jsonl"
    written = path.read_text()
    assert not tracker.flush() and written.endswith("\n") and 0 < len(read_metrics(path)) < 200
    free()
    tracker.log(200, {"reward": 0.0})
    assert tracker.flush() and not tracker.failures and path.read_text().startswith(written)
    assert [line["step"] for line in read_metrics(path)] == list(range(201))


def test_a_run_that_could_not_save_its_end_says_so(risky, tmp_path, small_disk):
    folder, fill, _ = small_disk
    faulty.in_loss[STEPS] = fill
    error = stopped(risky, folder, on_write_error="continue")
    assert error.code == 1 and "No space left on device" in str(error)


# ------------------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_update_that_is_not_finite_is_skipped_counted_and_kept(risky, tmp_path, value, capfd):
    faulty.in_loss[2] = lambda: value
    output = go(risky, tmp_path)
    lines = read_metrics(output / "metrics.jsonl")
    assert [line.get("update/skipped") for line in lines] == [None, 0, 1, 0, 0]
    assert lines[2]["loss"] is None
    assert adapter(output, 4) != adapter(output, 3)
    assert "step 2: an update is skipped" in capfd.readouterr().err
    batch = torch.load(output / "skipped" / "step_000002_rank_0.pt", weights_only=True)
    assert batch["step"] == 2 and not math.isfinite(batch["totals"]["loss"])
    rows = tables(output)["train_000002.parquet"]
    assert [row["completion"] for row in rows] == batch["completions"]
    assert [row["reward"] for row in rows] == batch["reward_B"].tolist()
    assert batch["rollout"]["canvas_BL"].shape[0] == len(rows) and batch["noise"]


def test_too_many_of_them_in_a_row_end_the_run(risky, tmp_path):
    for call in (1, 3, 4):  # with a good one between, the count starts again
        faulty.in_loss[call] = lambda: float("nan")
    error = stopped(risky, tmp_path, max_skipped=2)
    assert error.code == 1 and "2 updates in a row" in str(error) and "`run.max_skipped`" in str(error)
    kept = sorted(path.name for path in (tmp_path / "run" / "skipped").iterdir())
    assert kept == ["step_000003_rank_0.pt", "step_000004_rank_0.pt"]
    # The good steps before are kept and logged.
    assert saved(tmp_path / "run")[-1] == "step_000004" and untimed(tmp_path / "run")[-1]["step"] == 4


def test_a_run_that_was_stopped_for_them_resumes_where_it_stopped(risky, whole, tmp_path):
    faulty.in_loss[3] = lambda: float("nan")
    risky["run"]["save_steps"] = 0
    error = stopped(risky, tmp_path, max_skipped=1)
    assert "1 updates in a row" in str(error) and saved(tmp_path / "run") == ["step_000003"]
    go(risky, tmp_path, resume_from_checkpoint="latest")
    assert untimed(tmp_path / "run")[:3] == untimed(whole)[:3] and len(untimed(tmp_path / "run")) == STEPS + 1


# ------------------------------------------------------------------------------------------------- rewards


def busy() -> None:
    while True:
        pass


def stubborn() -> None:
    while True:
        try:
            time.sleep(600)
        except Exception:
            pass


HANGS = {
    "busy": busy,
    "deaf": stubborn,
    "child": lambda: subprocess.run(["sleep", "600"], check=True),
    "asleep": lambda: time.sleep(600),
}


@pytest.mark.parametrize("hang", HANGS.values(), ids=HANGS)
def test_a_hanging_reward_is_interrupted_and_named(risky, tmp_path, hang):
    risky["reward"]["time_limit"] = 1.0
    faulty.in_reward[2] = hang
    began = time.monotonic()
    with pytest.raises(ConfigError, match=r"reward 'reward' did not return within its `time_limit` of 1 seconds"):
        go(risky, tmp_path, eval_steps=0)
    assert time.monotonic() - began < 300  # half of what the others sleep
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_a_raising_reward_is_named_with_its_line(risky, tmp_path):
    faulty.in_reward[3] = faulty.fail
    with pytest.raises(ConfigError) as caught:
        go(risky, tmp_path)
    assert "reward 'reward' raised ZeroDivisionError: this rank has had it" in str(caught.value)
    assert "faulty.py, line " in str(caught.value) and caught.value.on_one_rank


def test_failed_calls_can_count_as_zero(risky, tmp_path, capfd):
    risky["reward"] |= {"time_limit": 1.0, "on_error": "zero"}
    faulty.in_reward |= {3: faulty.fail, 4: busy}
    output = go(risky, tmp_path)
    lines = read_metrics(output / "metrics.jsonl")
    assert [line.get("rewards/reward/failed") for line in lines] == [None, 0, 1, 1, 0]
    assert [line.get("rewards/reward/mean") == 0.0 for line in lines] == [False, False, True, True, False]
    printed = capfd.readouterr().err
    assert "step 2: reward 'reward' raised ZeroDivisionError" in printed
    assert "step 3: reward 'reward' did not return within" in printed
    # The reward model's term still teaches; a term that is the same for all moves no advantage.
    rows = tables(output)["train_000002.parquet"]
    assert any(row["advantage"] != 0 for row in rows)


def test_the_limit_rings_in_the_main_thread_and_leaves_the_alarm_as_it_was():
    rung = []
    before = signal.signal(signal.SIGALRM, lambda *_: rung.append(1))
    try:
        with time_limit(5.0):
            pass
        with pytest.raises(TimeUpError), time_limit(0.05):
            time.sleep(5)
        signal.raise_signal(signal.SIGALRM)
        assert rung == [1]
    finally:
        signal.signal(signal.SIGALRM, before)


@pytest.mark.slow
def test_what_nothing_can_interrupt_ends_the_process_and_shows_where(risky, tmp_path):
    risky["reward"]["time_limit"] = 1.0
    config = write(risky, tmp_path)
    script = altered_train(tmp_path, "import rgrl.plugins as plugins; plugins.GRACE = 2.0")
    process = start(script, "--config", config, FAULT="reward:3:0:hang")
    printed = finish(process, 1)
    assert "Timeout" in printed and "in hang_in_c" in printed
    assert not checkpoint.damage(tmp_path / "run" / "checkpoints" / "step_000001")


# ------------------------------------------------------------------------------------------------- W&B and clocks


@pytest.mark.slow
def test_a_run_survives_the_death_of_wandb(risky, tmp_path):
    whole = tmp_path / "whole"  # in a process like the other: the number of threads changes the last digits
    finish(start(TRAIN, "--config", write(risky, tmp_path), "--run.output_dir", whole))
    risky["tracking"]["wandb"] = True
    config = write(risky, tmp_path)
    printed = finish(start(TRAIN, "--config", config, FAULT="reward:3:0:kill_wandb"))
    assert printed.count("warning: W&B failed and is off for the rest of this run") == 1
    assert_same_run(tmp_path / "run", whole, STEPS)


@pytest.mark.slow
def test_a_run_starts_without_a_server_that_answers(risky, tmp_path):
    risky["tracking"]["wandb"] = True
    risky["run"]["steps"] = 1
    config = write(risky, tmp_path)
    nowhere = {
        "WANDB_MODE": "online",
        "WANDB_BASE_URL": "http://127.0.0.1:9",
        "WANDB_API_KEY": "local-" + "a" * 40,
        "WANDB_INIT_TIMEOUT": "3",
    }
    printed = finish(start(TRAIN, "--config", config, **nowhere))
    assert printed.count("W&B cannot be reached and keeps its record in") == 1
    assert len(untimed(tmp_path / "run")) == 2
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*"))


def test_a_clock_that_goes_backwards_changes_nothing(risky, whole, tmp_path, monkeypatch):
    now = [time.time()]

    def backwards() -> float:
        now[0] -= 3600.0
        return now[0]

    monkeypatch.setattr(time, "time", backwards)
    go(risky, tmp_path, max_hours=1.0)
    assert now[0] == pytest.approx(time.time() + 3600.0)
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert all(0 <= v < 600 for line in lines for k, v in line.items() if k.startswith(("time/", "step_time")))
    assert_same_run(tmp_path / "run", whole, STEPS)


def test_durations_come_from_a_monotonic_clock():
    clocks = {"time", "now", "utcnow", "today", "st_mtime", "getmtime"}
    for path in (REPO / "rgrl").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            assert not (isinstance(node, ast.Attribute) and node.attr in clocks), f"{path.name}, line {node.lineno}"


# ------------------------------------------------------------------------------------------------- all of it


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "count"), [(1, 4), (2, 3)])
def test_killed_at_random_moments(tmp_path, processes, count):
    """A bounded part of `python tests/kills.py --kills 50`; RGRL_KILLS=50 does it here."""
    where = kills.run(int(os.environ.get("RGRL_KILLS", count)), processes, 1, tmp_path)
    assert sum(where.values()) >= count
