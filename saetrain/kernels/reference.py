"""The reference that every faster backend is compared with: plain PyTorch, slow and wasteful.

Letters: N tokens, D d_in, M num_latents, K k. Every function is differentiable by autograd.
Sums of bfloat16 and float16 are formed in float32 and rounded once. `pairs` are accepted for the
common signature; nothing is sorted here.
"""

import torch
from torch import Tensor

from saetrain.kernels.backends import Primitives
from saetrain.kernels.prefix_groups import PrefixGroups, Selector
from saetrain.kernels.sorted_pairs import Bags, SortedPairs
from saetrain.kernels.update import UpdateOptions, adam_numbers

SKIPS_EMPTY, MIXES_TYPES = False, True


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def gather_sum(acts: Tensor, indices: Tensor, W: Tensor, bags: Bags | None = None) -> Tensor:
    """Compute out[n] = sum over k of acts[n, k] * W[indices[n, k]]: [N, D] in the dtype of acts.

    With `bags`, out has a row for each of them, the sum over its pairs: [N*P, D].
    """
    wide = _wide(acts.dtype)
    products = acts.to(wide).unsqueeze(-1) * W[indices].to(wide)  # [N, K, D]
    if bags is None:
        return products.sum(dim=1).to(acts.dtype)
    out = torch.zeros(len(bags.offsets) - 1, W.shape[1], dtype=wide, device=W.device)
    return out.index_add(0, bags.bag.reshape(-1), products.flatten(0, 1)).to(acts.dtype)


def gather_dot(
    dY: Tensor,
    indices: Tensor,
    W: Tensor,
    pairs: SortedPairs | None = None,
    bags: Bags | None = None,
    acts: Tensor | None = None,
) -> Tensor:
    """Compute out[n, k] = <dY[n], W[indices[n, k]]>: [N, K] in the dtype of W, or of `acts`.

    With `bags`, dY has a row for each of them, [N*P, D]. With `acts`, the result is 0 where they
    are.
    """
    del pairs
    dtype = W.dtype if acts is None else acts.dtype
    wide = _wide(dtype)
    rows = W[indices].to(wide)  # [N, K, D]
    dots = (_of_pairs(dY, bags).to(wide) * rows).sum(dim=2).to(dtype)
    return dots if acts is None else torch.where(acts == 0, 0, dots)


def _of_pairs(dY: Tensor, bags: Bags | None) -> Tensor:
    """Return the row of dY of each pair: [N, K, D], or [N, 1, D] if a token has only one."""
    return dY.unsqueeze(1) if bags is None else dY[bags.bag]


def scatter_outer(
    acts: Tensor,
    indices: Tensor,
    dY: Tensor,
    num_latents: int,
    pairs: SortedPairs | None = None,
    bags: Bags | None = None,
) -> Tensor:
    """Compute out[m] = sum over (n, k) with indices[n, k] = m of acts[n, k] * dY[n]: [M, D].

    With `bags`, dY has a row for each of them, [N*P, D].
    """
    del pairs
    wide = _wide(dY.dtype)
    products = acts.to(wide).unsqueeze(-1) * _of_pairs(dY, bags).to(wide)  # [N, K, D]
    out = torch.zeros(num_latents, dY.shape[1], dtype=wide, device=dY.device)
    return out.index_add(0, indices.reshape(-1), products.flatten(0, 1)).to(dY.dtype)


