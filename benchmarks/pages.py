"""Write tables and pictures of the documentation from the JSON files in `benchmarks/results`. Run it after a benchmark.

A table is between `<!-- table NAME -->` and `<!-- end -->` on a page; its name is `chart-NAME` for a picture.
A test compares all of them with the results.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from mixture_rows import MIXTURES
from page_charts import CHARTS
from page_rows import TABLES, Cells, ratio_rows

ROOT: Final = Path(__file__).parents[1]
PICTURES: Final = ROOT / "docs" / "pictures"
# A figure and its unit, which a narrow column would part.
UNIT: Final = re.compile(r"^([\d.,+-]+) (%|ms|us|s|MB)$")
TABLE: Final = re.compile(r"(<!-- table ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def main() -> None:
    """Draw all pictures again, and rewrite the tables of all pages."""
    for name in CHARTS:
        (PICTURES / f"{name}.svg").write_text(drawn(name), encoding="utf-8")
    for page in pages():
        page.write_text(renewed(page.read_text()))


def pages() -> list[Path]:
    """The pages that may have tables."""
    return [ROOT / "README.md", ROOT / "benchmarks" / "results" / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def renewed(text: str) -> str:
    """The text of a page with its tables made from the present results."""
    return TABLE.sub(lambda found: f"{found[1]}\n{table(found[2])}\n\n{found[3]}", text)


def table(name: str) -> str:
    """A table or a picture in Markdown, with a line that names the command, the machine and the versions."""
    if name == "highlights":
        return highlights()
    if name.startswith("chart-"):
        picture = name.removeprefix("chart-")
        file, words, _ = CHARTS[picture]
        return f"![{words}](pictures/{picture}.svg)\n\n{origin(facts_of(file))}"
    file, rows = (TABLES | MIXTURES).get(name, (name, ratio_rows))
    facts = facts_of(file)
    return f"{as_markdown(rows(facts['results']))}\n\n{origin(facts)}"


def origin(facts: dict[str, Any]) -> str:
    """The line below a table or picture: the command, the machine and the versions."""
    versions = ", ".join(f"{package} {version}" for package, version in facts["versions"].items())
    return f"`{facts['command']}`, {facts['date']}, {facts['machine']}, Python {facts['python']}, {versions}"


def drawn(name: str) -> str:
    """A picture made from the present results."""
    file, _, draw = CHARTS[name]
    return draw(facts_of(file)["results"])


def facts_of(file: str) -> dict[str, Any]:
    """The results of one benchmark with its command, date, machine and versions."""
    facts: dict[str, Any] = json.loads((ROOT / "benchmarks" / "results" / f"{file}.json").read_text())
    return facts


def highlights() -> str:
    """Four lines for the README, each with a measured figure."""
    return "\n".join(f"- {line}" for line in (training_line(), plan_line(), rnn_line(), disk_line()))


def training_line() -> str:
    """Throughput and padding of the main job."""
    steps = facts_of("language_model")["results"]
    bucketed, random = steps["bucketed"], steps["random"]
    times = bucketed["real tokens a second"] / random["real tokens a second"]
    return (
        f"**Less padding.** The training step of `make demo` processes {times:.1f} times as many real tokens per "
        f"second as with random batches of the same budget: {bucketed['padding']:.1%} padding instead of "
        f"{random['padding']:.1%}."
    )


def plan_line() -> str:
    """Batches over the budget, and the time to resume in the largest corpus."""
    plans = facts_of("planning")["results"]["plans"]
    ours = max(plan["worst"] for plan in plans if plan["contender"] == "ours" and plan["corpus"] == "speech-like")
    largest = max(facts_of("scale")["results"], key=lambda row: row["samples"])
    return (
        f"**A hard budget, exact resume.** The largest batch uses {ours:.0%} of the budget, never more. In a corpus of "
        f"{largest['samples']:,} sequences, `seek` into an epoch and the first batch take "
        f"{largest['seek, batch']:.1f} ms."
    )


def rnn_line() -> str:
    """Training of recurrent modules against torch's packed run."""
    low, high = zip(*(rnn_range(module) for module in ("LSTM", "GRU")), strict=True)
    return (
        f"**Fast recurrent training.** On a CPU, `apply_rnn` trains an LSTM {low[0]:.1f} to {high[0]:.1f} times as "
        f"fast as torch's packed run, a GRU {low[1]:.1f} to {high[1]:.1f} times."
    )


def rnn_range(module: str) -> tuple[float, float]:
    """The lowest and the highest median speed-up over torch's packed run, in training."""
    medians = [
        row["times_as_fast"]["torch packed"][1]
        for row in facts_of("rnn")["results"]
        if row["case"].startswith(module) and "training" in row["case"]
    ]
    return min(medians), max(medians)


def disk_line() -> str:
    """From disk to padded batches, against the faster of the two webdataset pipelines."""
    case = facts_of("shards")["results"]["disk to batches"]["tokens"]
    rates = case["samples a second"]
    ours = rates["ShardDataset, blocks"]
    peer = max(rate for name, rate in rates.items() if name.startswith("webdataset"))
    return (
        f"**Fast shards.** Two workers read {ours:,.0f} token sequences per second from disk into padded batches, "
        f"{ours / peer:.0f} times as many as with webdataset."
    )


def as_markdown(rows: Sequence[Cells]) -> str:
    """A Markdown table of rows; their common keys are the headings. Without rows, a line that says so."""
    if not rows:
        return "Not measured."
    names = list(rows[0])
    cells = [[UNIT.sub(r"\1&nbsp;\2", row[name]) for name in names] for row in rows]
    lines = [names, ["---", *["--:"] * (len(names) - 1)], *cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    main()
