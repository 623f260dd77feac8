"""Averages over processes, for problems that are solved by several of them."""

import torch
from torch import distributed

from diopt_lightning.bilevel.sharding import is_sharded
from diopt_lightning.bilevel.vectors import Vector


def several_processes() -> bool:
    """Whether this process is one of several in an initialized group."""
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def average_over_processes(vector: Vector) -> Vector:
    """Average a vector over all processes of the default group, in one flat buffer for each device and precision.

    ``torch.autograd.grad`` is not reduced by ``DistributedDataParallel``, so everything that an estimator computes from
    a loss goes through this: the outer gradient and *each* product. Averaging the local solutions at the end would not
    be the same, because the inverse of an average is not the average of the inverses.

    Args:
        vector: Tensors of equal shapes on all processes. Sharded ones are averages already: ``fully_shard`` averages
            where it shards.

    Returns:
        New tensors with the averages; ``vector`` itself where there is only one process.
    """
    if not several_processes():
        return vector
    averaged = list(vector)
    groups: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for position, tensor in enumerate(vector):
        if is_sharded(tensor):
            continue
        groups.setdefault((tensor.device, tensor.dtype), []).append(position)
    for positions in groups.values():
        flat = torch.cat([vector[position].reshape(-1) for position in positions])
        distributed.all_reduce(flat)
        flat /= distributed.get_world_size()
        sizes = [vector[position].numel() for position in positions]
        for position, part in zip(positions, torch.split(flat, sizes), strict=True):
            averaged[position] = part.view_as(vector[position])
    return averaged
