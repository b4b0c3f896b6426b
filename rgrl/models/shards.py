"""Frozen weights in pieces: each process of a machine keeps a part of every decoder layer (FSDP2).

A layer is put together just before it is read, forward or backward, and taken apart after it. That is a collective
call, so processes that share weights must read the model equally often: `Lockstep` sees to that. The adapter, the
embedding and the head stay whole everywhere. So gradients, optimizer and checkpoints are those of a run whose weights
are not shared, and machines exchange no weights.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor


class Lockstep:
    """Keeps processes that share the layers of `body` equally often in its forward pass, whatever each has to do."""

    def __init__(self, body: nn.Module, group: dist.ProcessGroup, device: torch.device) -> None:
        self.body, self.group, self.device = body, group, device
        self._counting = False
        body.register_forward_pre_hook(self._before)

    def _before(self, *_: object) -> None:
        if self._counting:
            self._tell(1.0)

    def _tell(self, working: float) -> Tensor:
        """How many processes are about to read for themselves. One that is has no need to wait for the answer."""
        count = torch.full((1,), working, device=self.device)
        dist.all_reduce(count, group=self.group)
        return count

    @contextmanager
    def __call__(self) -> Iterator[list[Tensor]]:
        """Within it the processes may read `body` a different number of times each; it ends for all at once.

        Whoever has done reads a single token until everybody has. Where gradients are recorded, the list that it
        yields then holds zeros that depend on those readings: added to the loss they also even out the backward pass.
        """
        spare: list[Tensor] = []
        self._counting = True
        try:
            yield spare
        finally:
            self._counting = False
        token_11 = torch.zeros(1, 1, dtype=torch.long, device=self.device)
        while self._tell(0.0).item() > 0:
            states_11H = self.body(token_11, use_cache=False).last_hidden_state
            if states_11H.requires_grad:
                spare.append(states_11H[:0].sum())


def shard_layers(body: nn.Module, device: torch.device, size: int, timeout: timedelta | None = None) -> Lockstep:
    """Cut the frozen weights of `body.layers` in place among groups of `size` neighbouring processes. Collective.

    `body` may be anywhere; its layers come to `device` one by one. A process that waits for another of its group
    longer than `timeout` (None: torch's own) gives up.
    """
    machines = torch.arange(dist.get_world_size()).view(-1, size).tolist()
    group, _ = dist.new_subgroups_by_enumeration(machines, timeout=timeout)
    mesh = DeviceMesh.from_group(group, device.type)
    for layer in body.layers:
        trained = {p for p in layer.parameters() if p.requires_grad}
        fully_shard(layer, mesh=mesh, reshard_after_forward=True, ignored_params=trained)
    # The root owns no weights; with it the layers are fetched one ahead.
    fully_shard(body, mesh=mesh, ignored_params={p for p in body.parameters() if not isinstance(p, DTensor)})
    body.to(device)
    return Lockstep(body, group, device)
