"""The shards that a process has open, what it reads ahead, and what it has transferred.

Imports `storage`, `indexing` and `skip_counts`. Terms: to *read ahead* is to fetch in the background what comes next; a
*transfer* is a request with its bytes; to *wait* is to stand still until bytes have arrived.
"""
