"""Models small enough to look at every canvas, and rewards, guides and rollouts made of random numbers."""

import torch

from rgrl.models.readout import read_out
from rgrl.rollout.denoise import RolloutNoise, denoise
from rgrl.rollout.guidance import Guide, Hidden, steer
from rgrl.rollout.sampling import draw_uniform, sampled_logp, scale_of, support_of
from rgrl.seeds import generators
from rgrl.types import Rollout

WORDS, END, MASK, V = (0, 1, 2), 3, 4, 5


class Toy(torch.nn.Module):
    """A diffusion LM in float64: every token of a row moves every other's logits, and position l scores token l.

    The mask is never written. With `words` fewer of them exist.
    """

    mask_id = MASK

    def __init__(self, L, seed=0, scale=1.0, words=WORDS):
        super().__init__()
        self.absent_V = torch.tensor([v not in (*words, END) for v in range(V)])
        rng = torch.Generator().manual_seed(seed)
        for name, shape in (("seen_VLH", (V, L, 6)), ("place_LH", (L, 6)), ("out_HV", (6, V))):
            p = torch.randn(shape, generator=rng, dtype=torch.float64) * (scale if name == "out_HV" else 1.0)
            setattr(self, name, torch.nn.Parameter(p))

    def logits(self, canvas_BL, attention_BL, at, prefix=None):
        seen_BLH = self.seen_VLH[canvas_BL, torch.arange(canvas_BL.shape[1])] * attention_BL[..., None]
        logits_BLV = torch.tanh(seen_BLH.mean(1, keepdim=True) + self.place_LH) @ self.out_HV
        logits_BLV = logits_BLV.masked_fill(self.absent_V, float("-inf"))
        return logits_BLV[at] if at.dtype == torch.bool else logits_BLV.flatten(0, 1)[at]

    def read_out(self, canvas_BL, attention_BL, at_BL, token_N, readouts, given=None):
        logits_NV = self.logits(canvas_BL, attention_BL, at_BL)  # they stand for the states: nothing is projected
        return read_out(lambda logits: logits, logits_NV, token_N, readouts, given, vocab_size=V)

    def logp(self, canvas_BL, attention_BL, at_BL, token_N):
        return self.logits(canvas_BL, attention_BL, at_BL).log_softmax(-1).gather(1, token_N[:, None])[:, 0]

    def is_end(self, ids):
        return ids == END


def sampled_values(policy, r):
    """What estimators evaluate: log-probabilities under the sampler with the rollout settings `r`."""

    def logp(places):
        return sampled_logp(places.logits_NV, places.token_N, r.temperature, r.top_k, r.top_p)

    return lambda k, *canvas: policy.read_out(*canvas, {"logp": logp})


def random_guide(V, config, D=5, seed=4, dtype=torch.float32):
    """A guide with random embeddings, whose reward is tanh in a random direction, summed over what it is shown."""
    rng = torch.Generator().manual_seed(seed)
    embedding_VD, direction_D = (torch.randn(*shape, generator=rng).to(dtype) for shape in ((V, D), (D,)))

    def reward(x_BCD, a_BC, rows_B):
        return torch.tanh((x_BCD * a_BC[..., None]) @ direction_D).sum(1)

    return Guide(reward, embedding_VD, config)


def all_hidden(B, C):
    """B completions of C hidden places."""
    return Hidden(torch.zeros(B, C, dtype=torch.long), torch.arange(B * C), torch.arange(B))


def steered(logits_NV, hidden, guide, sampler, is_end=lambda ids: ids < 0, u_MN=None):
    """A steered copy of the logits, and how many gradients were not finite."""
    guided_NV = logits_NV.clone()
    support = support_of(logits_NV, scale_of(sampler), sampler.top_k, sampler.top_p)
    if u_MN is None:
        u_MN = draw_uniform((guide.config.steps, len(logits_NV)), torch.Generator().manual_seed(1))
    _, broken = steer(guided_NV, support, hidden, u_MN, guide, sampler, is_end)
    return guided_NV, broken


def noise_for(config, rows, guide=None, seed=0):
    M = guide.config.steps if guide is not None else 0
    return RolloutNoise.draw(generators(seed, 0, range(rows), "test"), config.steps, config.max_completion_length, M)


def roll_out(policy, config, prompt_BL, attention_BL=None, guide=None, seed=0, stats=None):
    """A rollout from token ids; no prompt is padded unless `attention_BL` says so."""
    attention_BL = torch.ones_like(prompt_BL, dtype=torch.bool) if attention_BL is None else attention_BL
    noise = noise_for(config, len(prompt_BL), guide, seed)
    return denoise(policy, prompt_BL, attention_BL, config, noise, guide, stats)


def rollout_of(canvas_BL, mask_BC, attention_BL=None, step_BC=None, behaviour_BC=None, policy_BC=None):
    """A rollout as if it had been sampled; what is left out is 0, and nothing is padding."""
    attention_BL = torch.ones_like(canvas_BL, dtype=torch.bool) if attention_BL is None else attention_BL
    step_BC = torch.zeros(mask_BC.shape, dtype=torch.long) if step_BC is None else step_BC
    behaviour_BC, policy_BC = (torch.zeros(mask_BC.shape) if x is None else x for x in (behaviour_BC, policy_BC))
    return Rollout(canvas_BL, attention_BL, mask_BC, step_BC, behaviour_BC, policy_BC)
