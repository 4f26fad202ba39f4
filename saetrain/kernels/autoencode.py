"""Encoder and decoder in one function, so that one backward pass forms both weights' gradients.

In two functions, the encoder and the decoder each write a gradient, every reconstruction that is
trained on adds a dense one of W_dec, and every use of some rows of a weight (AuxK) adds a dense one
of that. Here all results come from one function, and gradients are added before they are dense.

Letters: N tokens, D d_in, E width of the output, M num_latents, K slots, P groups, A rows. Derived
in README.md. A second derivative is not defined, and requesting one raises.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from saetrain.kernels import backends, reference
from saetrain.kernels.backends import Primitives, backend_module, backend_of
from saetrain.kernels.dense import (
    centred,
    check_encode,
    check_vector,
    gradient_of_subtracted,
    product_dtype,
    products_from,
)
from saetrain.kernels.prefix_groups import PrefixGroups, Selector
from saetrain.kernels.sorted_pairs import SharedSortedPairs, sort_pairs
from saetrain.kernels.update import bf16_copy_of


class WeightRows(NamedTuple):
    """The weights of some latents.

    Attributes:
        W_enc: [A, D].
        b_enc: [A].
        W_dec: [A, E].
    """

    W_enc: Tensor
    b_enc: Tensor
    W_dec: Tensor


class Autoencoded(NamedTuple):
    """The results of `autoencode`.

    Attributes:
        reconstructions: P of them, [N, E]; the last is that of all pairs.
        top_acts: [N, K], at least zero; with groups, in their order.
        top_indices: [N, K] int64, the latents they belong to.
        rows: the requested rows of the weights, if any.
    """

    reconstructions: tuple[Tensor, ...]
    top_acts: Tensor
    top_indices: Tensor
    rows: WeightRows | None


def autoencode(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    subtracted: Tensor | None,
    W_dec: Tensor,
    b_dec: Tensor,
    selector: Selector,
    *,
    prefix_groups: PrefixGroups | None = None,
    rows: Tensor | None = None,
    active: int | None = None,
) -> Autoencoded:
    """Encode, and decode the selected latents: all of them, and each prefix of the groups.

    The product, the selection and all types are as in `sparse_encode` and `sparse_decode`. Under
    autocast a backend with `MIXES_TYPES` also gathers rows of W_dec, if it has a copy in bfloat16,
    and of x and the gradient of the reconstructions in autocast's type; sums and results keep that
    of W_enc.

    Args:
        x: [N, D], cast to the dtype of W_enc.
        W_enc: [M, D].
        b_enc: [M].
        subtracted: subtracted from x, [D]; None: nothing (a transcoder's input has another mean).
        W_dec: [M, E], in the dtype of W_enc.
        b_dec: [E].
        selector: from `topk_selector` or `make_selector`.
        prefix_groups: split of the pairs: reconstruction j sums groups 0 to j. None: one group.
        rows: latents whose weights are returned too, [A] int64, none twice. Gradients of these
            rows are added to the weights' own; `W_enc[rows]` would add a dense gradient.
        active: slots of a token that hold something, on average; None: all K. On CUDA it decides,
            where there is one group, whether dense products are faster than gathers.

    Returns:
        Differentiable once with respect to x and all weights, through reconstructions, rows, and
        positive top_acts.

    Raises:
        ValueError: the shapes or dtypes do not fit, or the selector refuses them.
    """
    _check(x, W_enc, b_enc, subtracted, W_dec, b_dec)
    dtype, ops = W_enc.dtype, backend_of(W_enc)
    x, b_enc, b_dec = x.to(dtype), b_enc.to(dtype), b_dec.to(dtype)
    subtracted = None if subtracted is None else subtracted.to(dtype)
    if prefix_groups is not None:
        selector = prefix_groups.grouped(selector)
    if ops is reference:
        acts, indices, outs = reference.autoencode(
            x, W_enc, b_enc, subtracted, W_dec, b_dec, selector, prefix_groups, ops
        )
        found = None if rows is None else WeightRows(W_enc[rows], b_enc[rows], W_dec[rows])
        return Autoencoded(outs, acts, indices, found)
    shared: list[SharedSortedPairs] = []
    # b_dec may be what is subtracted, too: its two gradients are added in this order.
    inputs = (x, W_enc, b_enc, W_dec, b_dec, subtracted)
    how = (rows, selector, prefix_groups, active, shared, ops)
    acts, indices, *others = _Autoencode.apply(*inputs, *how)  # type: ignore[no-untyped-call]
    shared[0].attach_to(indices)
    P = 1 if prefix_groups is None else prefix_groups.number
    found = None if rows is None else WeightRows(*others[P:])
    return Autoencoded(tuple(others[:P]), acts, indices, found)


class _Autoencode(Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        W_enc: Tensor,
        b_enc: Tensor,
        W_dec: Tensor,
        b_dec: Tensor,
        subtracted: Tensor | None,
        rows: Tensor | None,
        selector: Selector,
        prefix_groups: PrefixGroups | None,
        active: int | None,
        shared: list[SharedSortedPairs],
        ops: Primitives,
    ) -> tuple[Tensor, ...]:
        values, indices = selector(centred(x, subtracted), W_enc, b_enc, ops)  # [N, K]
        acts = torch.relu(values).to(W_enc.dtype)
        ctx.mark_non_differentiable(indices)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, W_enc, subtracted, W_dec, acts, indices, rows)
        # Under autocast, rows are gathered in its type, W_dec from its copy, where there is one.
        ctx.rounded = product_dtype(W_dec) if ops.MIXES_TYPES else W_dec.dtype
        ctx.table = bf16_copy_of(W_dec) if ctx.rounded == torch.bfloat16 else None
        table = W_dec if ctx.table is None else ctx.table
        ctx.by_products = False
        if ops.MIXES_TYPES and prefix_groups is None and not backends.host_can_read(W_dec):
            sizes = (len(W_enc), x.shape[1], W_dec.shape[1], ctx.rounded)
            ctx.by_products = (active or indices.shape[1]) >= products_from(*sizes)
        ctx.ops = ops = backend_module("products") if ctx.by_products else ops
        ctx.bags = None if prefix_groups is None else prefix_groups.bags(indices)
        ctx.number = 1 if prefix_groups is None else prefix_groups.number
        out = ops.gather_sum(acts, indices, table, bags=ctx.bags)  # [N * P, E]
        outs = [out.add_(b_dec)] if ctx.number == 1 else _running_sums(out, ctx.number, b_dec)
        if rows is not None:
            outs += W_enc.index_select(0, rows), b_enc.index_select(0, rows)
            outs.append(W_dec.index_select(0, rows))
        ctx.pairs = SharedSortedPairs(indices, len(W_enc))
        shared.append(ctx.pairs)
        return acts, indices, *outs

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, d_acts: Tensor | None, _: None, *gradients: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        x, W_enc, subtracted, W_dec, acts, indices, rows = ctx.saved_tensors
        need_x, need_W_enc, need_b_enc, need_W_dec, need_b_dec, need_sub, *_ = ctx.needs_input_grad
        ops, bags, M = ctx.ops, ctx.bags, len(W_enc)
        dY = _gradient_of_bags(gradients[: ctx.number])  # [N * P, E]
        x = centred(x, subtracted)
        gathered = None if dY is None else dY.to(ctx.rounded)
        reached = dY is not None or d_acts is not None
        of_latents = need_W_enc or need_b_enc or need_sub or need_W_dec
        empty, pairs = acts <= 0, None  # [N, K]
        if reached and of_latents and not ctx.by_products:
            pairs = sort_pairs(indices, M, empty) if ops.SKIPS_EMPTY else ctx.pairs.get()
        g = None if d_acts is None else d_acts.masked_fill(empty, 0)  # [N, K]
        if gathered is not None and (need_x or need_W_enc or need_b_enc or need_sub):
            table = W_dec if ctx.table is None else ctx.table
            of_outs = ops.gather_dot(gathered, indices, table, pairs, bags, acts)  # [N, K]
            g = of_outs if g is None else g + of_outs

        dx = dW_enc = db_enc = d_sub = dW_dec = db_dec = None
        if need_x and g is not None:
            dx = ops.gather_sum(g, indices, W_enc)  # [N, D]
        if need_b_dec and dY is not None:
            db_dec = dY.view(len(x), ctx.number, W_dec.shape[1])[:, 0].sum(dim=0)  # [E]
        if need_W_enc and need_W_dec and gathered is not None and g is not None:
            both = (acts, gathered, g, x.to(ctx.rounded))
            dtype = None if ctx.rounded == W_dec.dtype else W_dec.dtype
            of_weights = ops.weight_gradients(*both, indices, M, pairs, dtype, bags)
            dW_dec, dW_enc, db_enc = of_weights  # [M, E], [M, D], [M]
        else:
            if need_W_dec and dY is not None:
                dW_dec = ops.scatter_outer(acts, indices, dY, M, pairs, bags)
            if need_W_enc and g is not None:
                dW_enc = ops.scatter_outer(g, indices, x, M, pairs)
            if (need_b_enc or need_sub) and g is not None:
                db_enc = ops.scatter_sum(g, indices, M, pairs)
        if need_sub and db_enc is not None:
            d_sub = gradient_of_subtracted(db_enc, W_enc)  # [D]
        if rows is not None:
            of_W_enc, of_b_enc, of_W_dec = gradients[ctx.number :]
            dW_enc = _add_rows(dW_enc, rows, of_W_enc if need_W_enc else None, M)
            db_enc = _add_rows(db_enc, rows, of_b_enc if need_b_enc else None, M)
            dW_dec = _add_rows(dW_dec, rows, of_W_dec if need_W_dec else None, M)
        return dx, dW_enc, db_enc if need_b_enc else None, dW_dec, db_dec, d_sub, *(None,) * 6


def _running_sums(out: Tensor, number: int, b_dec: Tensor) -> list[Tensor]:
    """Compute the reconstructions [N, E] from the sums over bags, [N * P, E]."""
    so_far, sums = b_dec, []
    for of_group in out.view(len(out) // number, number, len(b_dec)).unbind(1):
        so_far = so_far + of_group
        sums.append(so_far)
    return sums


def _gradient_of_bags(gradients: tuple[Tensor | None, ...]) -> Tensor | None:
    """Compute the gradient of the sum over each bag, [N * P, E].

    Group i is in reconstructions i to P - 1, so its gradient is the sum of theirs.
    """
    if len(gradients) == 1:
        return gradients[0]
    like = next((gradient for gradient in gradients if gradient is not None), None)
    if like is None:
        return None
    N, E = like.shape
    dY = torch.empty(N, len(gradients), E, dtype=like.dtype, device=like.device)
    so_far = torch.zeros_like(like)
    for group in reversed(range(len(gradients))):
        if (gradient := gradients[group]) is not None:
            so_far = so_far + gradient
        dY[:, group] = so_far
    return dY.flatten(0, 1)


def _add_rows(
    gradient: Tensor | None, rows: Tensor, of_rows: Tensor | None, M: int
) -> Tensor | None:
    """Add the gradient of some rows to the weight's gradient, in place."""
    if of_rows is None:
        return gradient
    if gradient is None:
        gradient = of_rows.new_zeros(M, *of_rows.shape[1:])
    return gradient.index_add_(0, rows, of_rows)


def _check(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    subtracted: Tensor | None,
    W_dec: Tensor,
    b_dec: Tensor,
) -> None:
    check_encode(x, W_enc, b_enc, subtracted, "subtracted")
    if W_dec.dim() != 2 or len(W_dec) != len(W_enc) or W_dec.dtype != W_enc.dtype:
        raise ValueError(
            f"W_dec must be [{len(W_enc)}, d_out] in {W_enc.dtype} as W_enc is "
            f"{tuple(W_enc.shape)}, got shape {tuple(W_dec.shape)} in {W_dec.dtype}"
        )
    check_vector("b_dec", b_dec, W_dec.shape[1])
