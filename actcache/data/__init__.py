"""Text to sequences of token ids, in a seeded order.

`datasets` opens what the user names, and `watched_files` detects when it changes; `sequences`
shuffles and mixes the documents, tokenises them, and cuts them to `ctx_len` tokens.
"""

__all__ = ["datasets", "sequences", "watched_files"]
