# SPDX-License-Identifier: Apache-2.0
"""The FP8 ops' meaning in plain ONNX ops; ``fp8`` has it in words and in torch, ``functions`` puts it into models.

Inputs, for x [..., K] and N output channels, K' being K in whole steps of 128::

    LynxFp8Linear              x, weight int32 [N, K' / 4], weight_scale float32 [N], bias [N]
    LynxFp8SparseWeightLinear  x, values int32 [Np, K' / 8], metadata int32 [K' / 128, Np, 4], weight_scale, bias

x, bias and y have one dtype. ``weight`` and ``values`` hold e4m3 four to a word (``fp8.to_words``), as a strongly typed
network takes them into a plugin. Attributes: ``prune`` of the first, whether x becomes 2:4; ``out_channels`` of the
second, N; ``activation``, ``activation_from`` and ``gated`` of both.

Both have variants that make their x, as ``LynxSparseLinear`` has them: ``Norm`` (inputs gain and shift, attributes rms
and epsilon), ``Gelu`` (attribute producer_activation), and ``Gated`` (input gate, attributes producer_activation and
halves).

An e4m3 is emulated in float32, exactly: opset 18 does not have it.
"""

from __future__ import annotations

FP8_OP = "LynxFp8Linear"
FP8_WEIGHT_OP = "LynxFp8SparseWeightLinear"
FP8_NORM_OP = "LynxNormFp8Linear"
FP8_GELU_OP = "LynxGeluFp8Linear"
FP8_GATED_OP = "LynxGatedFp8Linear"
FP8_NORM_WEIGHT_OP = "LynxNormFp8SparseWeightLinear"
FP8_GELU_WEIGHT_OP = "LynxGeluFp8SparseWeightLinear"
FP8_GATED_WEIGHT_OP = "LynxGatedFp8SparseWeightLinear"

# scaled: float32 -> rounded: its nearest e4m3, ties to even. Numbers with an exponent above the lowest are brought down
# to it by a power of two, at which every e4m3 is a whole number of 512ths.
ROUND_TO_E4M3 = """
    one = Constant <value_float = 1.0> ()
    largest_e4m3 = Constant <value_float = 448.0> ()
    smallest_e4m3 = Constant <value_float = -448.0> ()
    above_smallest = Max (scaled, smallest_e4m3)
    bounded_value = Min (above_smallest, largest_e4m3)
    size_8 = Abs (bounded_value)
    from_8 = Constant <value_float = 4.0> ()
    down_8 = Constant <value_float = 0.00390625> ()
    is_8 = GreaterOrEqual (size_8, from_8)
    shrink_8 = Where (is_8, down_8, one)
    size_4 = Mul (size_8, shrink_8)
    from_4 = Constant <value_float = 0.25> ()
    down_4 = Constant <value_float = 0.0625> ()
    is_4 = GreaterOrEqual (size_4, from_4)
    shrink_4 = Where (is_4, down_4, one)
    size_2 = Mul (size_4, shrink_4)
    from_2 = Constant <value_float = 0.0625> ()
    down_2 = Constant <value_float = 0.25> ()
    is_2 = GreaterOrEqual (size_2, from_2)
    shrink_2 = Where (is_2, down_2, one)
    size_1 = Mul (size_2, shrink_2)
    from_1 = Constant <value_float = 0.03125> ()
    down_1 = Constant <value_float = 0.5> ()
    is_1 = GreaterOrEqual (size_1, from_1)
    shrink_1 = Where (is_1, down_1, one)
    shrink_12 = Mul (shrink_8, shrink_4)
    shrink_3 = Mul (shrink_2, shrink_1)
    shrink = Mul (shrink_12, shrink_3)
    shrunk = Mul (bounded_value, shrink)
    parts_of_one = Constant <value_float = 512.0> ()
    steps = Mul (shrunk, parts_of_one)
    whole_steps = Round (steps)
    rounded_low = Div (whole_steps, parts_of_one)
    rounded = Div (rounded_low, shrink)
"""

# z32 [..., K] and kept, which is z32 or its 2:4 part -> rounded [..., K], x_scale [..., 1]. What is taken off itself is
# 0, or NaN where a token is not finite.
ROUND_TOKENS = """
    last_axis = Constant <value_ints = [-1]> ()
    magnitudes = Abs (z32)
    largest = ReduceMax <keepdims = 1> (magnitudes, last_axis)
    nothing_left = Sub (z32, z32)
    poison = ReduceSum <keepdims = 1> (nothing_left, last_axis)
    least = Constant <value_float = 7.888609052210118e-31> ()
    limit = Constant <value_float = 448.0> ()
    bounded = Max (largest, least)
    finite_scale = Div (bounded, limit)
    x_scale = Add (finite_scale, poison)
    finite_inverse = Div (limit, bounded)
    inverse = Add (finite_inverse, poison)
    scaled = Mul (kept, inverse)
ROUND_TO_E4M3
"""

