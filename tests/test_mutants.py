"""Errors put into the sources on purpose: each must make a test fail.

Slow, since every one compiles anew, so only on request: pytest -m mutants

A mutant is a replacement in one file of a copy of the package, and the tests that are to notice it. Those of CUDA
kernels are looked for in their sources, where that can be: what they are compiled to takes half a minute each time.
"""

import os
import pathlib
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent

MUTANTS = {
    "a row of -inf": (
        "_scalar.py",
        "alone = select(x > -np.inf, 0.0, np.nan)",
        "alone = 0.0",
        "test_special.py::test_rows_without_a_softmax[1100-float32]",
    ),
    "classes in pieces": (
        "_dask.py",
        "(*shape[1:], x.shape[-1]), x.rechunk({x.ndim - 1: -1})",
        "(*shape[1:], x.shape[-1]), x",
        "test_dask.py::test_same_bits[mean]",
    ),
    "weights that are not summed": (
        "_dask.py",
        'return _total(total, (), {"values": values, **rows})',
        'return _total(total, (), {"values": values})',
        "test_dask.py::test_same_bits[sum]",
    ),
    "a block that is not merged": (
        "_dask.py",
        "for other in evaluations:",
        "for other in evaluations[1:]:",
        "test_dask.py::test_evaluation[chunks1]",
    ),
    "another chunk length": (
        "_scalar.py",
        "CHUNK = 8192",
        "CHUNK = 4096",
        "test_hashes.py::test_hashes[cross_entropy]",
    ),
    "another order of the lanes": (
        "cpu/_chunks.py",
        "(load(zero, at) + load(zero, at + 4 * h)) + (load(zero, at + 2 * h) + load(zero, at + 6 * h))",
        "load(zero, at) + load(zero, at + 4 * h) + load(zero, at + 2 * h) + load(zero, at + 6 * h)",
        "test_hashes.py::test_hashes[cross_entropy]",
    ),
    "the last class of a chunk": (
        "cpu/_chunks.py",
        "if whole * WIDTH < size:",
        "if whole * WIDTH < size - 1:",
        "test_exact.py::test_exact_random[1025-float32]",
    ),
    "the target stays in the sum": (
        "cpu/_chunks.py",
        "            span(ZERO, lanes, LANES)[lane] = kept\n",
        "",
        "test_exact.py::test_exact_random[1025-float32]",
    ),
    "the target stays in the sum of few classes": (
        "cpu/softmax.py",
        "take_targets(classes, targets, columns, x)",
        "take_targets(classes, targets, columns.copy(), x)",
        "test_exact.py::test_exact_random[10-float32]",
    ),
    "the target of two classes": (
        "cpu/_columns.py",
        "select(y == NOT_COUNTED, low_x, select(y == 1, a, b))",
        "select(y == NOT_COUNTED, low_x, select(y == 1, b, a))",
        "test_exact.py::test_exact_random[2-float32]",
    ),
    "a class too many at the end": (
        "cpu/_memory.py",
        'icmp_signed("<", ir.Constant(index',
        'icmp_signed("<=", ir.Constant(index',
        "test_exact.py::test_exact_random[1025-float32]",
    ),
    "a NaN that is not looked for": (
        "cpu/softmax.py",
        "argmax[r] = nan if nan >= 0 else argmax[r]",
        "nan = nan",
        "test_special.py::test_rows_without_a_softmax[1100-float32]",
    ),
    "the last of equal logits": (
        "cpu/_rows.py",
        "if top > best:",
        "if top >= best:",
        "test_softmax.py::test_argmax_of_equal_logits[9000-float32]",
    ),
    "exponents that overflow": (
        "_scalar.py",
        "HEADROOM = f32(100)",
        "HEADROOM = f32(1000)",
        "test_exact.py::test_late_large_logit[1100-float32]",
    ),
    "logits beyond 2^20": (
        "_scalar.py",
        "EXP_LIMIT = f32(2**20",
        "EXP_LIMIT = f32(2**30",
        "test_exact.py::test_exact_huge",
    ),
    "a row index in 32 bits": (
        "cpu/_rows.py",
        "(r % inner) * inner_stride",
        "np.int64(np.int32((r % inner) * inner_stride))",
        "test_softmax.py::test_strides_beyond_32_bits",
    ),
    "weights are not read": (
        "cpu/_rows.py",
        "return weights.size > 0 and weights[r] == 0",
        "return False",
        "test_grad.py::test_rows_that_do_not_count[mean-float32]",
    ),
    "products in float32": (
        "cpu/totals.py",
        "add_number(top, np.float64(values[i]) * above)",
        "add_number(top, np.float64(np.float32(values[i] * above)))",
        "test_totals.py::test_reductions[63-float32]",
    ),
    "a sum that is half-way": (
        "_exact.py",
        "sticky = (below << shift) & np.uint64(0xFFFFFFFF) != 0",
        "sticky = False",
        "test_totals.py::test_a_sum_rounds_once",
    ),
    "negative labels wrap": (
        "cpu/softmax.py",
        "0 <= y < classes",
        "-1 <= y < classes",
        "test_special.py::test_labels_out_of_range",
    ),
    "the divisor of sums": (
        "cpu/totals.py",
        "1.0 if divisor == NONZERO_OR_NONE else w",
        "w",
        "test_sequence.py::test_divisors",
    ),
    "CUDA: less than a load beyond a round": (
        "cuda/_stream.py",
        "            store_ring(like, np.int32(where + k), load(like, at + k))",
        "            store_ring(like, np.int32(where + k + 4096), load(like, at + k))",
        "test_cuda.py::test_rows_in_a_stream[float32-1101]",
    ),
    "CUDA: a gradient's rounds in a ring that other chunks filled": (
        "cuda/_gradients.py",
        "rounds if chunks < PARTS else",
        "rounds if chunks < PARTS + 9 else",
        "test_cuda.py::test_many_classes[float32]",
    ),
    "CUDA: a gradient's first round is the one before the last": (
        "cuda/_gradients.py",
        "where = np.int32(ring + held % slots * round_bytes(like))",
        "where = np.int32(ring + (held + slots - 1) % slots * round_bytes(like))",
        "test_cuda.py::test_gradients[1025-bfloat16]",
    ),
    "CUDA: a chunk that its warp writes and another sums": (
        "cuda/_gradients.py",
        "    start, end = share_of_warp(chunks, classes)\n    base",
        "    start, end = share_of_warp(chunks, classes)\n    start = np.int32(max(start - 1, 0))\n    base",
        "test_cuda_races.py",
    ),
    "CUDA: a gradient's first round is not copied": (
        "cuda/_gradients.py",
        "        if rounds >= slots:",
        "        if rounds > slots:",
        "test_cuda.py::test_many_classes[bfloat16]",
    ),
    "CUDA: subnormal entries by addition of powers": (
        "cuda/_gradients.py",
        "SAFE = f32(20)",
        "SAFE = f32(-20)",
        "test_cuda.py::test_subnormal_gradients",
    ),
    "CUDA: a target that is not in the note": (
        "cuda/_gradients.py",
        "            note[2] = np.float64(widen(load(like, target)))",
        "            note[2] = 0.0",
        "test_cuda.py::test_gradients_of_many_rows[9-33001-2-float32]",
    ),
    "CUDA: the last round that holds the largest logit": (
        "cuda/_stream.py",
        "return x > best or",
        "return x >= best or",
        "test_cuda.py::test_scores_in_a_stream[bfloat16-9001-3]",
    ),
    "CUDA: ranks by logits that are clipped": (
        "cuda/_stream.py",
        "if clip == 0 or not target >= low + ONE:",
        "if clip == 0:",
        "test_cuda.py::test_scores_in_a_stream[float32-1101-1]",
    ),
    "CUDA: the target is not among the largest": (
        "cuda/_scores.py",
        "where = min(where, y)",
        "where = where + 0",
        "test_cuda.py::test_scores_in_a_stream[bfloat16-9001-3]",
    ),
    "a log-probability of -0": (
        "cpu/softmax.py",
        "compute_zero(like) - number(like, loss)",
        "0.0 - loss",
        "test_softmax.py::test_losses_that_are_too_small[9000-float32]",
    ),
    "CUDA: a log-probability of -0": (
        "cuda/_scores.py",
        "compute_zero(like) - number(like, loss)",
        "number(like, 0.0 - loss)",
        "test_cuda.py::test_losses_that_are_too_small[300-float32]",
    ),
    "a large exponential that is cut off": (
        "_scalar.py",
        "select(x <= 660.0, exp_64(x), ",
        "select(x <= 1e9, exp_64(x), ",
        "test_totals.py::test_exponentials",
    ),
    "CUDA: a rank by the first chunks": (
        "cuda/_scores.py",
        "larger + load(0.0, at + 24)",
        "load(0.0, at + 24)",
        "test_cuda.py::test_scores_of_few_rows[bfloat16]",
    ),
    "CUDA: the chunk with the last of the largest logits is summed without it": (
        "cuda/_sums.py",
        "0xFFFFFF - ",  # there and back
        "0 + ",
        "test_cuda.py::test_sums_of_few_rows",
    ),
    "CUDA: the largest logit stays in the sum": (
        "cuda/_sums.py",
        "bits_float(where - begin)",
        "bits_float(where - begin - CHUNK)",
        "test_cuda.py::test_equal_logits[8200-bfloat16]",
    ),
    "CUDA: a part of a softmax begins a round too late": (
        "cuda/softmax.py",
        "(block - r * tiles) * SPREAD, TEAMS",
        "(block - r * tiles) * (SPREAD + LANES), TEAMS",
        "test_cuda.py::test_a_softmax_in_parts[32761-float32]",
    ),
    "CUDA: an element behind a row's last is read": (
        "cuda/elements.py",
        "a, b = row + min(j, columns - 1) * stride",
        "a, b = row + min(j, columns) * stride",
        "test_cuda_linear.py::test_hidden_and_weight_in_16_bits_and_strided[float32]",
    ),
    "CUDA: an element behind a row's last is written": (
        "cuda/sigmoid.py",
        "    if j < columns:\n        value",
        "    if j <= columns:\n        value",
        "test_cuda_sigmoid.py",
    ),
    "CUDA: no gradient for the ninth round": (
        "cuda/_gradients.py",
        "        if i < begin and at < classes:",
        "        if i < begin - 1 and at < classes:",
        "test_cuda.py::test_many_classes[bfloat16]",
    ),
    "CUDA: the other half of an exchange": (
        "cuda/_chunks.py",
        "butterfly(select(upper, low, high), mask)",
        "butterfly(select(upper, high, low), mask)",
        "test_cuda.py::test_classes[513-float32]",
    ),
    "CUDA: terms with one another's powers": (
        "cuda/_chunks.py",
        "fma(p2, power2, p1 * power1)",
        "fma(p2, power1, p1 * power2)",
        "test_cuda.py::test_classes[513-bfloat16]",
    ),
    "CUDA: the other logit of a pair is hidden": (
        "cuda/_memory.py",
        "shift = 16 * (k % 2)",
        "shift = 16 - 16 * (k % 2)",
        "test_simt.py::test_hidden_items[bfloat16]",
    ),
    "CUDA: two levels of the butterfly swapped": (
        "cuda/_chunks.py",
        "v2 = exchange(v1, team >> 1)\n    v3 = exchange(v2, team >> 2)",
        "v2 = exchange(v1, team >> 2)\n    v3 = exchange(v2, team >> 1)",
        "test_cuda.py::test_hashes_on_cupy[cross_entropy]",
    ),
    "CUDA: a missing barrier": (
        "cuda/_rows.py",
        "    cuda.syncthreads()\n    if cuda.threadIdx.x < 32:\n",
        "    if cuda.threadIdx.x < 32:\n",
        "test_cuda.py::test_order_of_threads[float32]",
    ),
    "CUDA: the chunk with the largest logit is not summed again": (
        "cuda/_rows.py",
        "(skip < 0 and first + k - 1 == found)",
        "(skip < 0 and first + k == found)",
        "test_cuda.py::test_hashes_on_cupy[softmax]",
    ),
    "CUDA: a level too many for a small team": (
        "cuda/_chunks.py",
        "select(team >> shift != 0, other, compute_zero(like))",
        "other",
        "test_cuda.py::test_classes[129-float32]",
    ),
    "CUDA: a team too small for rows between 16-byte boundaries": (
        "cuda/softmax.py",
        "needed = classes if aligned else",
        "needed = classes if stride else",
        "test_cuda.py::test_unaligned_rows[bfloat16-1]",
    ),
    "CUDA: a chunk of -inf": (
        "cuda/_chunks.py",
        "        if high == -INF:",
        "        if high != high:",
        "test_cuda.py::test_blocks_of_minus_infinity[8200-float32]",
    ),
    "CUDA: a class too many at the end": (
        "cuda/_stream.py",
        "        while k < left:\n            store_ring",
        "        while k < left + item_size(like):\n            store_ring",
        "test_cuda.py::test_classes[2047-float32]",
    ),
    "CUDA: a class too few in the ninth round": (
        "cuda/_stream.py",
        "room, i)[1] > CHUNK:",
        "room, i)[1] > CHUNK + 1:",
        "test_cuda.py::test_unaligned_rows[bfloat16-1]",
    ),
    "CUDA: the target stays in the sum": (
        "cuda/_chunks.py",
        "    return np.int32(skip + begin) if 0 <= skip < size else np.int32(-1)",
        "    return np.int32(-1)",
        "test_cuda.py::test_classes[129-float32]",
    ),
    "CUDA: a round that is not waited for": (
        "cuda/_stream.py",
        "                await_oldest(like, capacity)\n                if p == apart",
        "                if p == apart",
        "test_cuda.py::test_classes[7680-float32]",
    ),
    "CUDA: a ring of one round": (
        "cuda/_stream.py",
        "return where if where < np.int32(ring + capacity) else ring",
        "return ring",
        "test_cuda.py::test_classes[2049-float32]",
    ),
    "CUDA: bytes of the row after it": (
        "cuda/_stream.py",
        "        if left - APART * k < 16:",
        "        if left - APART * k < 0:",
        "test_cuda.py::test_classes[1025-float32]",
    ),
    "CUDA: bytes of the row before it": (
        "cuda/_stream.py",
        "if np.int32(k) < count:",
        "if np.int32(k) < count - 1:",
        "test_cuda.py::test_unaligned_rows[bfloat16-1]",
    ),
    "CUDA: a target in the other half of a load": (
        "cuda/_memory.py",
        'builder.icmp_signed("<", k, _c32(4)), _c32(_none',
        'builder.icmp_signed("<", k, _c32(5)), _c32(_none',
        "test_simt.py::test_hidden_items[bfloat16]",
    ),
    "CUDA: a sum of twice its size": (
        "cuda/_stream.py",
        "(ref - n) + (MAGIC + BIAS)",
        "(ref - n) + (MAGIC + BIAS + ONE)",
        "test_cuda.py::test_rows_in_a_stream[float32-1100]",
    ),
    "CUDA: a target in a row's first round, which holds the row before it too": (
        "cuda/_stream.py",
        "np.int32(0) if begin > 0 else np.int32(skip & -LANES)",
        "np.int32(skip & -LANES)",
        "test_cuda.py::test_unaligned_rows[bfloat16-1]",
    ),
    "CUDA: 16-bit logits that are clipped to the largest": (
        "cuda/_chunks.py",
        "CLIP_LIMIT = f32(256)",
        "CLIP_LIMIT = f32(2**30)",
        "test_cuda.py::test_16_bits_far_apart",
    ),
    "CUDA: rows that do not count are copied": (
        "cuda/_stream.py",
        "        while task < size and float_bits(room[0, task]) == 0:",
        "        while task < size and float_bits(room[0, task]) == 1:",
        "test_cuda.py::test_rows_in_a_stream[float32-1100]",
    ),
    "CUDA: a row index in 32 bits": (
        "cuda/_operands.py",
        "(r - outer * inner) * inner_stride",
        "np.int64(np.uint64((r - outer * inner) * inner_stride) & np.uint64(0x7FFFFFFF))",
        "test_cuda.py::test_strides_beyond_32_bits[140]",
    ),
    "CUDA: negative labels wrap": (
        "cuda/_rows.py",
        "if not 0 <= y < rows[5]:",
        "if not -1 <= y < rows[5]:",
        "test_cuda.py::test_labels_out_of_range[140]",
    ),
    "CUDA: the target of few classes": (
        "cuda/softmax.py",
        "                x = np.float64(room[at + y])\n                room[at + y] = number(like, -np.inf)\n",
        "                x = np.float64(room[at + y])\n",
        "test_cuda.py::test_classes[9-float32]",
    ),
    "CUDA: a class too many in a sum of few": (
        "cuda/_columns.py",
        "        if j + half < classes:",
        "        if j + half <= classes:",
        "test_cuda.py::test_classes[9-float32]",
    ),
    "CUDA: words that are never added": (
        "cuda/totals.py",
        "        add_number(room, row, x if away else 0.0)",
        "        away = False",
        "test_cuda.py::test_totals_of_any_size",
    ),
    "CUDA: what a block's words have beyond 32 bits": (
        "cuda/totals.py",
        "        word += words[k - 1] >> 32",
        "        word += 0",
        "test_cuda.py::test_totals_of_any_size",
    ),
    "CUDA: the words of one block alone": (
        "cuda/totals.py",
        "cuda.gridDim.x == 1 or all_blocks_added",
        "cuda.gridDim.x < 9 or all_blocks_added",
        "test_cuda.py::test_totals_of_any_size",
    ),
    "CUDA: a uint64 label that is an ignored one in 64 bits": (
        "cuda/_operands.py",
        "return y if y >= 0 else np.int64(0x7FFFFFFFFFFFFFFF)",
        "return y",
        "test_cuda.py::test_label_dtypes_and_layouts[uint64]",
    ),
    "CUDA: the target's entry is that of another class": (
        "cuda/softmax.py",
        "store_item(like_grad, to, number(like, note[5]))",
        "store_item(like_grad, to, number(like, note[2]))",
        "test_cuda.py::test_gradients[130-float32]",
    ),
    "the target's entry of a gradient by cancellation": (
        "_typed.py",
        "return m, low, shift, f32(factor * less), f32(0.0 - rounded_product(others, k))",
        "return m, low, shift, f32(factor * less), f32(f32(1.0 - others * k) - f32(1))",
        "test_grad.py::test_exact[17-float32]",
    ),
    "a rounding to bfloat16 that cuts": (
        "_intrinsics.py",
        "builder.add(odd, of(_I32, 0x7FFF))",
        "builder.sub(odd, odd)",
        "test_grad.py::test_exact[17-bfloat16]",
    ),
    "two vectors of a gradient in the other order": (
        "cpu/softmax.py",
        "item_size(like_grad), g, g_2)",
        "item_size(like_grad), g_2, g)",
        "test_grad.py::test_rounded_once[1063-bfloat16]",
    ),
    "the largest class's entry of a dense gradient by cancellation": (
        "cpu/dense.py",
        "                put(zero, lanes, size, where - begin, top)\n",
        "",
        "test_options.py::test_confident_rows[40.0]",
    ),
    "class weights in the loss and once more in the mean": (
        "_xent.py",
        "divisor = _check.FACTORS if q.plain else _check.CLASS_FACTORS",
        "divisor = _check.FACTORS",
        "test_options.py::test_every_combination[float64-False-mean]",
    ),
    "a weight's gradient without the divisor's": (
        "cpu/totals.py",
        "slope -= rounded_product(c, mean_at(mean, i))",
        "slope -= 0.0",
        "test_options.py::test_by_weights_and_targets[labels]",
    ),
    "smoothing over a class that is absent": (
        "cpu/dense.py",
        "distance[i] = select(label == 0, distance[i], product)",
        "distance[i] = product",
        "test_options.py::test_minus_infinity[float32]",
    ),
    "a Hessian whose 1 - p cancels": (
        "cpu/dense.py",
        "put(zero, room, size, where - begin, p * fma(b, p, a * (u * p)))",
        "put(zero, room, size, where - begin, p * fma(b, p, a * (1.0 - p)))",
        "test_options.py::test_hessians",
    ),
    "CUDA: smoothing goes on beyond the last class": (
        "cuda/dense.py",
        "        return ones_apart(like, position, end)",
        "        return ones_apart(like, position, end + 1)",
        "test_cuda_options.py::test_every_combination[float32-False]",
    ),
    "CUDA: a gradient in place of a logit that is still to be read": (
        "cuda/dense.py",
        "    if warps > 1:\n        cuda.syncthreads()\n    cuda.syncwarp()  # in place",
        "    if warps > 99:\n        cuda.syncthreads()\n    cuda.syncwarp()  # in place",
        "test_cuda_options.py::test_in_place_of_chunks",
    ),
    "CUDA: labels of the second half of a Vector": (
        "cuda/dense.py",
        "        position += HALF\n",
        "",
        "test_cuda_options.py::test_classes[1025-float32-True]",
    ),
    "a divergence of nearly equal rows by cancellation": (
        "_divergence_scalar.py",
        "down = select(near, t * fma(-a, odd, even), (e - one) + a)",
        "down = (e - one) + a",
        "test_divergence.py::test_exact[17-float32]",
    ),
    "0 times infinity": (
        "_scalar.py",
        "return select(factor == one - one, log1p_exp, fma(abs(x), factor, log1p_exp))",
        "return fma(abs(x), factor, log1p_exp)",
        "test_sigmoid.py::test_limits[float32]",
    ),
}

