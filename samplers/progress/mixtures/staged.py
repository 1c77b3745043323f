"""StagedLoader: a loader whose copies in workers follow where a mixture stands.

The *stage* of a mixture says what was taken of each source before it took over from another one. A process that seeks a
position of another stage, or loads a state of one, tells it to the others as a text.
"""

import json
from copy import copy
from typing import Any, Final, Self, cast

from samplers.planning.mixtures.mixed_table import MixedTable
from samplers.planning.mixtures.mixture import Mixture
from samplers.planning.tables.epoch_table import EpochTable
from samplers.progress.loader import PlannedLoader
from samplers.progress.mixtures.shared_text import SharedText

# Bytes of the text for each source: a number of changes within one pass.
_TEXT_BYTES: Final = 1024


class StagedLoader(PlannedLoader):
    """Epochs of planned batches, in processes that share where a mixture stands."""

    _planned: Any
    _shared: SharedText | None = None
    _seen = b""

    def __copy__(self) -> Self:
        new = super().__copy__()
        new.__dict__["_shared"] = copy(self._shared)
        return new

    @property
    def fingerprint(self) -> str:
        """Short digests of the lengths, the options and the seed, which a position carries."""
        _ = self._table
        return super().fingerprint

    @property
    def _table(self) -> Any:
        """The batches of any epoch; of a mixture in its present stage, which another process may have changed."""
        if self._shared is not None and self._shared.version != self._seen:
            self._follow_stage(self._shared)
        return self._planned

    @_table.setter
    def _table(self, table: EpochTable) -> None:
        self._planned = table

    def _begin_sharing(self) -> None:
        """Share the stage of a mixture with copies that begin in other processes from now on."""
        if isinstance(self._lengths, Mixture):
            self._shared = SharedText(_TEXT_BYTES * (4 + len(self._lengths.names)))
            self._share_stage()

    def _use_table(self, table: EpochTable) -> None:
        """Take the batches of this table from now on, here and in the workers; `len` may be another."""
        super()._use_table(table)
        self._share_stage()

    def _share_stage(self) -> None:
        """Tell the stage of a mixture to the copies in other processes."""
        if self._shared is not None and isinstance(self._planned, MixedTable):
            self._shared.write(json.dumps([self._planned.mixture_digest, self._planned.stage_text]))
            self._seen = self._shared.version

    def _follow_stage(self, shared: SharedText) -> None:
        """Take the stage that another process has told.

        Raises:
            RuntimeError: It has another mixture.
        """
        self._seen = shared.version
        digest, text = json.loads(shared.read())
        table = cast(MixedTable, self._planned)
        if digest != table.mixture_digest:
            raise RuntimeError(
                "another mixture took over while this worker lived, which has the one before: seek the position with "
                "the new mixture before a loader starts its workers, or set persistent_workers=False"
            )
        super()._use_table(table.with_stage_text(text))