# packed: int32 [rows, words] -> decoded: float32 [rows, 4 words].
DECODE_E4M3 = """
    signed_words = Cast <to = 7> (packed)
    word_range = Constant <value_int = 4294967296> ()
    unsigned_words = Mod (signed_words, word_range)
    words_alone = Unsqueeze (unsigned_words, minus_one)
    byte_units = Constant <value_ints = [1, 256, 65536, 16777216]> ()
    lowered_words = Div (words_alone, byte_units)
    byte_range = Constant <value_int = 256> ()
    bytes_alone = Mod (lowered_words, byte_range)
    packed_rows = Shape <start = 0, end = 1> (packed)
    bytes_shape = Concat <axis = 0> (packed_rows, minus_one)
    codes = Reshape (bytes_alone, bytes_shape)
    sign_code = Constant <value_int = 128> ()
    magnitude_code = Mod (codes, sign_code)
    negative = GreaterOrEqual (codes, sign_code)
    mantissas = Constant <value_int = 8> ()
    mantissa = Mod (magnitude_code, mantissas)
    exponent = Div (magnitude_code, mantissas)
    subnormal = Less (magnitude_code, mantissas)
    leading_one = Add (mantissa, mantissas)
    significand = Where (subnormal, mantissa, leading_one)
    significand32 = Cast <to = 1> (significand)
    powers = Constant <value_floats = [0.001953125, 0.001953125, 0.00390625, 0.0078125, 0.015625, 0.03125, 0.0625,
        0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0]> ()
    power = Gather (powers, exponent)
    magnitude = Mul (significand32, power)
    plus = Constant <value_float = 1.0> ()
    minus = Constant <value_float = -1.0> ()
    sign = Where (negative, minus, plus)
    signed = Mul (magnitude, sign)
    nan_code = Constant <value_int = 127> ()
    is_nan = Equal (magnitude_code, nan_code)
    no_number = Constant <value_float = 0.0> ()
    nan = Div (no_number, no_number)
    decoded = Where (is_nan, nan, signed)
"""

# rounded, x_scale, weight_q [at least N, at least K] float32, out_channels [1] -> y.
FP8_PRODUCT = """
    channels = Shape <start = -1> (z32)
    first = Constant <value_ints = [0, 0]> ()
    used = Concat <axis = 0> (out_channels, channels)
    weight_used = Slice (weight_q, first, used)
    weight_t = Transpose <perm = [1, 0]> (weight_used)
    product = MatMul (rounded, weight_t)
    product_x = Mul (product, x_scale)
    product_w = Mul (product_x, weight_scale)
    bias32 = Cast <to = 1> (bias)
    y32 = Add (product_w, bias32)
    pair_gate = Constant <value_int: int = @gated> ()
EPILOGUE
"""

FP8_FUNCTION = """
<domain: "lynx", opset_import: ["" : OPSET]>
LynxFp8Linear <prune, activation, activation_from, gated: int = 0, plugin_namespace, plugin_version>
    (x, weight, weight_scale, bias) => (y)
{
    minus_one = Constant <value_ints = [-1]> ()
    shape = Shape (x)
    z32 = Cast <to = 1> (x)
KEEP_2_OF_4
    prune_int = Constant <value_int: int = @prune> ()
    prune_on = Cast <to = 9> (prune_int)
    kept = Where (prune_on, kept_2_of_4, z32)
ROUND_TOKENS
    packed = Identity (weight)
DECODE_E4M3
    weight_q = Identity (decoded)
    out_channels = Shape (bias)
FP8_PRODUCT
}
"""

