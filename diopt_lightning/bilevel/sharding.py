"""Tensors that are sharded over processes, as PyTorch's ``fully_shard`` (FSDP2) leaves a model's parameters.

A sharded tensor is a ``DTensor``. What is done entry by entry is done on this process's own shards here; what is summed
over entries is gathered over the processes.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, distributed

from diopt_lightning.errors import ConfigurationError

if distributed.is_available():
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is a shard, of this process, of a larger one."""
    return distributed.is_available() and isinstance(tensor, DTensor)


def any_sharded(tensors: Sequence[Tensor]) -> bool:
    """Whether one of them is sharded."""
    return any(is_sharded(tensor) for tensor in tensors)


def shards(tensors: Sequence[Tensor]) -> list[Tensor]:
    """This process's own part of each tensor, in the same memory: the tensor itself where it is not sharded."""
    if not any_sharded(tensors):
        return list(tensors)
    return [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]


def joined(parts: Sequence[Tensor], like: Sequence[Tensor]) -> list[Tensor]:
    """Undo :func:`shards`: what was computed from the shards of ``like``, entry by entry, sharded as those are."""
    if not any_sharded(like):
        return list(parts)
    return [
        DTensor.from_local(part, x.device_mesh, x.placements, run_check=False, shape=x.shape, stride=x.stride())
        if isinstance(x, DTensor)
        else part
        for part, x in zip(parts, like, strict=True)
    ]


def everywhere(numbers: Sequence[Tensor], like: Sequence[Tensor]) -> Tensor:
    """Gather a number for each entry of ``like``, or for each shard of a sharded one, in the same order everywhere.

    Args:
        numbers: Scalars, computed from the shards of this process.
        like: The vector that they belong to.

    Returns:
        All numbers ``(count,)``, which are bitwise the same on all processes.
    """
    if not any_sharded(like):
        return torch.stack(list(numbers))
    groups: dict[object, list[int]] = {}
    for position, x in enumerate(like):
        groups.setdefault((x.device_mesh, x.placements) if isinstance(x, DTensor) else None, []).append(position)
    gathered = []
    for positions in groups.values():
        own, x = torch.stack([numbers[position] for position in positions]), like[positions[0]]
        if isinstance(x, DTensor):
            # A replicated dimension of the mesh has the same numbers on all its processes, which count once.
            placements = [Shard(0) if placement.is_shard() else Replicate() for placement in x.placements]
            own = DTensor.from_local(own, x.device_mesh, placements, run_check=False).full_tensor()
        gathered.append(own)
    return torch.cat(gathered)


def whole(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Gather sharded tensors on every process, in the memory of the CPU; others stay as they are."""
    return [tensor.full_tensor().cpu() if isinstance(tensor, DTensor) else tensor for tensor in tensors]


def placed(tensors: Sequence[Tensor], like: Sequence[Tensor]) -> list[Tensor]:
    """Undo :func:`whole`: put tensors where ``like`` is, sharded as that is.

    Raises:
        ConfigurationError: If they are of other sizes, as those of another run's checkpoint.
    """
    sizes = [getattr(tensor, "shape", None) for tensor in tensors] if isinstance(tensors, list) else None
    if sizes != [x.shape for x in like]:
        raise ConfigurationError(
            "What the estimator has kept in the checkpoint is not of the sizes of the inner parameters: give the "
            "configuration that the checkpoint was written with."
        )
    return [
        distribute_tensor(tensor.to(x.device), x.device_mesh, x.placements, src_data_rank=None)
        if isinstance(x, DTensor) and not isinstance(tensor, DTensor)
        else tensor.to(x.device)
        for tensor, x in zip(tensors, like, strict=True)
    ]
