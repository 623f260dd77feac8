"""The pairs of batches, one of each level, that a bilevel training step is given."""

from typing import Any

from diopt_lightning.errors import ConfigurationError


def check_pairs(outer_accumulation: int, inner_steps: int, inner_accumulation: int) -> None:
    """Refuse to average more hypergradients than a round has pairs of batches.

    Raises:
        ConfigurationError: If there are fewer.
    """
    if outer_accumulation > inner_steps * inner_accumulation:
        raise ConfigurationError(
            f"`outer_accumulation` is {outer_accumulation}, and a round of {inner_steps} inner step(s) of "
            f"{inner_accumulation} batch(es) has only {inner_steps * inner_accumulation} pairs: lower it, or raise "
            "`outer_batches`."
        )


def batch_of_each_level(batch: Any, outer_batches: int) -> tuple[Any, Any]:
    """The inner and the outer batch of a training step; where there are several outer batches, the list of them.

    Raises:
        ConfigurationError: If it is given something else.
    """
    if not isinstance(batch, dict) or not {"inner", "outer"} <= batch.keys():
        found = f"the keys {sorted(batch)}" if isinstance(batch, dict) else type(batch).__name__
        raise ConfigurationError(
            f"A bilevel training step needs {{'inner': batch, 'outer': batch}}, got {found}: pass "
            "`{'inner': inner_loader, 'outer': outer_loader}` as the training data loaders."
        )
    outer = batch["outer"]
    if outer_batches > 1 and not (isinstance(outer, list | tuple) and len(outer) == outer_batches):
        found = f"{len(outer)} in a {type(outer).__name__}" if isinstance(outer, list | tuple) else type(outer).__name__
        raise ConfigurationError(
            f"`outer_batches` is {outer_batches}, and a step is given {found}: pass `{{'inner': inner_loader, 'outer': "
            f"[outer_loader] * {outer_batches}}}`, with loaders that shuffle, as the training data loaders."
        )
    return batch["inner"], outer
