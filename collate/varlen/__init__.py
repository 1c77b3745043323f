"""What lives here: rows that hold several sequences ("documents"), their collator, and the offsets that kernels take.

May import: `collator`, `batch`, `operations`, `lengths`, `padding`, `widths` and `tensors` of `collate`.
Words: a *document* is one sample's sequence. A *row* holds documents one after the other, up to its *capacity* of C
steps. A *gap* is a run of steps without a document, a *segment* a document or a gap. A *slot* is an entry of the table
of segments, whose number is fixed for a run. A *span* is where a document lies.
"""
