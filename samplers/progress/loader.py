"""PlannedLoader: what a batch sampler and a shard stream have in common: plans, epochs and positions."""

from collections.abc import Mapping
from copy import copy
from functools import cached_property
from typing import Any, Self

from collate.deprecated.names import renamed_arguments
from collate.widths import Widths, check_count
from samplers.planning.mixtures.mixed_table import MixedTable
from samplers.planning.mixtures.mixture import Mixture
from samplers.planning.mixtures.report import MixtureReport
from samplers.planning.options import EpochOptions, Options, check_epoch
from samplers.planning.plan import BatchPlan
from samplers.planning.schedules.schedule import Schedule, count_steps, make_schedule
from samplers.planning.schedules.updates import Labels, RowsOf, Updates, make_updates
from samplers.planning.tables.batch_table import BatchTable
from samplers.planning.tables.epoch_table import EpochTable, Shape
from samplers.progress.epoch_cursor import EpochCursor
from samplers.progress.loop_updates import LoopUpdates
from samplers.progress.position import Position, PositionDict, make_fingerprint, refuse_iterator_state
from samplers.progress.shared_cursor import SharedEpochCursor


class PlannedLoader:
    """Epochs of planned batches, and positions in them.

    A class that inherits sets the attributes below. Its iterators decide which epoch they take at their first batch.

    Attributes:
        num_replicas: W, how many replicas share each step.
        options: The planner's, checked.
    """

    num_replicas: int
    options: EpochOptions
    _cursor: EpochCursor | SharedEpochCursor
    _table: EpochTable
    # Batches of each replica in a whole epoch.
    _steps: int
    # What was planned, with the fingerprint that an index has; or a mixture.
    _lengths: Any
    # Batches that one iterator gives in each step.
    _batches_per_step = 1

    def __copy__(self) -> Self:
        new = self.__class__.__new__(self.__class__)
        # A copy begins where the original stands, and then moves independently.
        new.__dict__.update(self.__dict__, _cursor=copy(self._cursor))
        return new

    @property
    def epoch(self) -> int:
        """The epoch that the next iteration begins or resumes: it advances when an iteration takes its first batch."""
        return self._cursor.next_start.epoch

    @property
    def shapes(self) -> list[Shape]:
        """Shapes `(rows, (width, ...))`, a width for each field, that hold every batch of any epoch.

        A batch that is split or left short is smaller than one of them.
        """
        return self._table.shapes

    @property
    def remaining(self) -> int:
        """Batches that the next iteration gives: `len`, or fewer after `seek`."""
        return self.schedule_from(self._cursor.next_start).steps * self._batches_per_step

    @property
    def next_position(self) -> PositionDict:
        """Where the next iteration begins, as `position` tells it for the present iteration."""
        return self.state_of(self._cursor.next_start)

    @cached_property
    def fingerprint(self) -> str:
        """Short digests of the lengths, the options and the seed, which a position carries."""
        return make_fingerprint(self._lengths, self._table)

    def set_epoch(self, epoch: int) -> None:
        """Let the next iteration begin this epoch; a position that was sought in another epoch is forgotten.

        Raises:
            TypeError: The epoch is not an int.
            ValueError: The epoch is negative.
        """
        self._cursor.set_epoch(check_epoch(epoch))

    @renamed_arguments(steps="batches")
    def position(self, batches: int) -> PositionDict:
        """Where the epoch stands after this replica's first `batches` batches of the present iteration.

        A loader's workers run ahead of training, so only the training loop knows how many batches it has used.

        Args:
            batches: Batches that each replica has used since the present iteration began. That is the last iteration
                that has taken a batch; if none has since `seek`, or since `set_epoch` to another epoch, the next one.

        Returns:
            Five primitive values, under 1 kB, the same on all replicas, for `seek` on any number of replicas and
            workers. Of a mixture, a sixth: a text that says what was taken of each source before its weights changed.

        Raises:
            TypeError: `batches` is not an int.
            ValueError: The iteration has fewer batches.
        """
        start, before = self._cursor.last_start
        schedule = self.schedule_from(start)
        batches = check_count("batches", batches, least=0, hint="count the batches used since the iteration began")
        if before + batches > schedule.steps:
            raise ValueError(
                f"batches must be at most {schedule.steps - before}, the iteration's batches, got {batches}"
            )
        return self.position_after(start, before + batches)

    def position_after(self, start: Position, steps: int) -> PositionDict:
        """Where the epoch stands after this many steps from a position on."""
        taken = self.schedule_from(start).taken_after(steps)
        return self.state_of(Position(start.epoch, start.replicas, taken))

    def updates(
        self, *, accumulate: int | None = None, step_tokens: int | None = None, labels: Labels | None = None
    ) -> LoopUpdates:
        """The optimizer steps of a loop that accumulates gradients, for all epochs.

        All replicas have equally many batches in each update, and know its tokens, documents and rows over all replicas
        before its first batch, without communication. A position inside an update resumes without the gradients that
        were accumulated: save at the end of one.

        Args:
            accumulate: Batches of each replica in an update; the last update of an epoch may have fewer.
            step_tokens: Instead, labelled tokens of an update over all replicas. It ends with the step that comes
                nearest: half a step off at most, except in the last update of an epoch.
            labels: How many labelled tokens a sample has: integers `[N]`, or a function of the planned lengths, int64
                `[n]` or `[n, K]` -> `[n]`, such as `lambda lengths: lengths - 1` where each step predicts the next.
                None takes all real tokens, of all fields.

        Returns:
            Call its `at(number)` for each batch of the loop.

        Raises:
            TypeError: A number is not an int.
            ValueError: Neither or both of the first two are given, one is below 1, or labels are not one number from 0
                on for each sample.

        Examples:
            >>> from samplers import LengthBucketBatchSampler
            >>> sampler = LengthBucketBatchSampler([5, 4, 4, 3, 2, 2], batch_size=1, shuffle=False)
            >>> updates = sampler.updates(step_tokens=8)
            >>> for number, batch in enumerate(sampler):
            ...     update = updates.at(number)
            ...     print(batch, update.number, update.tokens, "step" if update.is_last else "")
            [0] 0 9
            [1] 0 9 step
            [2] 1 7
            [3] 1 7 step
            [4] 2 4
            [5] 2 4 step
        """

        def make(start: Position) -> Updates:
            options = {"accumulate": accumulate, "step_tokens": step_tokens}
            return make_updates(self.schedule_from(start), self._rows_of(), labels=labels, **options)

        updates = LoopUpdates(lambda: (*self._cursor.last_start, self._table), make)
        # What is wrong is refused here.
        _ = updates.present
        return updates

    def seek(self, position: Mapping[str, Any], *, mixture: Mixture | None = None) -> None:
        """Let the next iteration that takes a batch resume from a position, once; the next epoch comes after it.

        `set_epoch` to the position's epoch keeps the position, to another one forgets it.

        Args:
            position: From `position`, of the same lengths, options and seed.
            mixture: The mixture that takes over at this position, where one is planned: other weights, other sources,
                or another end. What was taken before stays taken: sources of the same name go on where they stand. An
                epoch of the new mixture begins here, of the position's number; later positions say so, and a new
                sampler or stream of the new mixture resumes from them.

        Raises:
            TypeError: The position is not a mapping, one of its values has the wrong type, or no mixture is planned.
            ValueError: It is of other lengths, options, seed or version, this number of replicas cannot share the
                remaining batches of its epoch, or a source has other lengths than before.
            LengthError: A length of a new source is not allowed.
        """
        refuse_iterator_state(position)
        if mixture is None:
            self._cursor.seek(self.read_position(position))
            return
        if not isinstance(self._table, MixedTable) or not isinstance(mixture, Mixture):
            raise TypeError(
                f"mixture must be a Mixture where one is planned, got {type(mixture).__name__} for a plan of "
                f"{type(self._lengths).__name__}"
            )
        before, start = self._find_position(position)
        table = self._make_table(mixture).follow(before, start.epoch, start.replicas, start.batches)
        self._take_mixture(mixture, table)
        self._cursor.seek(Position(start.epoch, self.num_replicas))

    def mixture_report(self, position: Mapping[str, Any] | None = None) -> MixtureReport:
        """What each source of a mixture has given at a position, and what its share wants.

        Args:
            position: From `position`; None for where the next iteration begins.

        Raises:
            TypeError: No mixture is planned, or the position is not a mapping of the right types.
            ValueError: The position is of other lengths, options, seed or version.
        """
        if not isinstance(self._table, MixedTable):
            raise TypeError(f"a report of a mixture must be of a plan of one, got {type(self._lengths).__name__}")
        table, start = self._find_position(self.next_position if position is None else position)
        return table.report_at(start.epoch, start.replicas, start.batches)  # type: ignore[attr-defined, no-any-return]

    def read_position(self, state: Mapping[str, Any]) -> Position:
        """The position in a state, checked; the errors are those of `seek`."""
        table, position = self._find_position(state)
        self._use_table(table)
        return position

    def _make_table(self, lengths: Any) -> Any:
        """The batches of any epoch of these lengths, or of a mixture, with the options given."""
        raise NotImplementedError

    def _take_mixture(self, mixture: Mixture, table: EpochTable) -> None:
        """Let another mixture take over."""
        self._use_table(table)
        self._lengths = mixture

    def _rows_of(self) -> RowsOf | None:
        """What counts the rows of each step, where they hold several samples."""
        return None

    def _find_position(self, state: Mapping[str, Any]) -> tuple[EpochTable, Position]:
        """The table and the position of a state, checked; nothing changes."""
        text = state.get("mixture", "") if isinstance(state, Mapping) else ""
        table = self._table.with_stage_text(str(text))
        fingerprint = self.fingerprint if table is self._table else make_fingerprint(self._lengths, table)
        position = Position.from_dict(state, fingerprint, len(table))
        make_schedule(table, position.epoch, self.num_replicas, laid_for=position.replicas, taken=position.batches)
        return table, position

    def state_of(self, position: Position) -> PositionDict:
        """A position as users save it."""
        text = self._table.stage_text
        return position.as_dict(self.fingerprint) | ({"mixture": text} if text else {})

    def _use_table(self, table: EpochTable) -> None:
        """Take the batches of this table from now on; `len` may be another."""
        if table is not self._table:
            self._steps = count_steps(table, self.num_replicas)
            self._table = table
            self.__dict__.pop("fingerprint", None)

    def schedule_from(self, start: Position) -> Schedule:
        """The remaining batches of an epoch from a position on, as the replicas take them."""
        return make_schedule(self._table, start.epoch, self.num_replicas, laid_for=start.replicas, taken=start.batches)


class BucketLoader(PlannedLoader):
    """Epochs of batches that a collator pads."""

    options: Options
    _table: BatchTable

    @property
    def max_length(self) -> int | None:
        """Longer samples are planned with this many time steps; `PadCollator.for_sampler` cuts to it."""
        return self.options.max_length

    @property
    def widths(self) -> Widths:
        """The padded widths that batches are planned with, as given; `PadCollator.for_sampler` pads to them."""
        return self.options.widths

    def plan(self, epoch: int) -> BatchPlan:
        """All batches of an epoch, over all replicas.

        Raises:
            TypeError: The epoch is not an int.
            ValueError: The epoch is negative.
        """
        return BatchPlan(self._table, check_epoch(epoch), self.num_replicas)
