"""Every instantiation of the kernels that is ever asked for, file by file.

`test_ops_kernels_compile.py` compiles them, and holds them against the sources and the launches.
"""

import itertools
from collections.abc import Iterable

import torch

from sanctl_ops.checks import DTYPES
from sanctl_ops.kernels import (
    aggregation_mma,
    channels,
    conv_norm_pool,
    halves,
    pairwise_layout,
    runtime,
)
from sanctl_ops.kernels.geometry import SAME_KERNEL_SIZES, VECTOR_BYTES

Parameters = tuple[torch.dtype | bool | int, ...]
REFLECTS = (True, False)
FLAGS = (True, False)


def _vectors(vectors: Iterable[int], dtypes: Iterable[torch.dtype]) -> list[Parameters]:
    pairs = itertools.product(dtypes, vectors)
    return [(dtype, v) for dtype, v in pairs if v * dtype.itemsize <= VECTOR_BYTES]


def _same(vectors: Iterable[int], dtypes: Iterable[torch.dtype]) -> list[Parameters]:
    chosen = itertools.product(_vectors(vectors, dtypes), REFLECTS, SAME_KERNEL_SIZES)
    return [(dtype, reflects, k, vector) for (dtype, vector), reflects, k in chosen]


ANY: list[Parameters] = list(itertools.product(DTYPES, REFLECTS))
SAME = _same((1, 2, 4), DTYPES)


def _together(vectors: Iterable[int]) -> list[Parameters]:
    chosen = itertools.product(_same(vectors, aggregation_mma.DTYPES), aggregation_mma.MOST_WARPS)
    return [(*same, rows) for same, rows in chosen]


MMA = _together(aggregation_mma.VECTORS)
ELEMENTS = _vectors((1, 4), DTYPES)
SUMS: list[Parameters] = [(torch.float32,), (torch.float64,)]

