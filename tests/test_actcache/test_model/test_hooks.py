from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from actcache.errors import HookpointError, ModelError
from actcache.format.manifest import Hookpoint
from actcache.model.hooks import (
    ActivationCapture,
    HookSite,
    choose,
    discover_sites,
    layout_of,
    residual_hookpoints,
)

SMALL = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
TOKENS = {"bos_token_id": 0, "eos_token_id": 1}

LLAMA = SMALL | {"intermediate_size": 32, "num_key_value_heads": 1}
HEADS = LLAMA | {"head_dim": 8}
SLIDING = HEADS | {"sliding_window": 3}
"""Some layers attend to three tokens only, of the seven of a test's sequence."""
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}

FAMILIES: dict[str, tuple[str, dict[str, Any], str, str]] = {
    "gpt2": (
        "GPT2Config",
        {"vocab_size": 50, "n_embd": 16, "n_layer": 3, "n_head": 2, "n_positions": 32},
        "h",
        "ln_f",
    ),
    "gpt_neox": ("GPTNeoXConfig", SMALL | {"intermediate_size": 32}, "layers", "final_layer_norm"),
    "llama": ("LlamaConfig", LLAMA, "layers", "norm"),
    "mistral": ("MistralConfig", SLIDING, "layers", "norm"),
    "gemma": ("GemmaConfig", HEADS, "layers", "norm"),
    "gemma2": ("Gemma2Config", SLIDING, "layers", "norm"),
    "gemma3": ("Gemma3TextConfig", SLIDING, "layers", "norm"),
    "gemma3_vision": (
        "Gemma3Config",
        {
            "text_config": SLIDING | TOKENS,
            "vision_config": SMALL | {"intermediate_size": 16, "image_size": 28, "patch_size": 14},
        },
        "language_model.layers",
        "language_model.norm",
    ),
    "qwen2": ("Qwen2Config", LLAMA, "layers", "norm"),
    "qwen3": ("Qwen3Config", HEADS, "layers", "norm"),
    "qwen3_moe": ("Qwen3MoeConfig", HEADS | EXPERTS, "layers", "norm"),
    "mixtral": ("MixtralConfig", LLAMA | {"num_local_experts": 4}, "layers", "norm"),
    "gpt_oss": (
        "GptOssConfig",
        SLIDING | {"num_local_experts": 4, "num_experts_per_tok": 2},
        "layers",
        "norm",
    ),
    "falcon": ("FalconConfig", SMALL, "h", "ln_f"),
    "falcon_sequential": (
        "FalconConfig",
        SMALL | {"parallel_attn": False, "multi_query": False, "alibi": True},
        "h",
        "ln_f",
    ),
    "falcon_new": (
        "FalconConfig",
        SMALL | {"new_decoder_architecture": True, "num_kv_heads": 1},
        "h",
        "ln_f",
    ),
    "phi": ("PhiConfig", SMALL | {"intermediate_size": 32}, "layers", "final_layernorm"),
    "phi3": ("Phi3Config", LLAMA | {"pad_token_id": 0}, "layers", "norm"),
    "opt": (
        "OPTConfig",
        SMALL | {"ffn_dim": 32, "word_embed_proj_dim": 16, "max_position_embeddings": 32},
        "decoder.layers",
        "decoder.final_layer_norm",
    ),
    "bloom": (
        "BloomConfig",
        {"vocab_size": 50, "hidden_size": 16, "n_layer": 3, "n_head": 2},
        "h",
        "ln_f",
    ),
    "gptj": (
        "GPTJConfig",
        {"vocab_size": 50, "n_embd": 16, "n_layer": 3, "n_head": 2, "rotary_dim": 4},
        "h",
        "ln_f",
    ),
    "gpt_neo": (
        "GPTNeoConfig",
        {
            "vocab_size": 50,
            "hidden_size": 16,
            "num_layers": 3,
            "num_heads": 2,
            "attention_types": [[["global"], 3]],
        },
        "h",
        "ln_f",
    ),
    "mpt": (
        "MptConfig",
        {"vocab_size": 50, "d_model": 16, "n_layers": 3, "n_heads": 2, "max_seq_len": 32},
        "blocks",
        "norm_f",
    ),
    "mamba": (
        "MambaConfig",
        {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 3, "state_size": 4},
        "layers",
        "norm_f",
    ),
}
"""Configuration class, sizes, list of layers, final norm. OPT and BLOOM refuse a mask of four
dimensions; Mamba takes no mask."""


