"""Former names of modules, which stand in pickles of earlier releases: each still leads to the present module."""

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_loader
from types import ModuleType
from typing import Any, Final

# Up to release 0.1 -> now. A former name that has become a folder's is not here: the folder resolves by itself.
MOVED: Final = {
    "collate.agreement": "collate.lengths.validation",
    "collate.bits": "collate.tensors.numpy_view",
    "collate.blocks": "collate.training.cpu_rnn",
    "collate.check": "collate.training.checking.check_step",
    "collate.collation": "collate.training.checking.samples",
    "collate.findings": "collate.training.checking.report",
    "collate.graphs": "collate.tensors.graphs",
    "collate.host": "collate.lengths.tracking",
    "collate.options": "collate.padding.options",
    "collate.memory": "collate.training.max_tokens",
    "collate.prefetch": "collate.training.prefetch",
    "collate.probes": "collate.training.checking.probes",
    "collate.recurrent": "collate.training.rnn_modules",
    "collate.reduce": "collate.training.losses",
    "collate.rerun": "collate.training.checking.rerun",
    "collate.rnn": "collate.training.rnn",
    "collate.sending": "collate.tensors.to_device",
    "collate.serialization": "collate.operations.serialization",
    "collate.structure": "collate.tensors.nested",
    "collate.tracing": "collate.training.checking.autograd",
    "collate.transport": "collate.operations.serialization",
    "collate.variants": "collate.training.checking.variants",
    "samplers.arguments": "samplers.cli.arguments",
    "samplers.arrow": "samplers.cli.conversion.arrow",
    "samplers.batches": "samplers.planning.tables.pool_table",
    "samplers.bucketer": "samplers.dynamic.bucketer",
    "samplers.budget": "samplers.planning.budget",
    "samplers.chunks": "samplers.planning.tables.pool_table",
    "samplers.clipping": "samplers.planning.tables.clipping",
    "samplers.comparison": "samplers.cli.compare",
    "samplers.contract": "samplers.testing",
    "samplers.convert": "samplers.cli.conversion.rows",
    "samplers.corpus": "samplers.planning.sorting",
    "samplers.course": "samplers.planning.schedules.schedule",
    "samplers.cursor": "samplers.progress.epoch_cursor",
    "samplers.edges": "samplers.planning.tables.buckets",
    "samplers.exact": "samplers.cli.conversion.exact_numbers",
    "samplers.extras": "samplers.sources.extras",
    "samplers.layout": "samplers.planning.tables.batch_table",
    "samplers.measure": "samplers.planning.report",
    "samplers.options": "samplers.planning.options",
    "samplers.pictures": "samplers.cli.plots",
    "samplers.plan": "samplers.planning.plan",
    "samplers.printing": "samplers.cli.printing",
    "samplers.reader": "samplers.progress.window_reader",
    "samplers.report": "samplers.planning.plan",
    "samplers.runs": "samplers.planning.tables.equal_lengths",
    "samplers.sample_length": "samplers.dynamic.sample_length",
    "samplers.sampler": "samplers.batch_sampler",
    "samplers.shards.blocks": "samplers.shards.indexing.verify",
    "samplers.shards.continued": "samplers.shards.writing.existing",
    "samplers.shards.files": "samplers.shards.storage.reading",
    "samplers.shards.index": "samplers.shards.indexing.index",
    "samplers.shards.indexfile": "samplers.shards.indexing.index_file",
    "samplers.shards.kept": "samplers.shards.indexing.cache",
    "samplers.shards.kinds": "samplers.shards.writing.schema",
    "samplers.shards.locks": "samplers.shards.storage.locks",
    "samplers.shards.measuring": "samplers.shards.indexing.measuring",
    "samplers.shards.names": "samplers.shards.storage.paths",
    "samplers.shards.newfile": "samplers.shards.storage.atomic",
    "samplers.shards.newshard": "samplers.shards.writing.shard_file",
    "samplers.shards.parallel": "samplers.shards.storage.process_pool",
    "samplers.shards.parts": "samplers.shards.writing.parts",
    "samplers.shards.rereading": "samplers.shards.writing.source",
    "samplers.shards.scan": "samplers.shards.indexing.scan",
    "samplers.shards.tables": "samplers.shards.indexing.tables",
    "samplers.shards.tally": "samplers.shards.skip_counts",
    "samplers.shards.tar": "samplers.shards.format.tar",
    "samplers.shards.verify": "samplers.shards.indexing.verify",
    "samplers.shards.writer": "samplers.shards.writing.writer",
    "samplers.shared": "samplers.progress.shared_cursor",
    "samplers.shuffle": "samplers.planning.keyed_shuffle",
    "samplers.stream": "samplers.dynamic",
    "samplers.widths": "samplers.planning.fitting.optimal_widths",
    "samplers.window_reader": "samplers.progress.window_reader",
    "samplers.windows": "samplers.planning.tables.window_table",
}


# The two classes have no base class: importing `importlib.abc` takes longer than Python's own start.
class FormerModules:
    """Finds modules by the names that they had."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """A stand-in for a former module; None for every other name."""
        del path, target
        if fullname not in MOVED:
            return None
        # typeshed asks for a method that Python does not call.
        loader: Any = FormerModule(MOVED[fullname])
        return spec_from_loader(fullname, loader)


class FormerModule:
    """Makes a module whose every attribute is that of another, loaded when the first is asked for."""

    def __init__(self, name: str) -> None:
        self.name = name

    def create_module(self, spec: ModuleSpec) -> None:
        """Let Python make the module."""

    def exec_module(self, module: ModuleType) -> None:
        """Hand on every attribute (PEP 562)."""

        def from_present_module(name: str) -> Any:
            return getattr(import_module(self.name), name)

        # typeshed has no name for a module's own `__getattr__`.
        vars(module)["__getattr__"] = from_present_module


def find_former_modules() -> None:
    """Make former names importable, once."""
    if not any(isinstance(finder, FormerModules) for finder in sys.meta_path):
        # Last: a module of that name which exists is found first.
        sys.meta_path.append(FormerModules())
