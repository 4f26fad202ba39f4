"""Text to sequences of token ids, in a seeded order.

`datasets` opens what the user names, `documents` is what every dataset yields, `shuffling` orders
and mixes documents, and `iter_sequences` tokenizes them and cuts them to `ctx_len` tokens.
"""

__all__ = [
    "datasets",
    "documents",
    "sequences",
    "shuffling",
]
