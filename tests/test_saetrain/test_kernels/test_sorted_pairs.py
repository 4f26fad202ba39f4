import torch

from saetrain.kernels.sorted_pairs import SharedSortedPairs, sort_pairs


def test_pairs_are_in_order_of_latent_and_then_of_token():
    pairs = sort_pairs(torch.tensor([[4, 0], [0, 4], [1, 0]]), num_latents=6)
    assert pairs.order.tolist() == [1, 2, 5, 4, 0, 3]
    assert pairs.token.tolist() == [0, 1, 2, 2, 0, 1]
    assert pairs.offsets.tolist() == [0, 3, 4, 4, 4, 6, 6]


def test_without_pairs_every_segment_is_empty():
    pairs = sort_pairs(torch.empty(0, 3, dtype=torch.int64), num_latents=2)
    assert pairs.order.tolist() == []
    assert pairs.offsets.tolist() == [0, 0, 0]


def test_each_segment_holds_the_pairs_of_its_latent():
    indices = torch.randint(11, (50, 4), generator=torch.Generator().manual_seed(0))
    pairs = sort_pairs(indices, num_latents=11)
    for m in range(11):
        segment = pairs.order[pairs.offsets[m] : pairs.offsets[m + 1]]
        assert segment.tolist() == (indices.reshape(-1) == m).nonzero().squeeze(1).tolist()


def test_pairs_that_are_left_out_come_after_those_of_all_latents():
    indices = torch.tensor([[4, 0], [0, 4], [1, 0]])
    empty = torch.tensor([[False, True], [False, False], [True, False]])
    pairs = sort_pairs(indices, 6, empty)
    assert pairs.offsets.tolist() == [0, 2, 2, 2, 2, 4, 4]
    assert pairs.order[:4].tolist() == [2, 5, 0, 3]
    assert sorted(pairs.order[4:].tolist()) == [1, 4]
    assert indices.max() == 4  # the caller's are not changed


def make_indices():
    return torch.randint(11, (50, 4), generator=torch.Generator().manual_seed(0))


def test_shared_pairs_belong_to_one_tensor_of_indices():
    indices = make_indices()
    once = SharedSortedPairs(indices, 11)
    once.attach_to(indices)
    assert SharedSortedPairs.of(indices, 11) is once
    assert SharedSortedPairs.of(indices, 12) is not once
    assert SharedSortedPairs.of(indices.clone(), 11) is not once
    assert SharedSortedPairs.of(indices[:, :2], 11) is not once


def test_pairs_are_sorted_once_and_again_after_a_write_to_the_indices():
    indices = make_indices()
    once = SharedSortedPairs(indices, 11)
    assert once.get() is once.get()
    indices.zero_()
    assert once.get().offsets.tolist() == [0] + [200] * 11
