"""Encoder and decoder as one, so that one backward pass forms both weights' gradients together.

Apart, the encoder and the decoder each write a gradient, every reconstruction that is trained on
adds a dense one of W_dec, and every use of some rows of a weight (AuxK) a dense one of that.
Here whatever is made of the weights comes from one function, and is added before it is dense.

Letters: N tokens, D d_in, E width of the output, M num_latents, K slots, P pieces, A rows. Derived
in README.md. A second derivative is not defined, and asking for one raises.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from saetrain.kernels import reference
from saetrain.kernels.backends import backend_module, select_backend
from saetrain.kernels.encode import (
    centred,
    check_encode,
    check_vector,
    gradient_of_subtracted,
    select_acts,
    through_relu,
)
from saetrain.kernels.prefix_groups import PrefixGroups, Selector
from saetrain.kernels.sorted_pairs import SharedSortedPairs


class WeightRows(NamedTuple):
    """Of some latents, what belongs to them.

    Attributes:
        W_enc: [A, D].
        b_enc: [A].
        W_dec: [A, E].
    """

    W_enc: Tensor
    b_enc: Tensor
    W_dec: Tensor


class Autoencoded(NamedTuple):
    """What `autoencode` gives.

    Attributes:
        reconstructions: P of them, [N, E]; the last is that of all pairs.
        top_acts: [N, K], at least zero; with pieces, in their order.
        top_indices: [N, K] int64, the latents they belong to.
        rows: of the weights, if they were asked for.
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
) -> Autoencoded:
    """Encode, and decode what was selected: all of it, and the first pieces alone.

    The product, the selection and all types are as in `sparse_encode` and `sparse_decode`.

    Args:
        x: [N, D], cast to the dtype of W_enc.
        W_enc: [M, D].
        b_enc: [M].
        subtracted: from x, [D]; None: nothing (a transcoder's input has another mean).
        W_dec: [M, E], in the dtype of W_enc.
        b_dec: [E].
        selector: selects; `topk_selector` or `selector`.
        prefix_groups: split the pairs: reconstruction j is made of pieces 0 to j. None: one.
        rows: latents whose weights are wanted besides, [A] int64, none twice. Gradients of these
            rows join the weights' own; `W_enc[rows]` would add a dense gradient of its own.

    Returns:
        Differentiable once with respect to x and all weights, through reconstructions, rows, and
        positive top_acts.

    Raises:
        ValueError: the shapes or dtypes do not fit, or what `selector` says.
    """
    _check(x, W_enc, b_enc, subtracted, W_dec, b_dec)
    dtype, path = W_enc.dtype, select_backend(W_enc)
    x, b_enc, b_dec = x.to(dtype), b_enc.to(dtype), b_dec.to(dtype)
    subtracted = None if subtracted is None else subtracted.to(dtype)
    if prefix_groups is not None:
        selector = prefix_groups.grouped(selector)
    if path == "reference":
        acts, indices, outs = reference.autoencode(
            x, W_enc, b_enc, subtracted, W_dec, b_dec, selector, prefix_groups
        )
        found = None if rows is None else WeightRows(W_enc[rows], b_enc[rows], W_dec[rows])
        return Autoencoded(outs, acts, indices, found)
    shared: list[SharedSortedPairs] = []
    # b_dec may be what is subtracted, too: its two gradients are added in this order.
    inputs = (
        x,
        W_enc,
        b_enc,
        W_dec,
        b_dec,
        subtracted,
        rows,
        selector,
        prefix_groups,
        shared,
        path,
    )
    acts, indices, *others = _Autoencode.apply(*inputs)  # type: ignore[no-untyped-call]
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
        shared: list[SharedSortedPairs],
        path: str,
    ) -> tuple[Tensor, ...]:
        acts, indices = select_acts(x, W_enc, b_enc, subtracted, selector)  # [N, K]
        ctx.mark_non_differentiable(indices)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, W_enc, subtracted, W_dec, acts, indices, rows)
        ctx.pairs, ctx.path = SharedSortedPairs(indices, len(W_enc)), path
        ctx.bags = None if prefix_groups is None else prefix_groups.bags(indices)
        ctx.number = 1 if prefix_groups is None else prefix_groups.number
        shared.append(ctx.pairs)
        out = backend_module(path).gather_sum(acts, indices, W_dec, bags=ctx.bags)  # [N * P, E]
        outs = (
            [out.add_(b_dec)]
            if prefix_groups is None
            else _running_sums(out, prefix_groups.number, b_dec)
        )
        if rows is not None:
            outs += [weight.index_select(0, rows) for weight in (W_enc, b_enc, W_dec)]
        return acts, indices, *outs

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, d_acts: Tensor | None, _: None, *gradients: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        x, W_enc, subtracted, W_dec, acts, indices, rows = ctx.saved_tensors
        need_x, need_W_enc, need_b_enc, need_W_dec, need_b_dec, need_sub, *_ = ctx.needs_input_grad
        ops, bags, M = backend_module(ctx.path), ctx.bags, len(W_enc)
        dY = _of_pieces(gradients[: ctx.number])  # [N * P, E]
        reached = dY is not None or d_acts is not None
        of_latents = need_W_enc or need_b_enc or need_sub or need_W_dec
        pairs = ctx.pairs.get() if reached and of_latents else None
        if dY is not None and (need_x or need_W_enc or need_b_enc or need_sub):
            in_order = (pairs,) if ctx.path == "torch" and pairs is not None else ()  # gains by it
            of_outs = ops.gather_dot(dY, indices, W_dec, *in_order, bags=bags)  # [N, K]
            d_acts = of_outs if d_acts is None else d_acts + of_outs
        g = None if d_acts is None else through_relu(d_acts, acts)  # [N, K]

        dx = dW_enc = db_enc = d_sub = dW_dec = db_dec = None
        if need_x and g is not None:
            dx = ops.gather_sum(g, indices, W_enc)  # [N, D]
        if need_b_dec and dY is not None:
            db_dec = dY.view(len(x), ctx.number, W_dec.shape[1])[:, 0].sum(dim=0)  # [E]
        if need_W_enc and need_W_dec and dY is not None and g is not None:
            read = centred(x, subtracted)
            of_weights = ops.weight_gradients(acts, dY, g, read, indices, M, pairs, bags=bags)
            dW_dec, dW_enc, db_enc = of_weights  # [M, E], [M, D], [M]
        else:
            if need_W_dec and dY is not None:
                dW_dec = ops.scatter_outer(acts, indices, dY, M, pairs, bags)
            if need_W_enc and g is not None:
                dW_enc = ops.scatter_outer(g, indices, centred(x, subtracted), M, pairs)
            if (need_b_enc or need_sub) and g is not None:
                db_enc = ops.scatter_sum(g, indices, M, pairs)
        if need_sub and db_enc is not None:
            d_sub = gradient_of_subtracted(db_enc, W_enc)  # [D]
        if rows is not None:
            d_rows = WeightRows(*gradients[ctx.number :])  # type: ignore[arg-type]
            dW_enc = _joined(dW_enc, rows, d_rows.W_enc if need_W_enc else None, M)
            db_enc = _joined(db_enc, rows, d_rows.b_enc if need_b_enc else None, M)
            dW_dec = _joined(dW_dec, rows, d_rows.W_dec if need_W_dec else None, M)
        return dx, dW_enc, db_enc if need_b_enc else None, dW_dec, db_dec, d_sub, *(None,) * 5