FP8_WEIGHT_FUNCTION = """
<domain: "lynx", opset_import: ["" : OPSET]>
LynxFp8SparseWeightLinear <out_channels, activation, activation_from, gated: int = 0, plugin_namespace, plugin_version>
    (x, values, metadata, weight_scale, bias) => (y)
{
    minus_one = Constant <value_ints = [-1]> ()
    z32 = Cast <to = 1> (x)
    kept = Identity (z32)
ROUND_TOKENS
    packed = Identity (values)
DECODE_E4M3
    out_scalar = Constant <value_int: int = @out_channels> ()
    out_channels = Reshape (out_scalar, minus_one)

    by_row = Transpose <perm = [1, 0, 2]> (metadata)
    by_row64 = Cast <to = 7> (by_row)
    unsigned_metadata = Mod (by_row64, word_range)
    groups_alone = Unsqueeze (unsigned_metadata, minus_one)
    nibble_units = Constant <value_ints = [1, 16, 256, 4096, 65536, 1048576, 16777216, 268435456]> ()
    lowered_groups = Div (groups_alone, nibble_units)
    nibble_range = Constant <value_int = 16> ()
    nibbles = Mod (lowered_groups, nibble_range)
    one_each = Constant <value_ints = [1]> ()
    nibbles_shape = Concat <axis = 0> (packed_rows, minus_one, one_each)
    nibble = Reshape (nibbles, nibbles_shape)
    four = Constant <value_int = 4> ()
    low = Mod (nibble, four)
    high = Div (nibble, four)
    two_each = Constant <value_ints = [2]> ()
    pairs_shape = Concat <axis = 0> (packed_rows, minus_one, two_each)
    pairs = Reshape (decoded, pairs_shape)
    first_kept, second_kept = Split <axis = -1, num_outputs = 2> (pairs)
    positions = Constant <value_ints = [0, 1, 2, 3]> ()
    at_low = Equal (low, positions)
    at_high = Equal (high, positions)
    dropped = Constant <value_float = 0.0> ()
    with_first = Where (at_low, first_kept, dropped)
    with_both = Where (at_high, second_kept, with_first)
    weight_shape = Concat <axis = 0> (packed_rows, minus_one)
    weight_q = Reshape (with_both, weight_shape)
FP8_PRODUCT
}
"""

# z [..., K], as made by the producer -> y.
CALL = """
    y = lynx.LynxFp8Linear <prune: int = @prune, activation: int = @activation, activation_from: int = @activation_from,
        gated: int = @gated>
        (z, weight, weight_scale, bias)
"""
WEIGHT_CALL = """
    y = lynx.LynxFp8SparseWeightLinear <out_channels: int = @out_channels, activation: int = @activation,
        activation_from: int = @activation_from, gated: int = @gated>
        (z, values, metadata, weight_scale, bias)
"""

# By the prefix of its ops' names: attributes, inputs, how it makes z of x, and that in words.
PRODUCERS = {
    "Norm": ("rms, epsilon, ", ", gain, shift", "NORMALIZE", "norm(x) * gain + shift"),
    "Gelu": ("producer_activation: int = 1, ", "", "APPLY_GELU", "gelu(x)"),
    "Gated": (
        "producer_activation: int = 3, halves: int = 0, ",
        ", gate",
        "APPLY_GATE",
        "activation(x) * gate",
    ),
}


def _with_producer(prefix: str, op: str) -> tuple[str, str]:
    """Text and description of the variant of ``op`` that makes its x."""
    attributes, more_inputs, body, words = PRODUCERS[prefix]
    dense = op == FP8_OP
    own, weights = ("prune", "weight") if dense else ("out_channels", "values, metadata")
    text = f"""
<domain: "lynx", opset_import: ["" : OPSET, "lynx" : 1]>
{op.replace("Lynx", f"Lynx{prefix}")} <{own}, activation, activation_from, gated: int = 0, {attributes}plugin_namespace,
    plugin_version>
    (x, {weights}, weight_scale, bias{more_inputs}) => (y)
{{
{body}
{CALL if dense else WEIGHT_CALL}
}}
"""
    return text, f"{op} of {words}."


# Text that stands for more text, as ``functions.PARTS``.
FP8_PARTS = {
    "FP8_PRODUCT": FP8_PRODUCT,
    "ROUND_TOKENS": ROUND_TOKENS,
    "ROUND_TO_E4M3": ROUND_TO_E4M3,
    "DECODE_E4M3": DECODE_E4M3,
}

FP8_FUNCTIONS = {
    FP8_OP: (
        FP8_FUNCTION,
        "A linear in FP8, of 2:4 activations where it prunes; see lynx_compile/ops/fp8.py.",
    ),
    FP8_NORM_OP: _with_producer("Norm", FP8_OP),
    FP8_GELU_OP: _with_producer("Gelu", FP8_OP),
    FP8_GATED_OP: _with_producer("Gated", FP8_OP),
    FP8_WEIGHT_OP: (FP8_WEIGHT_FUNCTION, "A linear of 2:4 weights in FP8; see lynx_compile/ops/fp8.py."),
    FP8_NORM_WEIGHT_OP: _with_producer("Norm", FP8_WEIGHT_OP),
    FP8_GELU_WEIGHT_OP: _with_producer("Gelu", FP8_WEIGHT_OP),
    FP8_GATED_WEIGHT_OP: _with_producer("Gated", FP8_WEIGHT_OP),
}
