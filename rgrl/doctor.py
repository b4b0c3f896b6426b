"""`rgrl doctor`: what this machine and installation have, and a self-test that trains a tiny model."""

import contextlib
import importlib.metadata
import io
import json
import math
import os
import platform
import shutil
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import yaml
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForSequenceClassification

import rgrl
from rgrl.config import Config, load_config
from rgrl.models.families.llada import LLADA
from rgrl.tracking import read_metrics
from rgrl.tracking.wandb import chosen_mode
from rgrl.trainer import train

LIBRARIES = ("torch", "transformers", "accelerate", "peft", "tokenizers", "datasets", "wandb")


# ------------------------------------------------------------------------------------------------------- facts
def facts() -> Iterator[str]:
    """A line each, such as `bf16: yes`."""
    versions = [f"{name} {version(name)}" for name in LIBRARIES]
    yield f"versions: rgrl {rgrl.__version__}, python {platform.python_version()}, {', '.join(versions)}"
    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    yield f"CUDA devices: {', '.join(f'{gpu.name} ({gb(gpu.total_memory)})' for gpu in gpus) or 'none'}"
    yield f"CPU: {os.cpu_count()} cores, {torch.get_num_threads()} of them in use by torch"
    yield f"bf16: {'not on this GPU' if gpus and not torch.cuda.is_bf16_supported(False) else 'yes'}"
    here = torch.distributed.is_available()
    gloo, nccl = (here and has() for has in (torch.distributed.is_gloo_available, torch.distributed.is_nccl_available))
    yield f"between processes: gloo {'yes' if gloo else 'no'}, NCCL {'yes' if nccl else 'no'}"
    yield f"disk: {free(Path.cwd())} free in {Path.cwd()}"
    cache = Path(constants.HF_HUB_CACHE)
    offline = "not asked (HF_HUB_OFFLINE)" if constants.HF_HUB_OFFLINE else "asked for what the cache lacks"
    yield f"model hub: {offline}; {free(cache)} free for its cache, {cache}"
    yield f"W&B: {wandb_mode()}"


def version(name: str) -> str:
    """The installed version of a library."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def gb(size: float) -> str:
    """Bytes as gigabytes."""
    return f"{size / 1e9:.1f} GB"


def free(folder: Path) -> str:
    """The free space on the disk that holds a folder, which need not exist yet."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return gb(shutil.disk_usage(folder).free)


def wandb_mode() -> str:
    """How a run would log to W&B."""
    try:
        import wandb

        with tempfile.TemporaryDirectory() as folder:
            os.environ["WANDB_CACHE_DIR"] = folder  # for the log of the service that it starts to answer
            if chosen_mode() == "offline":
                return "offline, as there is no account here"
            return os.environ.get("WANDB_MODE") or wandb.setup().settings.mode or "online"
    except ImportError:
        return "not installed; set tracking.wandb: false"
    except Exception as error:  # as in a run, which goes on without it
        return f"fails ({type(error).__name__}: {' '.join(str(error).split())})"


# --------------------------------------------------------------------------------------------------- self-test
def self_test() -> tuple[str | None, float]:
    """Write, train, save, resume, compare. Returns what failed, None if nothing did, and the seconds it took."""
    start, problem, printed, threads = time.perf_counter(), None, io.StringIO(), torch.get_num_threads()
    torch.set_num_threads(1)  # more have nothing to share at this size, and wait for each other on a busy machine
    with tempfile.TemporaryDirectory(prefix="rgrl-doctor-") as name, contextlib.redirect_stderr(printed):
        try:
            problem = check_training(Path(name))
        except Exception as error:  # whatever is broken here: to find out is what this is for
            last = traceback.extract_tb(error.__traceback__)[-1]
            reason = " ".join(str(error).split())
            problem = f"{type(error).__name__}: {reason} ({Path(last.filename).name}, line {last.lineno})"
    torch.set_num_threads(threads)
    return problem, time.perf_counter() - start


def check_training(folder: Path) -> str | None:
    """What is wrong with two guided steps and their resuming; None if nothing is."""
    config = write_settings(folder)
    whole = train(config("whole"))
    lines = read_metrics(whole / "metrics.jsonl")
    if [line["step"] for line in lines] != [1, 2]:
        return f"two steps have left lines of metrics for steps {[line['step'] for line in lines]}"
    if not all(isinstance(line["loss"], float) and math.isfinite(line["loss"]) for line in lines):
        return f"the loss is not finite: {[line['loss'] for line in lines]}"
    resumed = train(config("resumed", "--run.resume_from_checkpoint", str(whole / "checkpoints" / "step_000001")))
    name = "checkpoints/step_000002/adapter/adapter_model.safetensors"
    one, other = load_file(whole / name), load_file(resumed / name)
    apart = max(float((one[key] - other[key]).abs().max()) for key in one)
    # The same bytes on a CPU. On a GPU sums may come in another order, and a first step of Adam magnifies that.
    if apart > (1e-3 if torch.cuda.is_available() else 0.0):
        return f"a resumed run has ended with another adapter than an undisturbed one (apart by {apart:.1g})"
    return None


def write_settings(folder: Path) -> Callable[..., Config]:
    """Write tiny models and prompts; returns the settings of a run in a folder of this name under overrides."""
    torch.manual_seed(0)
    tokenizer = byte_tokenizer()
    write_policy(folder / "policy", tokenizer)
    write_reward(folder / "reward", tokenizer)
    (folder / "prompts.txt").write_text("good morning\ngood night\n")
    settings = {
        "model": {"path": str(folder / "policy")},
        "lora": {"r": 4, "alpha": 8},
        "data": {"path": str(folder / "prompts.txt"), "max_prompt_length": 128},
        "reward": {"path": str(folder / "reward")},
        "rollout": {"num_generations": 2, "max_completion_length": 8, "steps": 4},
        "guidance": {"kind": "entrgi"},
        "optim": {"learning_rate": 1e-3},
        "run": {"steps": 2, "save_steps": 1},
        "tracking": {"wandb": False},
    }
    (folder / "rgrl.yaml").write_text(yaml.safe_dump(settings))
    return lambda name, *words: load_config(folder / "rgrl.yaml", ["--run.output_dir", str(folder / name), *words])


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A token for each byte, one that ends a text, one that hides a token."""
    special = ["<|endoftext|>", "<|mask|>"]
    vocab = {token: i for i, token in enumerate([*sorted(pre_tokenizers.ByteLevel.alphabet()), *special])}
    bytes_only = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    bytes_only.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_only.decoder = decoders.ByteLevel()
    bytes_only.add_special_tokens(special)
    end, mask = special
    return PreTrainedTokenizerFast(tokenizer_object=bytes_only, eos_token=end, pad_token=end, mask_token=mask)


def write_policy(folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """A diffusion LM of two layers in LLaDA's format, with random weights."""
    config = {
        "model_type": "llada",
        "vocab_size": len(tokenizer),
        "d_model": 32,
        "n_heads": 2,
        "n_layers": 2,
        "mlp_hidden_size": 48,
        "max_sequence_length": 160,
        "mask_token_id": tokenizer.mask_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    tokenizer.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(LLADA.model_class(LLADA.make_config(config)).state_dict(), folder / "model.safetensors")


def write_reward(folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """A reward model of two layers in Qwen3's format, with random weights."""
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=128,
        num_labels=1,
        pad_token_id=tokenizer.pad_token_id,
    )
    tokenizer.save_pretrained(folder)
    Qwen3ForSequenceClassification(config).save_pretrained(folder)
