"""Writing corpora: samples to shards, from one process or many, and shards rewritten as other shards.

Imports `dataset` and the rooms `indexing`, `format` and `storage`; of `collate` the errors and `widths`.
Terms: a *schema* is the dtype and shape of each field; a *part* is a piece of a corpus with its own writer; to
*append* continues behind finished shards, to *adopt* a shard reads its index, to *resume* writes the missing samples.
A shard is *finished* when it has its final name, a part when its marker or the corpus file says so.
"""
