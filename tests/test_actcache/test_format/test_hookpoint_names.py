from __future__ import annotations

import pytest

from actcache.format.hookpoint_names import find_in_cache

LLAMA, GEMMA = "LlamaForCausalLM", "Gemma2ForCausalLM"
HELD = ["layers.2", "layers.2:in", "layers.2.mlp", "layers.2.mlp.down_proj:in", "layers.10"]


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("blocks.2.hook_resid_post", ["layers.2"]),
        ("blocks.2.hook_resid_pre", ["layers.2:in"]),
        ("blocks.*.hook_resid_post", ["layers.2", "layers.10"]),
        ("resid_post_layer_10", ["layers.10"]),
        ("model.layers.2", ["layers.2"]),
        ("transformer.h.2.mlp", ["layers.2.mlp"]),
        ("blocks.2.mlp.hook_post", ["layers.2.mlp.down_proj:in"]),
        ("blocks.3.hook_resid_post", []),
        ("blocks.2.hook_resid_mid", []),
        ("lm_head", []),
    ],
)
def test_names_of_other_libraries_find_hookpoints_of_a_cache(name: str, found: list[str]) -> None:
    assert find_in_cache(name, HELD, LLAMA) == found


def test_an_output_is_found_only_where_it_is_added_to_the_stream_as_it_is() -> None:
    assert find_in_cache("blocks.2.hook_mlp_out", HELD, LLAMA) == ["layers.2.mlp"]
    assert find_in_cache("mlp_out_layer_2", HELD, LLAMA) == ["layers.2.mlp"]
    for architecture in (GEMMA, "BloomForCausalLM", "None"):
        assert find_in_cache("blocks.2.hook_mlp_out", HELD, architecture) == []
        assert find_in_cache("mlp_out_layer_2", HELD, architecture) == []


def test_nothing_is_found_in_a_cache_of_several_lists_of_layers() -> None:
    held = ["vision.layers.1", "text.layers.1"]
    assert find_in_cache("blocks.1.hook_resid_post", held, LLAMA) == []
