"""plan_epoch: an epoch of one corpus, or of a mixture of several."""

from typing import Final, Unpack

from collate.widths import check_count
from samplers.planning.mixtures.bucketed import make_bucket_mixture
from samplers.planning.mixtures.mixture import Mixture
from samplers.planning.options import PlanOptions, make_options
from samplers.planning.plan import BatchPlan, plan_corpus
from samplers.planning.sorting import Lengths

# As samplers have it; far above, the batches before an epoch are more than a float can count.
_LARGEST_EPOCH: Final = 2**31 - 1


def plan_epoch(
    lengths: Lengths | Mixture, *, epoch: int = 0, num_replicas: int = 1, **options: Unpack[PlanOptions]
) -> BatchPlan:
    """Plan an epoch: the same lengths and options give the same plan on every rank, machine and version.

    Args:
        lengths: Lengths of all samples, in time steps: integers `[N]`, or `[N, K]` for samples of K fields; a list, an
            array or a memory map, or an index that holds them; or a `Mixture` of several sources.
        epoch: Number of the epoch; of a mixture at most 2**31 - 1.
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
    if not isinstance(lengths, Mixture):
        return plan_corpus(lengths, epoch=epoch, num_replicas=num_replicas, **options)
    epoch = check_count("epoch", epoch, least=0, hint="count epochs from 0")
    if epoch > _LARGEST_EPOCH:
        raise ValueError(f"epoch must be at most {_LARGEST_EPOCH}, got {epoch}: count epochs from 0")
    num_replicas = check_count("num_replicas", num_replicas, least=1, hint="one process is 1")
    table = make_bucket_mixture(lengths, make_options(options), num_replicas)
    return BatchPlan(table, epoch, num_replicas)
