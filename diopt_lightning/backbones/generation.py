"""Greedy generation by transformers, in which a row does not depend on others nor on what ships with a model."""

import inspect
from typing import Any, cast

from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, PreTrainedModel

from diopt_lightning.backbones.rows import compact


def greedy(model: PreTrainedModel, options: GenerationConfig, mask: Tensor, **source: Tensor) -> Tensor:
    """Generate greedily for each row what would be generated for it alone.

    Nothing of ``generation_config.json`` acts: no least length, no forced, suppressed or repeated tokens, no beams.

    Args:
        model: The model, in evaluation mode.
        options: Limit and special tokens.
        mask: 1 where a row has something ``(batch, length)``.
        source: ``input_ids`` ``(batch, length)`` or ``inputs_embeds`` ``(batch, length, dim)``.

    Returns:
        Tokens ``(batch, up to the limit)``; of an encoder-decoder model, behind that with which a decoder begins.
    """
    ((name, column),) = source.items()
    in_one_piece = not model.config.is_encoder_decoder
    lengths = mask.sum(dim=1)
    groups = [lengths == length for length in set(lengths.tolist())] if sees_padding(model) else [lengths >= 0]
    found: dict[int, Tensor] = {}
    # `generate` takes from the model what its options leave open.
    shipped, model.generation_config = model.generation_config, options
    try:
        for group in groups:
            # What is generated goes on from the last position, which must be that of a token.
            used, read = compact(mask[group], column[group], left=in_one_piece)
            made = cast(Any, model).generate(generation_config=options, attention_mask=used, **{name: read})
            # Ids are given back before what goes on from them.
            new = made[:, read.shape[1] :] if in_one_piece and name == "input_ids" else made
            found |= dict(zip(group.nonzero().flatten().tolist(), new, strict=True))
    finally:
        model.generation_config = shipped
    ordered = [found[row] for row in range(len(mask))]
    return pad_sequence(ordered, batch_first=True, padding_value=cast(int, options.pad_token_id))


def sees_padding(model: PreTrainedModel) -> bool:
    """Whether what stands before a text changes how a causal model reads it, though it is masked.

    A recurrent state goes through it, and positions that cannot be given count it. (An encoder-decoder model is padded
    behind its texts.)
    """
    if model.config.is_encoder_decoder:
        return False
    return model._is_stateful or "position_ids" not in inspect.signature(model.forward).parameters
