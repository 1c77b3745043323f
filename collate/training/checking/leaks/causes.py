"""Mistakes that let documents reach each other, the likeliest first, and numbers of documents, as reports name them."""

from collections.abc import Sequence
from typing import Final

OTHER_DOCUMENTS: Final = (
    "a 2-D attention mask or a cache given next to position ids, which switches document masks off: pass "
    "batch.kwargs_for(...)",
    "no mask of documents, a mask of the wrong polarity, or offsets of another batch or off by one",
    "a convolution, a scan or a recurrent state that does not begin again at each document",
    "labels shifted over the whole row, so that the last step of a document predicts the next one: next_step_labels()",
    "a normalisation, a pooled statistic or an attention sink over the whole row",
    "pieces of a context-parallel group joined in another order, or offsets beyond int32",
    "results in another order than the documents have in the rows, as after unsort()",
)
BACKWARD: Final = (
    "a custom backward pass that reads across borders",
    "a kernel whose backward has other offsets than its forward",
)
DEAD_DOCUMENT: Final = (
    "a document that is left out, as the last one by cu_seqlens[:-1] or a loop over borders",
    "results in another order than the documents of the batch: return them as they are in the rows",
    "offsets of another batch, or off by one",
)
ORDER: Final = (
    "positions that run through the row: use position_ids, which begin again at each document",
    "a state or a mask that depends on where in its row a document is",
    "offsets that are kept from another batch",
)
MEETING: Final = {
    "batch norm": ("statistics over all documents of the batch: right where that is wanted, as in any batch",),
    "experts": (
        "a capacity that documents share, so that one document's steps push out another's",
        "products whose sizes depend on how many steps each expert gets, so that rounding differs",
    ),
}


def name_documents(documents: Sequence[int], shown: int = 6) -> str:
    """A few numbers of documents for a message.

    >>> name_documents([3]), name_documents(range(9))
    ('document 3', 'documents 0, 1, 2, 3, 4, 5 and 3 more')
    """
    names = ", ".join(str(document) for document in documents[:shown])
    more = f" and {len(documents) - shown} more" if len(documents) > shown else ""
    return f"document{'s' if len(documents) > 1 else ''} {names}{more}"
