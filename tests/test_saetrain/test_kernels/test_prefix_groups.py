import torch

from saetrain.kernels import PrefixGroups, reference

VALUES = torch.tensor([[1.0, 4.0, 2.0, 3.0], [5.0, 5.0, 0.0, 9.0]])
INDICES = torch.tensor([[7, 1, 3, 2], [0, 6, 2, 5]])


def grouped(prefix_groups):
    selector = prefix_groups.grouped(lambda *_: (VALUES, INDICES))
    return selector(VALUES, VALUES, VALUES, reference)


def test_by_latent_slots_are_ordered_by_group_and_stable_within_one():
    prefix_groups = PrefixGroups("latent", (2, 6))
    values, indices = grouped(prefix_groups)
    assert indices.tolist() == [[1, 3, 2, 7], [0, 2, 5, 6]]
    assert values.tolist() == [[4.0, 2.0, 3.0, 1.0], [5.0, 0.0, 9.0, 5.0]]
    bags = prefix_groups.bags(indices)
    assert bags.bag.tolist() == [[0, 1, 1, 2], [3, 4, 4, 5]]
    assert bags.offsets.tolist() == [0, 1, 3, 4, 5, 7, 8]


def test_by_rank_the_strongest_are_first_and_ties_are_stable():
    prefix_groups = PrefixGroups("rank", (1,))
    values, indices = grouped(prefix_groups)
    assert values.tolist() == [[4.0, 3.0, 2.0, 1.0], [9.0, 5.0, 5.0, 0.0]]
    assert indices.tolist() == [[1, 2, 3, 7], [5, 0, 6, 2]]
    assert prefix_groups.bags(indices).offsets.tolist() == [0, 1, 4, 5, 8]


def test_a_group_may_be_empty():
    prefix_groups = PrefixGroups("latent", (0, 3, 3, 99))
    bags = prefix_groups.bags(grouped(prefix_groups)[1])
    assert prefix_groups.number == 5
    assert bags.offsets.diff().view(2, 5).tolist() == [[0, 2, 0, 2, 0], [0, 2, 0, 2, 0]]


def test_without_tokens_there_are_no_bags():
    bags = PrefixGroups("latent", (2,)).bags(INDICES[:0])
    assert bags.bag.shape == (0, 4)
    assert bags.offsets.tolist() == [0]
