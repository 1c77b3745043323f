"""Bytes over a network: many requests at a time, each tried again where another try may help.

Imports `collate.widths`, and nothing else of this project. `transport` has the options, `failures` says what to try
again, `http_body` and `requests` send, `signed_urls` has the URLs of S3, `remote` the files, `upload` writes them.
Terms: a *request* asks for one range of a file; a *try* sends it once; a *second request* is sent next to one that
takes unusually long.
"""
