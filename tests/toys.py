"""A diffusion LM small enough that every canvas can be looked at: float64, with parameters."""

import torch

WORDS, END, MASK, V = (0, 1, 2), 3, 4, 5


class Toy(torch.nn.Module):
    """Every token of a row moves every other's logits; position l scores token l, and the mask is never written.

    With `words` fewer of them exist.
    """

    def __init__(self, L, seed=0, scale=1.0, words=WORDS):
        super().__init__()
        self.absent_V = torch.tensor([v not in (*words, END) for v in range(V)])
        rng = torch.Generator().manual_seed(seed)
        for name, shape in (("seen_VLH", (V, L, 6)), ("place_LH", (L, 6)), ("out_HV", (6, V))):
            p = torch.randn(shape, generator=rng, dtype=torch.float64) * (scale if name == "out_HV" else 1.0)
            setattr(self, name, torch.nn.Parameter(p))

    def logits(self, canvas_BL, attention_BL, at):
        seen_BLH = self.seen_VLH[canvas_BL, torch.arange(canvas_BL.shape[1])] * attention_BL[..., None]
        logits_BLV = torch.tanh(seen_BLH.mean(1, keepdim=True) + self.place_LH) @ self.out_HV
        logits_BLV = logits_BLV.masked_fill(self.absent_V, float("-inf"))
        return logits_BLV[at] if at.dtype == torch.bool else logits_BLV.flatten(0, 1)[at]

    def logp(self, canvas_BL, attention_BL, at_BL, token_N, score=None):
        logits_NV = self.logits(canvas_BL, attention_BL, at_BL)
        if score is not None:
            return score(logits_NV, token_N)
        return logits_NV.log_softmax(-1).gather(1, token_N[:, None])[:, 0]


def is_end(ids):
    return ids == END
