"""What all processes of a run must agree on before its first step."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import distributed

from diopt_lightning.bilevel.distributed import several_processes
from diopt_lightning.errors import ConfigurationError

if TYPE_CHECKING:
    from datasets import Dataset


def compare_processes(rows: Mapping[str, "Dataset"], where: str) -> None:
    """Check that all processes have read the same instances; nodes may have a disk each. All must ask together.

    Args:
        rows: What :func:`~diopt_lightning.data.tokenization.tokenize` made of each set of tasks.
        where: Where they come from, for the message.

    Raises:
        ConfigurationError: If one has other instances; on all of them.
    """
    if not several_processes():
        return
    own = {split: dataset._fingerprint for split, dataset in rows.items()}
    found: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(found, own)
    for rank, other in enumerate(found):
        differ = [split for split in found[0] | other if other.get(split) != found[0].get(split)]
        if differ:
            raise ConfigurationError(
                f"Process {rank} has other {' and '.join(differ)} instances than the first one: give all nodes the "
                f"same files in {where}, and the same options."
            )