def build(family: str, device: str = "cpu") -> Any:
    import transformers

    name, sizes, *_ = FAMILIES[family]
    config = getattr(transformers, name)(**(TOKENS | sizes))
    with torch.random.fork_rng(), torch.device(device):
        torch.manual_seed(0)
        # Mixtral's experts compute their shapes on the meta device in bfloat16 only.
        dtype = torch.bfloat16 if device == "meta" else torch.float32
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.eval().requires_grad_(False)


def residual_stream(family: str, model: Any) -> tuple[Tensor, ...]:
    """Return the model's `hidden_states`: embeddings, output of every layer but the last, and of
    the final norm."""
    states = model(IDS, output_hidden_states=True, use_cache=False).hidden_states
    if family == "mamba":  # omits the embeddings and repeats the last output
        return (model.backbone.embeddings(IDS), *states[:2], states[3])
    return tuple(states)


IDS = torch.arange(21).reshape(3, 7) * 2


def run(model: Any, names: list[str], ids: Tensor = IDS) -> dict[str, Tensor]:
    sites = discover_sites(model)
    with ActivationCapture(model, choose(names, sites, model)[0]) as capture:
        return dict(capture.run(ids))


@pytest.mark.parametrize("family", FAMILIES)
def test_captured_activations_are_the_models_hidden_states(family: str) -> None:
    model = build(family)
    _, _, layers, norm = FAMILIES[family]
    states = residual_stream(family, model)
    found = run(model, [f"{layers}.?", f"{layers}.?:in", norm, f"{norm}:in"])
    assert len(found) == 8
    for layer in range(3):
        assert torch.equal(found[f"{layers}.{layer}:in"], states[layer])
        if layer < 2:
            assert torch.equal(found[f"{layers}.{layer}"], states[layer + 1])
    # The last of hidden_states is after the final norm.
    assert torch.equal(found[norm], states[3])
    final = model.base_model.get_submodule(norm)
    assert torch.equal(final(found[f"{layers}.2"]), states[3])
    assert torch.equal(found[f"{layers}.2"], found[f"{norm}:in"])


@pytest.mark.parametrize("family", FAMILIES)
def test_residual_hookpoints_are_all_every_nth_or_the_given_layers(family: str) -> None:
    model = build(family)
    _, _, layers, _ = FAMILIES[family]
    assert residual_hookpoints(model, (), 1) == [f"{layers}.{n}" for n in range(3)]
    assert residual_hookpoints(model, (), 2) == [f"{layers}.0", f"{layers}.2"]
    assert residual_hookpoints(model, (2, 0), 1) == [f"{layers}.2", f"{layers}.0"]
    assert residual_hookpoints(model, (-1, "middle", -3), 1) == [
        f"{layers}.2",
        f"{layers}.1",
        f"{layers}.0",
    ]
    with pytest.raises(HookpointError, match=r"(?s)--layers.*0 to 2, or -3 to -1.*got: +3, -4"):
        residual_hookpoints(model, (1, 3, -4), 1)


@pytest.mark.parametrize(
    ("family", "attention", "mlp", "parallel"),
    [
        ("gpt2", "h.1.attn", "h.1.mlp", False),
        ("llama", "layers.1.self_attn", "layers.1.mlp", False),
        ("gpt_neox", "layers.1.attention", "layers.1.mlp", True),
    ],
)
def test_a_layer_adds_its_attention_and_mlp_to_its_input(
    family: str, attention: str, mlp: str, parallel: bool
) -> None:
    layer = mlp.rpartition(".")[0]
    found = run(build(family), [layer, f"{layer}:in", attention, mlp, f"{mlp}:in"])
    total = found[f"{layer}:in"] + found[attention] + found[mlp]
    torch.testing.assert_close(total, found[layer])


