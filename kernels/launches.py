"""The table of launch settings; `sleep-ops bench tune --write` measures rows on the GPU at hand and rewrites it.

Key: width of q, k and v; tile of K; tile of V (powers of two); architecture. None stands for any. The most particular
row that fits is taken: both tiles before K's alone before none, and for each the architecture's own before any's.

Row: tokens of a chunk, then (columns of the value tile, warps, pipeline stages) of the kernels prepare, scan, reverse
and grad.
"""

LAUNCHES = {
    ("float32", None, None, None): (16, (16, 4, 1), (16, 4, 1), (16, 4, 1), (16, 4, 1)),
    ("16-bit", None, None, None): (32, (32, 4, 1), (32, 4, 2), (32, 4, 2), (32, 4, 1)),
    ("16-bit", 256, None, None): (16, (16, 4, 1), (16, 4, 2), (16, 4, 2), (16, 4, 1)),
}
