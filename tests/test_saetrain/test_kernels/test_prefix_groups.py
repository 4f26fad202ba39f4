import torch

from saetrain.kernels import PrefixGroups

VALUES = torch.tensor([[1.0, 4.0, 2.0, 3.0], [5.0, 5.0, 0.0, 9.0]])
INDICES = torch.tensor([[7, 1, 3, 2], [0, 6, 2, 5]])


def arranged(prefix_groups):
    return prefix_groups.arranged(lambda *_: (VALUES, INDICES))(VALUES, VALUES, VALUES)


def test_by_latent_slots_are_in_order_of_pieces_and_keep_theirs_within_one():
    prefix_groups = PrefixGroups("latent", (2, 6))
    values, indices = arranged(prefix_groups)
    assert indices.tolist() == [[1, 3, 2, 7], [0, 2, 5, 6]]
    assert values.tolist() == [[4.0, 2.0, 3.0, 1.0], [5.0, 0.0, 9.0, 5.0]]
    bags = prefix_groups.bags(indices)
    assert bags.bag.tolist() == [[0, 1, 1, 2], [3, 4, 4, 5]]
    assert bags.offsets.tolist() == [0, 1, 3, 4, 5, 7, 8]


def test_by_rank_the_strongest_come_first_and_equals_in_their_order():
    prefix_groups = PrefixGroups("rank", (1,))
    values, indices = arranged(prefix_groups)
    assert values.tolist() == [[4.0, 3.0, 2.0, 1.0], [9.0, 5.0, 5.0, 0.0]]
    assert indices.tolist() == [[1, 2, 3, 7], [5, 0, 6, 2]]
    assert prefix_groups.bags(indices).offsets.tolist() == [0, 1, 4, 5, 8]


def test_a_piece_may_be_empty():
    prefix_groups = PrefixGroups("latent", (0, 3, 3, 99))
    bags = prefix_groups.bags(arranged(prefix_groups)[1])
    assert prefix_groups.number == 5
    assert bags.offsets.diff().view(2, 5).tolist() == [[0, 2, 0, 2, 0], [0, 2, 0, 2, 0]]


def test_no_tokens_have_no_bags():
    bags = PrefixGroups("latent", (2,)).bags(INDICES[:0])
    assert bags.bag.shape == (0, 4)
    assert bags.offsets.tolist() == [0]
