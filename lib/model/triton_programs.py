"""The Triton programs that kernels.py launches, which says what they compute and why so.

Importing this file needs Triton. A program's grid is the pairs, for aggregated tokens the pairs
times the blocks of tokens; the helpers are inlined into the programs that call them.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def order_patches(scores, order, L, k, WIDTH: tl.constexpr):
    """Write a row's patch numbers: the k with the largest scores, then the others.

    Both in ascending order; of equal scores at the threshold the first are kept. The threshold
    is the largest key that k keys reach, found bit by bit.
    """
    row = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, WIDTH)
    real = place < L
    bits = tl.load(scores + row * L + place, mask=real, other=0.0).to(tl.int32, bitcast=True)
    bits = tl.where(bits == -2147483648, 0, bits)  # -0.0 equals 0.0
    key = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)  # integers in the order of the floats
    key = tl.where(real, key, -2147483648)  # below that of -inf
    threshold = tl.where(tl.sum((key >= 0).to(tl.int32), 0) >= k, 0, -2147483648)
    for step in tl.static_range(31):
        candidate = threshold + (1 << (30 - step))
        enough = tl.sum((key >= candidate).to(tl.int32), 0) >= k
        threshold = tl.where(enough, candidate, threshold)
    above = key > threshold
    tied = key == threshold
    room = k - tl.sum(above.to(tl.int32), 0)
    kept = above | (tied & (tl.cumsum(tied.to(tl.int32), 0) <= room))
    before = tl.cumsum(kept.to(tl.int32), 0)  # kept up to and with this one
    target = tl.where(kept, before - 1, k + place - before)
    tl.store(order + row * L + target, place, mask=real)


@triton.jit
def _kept_weights(order, logits, rows, place, k, top):
    """Return exp(logit - top) of kept patches, (BLOCK_N, places), and their numbers."""
    kept = place < k
    index = tl.load(order + place, mask=kept, other=0)
    logit = tl.load(logits + (rows[:, None] + index[None, :]))
    return tl.where(kept[None, :], tl.exp(logit - top[:, None]), 0.0), index


@triton.jit
def _softmax_parts(
    order, logits, rows, k: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_L: tl.constexpr
):
    """Return each token's largest kept logit and its softmax denominator, (BLOCK_N,)."""
    top = tl.full((BLOCK_N,), float("-inf"), tl.float32)
    mass = tl.zeros((BLOCK_N,), tl.float32)
    for first in range(0, k, BLOCK_L):
        place = first + tl.arange(0, BLOCK_L)
        kept = place < k
        index = tl.load(order + place, mask=kept, other=0)
        logit = tl.load(logits + (rows[:, None] + index[None, :]))
        logit = tl.where(kept[None, :], logit, float("-inf"))
        higher = tl.maximum(top, tl.max(logit, 1))
        mass = mass * tl.exp(top - higher) + tl.sum(tl.exp(logit - higher[:, None]), 1)
        top = higher
    return top, mass


