# mypy: disable-error-code="valid-type, misc, no-untyped-def, untyped-decorator"
"""The CUDA kernels as tilelang programs, each a function of the sizes that are compiled in.

Numbers of tokens, keys and selected rows are symbols: no program is compiled anew for them. Annotations are shapes
that tilelang reads. Needs tilelang from the first line on: ``dsakv.kernels.tile`` imports it at the first launch.
"""

import math
from typing import Any

import tilelang
import tilelang.language as T

from dsakv.kernels.contract import FP8_BLOCK

FP8_MAX = 448.0
PLAIN = {"disable_tma": True}  # rows of any stride, and one way for A100 and H100
PASS_CONFIGS = {"tl.disable_warp_specialized": True}


def compiled(program: Any, target: str | dict[str, str] = "cuda") -> Any:
    """The kernel of a program; it takes tensors in the order of the program's arguments.

    ``target`` is the current device, or as ``{"kind": "cuda", "arch": "sm_90a"}`` one that need not be there.
    """
    return tilelang.compile(program, target=target, execution_backend="tvm_ffi", pass_configs=PASS_CONFIGS)


def act_quant(dtype: str, block: int, power_of_two_scale: bool) -> Any:
    """Quantize each row of ``[groups, block]`` with a scale of its own."""
    groups = T.dynamic("groups")
    rows = 16  # of one thread block

    @T.prim_func
    def program(
        x: T.Tensor((groups, block), dtype),
        values: T.Tensor((groups, block), T.float8_e4m3fn),
        scale: T.Tensor((groups,), T.float32),
    ):
        with T.Kernel(T.ceildiv(groups, rows), threads=128) as bx:
            wide = T.alloc_fragment((rows, block), T.float32)
            narrow = T.alloc_fragment((rows, block), T.float8_e4m3fn)
            peak = T.alloc_fragment((rows,), T.float32)
            exact = T.alloc_fragment((rows,), T.float32)
            factor = T.alloc_fragment((rows,), T.float32)
            T.copy(x[bx * rows, 0], wide, **PLAIN)
            T.reduce_absmax(wide, peak, dim=1)
            for i in T.Parallel(rows):
                exact[i] = T.max(peak[i], T.float32(1e-4)) / T.float32(FP8_MAX)
            for i in T.Parallel(rows):
                if power_of_two_scale:  # a mantissa that is not zero carries into the exponent
                    factor[i] = T.reinterpret((T.reinterpret(exact[i], "int32") + 0x7FFFFF) & 0x7F800000, "float32")
                else:
                    factor[i] = exact[i]
            for i, j in T.Parallel(rows, block):
                narrow[i, j] = T.cast(
                    T.min(T.max(wide[i, j] / factor[i], T.float32(-FP8_MAX)), T.float32(FP8_MAX)), T.float8_e4m3fn
                )
            T.copy(narrow, values[bx * rows, 0], **PLAIN)
            T.copy(factor, scale[bx * rows], **PLAIN)

    return program