@pytest.mark.parametrize("family", FAMILIES)
def test_the_meta_device_gives_the_same_sites_as_weights(family: str) -> None:
    sites, empty = discover_sites(build(family)), discover_sites(build(family, "meta"))
    assert sum(site.width == 16 for site in sites.values()) >= 10
    assert empty == sites
    assert list(empty) == list(sites)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_site_can_be_captured_at_any_batch_size_and_length(family: str) -> None:
    model = build(family)
    hookpoints, _ = choose(["*", "*:in"], discover_sites(model), model)
    for ids in (IDS, IDS[:1], IDS[:2, :5]):
        with ActivationCapture(model, hookpoints) as capture:
            found = capture.run(ids)
        assert set(found) == {h.name for h in hookpoints}
        assert all(found[h.name].shape == (*ids.shape, h.width) for h in hookpoints)


def test_chosen_positions_equal_those_of_a_full_capture() -> None:
    hookpoints = [Hookpoint("layers.0", 16), Hookpoint("layers.1.mlp:in", 16)]
    chosen = torch.tensor([0, 3, 8, 20])  # of 3 sequences of 7
    with ActivationCapture(build("llama"), hookpoints) as capture:
        whole = dict(capture.run(IDS))
        found = capture.run(IDS, None, chosen)
    for name, rows in found.items():
        torch.testing.assert_close(rows, whole[name].flatten(0, 1)[chosen], rtol=0, atol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_masked_padding_does_not_change_the_tokens_before_it(
    family: str,
) -> None:
    model = build(family)
    layers = FAMILIES[family][2]
    hookpoints, _ = choose([f"{layers}.?"], discover_sites(model), model)
    mask = (torch.arange(7) < torch.tensor([[7], [4], [2]])).long()
    with ActivationCapture(model, hookpoints) as capture:
        padded = dict(capture.run(IDS * mask, mask))
        for sequence, length in enumerate((7, 4, 2)):
            alone = capture.run(IDS[sequence : sequence + 1, :length])
            for name, activations in alone.items():
                torch.testing.assert_close(activations[0], padded[name][sequence, :length])


def test_a_multimodal_model_runs_without_its_vision_tower() -> None:
    sites = discover_sites(build("gemma3_vision"))
    assert sites["vision_tower.encoder.layers.0"].reason == "is not called in a forward pass"
    assert sites["language_model.layers.0"].width == 16


@pytest.mark.parametrize("as_list", [False, True])
def test_the_first_tensor_of_a_tuple_or_list_is_captured(as_list: bool) -> None:
    model = build("llama")
    before = run(model, ["layers.1", "layers.2:in"])

    def several(_module: nn.Module, _args: Any, output: Tensor) -> Any:
        return [output, None] if as_list else (output, (output, output))

    def first(_module: nn.Module, args: Any) -> Any:
        return (args[0][0], *args[1:])

    model.model.layers[1].register_forward_hook(several)
    model.model.layers[2].register_forward_pre_hook(first)
    assert discover_sites(model)["layers.1"] == HookSite("layers.1", 16, "")
    after = run(model, ["layers.1", "layers.2:in"])
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_site_records_why_it_cannot_be_hooked() -> None:
    sites = discover_sites(build("mixtral"))
    assert "has shape [16, 4], not [batch, ctx, width]" in sites["layers.0.mlp.gate"].reason
    assert "not [batch, ctx, width]" in sites["layers.0.mlp.experts"].reason
    assert "not [batch, ctx, width]" in sites["rotary_emb"].reason
    assert sites["layers"].reason == "is not called in a forward pass"
    assert sites["layers.0.mlp"].width == 16
    assert sites["layers.0.self_attn:in"].width == 16  # a keyword argument
    assert (
        discover_sites(build("gpt2"))["wpe"].width is None
    )  # position embeddings have no batch dimension


class Toy(nn.Module):
    """Base model of four modules: one is called twice, one changes its input in place."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 4)
        self.first = nn.Linear(4, 4)
        self.twice = nn.Linear(4, 4)
        self.spoil = nn.ReLU(inplace=True)
        self.base_model, self.base_model_prefix = self, ""

    def forward(self, ids: Tensor, use_cache: bool) -> Tensor:
        x = self.twice(self.first(self.embed(ids)))
        return self.spoil(self.twice(x)).sum()

    def named_modules(self, *_: Any, **__: Any) -> Any:
        return [(name, module) for name, module in self._modules.items() if name != "base_model"]


def test_a_module_that_is_called_twice_is_refused() -> None:
    model = Toy()
    sites = discover_sites(model)
    assert sites["twice"].reason == "is called 2 times in a forward pass"
    with pytest.raises(HookpointError, match="'twice' cannot be hooked: it is called 2 times"):
        choose(["twice"], sites, model)


def test_captured_activations_are_not_changed_by_in_place_modules() -> None:
    torch.manual_seed(0)
    model = Toy()
    model.first.register_forward_hook(lambda *_: None)
    hookpoints = [Hookpoint("first", 4), Hookpoint("spoil:in", 4), Hookpoint("spoil", 4)]
    with ActivationCapture(model, hookpoints) as capture:
        found = capture.run(IDS)
    assert (found["spoil:in"] < 0).any()
    assert torch.equal(found["spoil"], found["spoil:in"].relu())


def test_the_pass_stops_after_the_last_hookpoint() -> None:
    model = build("llama")
    called: list[str] = []
    for name, module in model.named_modules():
        module.register_forward_pre_hook(lambda *_, name=name: called.append(name))
    with ActivationCapture(
        model, [Hookpoint("layers.0", 16), Hookpoint("layers.1.mlp:in", 16)]
    ) as capture:
        capture.run(IDS)
    assert "model.layers.1.post_attention_layernorm" in called
    later = ("model.layers.1.mlp.", "model.layers.2", "model.norm", "lm_head")
    assert not [name for name in called if name.startswith(later)]


def test_a_pass_never_reaches_the_lm_head() -> None:
    model = build("llama")
    called: list[str] = []
    model.lm_head.register_forward_pre_hook(lambda *_: called.append("lm_head"))
    with ActivationCapture(model, [Hookpoint("norm", 16)]) as capture:
        capture.run(IDS)
    run(model, ["*"])
    assert called == []


def test_hooks_are_removed_after_success_and_errors() -> None:
    model = build("llama")

    def count() -> int:
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())

    before = count()
    run(model, ["layers.*", "layers.*:in"])
    with (
        pytest.raises(ModelError, match=r"(?s)failed at 1 sequences of 3.*IndexError.*--device"),
        ActivationCapture(
            model, [Hookpoint("layers.0", 16), Hookpoint("layers.1:in", 16)]
        ) as capture,
    ):
        capture.run(torch.full((1, 3), 999))
    with pytest.raises(IndexError):
        model(torch.full((1, 3), 999))
    assert count() == before


def test_a_hookpoint_of_another_width_than_in_the_probe_is_refused() -> None:
    message = r"(?s)layers\.0 has another shape.*\[3, 7, 17\].*\(3, 7, 16\)"
    with (
        ActivationCapture(build("llama"), [Hookpoint("layers.0", 17)]) as capture,
        pytest.raises(HookpointError, match=message),
    ):
        capture.run(IDS)


def test_a_hookpoint_that_is_not_reached_is_refused() -> None:
    with (
        ActivationCapture(build("llama"), [Hookpoint("layers", 16)]) as capture,
        pytest.raises(HookpointError, match=r"(?s)layers has another shape.*got: +no output"),
    ):
        capture.run(IDS)


SITES = {
    site.name: site
    for n in range(12)
    for site in (
        HookSite(f"layers.{n}", 8, ""),
        HookSite(f"layers.{n}:in", 8, ""),
        HookSite(f"layers.{n}.mlp", 8, ""),
        HookSite(f"layers.{n}.mlp:in", 8, ""),
        HookSite(f"layers.{n}.mlp.gate", None, "has shape [16, 4], not [batch, ctx, width]"),
    )
}


WITHOUT_LAYERS = SimpleNamespace(
    base_model_prefix="model",
    base_model=nn.Module(),
    config=SimpleNamespace(get_text_config=SimpleNamespace),
)
"""A model in which no list of layers is found: names of other libraries mean nothing in it."""


def names(*patterns: str) -> list[str]:
    return [hookpoint.name for hookpoint in choose(patterns, SITES, WITHOUT_LAYERS)[0]]


def test_patterns_match_inputs_only_with_the_suffix_in() -> None:
    assert names("layers.1") == ["layers.1"]
    assert names("layers.1:in") == ["layers.1:in"]
    assert names("layers.[0-2]") == ["layers.0", "layers.1", "layers.2"]
    assert names("layers.?.mlp:in") == [f"layers.{n}.mlp:in" for n in range(10)]
    assert not [name for name in names("*") if name.endswith(":in")]


def test_hookpoints_are_unique_and_in_natural_order() -> None:
    assert names("layers.10", "layers.9", "layers.1*", "layers.9")[:5] == [
        "layers.1",
        "layers.1.mlp",
        "layers.9",
        "layers.10",
        "layers.10.mlp",
    ]


def test_the_base_prefix_is_optional() -> None:
    assert names("model.layers.3") == names("layers.3") == ["layers.3"]
    assert names("model.layers.*.mlp:in") == names("layers.*.mlp:in")


def test_a_pattern_skips_unhookable_sites_unless_it_matches_nothing_else() -> None:
    assert names("layers.0.*") == ["layers.0.mlp"]
    for pattern in ("layers.0.mlp.gate", "layers.*.gate"):
        with pytest.raises(HookpointError, match=r"(?s)cannot be hooked: it has shape \[16, 4\]"):
            names(pattern)


NONE_BETWEEN = {"gpt_neox", "gptj", "falcon", "falcon_new", "phi", "mamba"}
"""Families without a residual stream between attention and MLP: both read the same one."""


def meant(names: list[str], model: Any, sites: dict[str, HookSite]) -> list[str]:
    return [hookpoint.name for hookpoint in choose(names, sites, model)[0]]


@pytest.mark.parametrize("family", FAMILIES)
def test_names_of_other_libraries_find_what_they_mean(family: str) -> None:
    model = build(family)
    sites, (_, _, layers, norm) = discover_sites(model), FAMILIES[family]
    for name in (
        "blocks.1.hook_resid_post",
        "resid_post_layer_1",
        "layers.1",
        "model.layers.1",
        "transformer.h.1",
        "gpt_neox.layers.1",
        "model.decoder.layers.1",
        "transformer.h[1]",
        "model.layers[1].output",
        "transformer.h[1].output[0]",
    ):
        assert meant([name], model, sites) == [f"{layers}.1"]
    for name in ("model.layers[1].input", "transformer.h.1.inputs[0][0]"):
        assert meant([name], model, sites) == [f"{layers}.1:in"]
    everywhere = meant(["blocks.*.hook_resid_post"], model, sites)
    assert everywhere == [f"{layers}.{n}" for n in range(3)]
    assert meant(["blocks.1.hook_resid_pre"], model, sites) == [f"{layers}.1:in"]
    assert meant(["ln_final.hook_normalized"], model, sites) == [norm]
    (embedding,) = meant(["hook_embed"], model, sites)
    if family not in ("gpt2", "gpt_neo", "opt"):  # they add an embedding of the position
        found = run(model, [embedding, f"{layers}.0:in"])
        assert torch.equal(found[embedding], found[f"{layers}.0:in"])


@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in ("opt", "mamba")])
def test_hooks_of_attention_and_mlp_add_up_to_the_stream(family: str) -> None:
    model = build(family)
    sites = discover_sites(model)
    hooks = ["resid_pre", "attn_out", "mlp_out", "resid_post"]
    hooks += [] if family in NONE_BETWEEN else ["resid_mid"]
    names = {hook: meant([f"blocks.1.hook_{hook}"], model, sites)[0] for hook in hooks}
    found = {hook: run(model, [name])[name] for hook, name in names.items()}
    middle = found["resid_pre"] + found["attn_out"]
    torch.testing.assert_close(middle + found["mlp_out"], found["resid_post"])
    if "resid_mid" in found:
        torch.testing.assert_close(middle, found["resid_mid"])


@pytest.mark.parametrize(
    "family", ["llama", "gpt2", "gpt_neox", "bloom", "phi", "gemma2", "gptj", "gpt_neo", "mpt"]
)
def test_hooks_inside_attention_and_mlp_are_the_inputs_of_their_last_layers(family: str) -> None:
    model = build(family)
    sites = discover_sites(model)
    for hook in ("attn.hook_z", "mlp.hook_post"):
        (name,) = meant([f"blocks.1.{hook}"], model, sites)
        last = model.base_model.get_submodule(name.removesuffix(":in"))
        out = name.removesuffix(":in")
        found = run(model, [name, out])
        torch.testing.assert_close(last(found[name]), found[out])


@pytest.mark.parametrize("family", sorted(NONE_BETWEEN))
def test_a_hook_without_an_equal_is_refused_with_the_hooks_of_its_block(family: str) -> None:
    model = build(family, "meta")
    message = r"(?s)'blocks\.2\.hook_resid_mid' has no equal here.*blocks\.2\.hook_resid_pre"
    with pytest.raises(HookpointError, match=message) as caught:
        choose(["blocks.2.hook_resid_mid"], discover_sites(model), model)
    assert set(re.findall(r"blocks\.(\d)", str(caught.value))) == {"2"}


def test_a_block_beyond_the_last_is_refused_with_the_range() -> None:
    model = build("gpt2", "meta")
    with pytest.raises(HookpointError, match=r"(?s)no such block.*blocks 0 to 2"):
        choose(["blocks.3.hook_resid_post"], discover_sites(model), model)
    with pytest.raises(HookpointError, match=r"no module of the model matches 'h\.3'") as error:
        choose(["h.3"], discover_sites(model), model)
    assert "such as" not in str(error.value)


def test_a_hint_is_of_the_same_layer_and_part() -> None:
    model = build("llama", "meta")
    with pytest.raises(HookpointError) as caught:
        choose(["layers.1.mpl"], discover_sites(model), model)
    assert "such as layers.1.mlp\n" in str(caught.value)
    with pytest.raises(HookpointError) as caught:
        choose(["layers.1.mixer"], discover_sites(model), model)
    assert "such as" not in str(caught.value)


def test_a_name_of_the_model_itself_comes_before_those_of_other_libraries() -> None:
    model = build("llama", "meta")
    assert choose(["layers.1", "model.layers.2"], discover_sites(model), model)[1] == {}
    hookpoints, renamed = choose(["h.1.attn", "layers.0"], discover_sites(model), model)
    assert [h.name for h in hookpoints] == ["layers.0", "layers.1.self_attn"]
    assert renamed == {"h.1.attn": ["layers.1.self_attn"]}


def test_a_pattern_without_a_match_is_refused_with_the_closest_names() -> None:
    with pytest.raises(HookpointError, match=r"(?s)'layer\.3\.mpl'.*such as .*layers\.3\.mlp.*rem"):
        names("layers.1", "layer.3.mpl")
    with pytest.raises(HookpointError, match=r"(?s)'zzzz'\n.*actcache hookpoints MODEL"):
        names("zzzz")


def test_ambiguous_lists_of_layers_are_refused_with_a_remedy() -> None:
    model = nn.Module()
    model.a, model.b = nn.ModuleList([nn.Identity()] * 2), nn.ModuleList([nn.Identity()] * 2)
    text = SimpleNamespace(num_hidden_layers=2)
    fake = SimpleNamespace(base_model=model, config=SimpleNamespace(get_text_config=lambda: text))
    with pytest.raises(ModelError, match=r"(?s)one list of 2 modules.*a, b.*--hookpoint"):
        residual_hookpoints(fake, (), 1)


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("OpenAIGPTConfig", {"vocab_size": 50, "n_embd": 16, "n_layer": 3, "n_head": 2}),
        ("OPTConfig", FAMILIES["opt"][1] | {"do_layer_norm_before": False}),
    ],
)
def test_norms_that_follow_the_sums_stand_for_no_stream_between(
    name: str, sizes: dict[str, Any]
) -> None:
    import transformers

    with torch.device("meta"):
        config = getattr(transformers, name)(**sizes)
        model = transformers.AutoModelForCausalLM.from_config(config)
    sites, layout = discover_sites(model), layout_of(model)
    assert layout is not None
    found, _ = choose(["blocks.1.hook_resid_post"], sites, model)
    assert [hookpoint.name for hookpoint in found] == [f"{layout.layers}.1"]
    for hook in ("hook_resid_mid", "ln1.hook_normalized", "ln2.hook_normalized"):
        with pytest.raises(HookpointError):
            choose([f"blocks.1.{hook}"], sites, model)
