"""Generation by transformers, in which a row does not depend on others nor on what ships with a model."""

import inspect
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel

from diopt_lightning.backbones.rows import compact
from diopt_lightning.errors import ConfigurationError

# A cache does not hold the recurrent state of these, which their layers keep from one text to the next.
WITHOUT_CACHE = ("recurrent_gemma",)


def generate_rows(model: PreTrainedModel, options: GenerationConfig, mask: Tensor, **source: Tensor) -> Tensor:
    """Generate for each row what would be generated for it alone, greedily or by a search with beams.

    Nothing of ``generation_config.json`` acts: no least length, no forced, suppressed or repeated tokens.

    Args:
        model: The model, in evaluation mode.
        options: Limit, beams and special tokens.
        mask: 1 where a row has something ``(batch, length)``.
        source: ``input_ids`` ``(batch, length)`` or ``inputs_embeds`` ``(batch, length, dim)``.

    Returns:
        Tokens ``(batch, up to the limit)``; of an encoder-decoder model, behind that with which a decoder begins.

    Raises:
        ConfigurationError: If there are several beams, and the family's generation takes no vectors.
    """
    ((name, column),) = source.items()
    in_one_piece = not model.config.is_encoder_decoder
    lengths = mask.sum(dim=1)
    alone = name == "inputs_embeds" and in_one_piece and not goes_on_from_vectors(model)
    if alone and options.num_beams != 1:
        raise ConfigurationError(
            f"`num_beams` is {options.num_beams}, and {type(model).__name__} is greedy behind an instruction: set 1."
        )
    groups = [lengths == n for n in set(lengths.tolist())] if alone or sees_padding(model) else [lengths >= 0]
    found: dict[int, Tensor] = {}
    options.use_cache = model.config.model_type not in WITHOUT_CACHE
    # `generate` takes from the model what its options leave open.
    shipped, model.generation_config = model.generation_config, options
    try:
        for group in groups:
            # What is generated goes on from the last position, which must be that of a token.
            used, read = compact(mask[group], column[group], left=in_one_piece)
            if alone:
                made = by_repetition(model, options, read)
            else:
                # Not a family's own way, which for Seamless asks for a language each time.
                generate = cast(Any, GenerationMixin).generate
                read_by = {name: read, "attention_mask": used} | own_positions(model, used)
                made = generate(model, generation_config=options, **read_by)
            # Ids are given back before what goes on from them.
            new = made[:, read.shape[1] :] if in_one_piece and name == "input_ids" else made
            found |= dict(zip(group.nonzero().flatten().tolist(), new, strict=True))
    finally:
        model.generation_config = shipped
    ordered = [found[row] for row in range(len(mask))]
    return pad_sequence(ordered, batch_first=True, padding_value=cast(int, options.pad_token_id))


def own_positions(model: PreTrainedModel, mask: Tensor) -> dict[str, Tensor]:
    """Positions ``(batch, length)`` for causal families like RoBERTa, which count from behind that of padding.

    Left to itself, ``generate`` counts from 0, as no such model does when it is trained.
    """
    counting = (part for part in model.modules() if hasattr(part, "create_position_ids_from_inputs_embeds"))
    if model.config.is_encoder_decoder or (part := next(counting, None)) is None:
        return {}
    padding = cast(int, part.padding_idx)
    return {"position_ids": mask.cumsum(dim=1) * mask + padding}


def by_repetition(model: PreTrainedModel, options: GenerationConfig, vectors: Tensor) -> Tensor:
    """Generate greedily behind vectors ``(batch, length, dim)`` by reading all of them again for each token."""
    ends = torch.tensor(options.eos_token_id, device=vectors.device)
    ended = torch.zeros(len(vectors), dtype=torch.bool, device=vectors.device)
    made: list[Tensor] = []
    while len(made) < cast(int, options.max_new_tokens) and not ended.all():
        # A copy, for CTRL scales in place what it reads.
        following = cast(Any, model)(inputs_embeds=vectors.clone(), use_cache=False).logits[:, -1].argmax(dim=-1)
        made.append(following.masked_fill(ended, cast(int, options.pad_token_id)))
        ended |= torch.isin(following, ends)
        vectors = torch.cat([vectors, model.get_input_embeddings()(made[-1]).unsqueeze(1)], dim=1)
    return torch.stack(made, dim=1)


def goes_on_from_vectors(model: PreTrainedModel) -> bool:
    """Whether ``generate`` of a causal model takes vectors; without a cache it would forget them."""
    takes_them = "inputs_embeds" in inspect.signature(cast(Any, model).prepare_inputs_for_generation).parameters
    return takes_them and model.config.model_type not in WITHOUT_CACHE


def sees_padding(model: PreTrainedModel) -> bool:
    """Whether what stands before a text changes how a causal model reads it, though it is masked.

    A recurrent state goes through it, and positions that cannot be given count it. (An encoder-decoder model is padded
    behind its texts.)
    """
    if model.config.is_encoder_decoder:
        return False
    return model._is_stateful or "position_ids" not in inspect.signature(model.forward).parameters


def generates_by_length(model: PreTrainedModel) -> bool:
    """Whether :func:`generate_rows` takes rows of one length at a time, at least where they have an instruction."""
    return not model.config.is_encoder_decoder and (sees_padding(model) or not goes_on_from_vectors(model))
