"""Text to sequences of token ids, in a seeded order.

`datasets` opens what the user names; `sequences` shuffles and mixes the documents, tokenises them,
and cuts them to `ctx_len` tokens; `watched_file` notices text that changes meanwhile.
"""

__all__ = ["datasets", "sequences", "watched_file"]
