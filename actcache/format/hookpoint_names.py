"""Names that other libraries give to hookpoints, and the modules that they mean.

TransformerLens and SAELens name hooks alike for every model (`blocks.2.hook_resid_post`).
Transformers, sparsify and nnsight name modules, whose paths differ between families (`layers.2`,
`h.2`). A name that means nothing in a model finds nothing: no other module stands in for it.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

from actcache.format.manifest import INPUT

_LISTS = ("layers", "h", "blocks")
_BASES = "model|transformer|gpt_neox|backbone|decoder|language_model|text_model|base_model"
_PATH = re.compile(rf"(?:(?:{_BASES})\.)*(?:{'|'.join(_LISTS)})\.([^.:]+)((?:\.[^:]+)?)(:in)?")
_IN_LAYER = re.compile(rf"((?:.+\.)?(?:{'|'.join(_LISTS)}))\.(\d+)(?:\..+)?")
_LENS = re.compile(r"blocks\.([^.]+)\.((?:\w+\.)?hook_\w+)")
_DICTIONARY = re.compile(r"(resid_post|resid_pre|resid_mid|attn_out|mlp_out)_layer_(\d+)")
_INDEX = re.compile(r"(?<=\w)\[(\d+)\]")
_NNSIGHT = re.compile(r"\.(output|inputs?)(?:\[0\])*$")

_ATTENTION = ("self_attn", "attn", "attention", "self_attention")
_MLP = ("mlp", "feed_forward", "ffn", "block_sparse_moe")
_OUT = ("o_proj", "c_proj", "out_proj", "dense")
_DOWN = ("down_proj", "c_proj", "dense_4h_to_h", "fc2", "fc_out")
_FIRST_NORM = ("input_layernorm", "ln_1", "self_attn_layer_norm", "ln_attn", "norm_1")
_PARTS = (_ATTENTION, _MLP)

_ALONE = {
    "hook_resid_pre",
    "hook_resid_post",
    "hook_in",
    "hook_out",
    "attn.hook_z",
    "attn.hook_in",
    "mlp.hook_in",
    "mlp.hook_post",
}
"""Hooks that a module path alone identifies, without the other modules of its block."""
_OF_NORMS_BEFORE = ("hook_resid_mid", "ln1.hook_normalized", "ln2.hook_normalized")
"""Hooks of norms that come before attention and MLP."""


@dataclass(frozen=True)
class Layout:
    """Module paths of the parts of a model that other libraries name.

    Names are those of hookpoints, without ':in'.
    """

    layers: str
    """Path of the list of layers, such as 'h' or 'decoder.layers'."""
    count: int
    """Number of layers."""
    modules: frozenset[str]
    """Paths of all modules."""
    embedding: str = ""
    """Path of the token embedding; empty: unknown."""
    norm: str = ""
    """Path of the norm after the last layer; empty: unknown."""
    is_parallel: bool = False
    """Whether attention and MLP read the same stream, so that there is none between them."""
    is_scaled: bool = False
    """Whether outputs of attention and MLP are multiplied before they are added."""
    is_post_norm: bool = False
    """Whether norms follow the sums: none of them reads the stream between attention and MLP."""

    def hooks(self, layer: int) -> dict[str, str]:
        """Return the hookpoint of each hook of TransformerLens in one layer."""
        path = f"{self.layers}.{layer}"
        inside = {m.removeprefix(f"{path}.") for m in self.modules if m.startswith(f"{path}.")}
        found = _hooks(inside, is_parallel=self.is_parallel, is_scaled=self.is_scaled)
        left_out = _OF_NORMS_BEFORE if self.is_post_norm else ()
        return {hook: path + suffix for hook, suffix in found.items() if hook not in left_out}

    def peers(self) -> dict[str, list[str]]:
        """Return the names of TransformerLens by hookpoint, the usual one first."""
        names: dict[str, list[str]] = {}
        for layer in range(self.count):
            for hook, name in self.hooks(layer).items():
                names.setdefault(name, []).append(f"blocks.{layer}.{hook}")
        for hook, name in self._once().items():
            names.setdefault(name, []).append(hook)
        return names

    def find(self, name: str) -> list[str]:
        """Return the hookpoints, or patterns of them, that a name of another library means.

        Empty: it means nothing here, or is no such name. What is returned may not exist.
        """
        name = _uniform(name)
        if given := _LENS.fullmatch(name):
            numbers = [n for n in range(self.count) if fnmatchcase(str(n), given[1])]
            return [hooks[given[2]] for n in numbers if given[2] in (hooks := self.hooks(n))]
        if name in self._once():
            return [self._once()[name]]
        if given := _PATH.fullmatch(name):
            number, rest, is_input = given.groups()
            below = self._below(number, rest)
            return [f"{self.layers}.{number}{below}{is_input or ''}"]
        return []

    def _once(self) -> dict[str, str]:
        """Return the hookpoint of each hook outside the blocks."""
        after = "word_embeddings_layernorm"  # BLOOM, whose embedding ends with this norm
        embedding = after if after in self.modules else self.embedding
        found = {
            "hook_embed": embedding,
            "embed.hook_out": embedding,
            "ln_final.hook_normalized": self.norm,
            "ln_final.hook_out": self.norm,
        }
        return {hook: name for hook, name in found.items() if name}

    def _below(self, number: str, path: str) -> str:
        """Replace the names of attention and MLP in a path by those of this model's layers."""
        layer = number if number.isdecimal() else "0"
        parts = path.split(".")[1:]
        for i in range(len(parts)):
            above = ".".join([self.layers, layer, *parts[:i]])
            groups = _PARTS if i == 0 else (_OUT if parts[0] in _ATTENTION else _DOWN,)
            for group in groups:
                if parts[i] in group:
                    here = (part for part in group if f"{above}.{part}" in self.modules)
                    parts[i] = next(here, parts[i])
        return "".join(f".{part}" for part in parts)