COMPILED = {  # which the executor has twins of, so that these show in what is compiled only
    "a round of copies that is not awaited": (
        "cuda/_memory.py",
        "(like.bitwidth // 8)) - 1};",
        "(like.bitwidth // 8))};",
        "test_cuda.py::test_classes[8193-bfloat16]",
    ),
    "the last load of a part is not copied": (
        "cuda/_memory.py",
        'builder.icmp_signed(">=", left, _c32(APART * g + 16))',
        'builder.icmp_signed(">", left, _c32(APART * g + 16))',
        "test_cuda.py::test_classes[8193-bfloat16]",
    ),
    "a copy from another place": (
        "cuda/_memory.py",
        "builder.add(address, ir.Constant(_I64, APART * g))",
        "builder.add(address, ir.Constant(_I64, 256 * g))",
        "test_cuda.py::test_classes[2049-bfloat16]",
    ),
    "a wide store with two words exchanged": (
        "cuda/_memory.py",
        "', '.join(f'${i + 1}' for i in range(count))",
        "', '.join(f'${(i ^ 1) + 1}' for i in range(count))",
        "test_cuda.py::test_gradients[1025-bfloat16]",
    ),
    "NaN is lost in a pair": (
        "cuda/_memory.py",
        'f"{which}.NaN.{dtype} $0',
        'f"{which}.{dtype} $0',
        "test_cuda.py::test_nan_and_infinity[8200-bfloat16]",
    ),
    "the smallest of a warp": (
        "cuda/_memory.py",
        "redux.sync.max.s32",
        "redux.sync.min.s32",
        "test_cuda.py::test_classes[8193-bfloat16]",
    ),
    "a shuffle that drops a bit": (
        "cuda/_memory.py",
        "builder.lshr(x, ir.Constant(_I64, 32))",
        "builder.lshr(x, ir.Constant(_I64, 33))",
        "test_cuda.py::test_classes[2049-float64]",
    ),
    "two logits of a word exchanged": (
        "cuda/_memory.py",
        "[builder.shl(word, _c32(16)), builder.and_(word, _c32(-65536))]",
        "[builder.and_(word, _c32(-65536)), builder.shl(word, _c32(16))]",
        "test_cuda.py::test_classes[33-bfloat16]",
    ),
    "the neighbour of a hidden logit": (
        "cuda/_memory.py",
        "builder.shl(ir.Constant(_I64, 0xFFFF), far)",
        "builder.shl(ir.Constant(_I64, 0x1FFFF), far)",
        "test_cuda.py::test_classes[1024-bfloat16]",
    ),
    "a subnormal entry that is not noticed": (
        "cuda/_memory.py",
        'least, words[-1], "min")',
        'least, words[0], "min")',
        "test_cuda.py::test_subnormal_gradients[bfloat16]",
    ),
    "an item too many is written": (
        "cuda/_memory.py",
        'builder.icmp_signed("<=", builder.add(position, _c32(last)), end)',
        'builder.icmp_signed("<", builder.add(position, _c32(last)), end)',
        "test_cuda.py::test_gradients[1025-float32]",
    ),
    "the least of floats, which drops NaN": (
        "_divergence_scalar.py",
        "return select(value > LN2, LN2, value)",
        "return min(value, LN2)",
        "test_cuda_divergence.py::test_rows_that_lie_apart[37]",
    ),
}


def test_what_is_broken_is_there():
    every = MUTANTS | COMPILED
    texts = {name: (ROOT / "numbaloss" / file).read_text() for name, (file, *_) in every.items()}
    assert [name for name, (_, old, new, _) in every.items() if old not in texts[name] or old == new] == []


@pytest.mark.mutants
@pytest.mark.parametrize("name", [*MUTANTS, *COMPILED])
def test_is_caught(name, tmp_path):
    file, old, new, tests = (MUTANTS | COMPILED)[name]
    for part in ("numbaloss", "tests"):
        ignore = shutil.ignore_patterns("__pycache__", "test_mutants.py")
        shutil.copytree(ROOT / part, tmp_path / part, ignore=ignore)
    source = tmp_path / "numbaloss" / file
    text = source.read_text()
    assert old in text, f"{file} has changed: renew this mutant"
    source.write_text(text.replace(old, new))
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "TMPDIR": str(tmp_path)}
    if name in MUTANTS:
        environment["CUDA_SOURCES"] = "1"
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", f"tests/{tests}"]
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
    assert run.returncode != 0, f"not noticed by {tests}"
    assert run.returncode < 0 or (run.returncode == 1 and " failed" in run.stdout), run.stdout + run.stderr
