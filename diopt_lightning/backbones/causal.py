"""Causal models of transformers: GPT-2, Llama, Qwen, Gemma."""

from typing import Any, cast

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from diopt_lightning.backbones.random_weights import RandomWeights
from diopt_lightning.backbones.rows import compact, token_losses
from diopt_lightning.backbones.transformer import Source, TransformersBackbone
from diopt_lightning.data.collate import IGNORED_LABEL, Batch
from diopt_lightning.data.text_format import TextFormat, causal_format, chat_format
from diopt_lightning.errors import ConfigurationError
from diopt_lightning.instructions.base import InstructionEmbeddings


class Causal(TransformersBackbone):
    """A pretrained ``AutoModelForCausalLM``, which reads ``[instruction ; input ; target]`` in one piece.

    The instruction enters behind what opens the prompt: the token that begins a sequence, if the tokenizer has one, or
    the opening of the user's turn. The loss is that of the target's tokens alone, and of the token that ends it. The
    model keeps its fast attention kernel; where an exact hypergradient needs one that is twice differentiable, the
    engine switches it for that step alone.

    Args:
        pretrained: Name on the hub, or folder, of a pretrained model, e.g. ``HuggingFaceTB/SmolLM2-135M``.
        chat_template: Write source and target as the turns of user and assistant, exactly as the tokenizer's chat
            template writes that dialogue; for models that were tuned to chat. Default: no, the target goes on behind
            ``Output:``.
        template_arguments: What the template is given beside the dialogue, e.g. ``{"enable_thinking": False}``, or the
            date where it would write that of the day.
        options: As of every :class:`TransformersBackbone`.

    Example:
        >>> backbone = Causal("HuggingFaceTB/SmolLM2-135M-Instruct", chat_template=True)  # loaded when training starts
    """

    is_encoder_decoder = False
    auto_class = AutoModelForCausalLM
    family = "a causal model"

    def __init__(
        self,
        pretrained: str,
        chat_template: bool = False,
        template_arguments: dict[str, Any] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(pretrained, **options)
        if template_arguments and not chat_template:
            raise ConfigurationError("`template_arguments` are for a chat template, and `chat_template` is false.")
        self.chat_template = chat_template
        self.template_arguments = template_arguments

    def text_format(self, tokenizer: PreTrainedTokenizerBase) -> TextFormat:
        """The target goes on from the source, or answers it; see :class:`Backbone`."""
        return chat_format(tokenizer, self.template_arguments) if self.chat_template else causal_format(tokenizer)

    def check_lengths(self, source: int, target: int) -> None:
        """Check both in one piece; see :class:`Backbone`."""
        self._check_positions(source + target, "A source and its target")

    def target_losses(
        self, batch: Batch, instruction: InstructionEmbeddings | None, label_smoothing: float = 0.0
    ) -> Tensor:
        """Losses ``(batch,)``; see :class:`Backbone`."""
        embeddings, mask = self.read(batch, instruction)
        is_target = batch.labels != IGNORED_LABEL
        targets = self.embedding(batch.labels.masked_fill(~is_target, self._pad))
        labels = torch.cat([torch.full_like(mask, IGNORED_LABEL), batch.labels], dim=1)
        mask, embeddings, labels = compact(
            torch.cat([mask, is_target.to(mask.dtype)], dim=1), torch.cat([embeddings, targets], dim=1), labels
        )
        # The output before each token predicts it; none is computed before the first target of the batch.
        first = int((labels != IGNORED_LABEL).int().argmax(dim=1).min())
        predicting = torch.arange(first - 1, labels.shape[1] - 1, device=labels.device)
        output = self.model(inputs_embeds=embeddings, attention_mask=mask, use_cache=False, logits_to_keep=predicting)
        # A few families compute all of them nevertheless.
        every = output.logits.shape[1] == labels.shape[1] > len(predicting)
        logits = output.logits[:, predicting] if every else output.logits
        return token_losses(logits, labels[:, first:], label_smoothing)

    def logits(self, source: Source, ids: Tensor, left_out: int) -> Tensor:
        """Logits of one piece; see :class:`TransformersBackbone`."""
        return cast(Tensor, self.model(**source(ids[:, : ids.shape[1] - left_out]), use_cache=False).logits)


class RandomCausal(RandomWeights, Causal):
    """An ``AutoModelForCausalLM`` with random weights, made from a configuration.

    Example:
        >>> backbone = RandomCausal({"model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2})
    """
