"""The language model that is harvested: loaded onto devices, and hooked.

`loading` loads a causal language model, quantised or not, and fingerprints its weights and
tokenizer; `gguf_header` checks a GGUF file first; `checkpoint` refuses a model that was not loaded
whole; `hooks` finds the hookpoints and captures their activations.
"""

__all__ = ["checkpoint", "gguf_header", "hooks", "loading"]