def _running_sums(out: Tensor, number: int, b_dec: Tensor) -> list[Tensor]:
    """Reconstructions [N, E] from the sums over bags, [N * P, E]."""
    so_far, sums = b_dec, []
    for piece in out.view(len(out) // number, number, len(b_dec)).unbind(1):
        so_far = so_far + piece
        sums.append(so_far)
    return sums


def _of_pieces(gradients: tuple[Tensor | None, ...]) -> Tensor | None:
    """Gradient of the sum over each bag, [N * P, E].

    Piece i is in reconstructions i to P - 1, and has the sum of their gradients.
    """
    if len(gradients) == 1:
        return gradients[0]
    like = next((gradient for gradient in gradients if gradient is not None), None)
    if like is None:
        return None
    N, E = like.shape
    dY = torch.empty(N, len(gradients), E, dtype=like.dtype, device=like.device)
    so_far = torch.zeros_like(like)
    for piece in reversed(range(len(gradients))):
        if (gradient := gradients[piece]) is not None:
            so_far = so_far + gradient
        dY[:, piece] = so_far
    return dY.flatten(0, 1)


def _joined(gradient: Tensor | None, rows: Tensor, of_rows: Tensor | None, M: int) -> Tensor | None:
    """A weight's gradient and that of some of its rows; each is added to once, in place."""
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
