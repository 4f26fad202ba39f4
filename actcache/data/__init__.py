"""Text to sequences of token ids, in a seeded order.

`datasets` opens what the user names; `document_order` shuffles and mixes the documents,
`tokenization` makes token ids of them (of conversations by `chats`, of rows of token ids by
`token_rows`), and `sequences` cuts these to `ctx_len` tokens. Several processes tokenise together
by `shared_sequences`, through files of `text_blocks`. Local files are listed and opened by
`plain_files`, from `json_lines`, `json_objects`, `csv_rows` and `parquet_rows`, which give
`table_rows` made of `plain_bytes`; `extracts` holds columns of files that cannot be read in place.
`watched_files` detects when a file changes. `left_out` counts the documents that cannot be used;
`records` are what is read. `template_clock` pins the moment that a chat template reads.
"""

__all__ = [
    "chats",
    "csv_rows",
    "datasets",
    "document_order",
    "extracts",
    "json_lines",
    "json_objects",
    "left_out",
    "parquet_rows",
    "plain_bytes",
    "plain_files",
    "records",
    "sequences",
    "shared_sequences",
    "table_rows",
    "template_clock",
    "text_blocks",
    "token_rows",
    "tokenization",
    "watched_files",
]
