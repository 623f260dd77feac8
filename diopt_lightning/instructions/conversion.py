"""Instance conversion: networks that make an instruction, or an encoding, of an instance."""

from abc import ABC, abstractmethod
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModel, PreTrainedModel

from diopt_lightning.data.collate import IGNORED_LABEL, Batch, pad
from diopt_lightning.data.files import load_pretrained
from diopt_lightning.data.long_texts import SOURCE, TARGET, first_ids
from diopt_lightning.data.prompts import render_input
from diopt_lightning.data.tasks import Task
from diopt_lightning.data.text_format import special_tokens
from diopt_lightning.errors import ConfigurationError, require_at_least
from diopt_lightning.instructions.base import Embed, Tokenizer, outer_dtype
from diopt_lightning.instructions.initialization import embedding_scale

# Instances of a task that its description looks at.
DESCRIBED_INSTANCES = 4


def instance_tokens(batch: Batch, targets: bool) -> tuple[Tensor, Tensor]:
    """The tokens of instances ``(x, y)``: source and, if asked for, target.

    Returns:
        Token ids and mask ``(batch, length)``; there may be padding between source and target.
    """
    mask = batch.attention_mask.bool()
    if not targets:
        return batch.input_ids, mask
    there = batch.labels != IGNORED_LABEL
    ids = torch.cat([batch.input_ids, batch.labels.where(there, torch.zeros_like(batch.labels))], dim=1)
    return ids, torch.cat([mask, there], dim=1)


def example_batch(index: int, task: Task, tokenizer: Tokenizer) -> Batch:
    """The first instances of a task as a batch, without human-written instructions: to say what becomes of them.

    Texts are cut to the official limits of sources and targets.
    """
    instances = task.instances[:DESCRIBED_INSTANCES]
    before, after = special_tokens(tokenizer)
    sources = [[*before, *first_ids(tokenizer, render_input(instance.input), SOURCE), *after] for instance in instances]
    targets = [[*before, *first_ids(tokenizer, instance.outputs[0], TARGET), *after] for instance in instances]
    return Batch(
        input_ids=pad(sources, tokenizer.pad_token_id),
        attention_mask=pad([[1] * len(source) for source in sources], 0),
        labels=pad(targets, IGNORED_LABEL),
        task=torch.full((len(instances),), index),
        instance=torch.arange(len(instances)),
    )


def pooled(embeddings: Tensor, mask: Tensor) -> Tensor:
    """Mean over the positions where ``mask`` is true.

    Args:
        embeddings: ``(..., length, dim)``.
        mask: ``(..., length)``.

    Returns:
        ``(..., dim)``; zeros where there is no position.

    Example:
        >>> pooled(torch.tensor([[[2.0], [4.0], [9.0]]]), torch.tensor([[True, True, False]]))
        tensor([[3.]])
    """
    weights = mask.unsqueeze(-1).to(embeddings.dtype)
    return (embeddings * weights).sum(dim=-2) / weights.sum(dim=-2).clamp(min=1)


class Encoding(nn.Module, ABC):
    """Makes one vector of a text: of an instance, or of a candidate exemplar.

    Attributes:
        width: Length of the vector; known once it is built.
    """

    width: int

    @abstractmethod
    def build(self, embedding: nn.Embedding) -> None:
        """Make the parameters for the backbone's input embedding."""

    @abstractmethod
    def forward(self, ids: Tensor, mask: Tensor, embed: Embed) -> Tensor:
        """Encode texts ``(batch, length)`` as ``(batch, width)``."""


class Pooled(Encoding):
    """The mean of the token embeddings, with or without a hidden layer after it.

    Args:
        hidden: Width of the hidden layer, with a ReLU before and a linear layer after it. Default: none, the mean
            itself, which has no parameters.

    Raises:
        ConfigurationError: If ``hidden`` is below 1.
    """

    def __init__(self, hidden: int | None = None) -> None:
        super().__init__()
        require_at_least(1, hint="Leave it out for no hidden layer.", hidden=hidden)
        self.hidden = hidden
        self.layers = nn.Sequential()

    def build(self, embedding: nn.Embedding) -> None:
        """Make the layers, if any; see :class:`Encoding`."""
        self.width = embedding.embedding_dim
        if self.hidden is not None:
            layers = nn.Sequential(nn.Linear(self.width, self.hidden), nn.ReLU(), nn.Linear(self.hidden, self.width))
            self.layers = layers.to(embedding.weight.device, outer_dtype(embedding))

    def forward(self, ids: Tensor, mask: Tensor, embed: Embed) -> Tensor:
        """Encode texts; see :class:`Encoding`."""
        return cast(Tensor, self.layers(pooled(embed(ids), mask)))


