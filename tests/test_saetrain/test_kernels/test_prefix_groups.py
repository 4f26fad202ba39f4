import torch

from saetrain.kernels import Pieces

VALUES = torch.tensor([[1.0, 4.0, 2.0, 3.0], [5.0, 5.0, 0.0, 9.0]])
INDICES = torch.tensor([[7, 1, 3, 2], [0, 6, 2, 5]])


def arranged(pieces):
    return pieces.arranged(lambda *_: (VALUES, INDICES))(VALUES, VALUES, VALUES)


def test_by_latent_slots_are_in_order_of_pieces_and_keep_theirs_within_one():
    pieces = Pieces("latent", (2, 6))
    values, indices = arranged(pieces)
    assert indices.tolist() == [[1, 3, 2, 7], [0, 2, 5, 6]]
    assert values.tolist() == [[4.0, 2.0, 3.0, 1.0], [5.0, 0.0, 9.0, 5.0]]
    bags = pieces.bags(indices)
    assert bags.bag.tolist() == [[0, 1, 1, 2], [3, 4, 4, 5]]
    assert bags.offsets.tolist() == [0, 1, 3, 4, 5, 7, 8]


def test_by_rank_the_strongest_come_first_and_equals_in_their_order():
    pieces = Pieces("rank", (1,))
    values, indices = arranged(pieces)
    assert values.tolist() == [[4.0, 3.0, 2.0, 1.0], [9.0, 5.0, 5.0, 0.0]]
    assert indices.tolist() == [[1, 2, 3, 7], [5, 0, 6, 2]]
    assert pieces.bags(indices).offsets.tolist() == [0, 1, 4, 5, 8]


def test_a_piece_may_be_empty():
    pieces = Pieces("latent", (0, 3, 3, 99))
    bags = pieces.bags(arranged(pieces)[1])
    assert pieces.number == 5
    assert bags.offsets.diff().view(2, 5).tolist() == [[0, 2, 0, 2, 0], [0, 2, 0, 2, 0]]


def test_no_tokens_have_no_bags():
    bags = Pieces("latent", (2,)).bags(INDICES[:0])
    assert bags.bag.shape == (0, 4)
    assert bags.offsets.tolist() == [0]
