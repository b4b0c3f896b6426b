"""Sharded frozen weights: each process of a machine keeps a part of every decoder layer (FSDP2).

A layer is gathered just before it runs, forward or backward, and freed after it. That is a collective call, so
processes that share weights must make equally many forward passes: `Lockstep` sees to that. The adapter, the embedding
and the head stay whole everywhere. So gradients, optimizer and checkpoints are those of a run with whole weights, and
machines exchange no weights.
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
    """Makes processes that share the layers of `body` run its forward pass equally often, whatever each has to do."""

    def __init__(self, body: nn.Module, group: dist.ProcessGroup, device: torch.device) -> None:
        self.body, self.group, self.device = body, group, device
        self._counting = False
        body.register_forward_pre_hook(self._before)

    def _before(self, *_: object) -> None:
        if self._counting:
            self._tell(1.0)

    def _tell(self, working: float) -> Tensor:
        """How many processes are about to make a forward pass of their own. Those need not wait for the answer."""
        count = torch.full((1,), working, device=self.device)
        dist.all_reduce(count, group=self.group)
        return count

    @contextmanager
    def __call__(self) -> Iterator[list[Tensor]]:
        """Context in which each process may run `body` any number of times; it ends for all of them together.

        A process that is done makes dummy forward passes over one token until all are done. With gradients enabled, the
        list that it yields then holds zeros that depend on those passes: added to the loss, they make the backward
        passes equal in number too.
        """
        dummies: list[Tensor] = []
        self._counting = True
        try:
            yield dummies
        finally:
            self._counting = False
        token_11 = torch.zeros(1, 1, dtype=torch.long, device=self.device)
        while self._tell(0.0).item() > 0:
            states_11H = self.body(token_11, use_cache=False).last_hidden_state
            if states_11H.requires_grad:
                dummies.append(states_11H[:0].sum())


def shard_layers(body: nn.Module, device: torch.device, size: int, timeout: timedelta | None = None) -> Lockstep:
    """Shard the frozen weights of `body.layers` in place among groups of `size` neighbouring processes. Collective.

    `body` may be on any device; its layers move to `device` one by one. A process that waits for another of its group
    longer than `timeout` (None: torch's own) raises.
    """
    machines = torch.arange(dist.get_world_size()).view(-1, size).tolist()
    group, _ = dist.new_subgroups_by_enumeration(machines, timeout=timeout)
    mesh = DeviceMesh.from_group(group, device.type)
    assert isinstance(body.layers, nn.ModuleList)
    for layer in body.layers:
        trained = {p for p in layer.parameters() if p.requires_grad}
        fully_shard(layer, mesh=mesh, reshard_after_forward=True, ignored_params=trained)
    # The root owns no weights; wrapping it lets FSDP gather the next layer in advance.
    fully_shard(body, mesh=mesh, ignored_params={p for p in body.parameters() if not isinstance(p, DTensor)})
    body.to(device)
    return Lockstep(body, group, device)
