"""Padding before and after planning, for the picture of the first page: the corpus and the budget of `make demo`.

Both figures are those of the plan's own report. The corpus is Python's standard library, so that another version of
Python gives another picture. `pages.py` draws it.
"""

from pathlib import Path

from harness import save
from language_model import MAX_TOKENS, random_batches
from stdlib_corpus import open_corpus

from samplers import plan_epoch

SHOWN = 4


def main() -> None:
    """Plan the corpus; save the padding of the epoch, and the lengths in the first batches."""
    lengths = open_corpus(Path("runs/stdlib")).index.lengths[:, 0]
    plan = plan_epoch(lengths, max_tokens=MAX_TOKENS, overlong="drop")
    random = random_batches(lengths)
    kinds = {
        "random": (plan.random_padding, [next(random) for _ in range(SHOWN)]),
        "planned": (plan.report().padding, plan.batches[:SHOWN]),
    }
    results = {
        kind: {"padding": padding, "batches": [sorted(lengths[batch].tolist(), reverse=True) for batch in batches]}
        for kind, (padding, batches) in kinds.items()
    }
    save("padding", results)
    for kind, one in results.items():
        print(f"{kind}: {one['padding']:.1%} padding, batches of {[len(batch) for batch in one['batches']]} rows")


if __name__ == "__main__":
    main()