def weight_gradients(
    acts: Tensor,
    dY: Tensor,
    g: Tensor,
    x: Tensor,
    indices: Tensor,
    num_latents: int,
    pairs: SortedPairs | None = None,
    dtype: torch.dtype | None = None,
    bags: Bags | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute dW_dec [M, E], dW_enc [M, D] and db_enc [M], of `dtype`; None: that of dY.

    Args:
        acts: activations, [N, K].
        dY: gradient of the output, [N, E]; with `bags`, of the sum over each, [N*P, E].
        g: gradient of the activations through the ReLU, [N, K].
        x: rows that the encoder multiplied, [N, D].
        indices: latents, [N, K] int64.
        num_latents: M.
        pairs: ignored.
        dtype: of the results.
        bags: bags whose rows dY has; None: a row for each token.
    """
    dtype = dtype or dY.dtype
    acts, dY, g, x = (tensor.to(_wide(tensor.dtype)) for tensor in (acts, dY, g, x))
    return (
        scatter_outer(acts, indices, dY, num_latents, pairs, bags).to(dtype),
        scatter_outer(g, indices, x, num_latents, pairs).to(dtype),
        scatter_sum(g, indices, num_latents, pairs).to(dtype),
    )


def scatter_sum(
    values: Tensor, indices: Tensor, num_latents: int, pairs: SortedPairs | None = None
) -> Tensor:
    """Compute out[m] = sum of values[n, k] over (n, k) with indices[n, k] = m: [M]."""
    del pairs
    wide = _wide(values.dtype)
    out = torch.zeros(num_latents, dtype=wide, device=values.device)
    return out.index_add(0, indices.reshape(-1), values.reshape(-1).to(wide)).to(values.dtype)


def sparse_decode(
    top_acts: Tensor, top_indices: Tensor, W_dec: Tensor, b_dec: Tensor | None
) -> Tensor:
    """Compute `saetrain.kernels.sparse_decode`, differentiated by autograd."""
    out = gather_sum(top_acts, top_indices, W_dec)  # [N, D]
    return out if b_dec is None else out + b_dec


def sparse_encode(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    b_dec: Tensor | None,
    selector: Selector,
    ops: Primitives,
) -> tuple[Tensor, Tensor]:
    """Compute `saetrain.kernels.sparse_encode_by`, differentiated by autograd; `ops` selects."""
    centred = x if b_dec is None else x - b_dec  # [N, D]
    with torch.no_grad():
        values, top_indices = selector(centred, W_enc, b_enc, ops)  # [N, S]
    pre_acts = torch.nn.functional.linear(centred, W_enc, b_enc)  # [N, M]
    top_acts = torch.relu(pre_acts.gather(1, top_indices)) * (values > 0)  # [N, S]
    # A NaN is not greater than 0, and must not be lost.
    top_acts = top_acts.masked_fill(values.isnan(), torch.nan)
    return top_acts.to(W_enc.dtype), top_indices


def autoencode(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    subtracted: Tensor | None,
    W_dec: Tensor,
    b_dec: Tensor,
    selector: Selector,
    prefix_groups: PrefixGroups | None,
    ops: Primitives,
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """Compute `saetrain.kernels.autoencode`, differentiated by autograd; `ops` selects.

    `selector` is grouped already. Returns top_acts, top_indices and the reconstructions.
    """
    top_acts, top_indices = sparse_encode(x, W_enc, b_enc, subtracted, selector, ops)
    if prefix_groups is None:
        return top_acts, top_indices, (sparse_decode(top_acts, top_indices, W_dec, b_dec),)
    group = prefix_groups.bags(top_indices).bag % prefix_groups.number  # [N, K]
    return (
        top_acts,
        top_indices,
        tuple(
            sparse_decode(torch.where(group <= last, top_acts, 0), top_indices, W_dec, b_dec)
            for last in range(prefix_groups.number)
        ),
    )


def dense_encode(x: Tensor, W_enc: Tensor, b_enc: Tensor, b_dec: Tensor | None) -> Tensor:
    """Compute `saetrain.kernels.dense_encode`, differentiated by autograd."""
    return torch.nn.functional.linear(x if b_dec is None else x - b_dec, W_enc, b_enc)


def dense_decode(acts: Tensor, W_dec: Tensor, b_dec: Tensor) -> Tensor:
    """Compute `saetrain.kernels.dense_decode`, differentiated by autograd."""
    return acts @ W_dec + b_dec


# Selections. A row with a NaN anywhere gives NaN for all its values, so that its loss is not finite
# and the step is skipped; its indices lie in [0, M) all the same.


def topk(pre_acts: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Select the k largest of each row, in any order: values [N, k], indices [N, k] int64.

    Of equal values, any may be taken.
    """
    values, indices = torch.topk(pre_acts, k, dim=-1, sorted=False)
    spoiled = pre_acts.isnan().any(dim=1, keepdim=True)
    return torch.where(spoiled, torch.nan, values), indices


def batch_topk_threshold(pre_acts: Tensor, count: int) -> Tensor:
    """Find the count-th largest of all N*M values, no dimensions; NaN if any of them is."""
    smallest = torch.topk(pre_acts.flatten(), count, sorted=True).values[-1]
    return torch.where(pre_acts.isnan().any(), torch.nan, smallest)


def group_max(pre_acts: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Select the largest of each of k groups of M/k neighbours, the first of equals, in order.

    Values [N, k], indices [N, k] int64. A group with a NaN gives NaN.
    """
    size = pre_acts.shape[1] // k
    values, within = pre_acts.view(len(pre_acts), k, size).max(dim=-1)  # [N, k]
    return values, within + size * torch.arange(k, device=within.device)


# Updates of a weight in place; `UpdateOptions` describes the options. `grad` may be overwritten.


def signum_update_(y: Tensor, z: Tensor, grad: Tensor, options: UpdateOptions) -> None:
    """Make one step of schedule-free SignSGD, in place.

    x = lerp(y, z, 1 - 1/momentum); z -= lr * sign(grad); x = lerp(x, z, mix);
    y = lerp(x, z, 1 - momentum), with lerp(a, b, t) = a + t (b - a). The sign of 0 and of
    NaN is 0.

    Args:
        y: where gradients are taken, [M, D] or another shape.
        z: where sign steps go, as y.
        grad: of y, as y.
        options: lr, mix and momentum, and the common ones.
    """
    g, numbers = _projected(y, grad, options), options.numbers
    wide_y, wide_z = y.to(g.dtype), z.to(g.dtype)
    x = torch.lerp(wide_y, wide_z, 1 - 1 / options.momentum)
    lr, mix = (options.lr, options.mix) if numbers is None else numbers.to(g.dtype).unbind()
    new_z = wide_z - lr * g.sign()
    x = torch.lerp(x, new_z, mix)
    new_y = torch.lerp(x, new_z, 1 - options.momentum)
    _write(options.ok, (z, new_z))
    _write_weight(y, new_y, options)


def adam_update_(w: Tensor, m: Tensor, v: Tensor, grad: Tensor, options: UpdateOptions) -> None:
    """Make one step of Adam, with decoupled weight decay (0: none), in place.

    w -= lr * weight_decay * w; m = lerp(m, grad, 1 - beta1); v = beta2 v + (1 - beta2) grad²;
    w -= lr / (1 - beta1^step) * m / (sqrt(v) / sqrt(1 - beta2^step) + eps).

    Args:
        w: weights, [M, D] or another shape.
        m: mean of the gradient, as w.
        v: mean of its square, as w.
        grad: of w, as w.
        options: lr, the betas, eps, weight_decay and step, and the common ones.
    """
    g, o = _projected(w, grad, options), options
    keep, rate, root_v, _, _ = (
        adam_numbers(o.lr, o.weight_decay, o.beta1, o.beta2, o.step)
        if o.numbers is None
        else o.numbers.to(g.dtype).unbind()
    )
    wide_w = w.to(g.dtype) * keep
    new_m = torch.lerp(m.to(g.dtype), g, 1 - o.beta1)
    new_v = o.beta2 * v.to(g.dtype) + (1 - o.beta2) * g * g
    root = new_v.sqrt() / root_v + o.eps
    new_w = wide_w - rate * new_m / root
    _write(o.ok, (m, new_m), (v, new_v))
    _write_weight(w, new_w, o)


def _projected(w: Tensor, grad: Tensor, options: UpdateOptions) -> Tensor:
    """Remove the gradient's component along w's rows, if these have norm 1; write its squares."""
    g = grad.to(_wide(w.dtype))
    if options.unit:
        wide = w.to(g.dtype)
        g = g - (g * wide).sum(dim=1, keepdim=True) * wide
    if options.squares is not None:
        options.squares.copy_(g.square().sum(dim=1))
    return g


def _write_weight(w: Tensor, new: Tensor, options: UpdateOptions) -> None:
    if options.unit:
        divisor = new.norm(dim=1, keepdim=True) + torch.finfo(w.dtype).eps  # [M, 1]
        new = new / divisor
        if options.norms is not None:
            _write(options.ok, (options.norms, divisor.squeeze(1)))
    _write(options.ok, (w, new))
    if options.bf16_copy is not None:
        _write(options.ok, (options.bf16_copy, w))


def _write(ok: Tensor | None, *pairs: tuple[Tensor, Tensor]) -> None:
    """Overwrite each first tensor by the second where `ok`."""
    for old, new in pairs:
        new = new.to(old.dtype)
        old.copy_(new if ok is None else torch.where(ok, new, old))
