"""How many rows there are: the same in every epoch, found before the first one, whatever the seed."""

from dataclasses import dataclass
from typing import Final, NamedTuple

from samplers.planning.keyed_shuffle import derive_key
from samplers.planning.packs.best_fit import count_rows
from samplers.planning.packs.groups import Tree
from samplers.planning.packs.ladder import FULL_NOISE, LADDER, PackTask, Rung, attempt, fill_empty

# Rows beyond best-fit's, in thousandths: room in which an attempt can place documents more freely.
EXTRA: Final = 3
# From this many rows on, one more is cheap enough where only rungs from FREEZING on succeed: their rows change little.
# With 174 rows of a corpus 1.37 % of the pairs met again in the next epoch, with 175 rows 0.58 %.
ENOUGH_ROWS: Final = 100
FREEZING: Final = FULL_NOISE + 5
# From this many documents in a row on average, less noise is tried first; below the other, the search for a rung begins
# further down.
MANY_DOCUMENTS: Final = 24
FEW_DOCUMENTS: Final = 12
FEW_START: Final = FULL_NOISE + 3
# With several limits, the excess over the bound doubles until an attempt succeeds, and is halved again in this many
# steps.
_HALVINGS: Final = 2
# What a key is for.
_CONSTRUCTION: Final = 40


class Proof(NamedTuple):
    """That a number of rows holds all documents: the rung that fills them, with a key that never changes.

    Attributes:
        rows: The number.
        rung: Number of the rung.
    """

    rows: int
    rung: int

    def fill(self, task: PackTask, rows: int) -> Tree:
        """Recipes for that many rows, at least those of the proof and at most as many as documents.

        Raises:
            RuntimeError: The proof is of another task.
        """
        tree = _draw(task, self.rows, self.rung, 0)
        if tree is None:
            raise RuntimeError(f"{self} must hold its documents, got one that fits nowhere")
        return _widen(tree, rows)


@dataclass(frozen=True, eq=False)
class RowPlan:
    """The number of rows, and how epochs fill them.

    Attributes:
        rows: In every epoch.
        rungs: The rung of an epoch's first attempts, of the next, and so on.
        spare: Recipes that hold all documents, for epochs whose attempts fail; or the proof from which they are made.
    """

    rows: int
    rungs: tuple[Rung, ...]
    spare: Tree | Proof