class Transformer(Encoding):
    """The mean of a transformer encoder's outputs; with :class:`TokenWise`, each of them.

    Args:
        layers: Layers of a new encoder of the backbone's width.
        heads: Attention heads of each; they must divide the width.
        pretrained: Name on the hub, or folder, of a pretrained model whose encoder is taken instead, as a copy that is
            learned; the backbone's own name gives a copy of its encoder. It is given the backbone's tokens, so it must
            share the backbone's tokenizer.

    Raises:
        ConfigurationError: If a number is below 1, or the heads do not divide the width.
    """

    def __init__(self, layers: int = 1, heads: int = 4, pretrained: str | None = None) -> None:
        super().__init__()
        if layers < 1 or heads < 1:
            raise ConfigurationError(f"`layers` and `heads` must be 1 or more, got {layers} and {heads}.")
        self.num_layers = layers
        self.heads = heads
        self.pretrained = pretrained

    def build(self, embedding: nn.Embedding) -> None:
        """Make or load the encoder; see :class:`Encoding`."""
        if self.pretrained is not None:
            self.encoder = self._load(self.pretrained, embedding)
            return
        self.width = embedding.embedding_dim
        if self.width % self.heads:
            raise ConfigurationError(
                f"`heads` is {self.heads}, which does not divide the width of the backbone's embeddings, {self.width}."
            )
        # Without dropout: the instruction of an instance is a function of it.
        layer = nn.TransformerEncoderLayer(
            self.width, self.heads, 4 * self.width, dropout=0.0, batch_first=True, norm_first=True
        )
        encoder = nn.TransformerEncoder(layer, self.num_layers, enable_nested_tensor=False)
        self.encoder = encoder.to(embedding.weight.device, outer_dtype(embedding))

    def _load(self, name: str, embedding: nn.Embedding) -> nn.Module:
        model: PreTrainedModel = load_pretrained(AutoModel, name, "an encoder", dtype=torch.float32)
        # Of an encoder-decoder model the encoder alone (its configuration may be that of an encoder that was saved).
        encoder = model.get_encoder() if hasattr(model, "decoder") else model
        vocabulary = len(cast(nn.Embedding, model.get_input_embeddings()).weight)
        if vocabulary != len(embedding.weight):
            raise ConfigurationError(
                f"The encoder `{name}` has a vocabulary of {vocabulary} tokens, and the backbone one of "
                f"{len(embedding.weight)}: they must share a tokenizer."
            )
        self.width = model.config.hidden_size
        return cast(nn.Module, encoder).to(embedding.weight.device, outer_dtype(embedding))

    def outputs(self, ids: Tensor, mask: Tensor, embed: Embed) -> Tensor:
        """The encoder's output for each token of texts ``(batch, length)``: ``(batch, length, width)``.

        Raises:
            ConfigurationError: If a text is longer than a pretrained encoder has positions for.
        """
        if self.pretrained is not None:
            positions = getattr(self.encoder.config, "max_position_embeddings", None)
            if positions is not None and ids.shape[1] > positions:
                raise ConfigurationError(
                    f"A text of {ids.shape[1]} tokens is given to the encoder `{self.pretrained}`, which has "
                    f"{positions} positions: lower `data.max_source_length` or `candidate_length`, or take another "
                    "encoder."
                )
            return cast(Tensor, self.encoder(input_ids=ids, attention_mask=mask.long()).last_hidden_state)
        return cast(Tensor, self.encoder(embed(ids), src_key_padding_mask=~mask))

    def forward(self, ids: Tensor, mask: Tensor, embed: Embed) -> Tensor:
        """Encode texts; see :class:`Encoding`."""
        return pooled(self.outputs(ids, mask, embed), mask)


class Conversion(nn.Module, ABC):
    """Makes a soft instruction of an instance."""

    @property
    @abstractmethod
    def length(self) -> int:
        """Vectors of the longest instruction."""

    @abstractmethod
    def build(self, embedding: nn.Embedding) -> None:
        """Make the parameters for the backbone's input embedding."""

    @abstractmethod
    def forward(self, ids: Tensor, mask: Tensor, embed: Embed) -> tuple[Tensor, Tensor]:
        """Convert instances ``(batch, instance_length)`` to vectors ``(batch, length, dim)`` and their mask."""