PAIRWISE_PLANES: list[Parameters] = list(
    itertools.product(halves.DTYPES, pairwise_layout.KERNEL_SIZES)
)
RELATIONS: list[Parameters] = list(
    itertools.product(pairwise_layout.RELATIONS, pairwise_layout.KERNEL_SIZES)
)
VALUES: list[Parameters] = list(
    itertools.product(halves.DTYPES, pairwise_layout.BLOCKS, pairwise_layout.KERNEL_SIZES)
)
# Tiles of 8 hidden channels.
HIDDEN_TILES = (1, 2, 4, 8)
PATCHWISE: list[Parameters] = list(
    itertools.product(halves.DTYPES, SAME_KERNEL_SIZES, HIDDEN_TILES)
)
FLOAT: list[Parameters] = [(torch.float32,)]
BY_CHANNELS: list[Parameters] = [
    (dtype, VECTOR_BYTES // dtype.itemsize) for dtype in channels.DTYPES
]
CONVOLVED: list[Parameters] = list(
    itertools.product(channels.DTYPES, range(1, conv_norm_pool.MOST_IMAGE_CHANNELS + 1))
)

TEMPLATES: dict[str, dict[str, list[Parameters]]] = {
    "aggregation.cu": {
        "aggregation": ANY,
        "aggregation_same": SAME,
        "aggregation_weight_gradient": ANY,
        "aggregation_weight_gradient_same": SAME,
        "aggregation_input_gradient": ANY,
        "aggregation_input_gradient_same": SAME,
    },
    "aggregation_mma.cu": {
        "aggregation_mma": MMA,
        "aggregation_weight_gradient_mma": MMA,
    },
    "aggregation_mma_input.cu": {
        "aggregation_input_gradient_mma": _together(aggregation_mma.INPUT_VECTORS),
    },
    "batch_norm_relu.cu": {
        "moments": ELEMENTS,
        "join_moments": SUMS,
        "normalise": ELEMENTS,
        "slope_sums": ELEMENTS,
        "join_sums": SUMS,
        "input_gradient": ELEMENTS,
    },
    "concatenation.cu": {
        "concatenation": ANY,
        "concatenation_same": SAME,
        "concatenation_backward": ANY,
        "concatenation_backward_same": SAME,
    },
    "conv_norm_pool.cu": {
        "conv_norm_pool_moments": CONVOLVED,
        "conv_norm_pool_fold": CONVOLVED,
        "conv_norm_pool": CONVOLVED,
        "conv_norm_pool_sums": CONVOLVED,
        "conv_norm_pool_close": CONVOLVED,
    },
    "norm_pool.cu": {
        "norm_pool": BY_CHANNELS,
        "norm_pool_sums": BY_CHANNELS,
        "norm_pool_input_gradient": BY_CHANNELS,
    },
    "norm_relu.cu": {
        "norm_relu": BY_CHANNELS,
        "norm_relu_sums": BY_CHANNELS,
        "norm_relu_input_gradient": [(*of, skip) for of in BY_CHANNELS for skip in FLAGS],
    },
    "norm_statistics.cu": {
        "norm_moments": BY_CHANNELS,
        "norm_fold": [(dtype,) for dtype in channels.DTYPES],
        "norm_close": FLOAT,
    },
    "pairwise_gram.cu": {"pairwise_gram": RELATIONS},
    "pairwise_logits.cu": {"pairwise_logits": RELATIONS},
    "pairwise_close.cu": {
        "pairwise_sum_positions": FLOAT,
        "pairwise_close_sums": [(dtype,) for dtype in halves.DTYPES],
        "pairwise_join_close": [(flag,) for flag in FLAGS],
        "pairwise_close": PAIRWISE_PLANES,
    },
    "pairwise_fold.cu": {
        "pairwise_moments": PAIRWISE_PLANES,
        "pairwise_join_moments": list(itertools.product(pairwise_layout.RELATIONS, FLAGS)),
        "pairwise_fold_relation": list(itertools.product(halves.DTYPES, pairwise_layout.RELATIONS)),
    },
    "pairwise_narrow.cu": {
        name: [(dtype,) for dtype in halves.DTYPES]
        for name in (
            "pairwise_aggregate_narrow",
            "pairwise_logits_gradient_narrow",
            "pairwise_value_gradient_narrow",
        )
    },
    "pairwise_narrow_relation.cu": {
        "pairwise_gram_narrow": FLOAT,
        "pairwise_logits_narrow": FLOAT,
        "pairwise_weights_gradient_narrow": FLOAT,
    },
    "pairwise_relation_gradient.cu": {
        "pairwise_relation_gradient": RELATIONS,
        "pairwise_fold_keys": [(k,) for k in pairwise_layout.KERNEL_SIZES],
    },
    "pairwise_aggregate.cu": {"pairwise_aggregate": VALUES},
    "pairwise_largest.cu": {
        "pairwise_largest": [(d, VECTOR_BYTES // d.itemsize) for d in halves.DTYPES]
    },
    "pairwise_sums_gradient.cu": {
        # Layers of the one left out have kernels of their own.
        "pairwise_logits_gradient": [
            (*v, s) for v in VALUES for s in pairwise_layout.SLOTS if (*v[1:], s) != (2, 3, 2)
        ],
        "pairwise_value_gradient": VALUES,
        "pairwise_fold": PAIRWISE_PLANES,
    },
    "pairwise_weights.cu": {
        "pairwise_join": [(torch.float32,)],
        "pairwise_pack": list(itertools.product(pairwise_layout.RELATIONS, FLAGS)),
        "pairwise_close2": list(itertools.product(pairwise_layout.RELATIONS, FLAGS)),
        "pairwise_pack_back": [(relation,) for relation in pairwise_layout.RELATIONS],
    },
    "pairwise_weights_gradient.cu": {"pairwise_weights_gradient": RELATIONS},
    "patchwise_attend.cu": {"patchwise_attend": PATCHWISE},
    "patchwise_fold.cu": {
        "patchwise_fold_relation": [(torch.float32, True), (torch.float32, False)],
        "patchwise_fold_first": FLOAT,
        "patchwise_fold_first_turned": FLOAT,
        "patchwise_fold_second": [(torch.float32, True), (torch.float32, False)],
        "patchwise_join": FLOAT,
        "patchwise_close_second": FLOAT,
        "patchwise_close_first": FLOAT,
        "patchwise_spread": [(torch.float32, k) for k in SAME_KERNEL_SIZES],
    },
    "patchwise_hidden.cu": {"patchwise_hidden": PATCHWISE},
    "patchwise_narrow.cu": {
        name: [(dtype,) for dtype in halves.DTYPES]
        for name in (
            "patchwise_attend_narrow",
            "patchwise_value_gradient_narrow",
        )
    },
    "patchwise_narrow_slopes.cu": {
        "patchwise_slopes_narrow": [(dtype,) for dtype in halves.DTYPES]
    },
    "patchwise_narrow_relation.cu": {
        name: [(dtype,) for dtype in halves.DTYPES]
        for name in (
            "patchwise_hidden_narrow",
            "patchwise_relation_gradient_narrow",
            "patchwise_weight_gradient_narrow",
        )
    },
    "patchwise_planes.cu": {
        "patchwise_moments": FLOAT,
        "patchwise_join_moments": FLOAT,
        "patchwise_rectify": FLOAT,
        "patchwise_slopes_of_hidden": [(torch.float32, tiles) for tiles in HIDDEN_TILES],
        "patchwise_join_slopes": FLOAT,
        "patchwise_gradient_of_hidden": FLOAT,
    },
    "patchwise_relation_gradient.cu": {"patchwise_relation_gradient": PATCHWISE},
    "patchwise_slopes.cu": {"patchwise_slopes": PATCHWISE},
    "patchwise_statistics.cu": {
        "patchwise_image_moments": [(dtype,) for dtype in halves.DTYPES],
        "patchwise_statistics": list(itertools.product(halves.DTYPES, SAME_KERNEL_SIZES)),
    },
    "patchwise_value_gradient.cu": {"patchwise_value_gradient": PATCHWISE},
    "patchwise_weight_gradient.cu": {
        "patchwise_weight_gradient": [
            (*one, is_query) for one in PATCHWISE for is_query in (True, False)
        ]
    },
    "subtraction2.cu": {
        "subtraction2": ANY,
        "subtraction2_same": SAME,
        "subtraction2_backward": ANY,
        "subtraction2_backward_same": SAME,
    },
}


def instances(source: str) -> list[runtime.Kernel]:
    """Return the instantiations of one file."""
    return [
        runtime.kernel(source, name, *parameters)
        for name, choices in TEMPLATES[source].items()
        for parameters in choices
    ]
