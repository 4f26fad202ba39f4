from __future__ import annotations

import pytest

from actcache.data.left_out import LeftOutDocuments, by_reason
from actcache.data.records import Unusable
from actcache.errors import DatasetError


def unusable(number: int = 0, *, place: str = "") -> Unusable:
    error = DatasetError("a bad one", got=f"thing {number}", remedy="mend it")
    return Unusable("type", error, repr(f"text {number}"), place)


def left_out(allowed: float | None) -> LeftOutDocuments:
    return LeftOutDocuments(allowed, lambda document: f"a.jsonl, line {document + 1}")


def test_without_a_share_the_first_is_raised_as_it_is() -> None:
    with pytest.raises(DatasetError, match=r"^a bad one"):
        left_out(None).add(3, unusable())


def test_a_text_of_which_every_document_is_bad_is_refused_soon_and_by_its_first() -> None:
    found = left_out(0.01)
    for number in range(10):
        found.add(number, unusable(number))
    with pytest.raises(
        DatasetError,
        match=r"(?s)11 of 11 documents .* document 0 \(a\.jsonl, line 1\): a bad one; thing 0"
        r".*at most 0\.01.*--max-bad-documents.*11 type.*'text 0'.*mend it",
    ):
        found.add(10, unusable(10))


def test_the_share_is_of_the_documents_so_far_beyond_a_thousand() -> None:
    found = left_out(0.01)
    for document in range(0, 100_000, 100):  # one in a hundred
        found.add(document + 99, unusable())
    with pytest.raises(DatasetError, match=r"1,001 of 100,001 documents"):
        found.add(100_000, unusable())


@pytest.mark.parametrize(
    ("allowed", "bad", "documents", "refused"),
    [
        (0.01, 0, 10, False),
        (0.01, 1, 10, False),  # one alone
        (0.01, 1, 1, True),  # all of the text
        (0.01, 2, 10, True),
        (0.01, 2, 200, False),
        (0.01, 3, 200, True),
        (0.2, 2, 10, False),
    ],
)
def test_at_the_end_the_share_is_of_all_documents(
    allowed: float, bad: int, documents: int, refused: bool
) -> None:
    found = left_out(allowed)
    for number in range(bad):
        found.add(number, unusable())
    if not refused:
        found.end(documents)
        return
    with pytest.raises(DatasetError, match=rf"{bad} of {documents} documents cannot be used"):
        found.end(documents)


def test_a_share_of_zero_refuses_the_first_by_its_number() -> None:
    with pytest.raises(DatasetError, match=r"1 of 8 documents .* document 7 \(line 3\)"):
        left_out(0.0).add(7, unusable(place="line 3"))


def test_those_left_out_are_taken_once_in_their_order() -> None:
    found = left_out(1.0)
    for number in (3, 5):
        found.add(number, unusable(number))
    assert [(f.document, f.place, f.detail) for f in found.take()] == [
        (3, "a.jsonl, line 4", "a bad one; thing 3"),
        (5, "a.jsonl, line 6", "a bad one; thing 5"),
    ]
    assert found.take() == ()


def test_reasons_are_described_the_most_frequent_first() -> None:
    assert by_reason({"type": 2, "token_id": 1000}) == "1,000 token_id, 2 type"
