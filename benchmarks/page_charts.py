"""The pictures of the documentation, as `pages.py` writes them from the JSON files in `benchmarks/results`."""

from collections.abc import Callable, Mapping
from typing import Any, Final, TypeAlias

from loading_chart import chart as loading_chart
from padding_picture import padding_picture
from speed_charts import ratio_chart

Results: TypeAlias = Any


def rnn_chart(results: Results) -> str:
    """Four panels: training and inference of both modules."""
    return ratio_chart(
        {
            f"{module}, {use}": [
                {**row, "case": row["case"].removeprefix(f"{module} ").removesuffix(f", {use}")}
                for row in results
                if row["case"].startswith(module) and row["case"].endswith(use)
            ]
            for module in ("LSTM", "GRU")
            for use in ("training", "inference")
        }
    )


def shards_chart(results: Results) -> str:
    """Reading, indexing and loading, next to what is slower or faster there: a line for each peer."""
    titles = {
        "read": "samples in one process",
        "index": "all lengths",
        "disk to batches": "padded batches, two workers",
    }
    return ratio_chart(
        {
            f"{title}, {case['case'].split(', ', 1)[-1]}: {case['ours']} against": [
                {"case": peer, "times_as_fast": {"": spread}} for peer, spread in case["times_as_fast"].items()
            ]
            for kind, title in titles.items()
            for case in results[kind].values()
        }
    )


# By picture: the file of its results, its words for readers who do not see it, and the function that draws it.
CHARTS: Final[Mapping[str, tuple[str, str, Callable[[Results], str]]]] = {
    "padding": ("padding", "batches before and after planning", padding_picture),
    "collation": ("collation", "collation next to other libraries", lambda rows: ratio_chart({"collation": rows})),
    "packing": ("packing", "packing and unpacking next to torch", lambda rows: ratio_chart({"packing": rows})),
    "rnn": ("rnn", "recurrent modules next to torch", rnn_chart),
    "transport": ("transport", "batches from a worker", lambda rows: ratio_chart({"from a worker": rows})),
    "shards": ("shards", "reading shards next to webdataset", shards_chart),
    "loading": ("loading", "rows a second of each loader", lambda results: loading_chart(results["works"])),
}