@triton.jit
def _weights_and_lengths(
    order,  # (L,) of the pair
    logits,  # (N, L) of the image
    gram,  # (G, L) of the image
    squares,  # (BLOCK_N,) pointers
    rows,  # (BLOCK_N,) where a token's logits begin
    L: tl.constexpr,
    k: tl.constexpr,
    ADDED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Return largest kept logits, inverse softmax denominators and norms, (BLOCK_N,) each."""
    top, mass = _softmax_parts(order, logits, rows, k, BLOCK_N, BLOCK_L)
    square = tl.zeros((BLOCK_N,), tl.float32)
    cross = tl.zeros((BLOCK_N,), tl.float32)
    for first in range(0, k, BLOCK_L):
        column = first + tl.arange(0, BLOCK_L)
        right, right_index = _kept_weights(order, logits, rows, column, k, top)
        turned = tl.zeros((BLOCK_N, BLOCK_L), tl.float32)
        for other in range(0, first + BLOCK_L, BLOCK_K):
            place = other + tl.arange(0, BLOCK_K)
            left, index = _kept_weights(order, logits, rows, place, k, top)
            # the Gram matrix is symmetric: what is left of this block counts twice
            left *= tl.where(other < first, 2.0, 1.0)
            tile = tl.load(gram + (index[:, None] * L + right_index[None, :]))
            turned = tl.dot(left, tile, turned, input_precision="ieee")
        square += tl.sum(turned * right, 1)
        if ADDED:
            tile = tl.load(gram + (L * L + rows[:, None] + right_index[None, :]))
            cross += tl.sum(tile * right, 1)
    share = 1 / mass
    square *= share * share
    if ADDED:
        square += 2 * share * cross + tl.load(squares)
    return top, share, tl.maximum(tl.sqrt(tl.maximum(square, 0.0)), 1e-12)


@triton.jit
def _weighed_products(
    order,
    logits,
    products,  # of the pair, a patch's words `stride` apart
    rows,
    top,
    word,
    stride,
    M,
    k: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Return the sums of exp(logit - top) of kept patches times products, (BLOCK_N, BLOCK_M)."""
    total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for first in range(0, k, BLOCK_K):
        place = first + tl.arange(0, BLOCK_K)
        left, index = _kept_weights(order, logits, rows, place, k, top)
        source = products + (index[:, None] * stride + word[None, :])
        tile = tl.load(source, mask=(word < M)[None, :], other=0.0)
        total = tl.dot(left, tile, total, input_precision="ieee")
    return total


@triton.jit
def _cosines(total, share, length, products, added_row, word, stride, M, ADDED: tl.constexpr):
    """Return what `_weighed_products` summed, with the added vectors' products, as cosines."""
    cosine = total * share[:, None]
    if ADDED:
        source = products + (added_row[:, None] * stride + word[None, :])
        cosine += tl.load(source, mask=(word < M)[None, :], other=0.0)
    return cosine / length[:, None]


@triton.jit
def _best_word(cosine, word_mask, word, M):
    """Return each token's largest cosine with a real word of the caption, (BLOCK_N,)."""
    real = tl.load(word_mask + word, mask=word < M, other=0) != 0
    return tl.max(tl.where(real[None, :], cosine, float("-inf")), 1)


@triton.jit(do_not_specialize=["T", "M"])  # they vary from call to call
def match_aggregated(
    order,  # (B_v, T, L) kept patches first
    logits,  # (B_v, N, L)
    gram,  # (B_v, G, L)
    squares,  # (B_v, N) where vectors are added
    products,  # (B_v, R, T, M)
    word_mask,  # (T, M)
    for_words,  # (B_v, T, slots, M)
    for_tokens,  # (B_v, T, N + 1)
    G,
    R,
    T,
    M,
    N,
    slots,
    blocks,
    L: tl.constexpr,
    k: tl.constexpr,
    ADDED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WORD_BLOCKS: tl.constexpr,
):
    """Write the cosines of one pair's block of aggregated tokens, their maxima both ways."""
    block = tl.program_id(0) % blocks
    pair = (tl.program_id(0) // blocks).to(tl.int64)
    image, caption = pair // T, pair % T
    token = block * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.minimum(token, N - 1)  # rows past the end repeat the last, which no maximum feels
    order += pair * L
    logits += image * N * L
    gram += image * G * L
    squares += image * N + row
    rows = row * L
    products += (image * R * T + caption) * M
    top, share, length = _weights_and_lengths(
        order, logits, gram, squares, rows, L, k, ADDED, BLOCK_N, BLOCK_L, BLOCK_K
    )
    best = tl.full((BLOCK_N,), float("-inf"), tl.float32)
    for start in range(WORD_BLOCKS):
        word = start * BLOCK_M + tl.arange(0, BLOCK_M)
        total = _weighed_products(
            order, logits, products, rows, top, word, T * M, M, k, BLOCK_N, BLOCK_M, BLOCK_K
        )
        cosine = _cosines(total, share, length, products, L + row, word, T * M, M, ADDED)
        tl.store(for_words + (pair * slots + block) * M + word, tl.max(cosine, 0), mask=word < M)
        best = tl.maximum(best, _best_word(cosine, word_mask + caption * M, word, M))
    tl.store(for_tokens + pair * (N + 1) + token, best, mask=token < N)


@triton.jit
def _fused_length(
    order,  # of the dropped patches of the pair
    scores,
    gram,
    index,
    dropped,
    weight,
    top,
    mass,
    L: tl.constexpr,
    k: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Return the norm of the weighted sum of dropped patches, from their products."""
    square = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, L - k, BLOCK):
        column = first + tl.arange(0, BLOCK)
        inside = column < L - k
        column_index = tl.load(order + column, mask=inside, other=0)
        column_score = tl.load(scores + column_index, mask=inside, other=float("-inf"))
        tile = tl.load(
            gram + (index[:, None] * L + column_index[None, :]),
            mask=dropped[:, None] & inside[None, :],
            other=0.0,
        )
        square += tl.sum(tile * weight[:, None], 0) * tl.exp(column_score - top) / mass
    return tl.maximum(tl.sqrt(tl.maximum(tl.sum(square, 0), 0.0)), 1e-12)


@triton.jit(do_not_specialize=["T", "M"])
def match_fused(
    order,
    scores,  # (B_v, T, L)
    gram,
    products,
    word_mask,
    for_words,
    for_tokens,
    G,
    R,
    T,
    M,
    N,
    slots,
    L: tl.constexpr,
    k: tl.constexpr,
    HEIGHT: tl.constexpr,  # of the dropped patches
    BLOCK: tl.constexpr,
    WORD_BLOCKS: tl.constexpr,
):
    """Write the cosines of one pair's fused token, which comes after the aggregated ones."""
    pair = tl.program_id(0).to(tl.int64)
    image, caption = pair // T, pair % T
    scores += pair * L
    order += pair * L + k
    gram += image * G * L
    products += (image * R * T + caption) * M
    place = tl.arange(0, HEIGHT)
    dropped = place < L - k
    index = tl.load(order + place, mask=dropped, other=0)
    score = tl.load(scores + index, mask=dropped, other=float("-inf"))
    top = tl.max(score, 0)
    weight = tl.exp(score - top)
    mass = tl.sum(weight, 0)
    weight = weight / mass
    length = _fused_length(order, scores, gram, index, dropped, weight, top, mass, L, k, BLOCK)
    best = tl.full((BLOCK,), float("-inf"), tl.float32)
    for start in range(WORD_BLOCKS):
        word = start * BLOCK + tl.arange(0, BLOCK)
        inside = word < M
        source = products + (index[:, None] * (T * M) + word[None, :])
        tile = tl.load(source, mask=dropped[:, None] & inside[None, :], other=0.0)
        cosine = tl.sum(tile * weight[:, None], 0) / length
        tl.store(for_words + (pair * slots + slots - 1) * M + word, cosine, mask=inside)
        real = tl.load(word_mask + caption * M + word, mask=inside, other=0) != 0
        best = tl.maximum(best, tl.where(real, cosine, float("-inf")))
    tl.store(for_tokens + pair * (N + 1) + N, tl.max(best, 0))
