"""Backbones that are sharded over processes, by PyTorch's ``fully_shard`` (FSDP2)."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import distributed
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from transformers import PreTrainedModel

from diopt_lightning.backbones.base import Backbone
from diopt_lightning.backbones.generation import generates_by_length
from diopt_lightning.backbones.inner_parameters import transformer_layers
from diopt_lightning.bilevel.sharding import is_sharded
from diopt_lightning.errors import ConfigurationError


def shard(backbone: Backbone, mesh: DeviceMesh) -> None:
    """Shard a backbone over processes: each layer, and together what stands around the layers.

    Parameters of a layer are gathered when it runs, and gradients are averaged and sharded behind it.

    Args:
        backbone: The backbone, which has been built. All processes get the weights of the first.
        mesh: The processes.

    Raises:
        ConfigurationError: If the backbone is compiled, or generates for rows of one length at a time.
    """
    if getattr(backbone, "compile_model", False):
        raise ConfigurationError(
            "`compile` is true, and a compiled model has not been made to work under ModelParallelStrategy (FSDP2): "
            "set it to false, or use `ddp` where the model fits one GPU."
        )
    model = getattr(backbone, "language_model", None)
    if model is not None and generates_by_length(model):
        raise ConfigurationError(
            f"{type(model).__name__} generates for rows of one length at a time, and processes that share a model must "
            "run it equally often: use `ddp` where the model fits one GPU."
        )
    for module in (*transformer_layers(backbone), backbone):
        # Layer by layer, so that no device ever holds the whole model.
        for tensor in (*module.parameters(), *module.buffers()):
            if not is_sharded(tensor):
                tensor.data = tensor.data.to(mesh.device_type)
                distributed.broadcast(tensor.data, src=0)
        # Also what is around the layers is let go of after a pass: it is entered several times in a step, and what an
        # optimizer or a difference of gradients changes meanwhile would not reach a copy that is kept.
        fully_shard(module, mesh=mesh, reshard_after_forward=True)
    for method in ("embed", "target_losses", "generate"):
        register_fsdp_forward_method(backbone, method)
    for module in backbone.modules():
        if isinstance(module, PreTrainedModel):
            # Processes whose texts have ended go on generating until all have: layers are gathered together.
            module._is_fsdp_managed_module = True  # type: ignore[assignment]


@contextmanager
def gathered(backbone: Backbone) -> Iterator[None]:
    """Hold the embeddings, and what else stands around the layers, whole on every process meanwhile."""
    if not isinstance(backbone, FSDPModule):
        yield
        return
    backbone.unshard()
    try:
        yield
    finally:
        backbone.reshard()