def prove_rows(task: PackTask, like: RowPlan, bound: int) -> Proof:
    """A number of rows that holds all documents, found without a search: best-fit's where there is one limit.

    With several limits it exceeds the bound by the share by which a larger set of such documents did, or by a little
    more.

    Args:
        task: What to place.
        like: The rows of the larger set.
        bound: Rows that any packing of the larger set needs.
    """
    if len(task.limits) == 1:
        sizes, counts = task.sizes[:, 0].tolist(), task.counts.tolist()
        return Proof(count_rows(sizes, counts, int(task.limits[0])), len(LADDER) - 1)
    documents, rung = int(task.counts.sum()), LADDER.index(like.rungs[0])
    rows = -(-task.bound * like.rows // bound)
    # It ends: where there are as many rows as documents, an empty one always remains.
    while rows < documents and _draw(task, rows, rung, 0) is None:
        rows += 1 + rows // 200
    return Proof(min(rows, documents), rung)


def choose_rows(task: PackTask, best_fit: tuple[int, int] | None, *, is_brief: bool = False) -> RowPlan:
    """Choose the number of rows and the rung.

    Args:
        task: What to place.
        best_fit: Rows of best-fit decreasing by the first limit alone, for the true lengths and for the slots; None
            where it is not known, with several fields.
        is_brief: Where there is one limit, look for a rung that succeeds once, and not for the lowest that does so
            twice: fewer attempts, for hundreds of small corpora.

    Raises:
        RuntimeError: Best-fit decreasing does not fill the rows that it takes: a fault of this module.
    """
    documents = int(task.counts.sum())
    if best_fit is None or len(task.limits) > 1:
        return _choose_by_trials(task, documents, 0 if best_fit is None else best_fit[0])
    rows = min(documents, max(best_fit[0] + best_fit[0] * EXTRA // 1_000, best_fit[1]))
    start = FEW_START if documents < FEW_DOCUMENTS * rows else _first_rung(task, rows)
    if is_brief:
        return _choose_briefly(task, rows, start)
    index, spare = _lowest_rung(task, rows, len(LADDER), start)
    if index >= FREEZING and ENOUGH_ROWS <= rows < documents:
        rows += 1
        index, spare = _lowest_rung(task, rows, len(LADDER), start)
    if spare is None:
        raise RuntimeError(f"best-fit decreasing must fill {rows} rows, got a document that fits in none")
    return RowPlan(rows, LADDER[index : index + 2], spare)


def _choose_briefly(task: PackTask, rows: int, start: int) -> RowPlan:
    """A rung that succeeds once, found at strides that double; then by halving, where its rows would change little.

    Raises:
        RuntimeError: Best-fit decreasing does not fill the rows that it takes: a fault of this module.
    """
    last = len(LADDER) - 1
    low, index, stride = start - 1, start, 1
    while (spare := _draw(task, rows, index, 0)) is None:
        if index == last:
            raise RuntimeError(f"best-fit decreasing must fill {rows} rows, got a document that fits in none")
        low, index, stride = index, min(index + stride, last), stride * 2
    while index - low > 1 and index >= FREEZING:
        middle = (low + index) // 2
        tree = _draw(task, rows, middle, 0)
        low, index, spare = (middle, index, spare) if tree is None else (low, middle, tree)
    # Its next draws may fail: some further down are tried then.
    further = (LADDER[min(index + number, last)] for number in (0, 1, 3, 6))
    return RowPlan(rows, tuple(dict.fromkeys(further)), spare)


def _choose_by_trials(task: PackTask, documents: int, best_fit: int) -> RowPlan:
    """With several limits best-fit is far from the bound: the fewest rows over the bound that a spread can fill."""
    step = -(-task.bound * EXTRA // 1_000)
    # Fewer rows than best-fit takes for one of the limits are hardly worth an attempt.
    low, high = task.bound - 1, max(best_fit, task.bound + (step if task.bound >= ENOUGH_ROWS else 0))
    high = min(documents, high)
    rung = _trial_rung(documents, high)
    draw = _Draws(task)
    # It ends: where there are as many rows as documents, an empty one always remains.
    while high < documents and draw(high, rung) is None:
        low, high = high, min(documents, high + max(step, high - task.bound))
    for _ in range(_HALVINGS):
        if low >= task.bound and high - low > step:
            middle = (low + high) // 2
            low, high = (middle, high) if draw(middle, rung) is None else (low, middle)
    while (found := _confirm(task, high, rung, draw(high, rung))) is None:
        high = min(documents, high + step)
    rows = min(documents, high + high // 1_000)
    spare = _widen(found, rows)
    first = _first_rung(task, rows)
    while rung > first and (tree := draw(rows, rung - 1)) and _confirm(task, rows, rung - 1, tree):
        rung, spare = rung - 1, tree
    # Where the number of documents is the nearest limit, little noise succeeds when all else fails.
    rungs = dict.fromkeys((*LADDER[rung : rung + 2], LADDER[FULL_NOISE - 1]))
    return RowPlan(rows, tuple(rungs), spare)


def _trial_rung(documents: int, rows: int) -> int:
    """The rung that decides whether a number of rows will do."""
    if documents >= MANY_DOCUMENTS * rows:
        return FULL_NOISE - 1
    return FULL_NOISE if documents >= FEW_DOCUMENTS * rows else FULL_NOISE + 2


class _Draws:
    """First draws of a task, each made once."""

    def __init__(self, task: PackTask) -> None:
        self._task = task
        self._trees: dict[tuple[int, int], Tree | None] = {}

    def __call__(self, rows: int, rung: int) -> Tree | None:
        if (rows, rung) not in self._trees:
            self._trees[rows, rung] = _draw(self._task, rows, rung, 0)
        return self._trees[rows, rung]


def _widen(tree: Tree, rows: int) -> Tree:
    """The same recipes with more rows: each of them gets a document of another."""
    more = tree.rows.copy()
    more[0] = rows
    return fill_empty(tree._replace(rows=more))


def _first_rung(task: PackTask, rows: int) -> int:
    """The first rung that is worth a try."""
    return 0 if int(task.counts.sum()) >= MANY_DOCUMENTS * rows else FULL_NOISE


def _lowest_rung(task: PackTask, rows: int, count: int, start: int) -> tuple[int, Tree | None]:
    """The first of `count` rungs that succeeds, and its recipes; None where not even the last one does.

    Rungs further down succeed more often, as a rule. So one attempt each, at strides that double and then by halving,
    finds the rung to begin at; the rung is the first from there on that succeeds twice before it fails twice.

    Args:
        task: What to place.
        rows: Rows.
        count: How many rungs are tried.
        start: The rung that is tried first.
    """
    trees: dict[int, Tree | None] = {}

    def succeeds(index: int) -> bool:
        trees[index] = _draw(task, rows, index, 0)
        return trees[index] is not None

    low, high, stride = _first_rung(task, rows) - 1, start, 1
    while high < count - 1 and not succeeds(high):
        low, high, stride = high, min(high + stride, count - 1), stride * 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if succeeds(middle) else (middle, high)
    for index in range(high, count):
        if index not in trees:
            succeeds(index)
        tree = trees[index]
        # The last rung draws nothing.
        if index < len(LADDER) - 1:
            tree = _confirm(task, rows, index, tree)
        if tree is not None:
            return index, tree
    return count - 1, None


def _confirm(task: PackTask, rows: int, index: int, tree: Tree | None) -> Tree | None:
    """Recipes of a rung that succeeds twice before it fails twice, where its first attempt gave `tree`; or None."""
    again = _draw(task, rows, index, 1)
    if (again is None) == (tree is None):
        return again
    last = _draw(task, rows, index, 2)
    if last is None:
        return None
    return last


def _draw(task: PackTask, rows: int, index: int, draw: int) -> Tree | None:
    # Keys belong to rungs: one that is put before others leaves their draws as they are.
    number = index - FULL_NOISE if index >= FULL_NOISE else len(LADDER) + index
    return attempt(task, rows, LADDER[index], derive_key(_CONSTRUCTION, number, draw))
