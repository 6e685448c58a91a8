"""Eq. 2 of Progtuning (arXiv 2506.21119): the division of L Transformer blocks into T parts.

    L  num_blocks   Transformer blocks, numbered 0 .. L-1 from the input upwards (the paper counts from 1)
    T  num_parts    parts, one a stage

The paper gives every part floor(L / T) blocks and does not say where a remainder goes. Here the boundaries are

    b_t = floor(t * L / T),  t = 0 .. T,        part t (1-based) = blocks b_{t-1} .. b_t - 1,

which is floor(L / T) a part where T divides L, lets parts differ by at most one block where it does not, and leaves
some parts empty where T > L. The LoRA cells of the paper's Table 3 (L = 12; T = 25, 30, 40, 60, 80) follow from this
rule, and none of them from the literal floor(L / T), of no block a part. Its BitFit cells, 0.5 and 0.6 million (T = 8,
10), follow from this rule by rounding (0.49, 0.61), from the literal floor, of one block a part, only by cutting off
(0.593, 0.657).

Worked example, L = 12 and T = 3. The shrinking stages of Eq. 3 train the parts t .. T:

    block     1  2  3  4 | 5  6  7  8 | 9 10 11 12
    part      1  1  1  1 | 2  2  2  2 | 3  3  3  3
    stage 1   x  x  x  x | x  x  x  x | x  x  x  x
    stage 2   .  .  .  . | x  x  x  x | x  x  x  x
    stage 3   .  .  .  . | .  .  .  . | x  x  x  x

>>> boundaries(12, 3)
(0, 4, 8, 12)
>>> parts(12, 3)
(range(0, 4), range(4, 8), range(8, 12))
>>> boundaries(12, 8)
(0, 1, 3, 4, 6, 7, 9, 10, 12)
"""


def boundaries(num_blocks: int, num_parts: int) -> tuple[int, ...]:
    """Return b_0 .. b_T, the T + 1 block boundaries of Eq. 2: not decreasing, from 0 to num_blocks.

    Raises TypeError where an argument is not an integer and ValueError where it is less than 1.
    """
    for name, value in (("num_blocks", num_blocks), ("num_parts", num_parts)):
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"{name} must be an integer, got {value!r}")
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    return tuple(t * num_blocks // num_parts for t in range(num_parts + 1))


def parts(num_blocks: int, num_parts: int) -> tuple[range, ...]:
    """Return the T parts of Eq. 2 as ranges of 0-based block indices: disjoint, in order, together all blocks."""
    b = boundaries(num_blocks, num_parts)
    return tuple(range(low, high) for low, high in zip(b, b[1:]))
