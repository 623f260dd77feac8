"""Averages over processes, for problems that are solved by several of them."""

import torch
from torch import distributed

from diopt_lightning.bilevel.sharding import is_sharded
from diopt_lightning.bilevel.vectors import Vector


def several_processes() -> bool:
    """Whether this process is one of several in an initialized group."""
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


class ProcessAverage:
    """Averages vectors over all processes of the default group, and counts what it hands to the network.

    ``torch.autograd.grad`` is not reduced by ``DistributedDataParallel``, so everything that an estimator computes from
    a loss goes through this: the outer gradient and *each* product. Averaging the local solutions at the end would not
    be the same, because the inverse of an average is not the average of the inverses.

    A vector travels in one flat buffer for each device and precision; while one is on its way the next is filled.

    Attributes:
        bytes: Bytes of all buffers so far. A ring of n processes sends 2 (n - 1) / n times as many from each of them.
    """

    def __init__(self) -> None:
        self.bytes = 0

    def __call__(self, vector: Vector) -> Vector:
        """Return new tensors with the averages; ``vector`` itself where there is only one process.

        Args:
            vector: Tensors of equal shapes on all processes. Sharded ones are averages already: ``fully_shard``
                averages where it shards.
        """
        if not several_processes():
            return vector
        groups: dict[tuple[torch.device, torch.dtype], list[int]] = {}
        for position, tensor in enumerate(vector):
            if not is_sharded(tensor):
                groups.setdefault((tensor.device, tensor.dtype), []).append(position)
        averaged = list(vector)
        on_their_way = []
        for positions in groups.values():
            flat = torch.cat([vector[position].reshape(-1) for position in positions])
            on_their_way.append((positions, flat, distributed.all_reduce(flat, async_op=True)))
            self.bytes += flat.numel() * flat.element_size()
        for positions, flat, work in on_their_way:
            work.wait()
            flat /= distributed.get_world_size()
            sizes = [vector[position].numel() for position in positions]
            for position, part in zip(positions, torch.split(flat, sizes), strict=True):
                averaged[position] = part.view_as(vector[position])
        return averaged


def average_over_processes(vector: Vector) -> Vector:
    """Average a vector over all processes; see :class:`ProcessAverage`."""
    return ProcessAverage()(vector)
