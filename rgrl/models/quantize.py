"""A frozen decoder in 4 or 8 bits, by bitsandbytes, through transformers' own loader."""

import importlib.util
import logging

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel

from rgrl.errors import ConfigError


def check_quantize(quantize: str) -> None:
    """Raise `ConfigError` where this installation cannot quantize."""
    if quantize != "none" and importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(
            f"`model.quantize: {quantize}` needs bitsandbytes, which is not installed: "
            'pip install -e ".[quantize]", or pip install bitsandbytes'
        )


def quantization(quantize: str, dtype: torch.dtype, head: str = "lm_head") -> BitsAndBytesConfig | None:
    """How transformers is to quantize every linear layer but the `head`; None for `none`. Computes in `dtype`.

    `nf4` as in QLoRA (arXiv 2305.14314), scales quantized too. `int8` without the outlier columns of LLM.int8(), which
    are chosen for a whole batch: a row's numbers would depend on the other rows.
    """
    if quantize == "none":
        return None
    if quantize == "int8":
        # It tells of every product that it rounds to float16 before it rounds to 8 bits.
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0, llm_int8_skip_modules=[head])
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=[head],
    )


def check_quantized(model: PreTrainedModel, quantize: str) -> None:
    """Raise `ConfigError` unless the linear layers of the decoder, and nothing else, hold quantized weights."""
    if quantize == "none":
        return
    expected = {"nf4": torch.uint8, "int8": torch.int8}[quantize]
    head = model.get_output_embeddings()
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            wanted = isinstance(module, nn.Linear) and module is not head
            if (module.weight.dtype == expected) != wanted:
                told = "is" if not wanted else "is not"
                raise ConfigError(f"`model.quantize: {quantize}` cannot load this model: {name} {told} quantized")


def full_size(parameter: torch.Tensor) -> int:
    """Number of weights in a parameter, which may hold two in a byte."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else state.shape.numel()
