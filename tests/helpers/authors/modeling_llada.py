"""A skeleton of LLaDA: its authors' module names, and the formulas of a Llama that looks both ways."""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from .configuration_llada import LLaDAConfig


class RMSNorm(nn.Module):
    def __init__(self, size, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x):
        return x * (x.pow(2).mean(-1, keepdim=True) + self.eps).rsqrt() * self.weight


def rotate(x_BhLd, theta):
    """Rotary embedding: dimension i is paired with i + d/2."""
    L, d = x_BhLd.shape[-2:]
    angle = torch.arange(L)[:, None] * theta ** (-torch.arange(0, d, 2) / d)
    cos, sin = angle.cos(), angle.sin()
    a, b = x_BhLd.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        size, inner = config.d_model, config.mlp_hidden_size
        self.heads, self.kv_heads, self.theta = config.n_heads, config.n_kv_heads, config.rope_theta
        few = size // config.n_heads * config.n_kv_heads
        self.attn_norm, self.ff_norm = (RMSNorm(size, config.rms_norm_eps) for _ in range(2))
        self.q_proj, self.attn_out = (nn.Linear(size, size, bias=False) for _ in range(2))
        self.k_proj, self.v_proj = (nn.Linear(size, few, bias=False) for _ in range(2))
        self.ff_proj, self.up_proj = (nn.Linear(size, inner, bias=False) for _ in range(2))
        self.ff_out = nn.Linear(inner, size, bias=False)

    def forward(self, x):
        h = self.attn_norm(x)
        q, k, v = (
            project(h).unflatten(-1, (heads, -1)).transpose(1, 2)
            for project, heads in (
                (self.q_proj, self.heads),
                (self.k_proj, self.kv_heads),
                (self.v_proj, self.kv_heads),
            )
        )
        mixed = F.scaled_dot_product_attention(rotate(q, self.theta), rotate(k, self.theta), v, enable_gqa=True)
        x = x + self.attn_out(mixed.transpose(1, 2).flatten(2))
        h = self.ff_norm(x)
        return x + self.ff_out(F.silu(self.ff_proj(h)) * self.up_proj(h))


class Inner(nn.Module):
    def __init__(self, config):
        super().__init__()
        parts = {"wte": nn.Embedding(config.embedding_size, config.d_model)}
        parts["ln_f"] = RMSNorm(config.d_model, config.rms_norm_eps)
        parts["blocks"] = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        if not config.weight_tying:
            parts["ff_out"] = nn.Linear(config.d_model, config.embedding_size, bias=False)  # the head
        self.transformer = nn.ModuleDict(parts)

    def forward(self, input_ids):
        x = self.transformer["wte"](input_ids)
        for block in self.transformer["blocks"]:
            x = block(x)
        x = self.transformer["ln_f"](x)
        head = self.transformer["ff_out"] if "ff_out" in self.transformer else self.transformer["wte"]
        return F.linear(x, head.weight)


class LLaDAModelLM(PreTrainedModel):
    config_class = LLaDAConfig
    base_model_prefix = "model"

    def __init__(self, config):
        super().__init__(config)
        self.model = Inner(config)
        self.post_init()

    def _init_weights(self, module):
        pass

    def get_input_embeddings(self):
        return self.model.transformer["wte"]

    def forward(self, input_ids):
        return CausalLMOutput(logits=self.model(input_ids))
