"""Which parameters of a backbone are learned: all, some, or those of an adapter."""

import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from diopt_lightning.errors import OF_A_LIBRARY, ConfigurationError, one_line, require_at_least

BaseDtype = Literal["float32", "bfloat16"]


class InnerParameters(ABC):
    """Chooses theta among the parameters of a model; the others are frozen.

    Attributes:
        base_dtype: Precision in which the model's own weights are loaded. ``None`` for the run's.
    """

    base_dtype: torch.dtype | None = None

    @abstractmethod
    def choose(self, model: PreTrainedModel) -> nn.Module:
        """Freeze what is not learned, and return the model, with adapters if there are any.

        Raises:
            ConfigurationError: If nothing would be learned, or the model does not fit the options.
        """


class ByName(InnerParameters):
    """Those whose names match a pattern.

    Args:
        patterns: Shell patterns, e.g. ``decoder.*``, ``*.SelfAttention.*`` or ``*bias``. A parameter is learned if any
            matches its name, as ``model.named_parameters()`` of transformers has it.

    Raises:
        ConfigurationError: If a pattern matches no parameter.

    Example:
        >>> inner_parameters = ByName(["*.layers.11.*", "lm_head.*"])
    """

    def __init__(self, patterns: Sequence[str]) -> None:
        if not patterns:
            raise ConfigurationError("`patterns` of ByName is empty: nothing would be learned.")
        self.patterns = list(patterns)

    def choose(self, model: PreTrainedModel) -> nn.Module:
        """Freeze all others; see :class:`InnerParameters`."""
        names = [name for name, _ in model.named_parameters()]
        for pattern in self.patterns:
            if not any(fnmatchcase(name, pattern) for name in names):
                raise ConfigurationError(
                    f"No parameter of {type(model).__name__} matches `{pattern}`: its names are like `{names[0]}` and "
                    f"`{names[-1]}`."
                )
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(any(fnmatchcase(name, pattern) for pattern in self.patterns))
        return model


class LastLayers(InnerParameters):
    """Those of the last transformer layers; of an encoder-decoder model, the decoder's.

    Args:
        layers: How many layers.

    Raises:
        ConfigurationError: If the model has fewer.

    Example:
        >>> inner_parameters = LastLayers(2)
    """

    def __init__(self, layers: int = 1) -> None:
        require_at_least(1, of="LastLayers", layers=layers)
        self.layers = layers

    def choose(self, model: PreTrainedModel) -> nn.Module:
        """Freeze all others; see :class:`InnerParameters`."""
        found = transformer_layers(model)
        if len(found) < self.layers:
            raise ConfigurationError(
                f"`layers` of LastLayers is {self.layers}, and {type(model).__name__} has {len(found)}."
            )
        model.requires_grad_(False)
        for layer in found[-self.layers :]:
            layer.requires_grad_(True)
        return model


class Adapter(InnerParameters):
    """Those of an adapter, by any method of PEFT that adapts layers; the model itself stays as it is.

    Vectors of the size of theta, which solvers keep several of, are then as small as the adapter.

    Args:
        config: Options of PEFT, with ``peft_type``, e.g. ``{"peft_type": "LOHA", "r": 8}``.
        base_dtype: Precision of the frozen weights; an adapter beside ``bfloat16`` ones stays in float32 itself.
            Default: that of the run.

    Raises:
        ConfigurationError: If PEFT is not installed, or there is no such method or it does not fit the model.

    Example:
        >>> inner_parameters = Adapter({"peft_type": "IA3"})
    """

    def __init__(self, config: dict[str, Any], base_dtype: BaseDtype | None = None) -> None:
        self.config: Mapping[str, Any] = config
        self.base_dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16, None: None}[base_dtype]

    def choose(self, model: PreTrainedModel) -> nn.Module:
        """Add the adapter; see :class:`InnerParameters`."""
        try:
            import peft
        except ImportError as error:
            raise ConfigurationError(
                f"{type(self).__name__} needs PEFT, which cannot be imported ({error}): "
                "pip install 'diopt_lightning[peft]'."
            ) from error
        try:
            config = peft.get_peft_config(dict(self.config))
        except (*OF_A_LIBRARY, ImportError) as error:
            raise ConfigurationError(
                f"`config` {dict(self.config)!r} is not one of PEFT ({type(error).__name__}: {one_line(error)}): give "
                f"`peft_type`, one of {sorted(peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING)}, and its options."
            ) from error
        if config.is_prompt_learning:
            raise ConfigurationError(
                f"{self.config['peft_type']} of PEFT puts vectors before the input, which is what an `instruction` of "
                "this package is (`EmbedderDP`): choose a method that adapts layers, such as LORA."
            )
        try:
            with warnings.catch_warnings():
                # PEFT asks transformers by a name that is going away: no news for a user.
                warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
                return peft.get_peft_model(model, config)
        except (*OF_A_LIBRARY, ImportError) as error:
            what = f"PEFT cannot adapt {type(model).__name__} by {self.config['peft_type']}"
            raise ConfigurationError(f"{what}: {one_line(error)}") from error


class LoRA(Adapter):
    r"""Those of low-rank adapters: :math:`W x + \frac{\alpha}{r} B A x` (Hu et al., ICLR 2022).

    Args:
        rank: :math:`r`, the rank of :math:`B A`. Default: 8, as in the paper.
        alpha: :math:`\alpha`, by which the adapter's share is scaled. Default: 16, twice the rank.
        dropout: Probability with which an entry of :math:`x` is dropped before the adapter.
        target_modules: Names of the linear layers that are adapted, e.g. ``[q_proj, v_proj]``, or ``all-linear``.
            Default: those that PEFT knows for the model, mostly queries and values.
        base_dtype: Precision of the frozen weights :math:`W`; the adapter beside ``bfloat16`` ones stays in float32.
            Default: that of the run.

    Raises:
        ConfigurationError: If PEFT is not installed, or an option does not fit the model.

    Example:
        >>> inner_parameters = LoRA(rank=16, target_modules="all-linear", base_dtype="bfloat16")
    """

    def __init__(
        self,
        rank: int = 8,
        alpha: float = 16.0,
        dropout: float = 0.0,
        target_modules: list[str] | str | None = None,
        base_dtype: BaseDtype | None = None,
    ) -> None:
        require_at_least(1, of="LoRA", rank=rank)
        config = {
            "peft_type": "LORA",
            "r": rank,
            "lora_alpha": alpha,
            "lora_dropout": dropout,
            "target_modules": target_modules,
        }
        super().__init__(config, base_dtype)


def transformer_layers(model: nn.Module) -> list[nn.Module]:
    """The layers of a model of transformers, those of the encoder first."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
