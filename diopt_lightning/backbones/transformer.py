"""What the families of transformers' models share: how a model is made."""

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from diopt_lightning.backbones.base import Backbone
from diopt_lightning.backbones.generation import generate_rows
from diopt_lightning.backbones.inner_parameters import Adapter, InnerParameters, transformer_layers
from diopt_lightning.backbones.rows import insert
from diopt_lightning.backbones.suitability import check_suitability
from diopt_lightning.bilevel import checkpoint_activations
from diopt_lightning.data.collate import Batch
from diopt_lightning.data.files import load_pretrained
from diopt_lightning.data.text_format import TextFormat
from diopt_lightning.errors import ConfigurationError
from diopt_lightning.instructions.base import InstructionEmbeddings

Source = Callable[[Tensor], dict[str, Tensor]]


class TransformersBackbone(Backbone):
    """A model of transformers.

    It keeps its fast attention kernel. Where an exact hypergradient needs one that is twice differentiable, the engine
    switches it for that step alone.

    Args:
        name: Name on the hub, or folder, of the model; what it is made of where it is drawn.
        inner_parameters: Chooses theta among the model's parameters, or adds adapters. Default: all.
        activation_checkpointing: Keep the activations at the borders of layers alone and compute the others again, in
            first and in second derivatives: much less memory for a longer step.
        compile: Compile the model by ``torch.compile``, for inner steps and everything else that takes first
            derivatives. Exact second derivatives run it uncompiled.

    Attributes:
        model: The model, with adapters if there are any; there is none before :meth:`build`.
        auto_class: The class of transformers that loads or draws it.
        family: What such a model is called, with its article.
        is_pretrained: Whether the model is loaded, and not drawn.
    """

    model: nn.Module
    auto_class: Any
    family: str
    is_pretrained = True
    searches_beams = True

    def __init__(
        self,
        name: str,
        inner_parameters: InnerParameters | None = None,
        activation_checkpointing: bool = False,
        compile: bool = False,
    ) -> None:
        super().__init__()
        self.name = name
        self.inner_parameters = inner_parameters
        self.activation_checkpointing = activation_checkpointing
        self.compile_model = compile

    @property
    def embedding(self) -> nn.Embedding:
        """The input embedding; an encoder-decoder model's encoder has it."""
        return cast(nn.Embedding, cast(Any, self.model).get_input_embeddings())

    @property
    def config(self) -> Any:
        """The model's configuration."""
        return cast(Any, self.model).config

    def make(self, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype | None) -> PreTrainedModel:
        """Load the model, or draw its weights, in this precision or that of the run.

        Raises:
            ConfigurationError: If that cannot be done.
        """
        # In float32 whatever the file holds: Lightning's precision decides what is computed in.
        model, found = load_pretrained(
            self.auto_class, self.name, self.family, dtype=dtype or torch.float32, output_loading_info=True
        )
        if missing := sorted(found["missing_keys"]):
            raise ConfigurationError(
                f"`{self.name}` has no weights for {len(missing)} of the parameters of {self.family}, such as "
                f"`{missing[0]}`, which would stay random: give a whole one, or one of the same kind."
            )
        return cast(PreTrainedModel, model)

    def build(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Make the model and check that it fits the tokenizer; see :class:`Backbone`."""
        if hasattr(self, "model"):
            return
        choice = self.inner_parameters
        model = self.make(tokenizer, choice.base_dtype if choice is not None else None)
        self.check(model, tokenizer)
        # `from_pretrained` returns a model in evaluation mode, in which dropout would stay off while training.
        self.model = (choice.choose(model) if choice is not None else model).train()
        if self.activation_checkpointing:
            # Not transformers' own way, which keeps all activations in evaluation mode, where hypergradients compute.
            for layer in transformer_layers(self.model):
                checkpoint_activations(layer)
        text_format = self.text_format(tokenizer)
        self._before, self._pad = len(text_format.before), cast(int, tokenizer.pad_token_id)
        # The configurations of models name other tokens, or none: the end is what targets end with.
        self._ends = sorted({text_format.stop, cast(int, tokenizer.eos_token_id)})
        self._start = self.decoder_start(text_format)
        self._check_suitability(torch.tensor([text_format.source(tokenizer, "Input: 7, 8.\nOutput:", 10**6)[0]]))
        if self.compile_model:
            # Batches differ in length: one program for all lengths.
            self.model.compile(dynamic=True)

    @property
    def language_model(self) -> PreTrainedModel:
        """The model of transformers itself, inside of its adapters if there are any."""
        return next(module for module in self.model.modules() if isinstance(module, PreTrainedModel))

    @torch.no_grad()
    def generate(
        self, batch: Batch, max_new_tokens: int, instruction: InstructionEmbeddings | None = None, num_beams: int = 1
    ) -> Tensor:
        """Outputs, those of a decoder behind what it begins with; see :class:`Backbone`."""
        if instruction is None:
            return self._generate(max_new_tokens, num_beams, batch.attention_mask, input_ids=batch.input_ids)
        embeddings, mask = self.read(batch, instruction)
        return self._generate(max_new_tokens, num_beams, mask, inputs_embeds=embeddings)

    def _generate(self, max_new_tokens: int, num_beams: int, mask: Tensor, **source: Tensor) -> Tensor:
        options = cast(Any, GenerationConfig)(
            max_new_tokens=max_new_tokens,
            num_beams=num_beams,
            eos_token_id=self._ends,
            pad_token_id=self._pad,
            decoder_start_token_id=self._start,
        )
        return generate_rows(self.language_model, options, mask, **source)

    def read(self, batch: Batch, instruction: InstructionEmbeddings | None) -> tuple[Tensor, Tensor]:
        """Instruction and input, ``(batch, length, dim)``, and their mask, which may have gaps."""
        embeddings = self.embedding(batch.input_ids)
        if instruction is None:
            return embeddings, batch.attention_mask
        return insert(instruction, embeddings, batch.attention_mask, self._before)

    def decoder_start(self, text_format: TextFormat) -> int | None:
        """The token that an encoder-decoder model's decoder begins with."""
        return None

    @abstractmethod
    def logits(self, source: Source, ids: Tensor, left_out: int) -> Tensor:
        """Logits ``(1, length, vocabulary)`` of what follows each of some ids, without the last ``left_out`` of them.

        Args:
            source: Makes what the model reads from ids: themselves as ``input_ids``, or ``inputs_embeds``.
            ids: The ids ``(1, length)`` of a source, and of a target where that is another sequence.
            left_out: How many ids of the target are not read.
        """

    def _check_suitability(self, ids: Tensor) -> None:
        def source(by_vectors: bool) -> Source:
            return lambda ids: {"inputs_embeds": self.embedding(ids)} if by_vectors else {"input_ids": ids}

        adapted = f" with {choice.config['peft_type']}" if isinstance(choice := self.inner_parameters, Adapter) else ""
        check_suitability(
            self.language_model,
            self.name + adapted,
            lambda by_vectors, left_out: self.logits(source(by_vectors), ids, left_out),
            lambda by_vectors: self._generate(2, 1, torch.ones_like(ids), **source(by_vectors)(ids)),
        )

    def frozen_names(self) -> list[str]:
        """Names of what was loaded and is not learned; see :class:`Backbone`."""
        if not self.is_pretrained:
            return []
        # Tied weights under each of their names, as in a checkpoint.
        named = self.named_parameters(remove_duplicate=False)
        return [name for name, parameter in named if not parameter.requires_grad]

    def check(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        """Check that a model fits the tokenizer.

        Raises:
            ConfigurationError: If it does not.
        """
        embeddings = len(cast(nn.Embedding, model.get_input_embeddings()).weight)
        if (tokens := number_of_ids(tokenizer)) > embeddings:
            raise ConfigurationError(
                f"The tokenizer has {tokens} tokens, and the model ({self.name}) {embeddings} embeddings: "
                "`data.tokenizer` must be the one of the model, or `vocab_size` of its configuration at least as large."
            )

    def _check_positions(self, needed: int, what: str) -> None:
        positions = getattr(self.config.get_text_config(), "max_position_embeddings", None)
        if positions is not None and needed > positions:
            raise ConfigurationError(
                f"{what} may have {needed} tokens together, and the model ({self.name}) has {positions} positions: "
                "lower `data.max_source_length` or `data.max_target_length`."
            )


def number_of_ids(tokenizer: PreTrainedTokenizerBase) -> int:
    """How many embeddings a tokenizer's ids need; some leave ids out, and have fewer tokens."""
    return max(len(tokenizer), 1 + max(tokenizer.get_vocab().values()))