class Linear(Conversion):
    r"""A linear map of the instance's encoding :math:`e(x, y)` to :math:`l` vectors.

    With the default encoding this is the first conversion of the paper, mean-pooled embeddings -> linear -> l x d. (The
    third, an encoder's outputs -> linear, has a vector for each token: :class:`TokenWise` with an encoder. The mean of
    these outputs, which a :class:`Transformer` makes here, is not in the paper.)

    Args:
        length: :math:`l`, the vectors of an instruction. Default: 64, as in the embedder with free parameters.
        encoding: Makes the one vector of an instance. Default: the mean of its token embeddings.

    Raises:
        ConfigurationError: If the length is not positive.
    """

    def __init__(self, length: int = 64, encoding: Encoding | None = None) -> None:
        super().__init__()
        require_at_least(1, of="a soft instruction", length=length)
        self._length = length
        self.encoding = encoding if encoding is not None else Pooled()

    @property
    def length(self) -> int:
        """Vectors of an instruction."""
        return self._length

    def build(self, embedding: nn.Embedding) -> None:
        """Make encoding and map; see :class:`Conversion`."""
        self.encoding.build(embedding)
        self.map = scaled_linear(self.encoding.width, self._length * embedding.embedding_dim, embedding)

    def forward(self, ids: Tensor, mask: Tensor, embed: Embed) -> tuple[Tensor, Tensor]:
        """Convert instances; see :class:`Conversion`."""
        encoded = unit_scale(self.encoding(ids, mask, embed))
        vectors = self.map(encoded).view(len(ids), self._length, -1)
        return vectors, torch.ones_like(vectors[..., 0], dtype=torch.bool)


class TokenWise(Conversion):
    """A linear map of each token of the instance to a vector: the second conversion of the paper, or the third.

    The second maps the tokens' embeddings, the third what an encoder, which is learned too, makes of them:
    ``linear(last_hidden_state)``.

    Args:
        max_length: Tokens of an instance that are converted; the rest is left out. Default: 128.
        relu: Whether a ReLU stands before the map. Default: no.
        encoder: The encoder whose outputs are mapped. Default: none, the embeddings are.

    Raises:
        ConfigurationError: If the length is not positive.
    """

    def __init__(self, max_length: int = 128, relu: bool = False, encoder: Transformer | None = None) -> None:
        super().__init__()
        require_at_least(1, of="a token-wise conversion", max_length=max_length)
        self.max_length = max_length
        self.relu = relu
        self.encoder = encoder

    @property
    def length(self) -> int:
        """Tokens of the longest instance that is converted whole."""
        return self.max_length

    def build(self, embedding: nn.Embedding) -> None:
        """Make the map and the encoder; see :class:`Conversion`."""
        width = embedding.embedding_dim
        if self.encoder is not None:
            self.encoder.build(embedding)
            width = self.encoder.width
        self.map = scaled_linear(width, embedding.embedding_dim, embedding)

    def forward(self, ids: Tensor, mask: Tensor, embed: Embed) -> tuple[Tensor, Tensor]:
        """Convert instances; see :class:`Conversion`."""
        # What is used moves to the front, so that the limit counts tokens and not the padding before a target.
        order = mask.int().argsort(dim=1, descending=True, stable=True)[:, : self.max_length]
        ids, mask = ids.gather(1, order), mask.gather(1, order)
        vectors = self.encoder.outputs(ids, mask, embed) if self.encoder is not None else embed(ids)
        # A pretrained encoder's outputs have the scale that its last layer was trained to give them.
        if self.encoder is None or self.encoder.pretrained is None:
            vectors = unit_scale(vectors)
        return self.map(F.relu(vectors) if self.relu else vectors), mask


def unit_scale(vectors: Tensor) -> Tensor:
    """Bring vectors to a mean square of one, as layers are initialized for; models' embeddings differ by hundreds."""
    return F.rms_norm(vectors, vectors.shape[-1:])


def scaled_linear(inputs: int, outputs: int, embedding: nn.Embedding) -> nn.Linear:
    """A linear layer whose outputs are about as long as the backbone's token embeddings at the start."""
    layer = nn.Linear(inputs, outputs).to(embedding.weight.device, outer_dtype(embedding))
    scale = embedding_scale(embedding)
    with torch.no_grad():
        layer.weight.normal_(std=scale / inputs**0.5)
        layer.bias.zero_()
    return layer
