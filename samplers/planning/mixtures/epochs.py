"""plan_epoch: an epoch of one corpus, or of a mixture of several."""

from typing import Unpack

from collate.widths import check_count
from samplers.planning.mixtures.bucketed import make_bucket_mixture
from samplers.planning.mixtures.mixture import Mixture
from samplers.planning.options import PlanOptions, check_epoch, make_options
from samplers.planning.plan import BatchPlan
from samplers.planning.sorting import Lengths
from samplers.planning.tables.pool_table import choose_table


def plan_epoch(
    lengths: Lengths | Mixture, *, epoch: int = 0, num_replicas: int = 1, **options: Unpack[PlanOptions]
) -> BatchPlan:
    """Plan an epoch: the same lengths and options give the same plan on every rank, machine and version.

    Args:
        lengths: Lengths of all samples, in time steps: integers `[N]`, or `[N, K]` for samples of K fields; a list, an
            array or a memory map, or an index that holds them; or a `Mixture` of several sources.
        epoch: Number of the epoch, at most 2**31 - 1.
        num_replicas: W, how many replicas share each step.
        options: Those of `LengthBucketBatchSampler`.

    Returns:
        The plan; its batches are computed when they are asked for.

    Raises:
        TypeError: Lengths or an option have the wrong type.
        LengthError: A length is negative, above every allowed width, or over the budget with `overlong="error"`.
        ValueError: An option is out of its range, no budget is given, no batch is left to plan, the last step has
            fewer rows than replicas, or a source needs more passes than it may have.

    Examples:
        >>> plan = plan_epoch([3, 9, 4, 8, 3], max_tokens=20, shuffle=False)
        >>> list(plan.batches), plan.widths.tolist()
        ([[1, 3], [2, 0, 4]], [9, 4])
        >>> plan_epoch(Mixture({"web": [3, 4, 4, 3], "code": [8, 9]}), max_tokens=20, shuffle=False).widths.tolist()
        [9, 4]
    """
    epoch = check_epoch(epoch)
    num_replicas = check_count("num_replicas", num_replicas, least=1, hint="one process is 1")
    checked = make_options(options)
    if isinstance(lengths, Mixture):
        return BatchPlan(make_bucket_mixture(lengths, checked, num_replicas), epoch, num_replicas)
    return BatchPlan(choose_table(lengths, checked), epoch, num_replicas)