def _hooks(inside: Collection[str], *, is_parallel: bool, is_scaled: bool) -> dict[str, str]:
    """Return what follows the path of a block, by hook of TransformerLens.

    Args:
        inside: module paths below the block.
        is_parallel: as in `Layout`.
        is_scaled: as in `Layout`.
    """

    def first(names: Iterable[str]) -> str | None:
        return next((f".{name}" for name in names if name in inside), None)

    def input_of(path: str | None) -> str | None:
        return None if path is None else path + INPUT

    attention, mlp = first(_ATTENTION), first(_MLP)
    outs = (*_OUT, "attention.out_proj")  # GPT-Neo
    out = first(f"{attention[1:]}.{name}" for name in outs) if attention else None
    down = first(f"{mlp[1:]}.{name}" for name in _DOWN) if mlp else None
    # Norms between a sublayer and the residual stream: what is added comes out of them.
    after_attention = first(["post_self_attn_layernorm"])
    after_mlp = first(["post_feedforward_layernorm", "post_mlp_layernorm"])
    if "post_feedforward_layernorm" in inside:
        after_attention = first(["post_attention_layernorm"])
    middle = first(["pre_feedforward_layernorm"])
    if middle is None and "post_feedforward_layernorm" not in inside:
        middle = first(["post_attention_layernorm", "ln_2", "final_layer_norm", "ln_mlp", "norm_2"])
    adds_itself = "mlp.gelu_impl" in inside  # BLOOM's sublayers return the sum with their residual
    is_apart = is_parallel or middle == ".ln_mlp" or attention is None
    gate = first(["mlp.gate_proj"])
    attention_out = out if adds_itself else after_attention or attention
    mlp_out = down if adds_itself or mlp == ".ffn" else after_mlp or mlp  # so does MPT's MLP
    found = {
        "hook_resid_post": "",
        "hook_resid_pre": INPUT,
        "hook_resid_mid": None if is_apart else input_of(middle or (after_mlp and mlp)),
        "hook_attn_out": None if is_scaled else attention_out,
        "hook_mlp_out": None if is_scaled else mlp_out,
        "attn.hook_z": input_of(out),
        "attn.hook_in": input_of(attention),
        "attn.hook_q": attention and first([f"{attention[1:]}.q_proj"]),
        "attn.hook_k": attention and first([f"{attention[1:]}.k_proj"]),
        "attn.hook_v": attention and first([f"{attention[1:]}.v_proj"]),
        "mlp.hook_in": input_of(mlp),
        "mlp.hook_pre": gate or first(["mlp.c_fc", "mlp.dense_h_to_4h", "mlp.fc1", "mlp.fc_in"]),
        "mlp.hook_pre_linear": gate and first(["mlp.up_proj"]),
        "mlp.hook_post": input_of(down),
        "ln1.hook_normalized": first(_FIRST_NORM),
        "ln2.hook_normalized": middle,
        "hook_out": "",
        "hook_in": INPUT,
    }
    return {hook: suffix for hook, suffix in found.items() if suffix is not None}


