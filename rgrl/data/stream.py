"""Which prompts a step sees. A batch is a function of the step number, so resuming needs no other state."""

import torch

from rgrl.seeds import generator
from rgrl.types import Prompts, SomePrompts


class PromptStream:
    """An endless, shuffled-by-epoch sequence of prompts, split among ranks step by step."""

    def __init__(self, prompts: SomePrompts, seed: int, per_rank: int, ranks: int) -> None:
        self.prompts, self.seed, self.per_rank, self.ranks = prompts, seed, per_rank, ranks
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.long)

    def batch(self, step: int, rank: int) -> Prompts:
        """This rank's P prompts of `step`; every prompt appears once per epoch, whatever the number of ranks."""
        first = (step * self.ranks + rank) * self.per_rank
        chosen = [self._at(i) for i in range(first, first + self.per_rank)]
        return self.prompts.take(chosen)

    def _at(self, i: int) -> int:
        epoch, place = divmod(i, len(self.prompts))
        if epoch != self._epoch:
            self._order = torch.randperm(len(self.prompts), generator=generator(self.seed, epoch, 0, "order"))
            self._epoch = epoch
        return int(self._order[place])
