"""What each of several processes has to keep for itself in the one checkpoint that the first of them writes."""

from typing import TypeVar

from torch import distributed

from diopt_lightning.bilevel.distributed import several_processes

T = TypeVar("T")


def of_all_processes(own: T) -> list[T]:
    """The objects of all processes, in their order; all must ask together."""
    if not several_processes():
        return [own]
    found: list[T | None] = [None] * distributed.get_world_size()
    distributed.all_gather_object(found, own)
    return found  # type: ignore[return-value]


def of_this_process(saved: list[T]) -> T | None:
    """The one of this process among those of all, or ``None`` if they were another number of processes."""
    number, rank = (distributed.get_world_size(), distributed.get_rank()) if several_processes() else (1, 0)
    return saved[rank] if len(saved) == number else None