def _uniform(name: str) -> str:
    """Return `h[2].output[0]` as `h.2`, and names of dictionary_learning as in TransformerLens."""
    if side := _NNSIGHT.search(name):
        name = name[: side.start()] + (INPUT if side[1] != "output" else "")
    name = _INDEX.sub(r".\1", name)
    given = _DICTIONARY.fullmatch(name)
    return f"blocks.{given[2]}.hook_{given[1]}" if given else name


def find_in_cache(name: str, hookpoints: Collection[str], architecture: str) -> list[str]:
    """Return the hookpoints of a cache that a name of another library means.

    A cache does not list the whole model, so only names are found whose meaning does not
    depend on that, and outputs of attention and MLP of the architectures in `_PLAIN`.

    Args:
        name: the name.
        hookpoints: names of the cache's hookpoints.
        architecture: class of the model, by the manifest.
    """
    modules = frozenset(hookpoint.removesuffix(INPUT) for hookpoint in hookpoints)
    paths = [_IN_LAYER.fullmatch(module) for module in modules]
    lists = {path[1] for path in paths if path}
    if len(lists) != 1:
        return []
    within = {part for m in modules for part in _parents(m)}
    count = 1 + max(int(path[2]) for path in paths if path)
    layout = Layout(lists.pop(), count, modules | within)
    given = _LENS.fullmatch(_uniform(name))
    is_plain = architecture.removesuffix("ForCausalLM").removesuffix("LMHeadModel") in _PLAIN
    if given and given[2] not in _ALONE and not (is_plain and given[2].endswith("_out")):
        return []
    return [found for found in layout.find(name) if found in hookpoints]


_PLAIN = {"Falcon", "GPT2", "GPTNeoX", "Gemma", "Llama", "Mistral", "Phi", "Phi3", "Qwen2", "Qwen3"}
"""Architectures whose attention and MLP add their outputs to the stream as they are."""


def _parents(path: str) -> list[str]:
    parts = path.split(".")
    return [".".join(parts[:i]) for i in range(1, len(parts))]


def unknown_hook(name: str, layout: Layout) -> tuple[str, str] | None:
    """Explain why a name of TransformerLens means nothing in a model, and what its block has.

    None: it is no such name.
    """
    given = _LENS.fullmatch(_uniform(name))
    if given is None:
        return None
    if not any(fnmatchcase(str(n), given[1]) for n in range(layout.count)):
        return "the model has no such block", f"blocks 0 to {layout.count - 1}"
    number = int(given[1]) if given[1].isdecimal() else 0
    hooks: Mapping[str, str] = layout.hooks(number)
    shown = [f"blocks.{given[1]}.{hook}" for hook in hooks if hook not in ("hook_in", "hook_out")]
    return "the model has no such hook", " | ".join(shown)
