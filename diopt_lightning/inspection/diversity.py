r"""How much the instructions of several tasks differ: the paper's diversity analysis.

A task's vector is the mean of its instruction's embeddings (:func:`task_vectors`), for learned instructions and for
embedded human definitions alike. Everything is computed in float64.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from diopt_lightning.errors import TrainingError


def task_vectors(instructions: Sequence[Tensor]) -> Tensor:
    """Return the mean of each instruction ``(length, dim)``, together ``(tasks, dim)`` in float64 on the CPU.

    An instruction without any vector counts as zero.

    Example:
        >>> task_vectors([torch.tensor([[1.0, 0.0], [3.0, 0.0]]), torch.tensor([[0.0, 5.0]])])
        tensor([[2., 0.],
                [0., 5.]], dtype=torch.float64)
    """
    # On the CPU first: not every accelerator knows float64.
    return torch.stack([rows.detach().cpu().double().sum(dim=0) / max(1, len(rows)) for rows in instructions])


def mean_pairwise_cosine_distance(vectors: Tensor) -> float:
    r"""Return the mean of :math:`1 - \cos(v_i, v_j)` over all pairs :math:`i < j` of different tasks.

    From 0, where all point the same way, to a little above 1 (:math:`n / (n - 1)` is the most that :math:`n` vectors
    can have). With :math:`u_i = v_i / |v_i|` no pair has to be looked at:

    .. math:: \sum_{i<j} \cos(v_i, v_j) = \tfrac{1}{2} \Big( \big|\sum_i u_i\big|^2 - \sum_i |u_i|^2 \Big)

    A zero vector has no direction: it counts as at a right angle to every other. One task alone has no pair, and no
    distance: 0.

    Args:
        vectors: One for each task, ``(tasks, dim)``.

    Example:
        >>> mean_pairwise_cosine_distance(torch.eye(3))
        1.0
        >>> mean_pairwise_cosine_distance(torch.ones(3, 2))
        0.0
    """
    number = len(vectors)
    if number < 2:
        return 0.0
    units = torch.nn.functional.normalize(vectors.detach().double(), dim=-1, eps=torch.finfo(torch.float64).tiny)
    cosines = (units.sum(dim=0).square().sum() - units.square().sum()) / (number * (number - 1))
    # Equal vectors come out some 1e-16 beside zero, on either side.
    return max(0.0, 1.0 - round(cosines.item(), 14))


def effective_rank(vectors: Tensor) -> float:
    r"""Return the effective rank (Roy and Vetterli 2007): in how many directions the vectors spread.

    With singular values :math:`\sigma_k` of the matrix of all vectors it is the exponential of an entropy,

    .. math:: \exp\Big(-\sum_k p_k \log p_k\Big) \quad\text{with}\quad p_k = \sigma_k / \sum_l \sigma_l

    from 1, where all are multiples of one vector, to the smaller side of the matrix, where all singular values are
    equal. The vectors are taken as they are: their mean is not subtracted, as in the original definition, so that a
    direction common to all counts as one. Only zeros have rank 0.

    Args:
        vectors: One for each task, ``(tasks, dim)``.

    Example:
        >>> round(effective_rank(torch.eye(3)), 6)
        3.0
        >>> round(effective_rank(torch.ones(3, 2)), 6)
        1.0
    """
    singular = torch.linalg.svdvals(finite(vectors))
    if not singular.any():
        return 0.0
    shares = singular / singular.sum()
    return math.exp(torch.special.entr(shares).sum().item())


class Plane(NamedTuple):
    """Instructions and definitions in two dimensions.

    Args:
        learned: Coordinates of learned instructions ``(tasks, 2)``.
        human: Coordinates of human definitions ``(tasks, 2)``.
        share: How much of the variance each of the two dimensions has.
    """

    learned: Tensor
    human: Tensor
    share: tuple[float, float]


def two_dimensional(learned: Tensor, human: Tensor) -> Plane:
    r"""Project both onto the first two principal components of both together.

    The rows :math:`X` of both, less their common mean, have the singular value decomposition :math:`U S V^T`; the
    coordinates are :math:`X V_{:, :2}`. A singular vector's sign is arbitrary: here its entry of the largest magnitude
    is positive, so that a picture does not flip from one look to the next. Dimensions that the vectors do not have are
    zero.

    Args:
        learned: ``(tasks, dim)``.
        human: ``(tasks, dim)``, of the same tasks or of others.

    Example:
        >>> plane = two_dimensional(torch.tensor([[3.0, 0.0]]), torch.tensor([[1.0, 0.0]]))
        >>> plane.learned, plane.human, plane.share
        (tensor([[1., 0.]], dtype=torch.float64), tensor([[-1., 0.]], dtype=torch.float64), (1.0, 0.0))
    """
    rows = finite(torch.cat([learned, human]))
    size = torch.linalg.matrix_norm(rows)
    rows = rows - rows.mean(dim=0)
    _, singular, directions = torch.linalg.svd(rows, full_matrices=False)
    directions = directions[:2][singular[:2] > 1e-12 * size]  # below it is rounding, not a direction
    largest = directions.gather(1, directions.abs().argmax(dim=1, keepdim=True))
    points = torch.zeros(len(rows), 2, dtype=rows.dtype)
    points[:, : len(directions)] = rows @ (directions * largest.sign()).T
    shares = [*(singular.square() / singular.square().sum())[: len(directions)].tolist(), 0.0, 0.0]
    return Plane(points[: len(learned)], points[len(learned) :], (shares[0], shares[1]))


def finite(vectors: Tensor) -> Tensor:
    """Vectors in double precision, for a decomposition that fails within where they are not finite.

    Raises:
        TrainingError: If they are not.
    """
    if not vectors.isfinite().all():
        raise TrainingError(
            "Vectors of instructions are not finite: weights of the model or of the instruction have become NaN or "
            "infinite. Go on from an earlier checkpoint with lower learning rates, or train in a wider precision "
            "(`trainer.precision`)."
        )
    return vectors.detach().double()


def measure(vectors: Tensor) -> dict[str, float]:
    """Return both numbers by name, to six digits.

    Example:
        >>> measure(torch.eye(2))
        {'mean_cosine_distance': 1.0, 'effective_rank': 2.0}
    """
    return {
        "mean_cosine_distance": round(mean_pairwise_cosine_distance(vectors), 6),
        "effective_rank": round(effective_rank(vectors), 6),
    }
