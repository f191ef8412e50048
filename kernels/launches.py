"""The tables of launch settings; `sleep-ops bench tune --write` measures rows on the GPU at hand and rewrites them.

A row written by hand has to pass tests/ptx/test_rows.py too, which runs its kernels as compiled.

Key: width of q, k and v; tile of K; tile of V (powers of two); architecture. None stands for any. The most particular
row that fits is taken: both tiles before K's alone before none, and for each the architecture's own before any's.

A launch is (columns of the value tile, warps, pipeline stages). Rows of LAUNCHES: tokens of a chunk, and the launches
of the kernels prepare, scan, reverse and grad. Rows of SINGLE_CHUNK_LAUNCHES: the most tokens for which one launch does
everything, and the launches of single_chunk_forward and single_chunk_backward. The rows for sm90 are predicted to be
the fastest, not measured.
"""

LAUNCHES = {
    ("float32", None, None, None): (16, (16, 4, 1), (16, 4, 1), (16, 4, 1), (16, 4, 1)),
    ("16-bit", None, None, None): (32, (16, 1, 1), (32, 4, 2), (32, 4, 2), (32, 4, 1)),
    ("16-bit", 256, None, None): (16, (16, 1, 1), (16, 4, 2), (16, 4, 2), (16, 4, 1)),
    ("16-bit", None, None, "sm90"): (64, (16, 1, 1), (64, 4, 2), (64, 4, 2), (32, 4, 3)),
}

SINGLE_CHUNK_LAUNCHES = {
    ("float32", None, None, None): (16, (16, 4, 1), (16, 4, 1)),
    ("16-bit", None, None, None): (32, (32, 2, 1), (32, 4, 1)),
    ("16-bit", 16, None, None): (32, (16, 1, 1), (16, 1, 1)),
    ("16-bit", 64, 64, None): (32, (32, 1, 1), (64, 4, 1)),
    ("16-bit", 64, 64, "sm90"): (32, (32, 1, 1), (64, 2, 1)),
    ("16-bit", 256, None, None): (16, (16, 4, 1), (16, 4, 1)),
}