def fp8_gemm(n: int, k: int, block_t: int, block_n: int, native: bool) -> Any:
    """``x @ weight.T`` of block-scaled float8, on tensor cores for float8 (``native``) or on those for float16.

    Float8 tensor cores accumulate with few bits, so each product of 128 is added, scaled, to a sum in float32.
    """
    tokens = T.dynamic("tokens")
    blocks = k // FP8_BLOCK
    threads = 256 if block_t * block_n > 64 * 128 else 128

    @T.prim_func
    def program(
        x: T.Tensor((tokens, k), T.float8_e4m3fn),
        x_scale: T.Tensor((tokens, blocks), T.float32),
        weight: T.Tensor((n, k), T.float8_e4m3fn),
        weight_scale: T.Tensor((-(-n // FP8_BLOCK), blocks), T.float32),
        out: T.Tensor((tokens, n), T.float32),
    ):
        with T.Kernel(T.ceildiv(n, block_n), T.ceildiv(tokens, block_t), threads=threads) as (bx, by):
            x_tile = T.alloc_shared((block_t, FP8_BLOCK), T.float8_e4m3fn)
            w_tile = T.alloc_shared((block_n, FP8_BLOCK), T.float8_e4m3fn)
            x_operand = x_tile if native else T.alloc_shared((block_t, FP8_BLOCK), T.float16)
            w_operand = w_tile if native else T.alloc_shared((block_n, FP8_BLOCK), T.float16)
            factor = T.alloc_shared((block_t,), T.float32)
            part = T.alloc_fragment((block_t, block_n), T.float32)
            total = T.alloc_fragment((block_t, block_n), T.float32)
            T.clear(total)
            for ko in T.Pipelined(blocks, num_stages=2):
                T.copy(x[by * block_t, ko * FP8_BLOCK], x_tile, **PLAIN)
                T.copy(weight[bx * block_n, ko * FP8_BLOCK], w_tile, **PLAIN)
                for i in T.Parallel(block_t):
                    factor[i] = T.if_then_else(
                        by * block_t + i < tokens,
                        x_scale[by * block_t + i, ko] * weight_scale[bx * block_n // FP8_BLOCK, ko],
                        T.float32(0),
                    )
                if not native:
                    T.copy(x_tile, x_operand)
                    T.copy(w_tile, w_operand)
                T.gemm(x_operand, w_operand, part, transpose_B=True, clear_accum=True)
                for i, j in T.Parallel(block_t, block_n):
                    total[i, j] += part[i, j] * factor[i]
            T.copy(total, out[by * block_t, bx * block_n], **PLAIN)

    return program


def index_scores(heads: int, dim: int, dtype: str, key_dtype: str, scaled: bool) -> Any:
    """Scores of 128 keys for a few queries in a thread block: the keys stay in shared memory, queries pass by.

    Float8 keys are widened to float16, which holds them exactly and whose tensor cores accumulate in float32.
    """
    n_queries, n_keys = T.dynamic("n_queries"), T.dynamic("n_keys")
    row = T.dynamic("row", "int64")  # a matrix of scores may have more than 2^31 elements
    block, queries = 128, 8
    head_block = min(64, -(-heads // 16) * 16)

    @T.prim_func
    def program(
        q: T.Tensor((n_queries, heads, dim), dtype),
        weights: T.Tensor((n_queries, heads), T.float32),
        keys: T.Tensor((n_keys, dim), key_dtype),
        key_scale: T.Tensor((n_keys if scaled else 1,), T.float32),
        out: T.StridedTensor((n_queries, n_keys), (row, 1), T.float32),
    ):
        with T.Kernel(T.ceildiv(n_keys, block), T.ceildiv(n_queries, queries), threads=128) as (bx, by):
            k_tile = T.alloc_shared((block, dim), dtype)
            q_tile = T.alloc_shared((head_block, dim), dtype)
            gate = T.alloc_shared((head_block,), T.float32)
            factor = T.alloc_fragment((block,), T.float32)
            dots = T.alloc_fragment((block, head_block), T.float32)
            score = T.alloc_fragment((block,), T.float32)
            T.copy(keys[bx * block, 0], k_tile, **PLAIN)
            for i in T.Parallel(block):
                if scaled:
                    factor[i] = T.if_then_else(bx * block + i < n_keys, key_scale[bx * block + i], T.float32(0))
                else:
                    factor[i] = T.float32(1)
            for t in T.serial(T.min(queries, n_queries - by * queries)):
                T.clear(score)
                for hb in T.Pipelined(T.ceildiv(heads, head_block), num_stages=1):
                    T.copy(q[by * queries + t, hb * head_block, 0], q_tile, **PLAIN)
                    for h in T.Parallel(head_block):
                        gate[h] = T.if_then_else(
                            hb * head_block + h < heads,
                            weights[by * queries + t, hb * head_block + h],
                            T.float32(0),
                        )
                    T.gemm(k_tile, q_tile, dots, transpose_B=True, clear_accum=True)
                    for i, h in T.Parallel(block, head_block):
                        dots[i, h] = T.max(dots[i, h], T.float32(0)) * gate[h]
                    T.reduce_sum(dots, score, dim=1, clear=False)
                for i in T.Parallel(block):
                    score[i] *= factor[i]
                T.copy(score, out[by * queries + t, bx * block], **PLAIN)

    return program


def sparse_attention(
    heads: int, dim: int, value_dim: int, scale: float, head_block: int, block: int, stages: int, dtype: str
) -> Any:
    """Attention of ``head_block`` heads of one query in a thread block: online softmax over blocks of its rows.

    A query's rows are cut into as many parts as ``out`` has, each with an average and the logarithm of its weight;
    one without rows has NaN and -inf. ``stages`` blocks of rows are under way at a time, and what lies past the
    query's count is not read.
    """
    parts, tokens, selected = T.dynamic("parts"), T.dynamic("tokens"), T.dynamic("selected")
    threads = 256 if head_block == 64 else 128
    base2 = scale * math.log2(math.e)
    policy = T.GemmWarpPolicy.FullCol  # warps side by side: each holds all heads and a share of the wide sum
    groups = -(-heads // head_block)

    @T.prim_func
    def program(
        q: T.Tensor((tokens, heads, dim), dtype),
        rows: T.Tensor((tokens, selected, dim), dtype),
        counts: T.Tensor((tokens,), T.int32),
        out: T.Tensor((parts, tokens, heads, value_dim), T.float32),
        log_weight: T.Tensor((parts, tokens, heads), T.float32),
    ):
        with T.Kernel(tokens * groups, parts, threads=threads) as (bx, by):
            q_tile = T.alloc_shared((head_block, dim), dtype)
            tile = T.alloc_shared((block, dim), dtype)
            share = T.alloc_shared((head_block, block), dtype)
            logits = T.alloc_fragment((head_block, block), T.float32)
            total = T.alloc_fragment((head_block, value_dim), T.float32)
            highest = T.alloc_fragment((head_block,), T.float32)
            before = T.alloc_fragment((head_block,), T.float32)
            shrink = T.alloc_fragment((head_block,), T.float32)
            weight = T.alloc_fragment((head_block,), T.float32)
            added = T.alloc_fragment((head_block,), T.float32)
            token = bx // groups
            head = bx % groups * head_block
            count = counts[token]
            share_of_blocks = T.ceildiv(T.ceildiv(count, block), parts)
            first = by * share_of_blocks
            n_blocks = T.max(0, T.min(share_of_blocks, T.ceildiv(count, block) - first))
            T.copy(q[token, head, 0], q_tile, **PLAIN)
            T.clear(total)
            T.clear(weight)
            T.fill(highest, -T.infinity(T.float32))
            for kb in T.Pipelined(n_blocks, num_stages=stages):
                T.copy(rows[token, (first + kb) * block, 0], tile, **PLAIN)
                T.gemm(q_tile, tile, logits, transpose_B=True, clear_accum=True, policy=policy)
                for h, j in T.Parallel(head_block, block):
                    logits[h, j] = T.if_then_else(
                        (first + kb) * block + j < count, logits[h, j] * T.float32(base2), -T.infinity(T.float32)
                    )
                T.copy(highest, before)
                T.reduce_max(logits, highest, dim=1, clear=False)
                for h in T.Parallel(head_block):  # every block has a row that counts: highest is finite
                    shrink[h] = T.exp2(before[h] - highest[h])
                for h, j in T.Parallel(head_block, block):
                    logits[h, j] = T.exp2(logits[h, j] - highest[h])
                T.reduce_sum(logits, added, dim=1)
                for h in T.Parallel(head_block):
                    weight[h] = weight[h] * shrink[h] + added[h]
                T.copy(logits, share)
                for h, j in T.Parallel(head_block, value_dim):
                    total[h, j] *= shrink[h]
                T.gemm(share, tile[0:block, 0:value_dim], total, policy=policy)
            for h, j in T.Parallel(head_block, value_dim):
                total[h, j] /= weight[h]
            for h in T.Parallel(head_block):
                highest[h] = (highest[h] + T.log2(weight[h])) * T.float32(math.log(2))
            T.copy(total, out[by, token, head, 0], **PLAIN)
            T.copy(highest, log_weight[by, token, head], **PLAIN)

    return program
