"""The tilelang programs of ``dsakv.kernels.tile``: each function makes one, for sizes known when it is compiled.

Numbers of tokens and keys stay open (``T.dynamic``), so that a growing context compiles nothing anew. What lies outside
of a tensor reads as zero and is not written. Annotations are evaluated: no ``from __future__`` here.
"""

# mypy: disable-error-code="valid-type, no-untyped-def, untyped-decorator, operator"

import math
from typing import Any

import tilelang.language as T

from dsakv.kernels.contract import FP8_BLOCK
from dsakv.kernels.reference import FP8_MAX

FP8 = "float8_e4m3fn"
LOG2_E = math.log2(math.e)


def act_quant(n: int, block: int, power_of_two: bool, dtype: str) -> Any:
    """``x`` ``[t, n]`` to ``values`` ``[t, n]`` and ``scale`` ``[t, n / block]``; a thread block has 32 rows of one."""
    t = T.dynamic("t")
    rows = 32

    @T.prim_func
    def program(x: T.Tensor((t, n), dtype), values: T.Tensor((t, n), FP8), scale: T.Tensor((t, n // block), "float32")):
        with T.Kernel(T.ceildiv(t, rows), n // block, threads=128) as (i_row, i_block):
            tile = T.alloc_fragment((rows, block), "float32")
            top = T.alloc_fragment((rows,), "float32")
            unit = T.alloc_fragment((rows,), "float32")
            T.copy(x[i_row * rows, i_block * block], tile)
            T.reduce_absmax(tile, top, dim=1)
            for i in T.Parallel(rows):
                unit[i] = T.max(top[i], 1e-4) / FP8_MAX
                if power_of_two:  # up to the next power: a carry out of the mantissa, which is then cut off
                    bits = T.reinterpret(unit[i], "int32")
                    unit[i] = T.reinterpret((bits + 0x7FFFFF) & ~0x7FFFFF, "float32")
            for i, j in T.Parallel(rows, block):
                tile[i, j] = T.min(T.max(tile[i, j] / unit[i], -FP8_MAX), FP8_MAX)
            T.copy(tile, values[i_row * rows, i_block * block])
            for i in T.Parallel(rows):
                if i_row * rows + i < t:
                    scale[i_row * rows + i, i_block] = unit[i]

    return program


def fp8_gemm(n: int, k: int, rows: int) -> Any:
    """``out`` ``[t, n]`` of ``x`` ``[t, k]`` and ``weight`` ``[n, k]``; a thread block has ``rows`` by 128 of it.

    Each 128 of the inner dimension are multiplied in float8 and added up in float32 with their two scales.
    """
    t = T.dynamic("t")
    block = FP8_BLOCK

    @T.prim_func
    def program(
        x: T.Tensor((t, k), FP8),
        x_scale: T.Tensor((t, k // block), "float32"),
        weight: T.Tensor((n, k), FP8),
        weight_scale: T.Tensor((-(-n // block), k // block), "float32"),
        out: T.Tensor((t, n), "float32"),
    ):
        with T.Kernel(T.ceildiv(n, block), T.ceildiv(t, rows), threads=128) as (i_out, i_row):
            x_tile = T.alloc_shared((rows, block), FP8)
            weight_tile = T.alloc_shared((block, block), FP8)
            factor = T.alloc_fragment((rows,), "float32")
            product = T.alloc_fragment((rows, block), "float32")
            total = T.alloc_fragment((rows, block), "float32")
            T.clear(total)
            for i_inner in T.Pipelined(k // block, num_stages=3):
                T.copy(x[i_row * rows, i_inner * block], x_tile)
                T.copy(weight[i_out * block, i_inner * block], weight_tile)
                for i in T.Parallel(rows):
                    factor[i] = T.if_then_else(i_row * rows + i < t, x_scale[i_row * rows + i, i_inner], 0.0)
                T.clear(product)
                T.gemm(x_tile, weight_tile, product, transpose_B=True)
                for i, j in T.Parallel(rows, block):
                    total[i, j] += product[i, j] * (factor[i] * weight_scale[i_out, i_inner])
            T.copy(total, out[i_row * rows, i_out * block])

    return program


def index_scores(n_heads: int, dim: int, dtype: str, scaled: bool) -> Any:
    """Scores of ``t`` queries and ``s`` keys; a thread block has 128 keys and, in turn, 16 queries.

    ``out`` ``[t, width]`` may be wider than ``s``: what lies behind the scores of a row stays as it is.
    """
    t, s, width = T.dynamic("t, s, width")
    keys_at_once, queries = 128, 16

    @T.prim_func
    def program(
        q: T.Tensor((t, n_heads, dim), dtype),
        weights: T.Tensor((t, n_heads), "float32"),
        keys: T.Tensor((s, dim), dtype),
        key_scale: T.Tensor((s,), "float32"),
        out: T.Tensor((t, width), "float32"),
    ):
        with T.Kernel(T.ceildiv(s, keys_at_once), T.ceildiv(t, queries), threads=128) as (i_keys, i_queries):
            key_tile = T.alloc_shared((keys_at_once, dim), dtype)
            q_tile = T.alloc_shared((n_heads, dim), dtype)
            gate = T.alloc_fragment((n_heads,), "float32")
            dots = T.alloc_fragment((keys_at_once, n_heads), "float32")
            score = T.alloc_fragment((keys_at_once,), "float32")
            unit = T.alloc_fragment((keys_at_once,), "float32")
            first = i_keys * keys_at_once
            T.copy(keys[first, 0], key_tile)
            for i in T.Parallel(keys_at_once):
                if scaled:
                    unit[i] = T.if_then_else(first + i < s, key_scale[first + i], 0.0)
                else:
                    unit[i] = 1.0
            for j in T.serial(queries):
                query = i_queries * queries + j
                if query < t:
                    T.copy(q[query, 0, 0], q_tile)
                    T.copy(weights[query, 0], gate)
                    T.clear(dots)
                    T.gemm(key_tile, q_tile, dots, transpose_B=True)
                    for i, h in T.Parallel(keys_at_once, n_heads):
                        dots[i, h] = T.max(dots[i, h], 0.0) * gate[h]
                    T.reduce_sum(dots, score, dim=1)
                    for i in T.Parallel(keys_at_once):
                        if first + i < s:
                            out[query, first + i] = score[i] * unit[i]

    return program


def sparse_attention(n_heads: int, heads: int, value_dim: int, rest: int, scale: float, dtype: str) -> Any:
    """``out`` ``[t, H, value_dim]``; a thread block has one query, ``heads`` of its heads and, in turn, 64 rows.

    The softmax is the running one (Milakov and Gimelshein, 2018): what is added up so far shrinks by the growth of
    the largest logit. The first row of a query is always valid, so that this is finite from the first 64 on.
    """
    t, k = T.dynamic("t, k")
    rows_at_once = 64
    dim = value_dim + rest
    threads = 128 if heads <= 32 else 256  # what is added up has to fit their registers

    @T.prim_func
    def program(
        q: T.Tensor((t, n_heads, dim), dtype),
        rows: T.Tensor((t, k, dim), dtype),
        counts: T.Tensor((t,), "int64"),
        out: T.Tensor((t, n_heads, value_dim), dtype),
    ):
        with T.Kernel(t, T.ceildiv(n_heads, heads), threads=threads) as (i_query, i_heads):
            q_value = T.alloc_shared((heads, value_dim), dtype)
            q_rest = T.alloc_shared((heads, rest), dtype)
            row_value = T.alloc_shared((rows_at_once, value_dim), dtype)
            row_rest = T.alloc_shared((rows_at_once, rest), dtype)
            share_tile = T.alloc_shared((heads, rows_at_once), dtype)
            logits = T.alloc_fragment((heads, rows_at_once), "float32")
            total = T.alloc_fragment((heads, value_dim), "float32")
            top = T.alloc_fragment((heads,), "float32")
            top_before = T.alloc_fragment((heads,), "float32")
            shrink = T.alloc_fragment((heads,), "float32")
            part = T.alloc_fragment((heads,), "float32")
            weight = T.alloc_fragment((heads,), "float32")
            first_head = i_heads * heads
            T.copy(q[i_query, first_head, 0], q_value)
            T.copy(q[i_query, first_head, value_dim], q_rest)
            T.clear(total)
            T.clear(weight)
            T.fill(top, -T.infinity("float32"))
            for i_rows in T.serial(T.ceildiv(T.cast(counts[i_query], "int32"), rows_at_once)):
                first = i_rows * rows_at_once
                T.copy(rows[i_query, first, 0], row_value)
                T.copy(rows[i_query, first, value_dim], row_rest)
                T.clear(logits)
                T.gemm(q_value, row_value, logits, transpose_B=True)
                T.gemm(q_rest, row_rest, logits, transpose_B=True)
                for h, i in T.Parallel(heads, rows_at_once):
                    logits[h, i] = T.if_then_else(
                        first + i < counts[i_query], logits[h, i] * (scale * LOG2_E), -T.infinity("float32")
                    )
                T.copy(top, top_before)
                T.reduce_max(logits, top, dim=1, clear=False)
                for h in T.Parallel(heads):
                    shrink[h] = T.exp2(top_before[h] - top[h])
                for h, i in T.Parallel(heads, rows_at_once):
                    logits[h, i] = T.exp2(logits[h, i] - top[h])
                T.reduce_sum(logits, part, dim=1)
                for h in T.Parallel(heads):
                    weight[h] = weight[h] * shrink[h] + part[h]
                for h, j in T.Parallel(heads, value_dim):
                    total[h, j] *= shrink[h]
                T.copy(logits, share_tile)
                T.gemm(share_tile, row_value, total)
            for h, j in T.Parallel(heads, value_dim):
                total[h, j] /= weight[h]
            T.copy(total, out[i_query, first_head, 0])

    return program
