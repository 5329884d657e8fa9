# SPDX-License-Identifier: Apache-2.0
"""The ops' meaning in plain ONNX ops, as model-local functions: with them ONNX Runtime runs the very same file.

``sparse_linear`` and ``sparse_weight_linear`` have it in words. float32 inside, x's dtype outside. An op with a fused
producer is the producer in front of a call of ``LynxSparseLinear``. Those in FP8 are in ``fp8_functions``.
"""

from __future__ import annotations

from collections.abc import Iterable

import onnx

from lynx_compile.ops.fp8_functions import (
    FP8_FUNCTIONS,
    FP8_GATED_OP,
    FP8_GATED_WEIGHT_OP,
    FP8_GELU_OP,
    FP8_GELU_WEIGHT_OP,
    FP8_NORM_OP,
    FP8_NORM_WEIGHT_OP,
    FP8_OP,
    FP8_PARTS,
    FP8_WEIGHT_OP,
)

LINEAR_KEY = "lynx.linear"  # metadata of a node of the dense graph that came from a linear: its module path
OPSET = 18  # the oldest that has what is used here
DOMAIN = "lynx"
OP = "LynxSparseLinear"
NORM_OP = "LynxNormSparseLinear"
GELU_OP = "LynxGeluSparseLinear"
GATED_OP = "LynxGatedSparseLinear"
WEIGHT_OP = "LynxSparseWeightLinear"
OP_VERSION = "1"
PRODUCER_CALLS = {  # what an op with a fused producer calls
    **dict.fromkeys((NORM_OP, GELU_OP, GATED_OP), OP),
    **dict.fromkeys((FP8_NORM_OP, FP8_GELU_OP, FP8_GATED_OP), FP8_OP),
    **dict.fromkeys((FP8_NORM_WEIGHT_OP, FP8_GELU_WEIGHT_OP, FP8_GATED_WEIGHT_OP), FP8_WEIGHT_OP),
}


def lynx_functions(ops: Iterable[str], opset: int = OPSET) -> list[onnx.FunctionProto]:
    """The functions of ``ops``, and the one that those with a fused producer call.

    Args:
        opset: of the model they go into, which ONNX wants theirs to be.
    """
    ops = set(ops)
    called = {PRODUCER_CALLS[op] for op in ops & PRODUCER_CALLS.keys()}
    return [lynx_function(op, opset) for op in FUNCTIONS if op in ops | called]


def lynx_function(op: str = OP, opset: int = OPSET) -> onnx.FunctionProto:
    """The function of one op."""
    text, doc = FUNCTIONS[op]
    for name, part in PARTS.items():
        text = text.replace(name, part)
    function = onnx.parser.parse_function(text.replace("OPSET", str(opset)))
    function.doc_string = doc
    return function


# to_activate -> activated: by the number ``chosen``, 1 the tanh GELU, 2 the exact one, 3 SiLU; 0 leaves it.
ACTIVATE = """
    cubic = Constant <value_float = 0.044715> ()
    root_2_over_pi = Constant <value_float = 0.7978845608028654> ()
    half = Constant <value_float = 0.5> ()
    plus_one = Constant <value_float = 1.0> ()
    root_half = Constant <value_float = 0.7071067811865476> ()
    squared = Mul (to_activate, to_activate)
    cubed = Mul (squared, to_activate)
    cubic_term = Mul (cubed, cubic)
    inner_sum = Add (to_activate, cubic_term)
    inner = Mul (inner_sum, root_2_over_pi)
    tanh = Tanh (inner)
    one_tanh = Add (tanh, plus_one)
    halved = Mul (to_activate, half)
    gelu_tanh = Mul (halved, one_tanh)
    deviations = Mul (to_activate, root_half)
    erf = Erf (deviations)
    one_erf = Add (erf, plus_one)
    gelu_erf = Mul (halved, one_erf)
    sigmoid = Sigmoid (to_activate)
    silu = Mul (to_activate, sigmoid)
    number_1 = Constant <value_int = 1> ()
    number_2 = Constant <value_int = 2> ()
    number_3 = Constant <value_int = 3> ()
    chooses_1 = Equal (chosen, number_1)
    chooses_2 = Equal (chosen, number_2)
    chooses_3 = Equal (chosen, number_3)
    activated_1 = Where (chooses_1, gelu_tanh, to_activate)
    activated_2 = Where (chooses_2, gelu_erf, activated_1)
    activated = Where (chooses_3, silu, activated_2)
"""

# y32 [..., N], out_channels [1] -> y: activated from column activation_from on; where ``pair_gate`` is 1, of each run
# of 16 columns there the first 8, activated and times the other 8.
EPILOGUE = """
    no_columns = Constant <value_int = 0> ()
    one_column = Constant <value_int = 1> ()
    run = Constant <value_int = 8> ()
    activation_from = Constant <value_int: int = @activation_from> ()
    end_column = Squeeze (out_channels)
    columns_behind = Sub (end_column, activation_from)
    rows_of_y = Add (pair_gate, one_column)
    y_columns_behind = Div (columns_behind, rows_of_y)
    y_end = Add (activation_from, y_columns_behind)
    columns = Range (no_columns, y_end, one_column)
    behind = GreaterOrEqual (columns, activation_from)
    gate_offset = Mul (run, pair_gate)
    offset = Sub (columns, activation_from)
    runs = Div (offset, run)
    skipped = Mul (runs, gate_offset)
    skipped_behind = Where (behind, skipped, no_columns)
    own_column = Add (columns, skipped_behind)
    offset_behind = Where (behind, gate_offset, no_columns)
    gate_column = Add (own_column, offset_behind)
    to_activate = Gather <axis = -1> (y32, own_column)
    gates = Gather <axis = -1> (y32, gate_column)
    chosen = Constant <value_int: int = @activation> ()
ACTIVATE
    y_act = Where (behind, activated, to_activate)
    pair_gate_on = Cast <to = 9> (pair_gate)
    has_gate = And (behind, pair_gate_on)
    factor_1 = Where (has_gate, gates, plus_one)
    y_gated = Mul (y_act, factor_1)
    y = CastLike (y_gated, x)
"""

# z32 [..., K] float32, minus_one [1], shape: x's -> kept_2_of_4: z32 where kept, else 0.
KEEP_2_OF_4 = """
    score = Abs (z32)
    groups_of_4 = Constant <value_ints = [-1, 4]> ()
    grouped = Reshape (score, groups_of_4)
    a, b, c, d = Split <axis = -1, num_outputs = 4> (grouped)
    a_nan = IsNaN (a)
    b_nan = IsNaN (b)
    c_nan = IsNaN (c)
    a_ge_b = GreaterOrEqual (a, b)
    a_ge_c = GreaterOrEqual (a, c)
    a_ge_d = GreaterOrEqual (a, d)
    b_ge_c = GreaterOrEqual (b, c)
    b_ge_d = GreaterOrEqual (b, d)
    c_ge_d = GreaterOrEqual (c, d)
    ab = Or (a_ge_b, a_nan)
    ac = Or (a_ge_c, a_nan)
    ad = Or (a_ge_d, a_nan)
    bc = Or (b_ge_c, b_nan)
    bd = Or (b_ge_d, b_nan)
    cd = Or (c_ge_d, c_nan)
    ba = Not (ab)
    ca = Not (ac)
    da = Not (ad)
    cb = Not (bc)
    db = Not (bd)
    dc = Not (cd)
    a_wins = Concat <axis = -1> (ab, ac, ad)
    b_wins = Concat <axis = -1> (ba, bc, bd)
    c_wins = Concat <axis = -1> (ca, cb, cd)
    d_wins = Concat <axis = -1> (da, db, dc)
    a_count = Cast <to = 1> (a_wins)
    b_count = Cast <to = 1> (b_wins)
    c_count = Cast <to = 1> (c_wins)
    d_count = Cast <to = 1> (d_wins)
    a_sum = ReduceSum <keepdims = 1> (a_count, minus_one)
    b_sum = ReduceSum <keepdims = 1> (b_count, minus_one)
    c_sum = ReduceSum <keepdims = 1> (c_count, minus_one)
    d_sum = ReduceSum <keepdims = 1> (d_count, minus_one)
    wins = Concat <axis = -1> (a_sum, b_sum, c_sum, d_sum)
    enough = Constant <value_float = 1.5> ()
    keep_grouped = Greater (wins, enough)
    keep = Reshape (keep_grouped, shape)
    none = Constant <value_float = 0.0> ()
    kept_2_of_4 = Where (keep, z32, none)
"""

ACTIVATION_FUNCTION = """
<domain: "lynx", opset_import: ["" : OPSET]>
LynxSparseLinear <rank, norm_scale, activation: int = 0,
    activation_from: int = 0, plugin_namespace, plugin_version>
    (x, weight, lora_down, bias) => (y)
{
    shape = Shape (x)
    channels = Shape <start = -1> (x)
    zero = Constant <value_ints = [0]> ()
    one = Constant <value_ints = [1]> ()
    two = Constant <value_ints = [2]> ()
    minus_one = Constant <value_ints = [-1]> ()
    rank_scalar = Constant <value_int: int = @rank> ()
    r = Reshape (rank_scalar, one)

    z32 = Cast <to = 1> (x)
KEEP_2_OF_4
    kept = Identity (kept_2_of_4)

    squares = Mul (z32, z32)
    kept_squares = Mul (kept, kept)
    norm = ReduceSum <keepdims = 1> (squares, minus_one)
    kept_norm = ReduceSum <keepdims = 1> (kept_squares, minus_one)
    epsilon = Constant <value_float = 1e-8> ()
    kept_norm_safe = Add (kept_norm, epsilon)
    ratio = Div (norm, kept_norm_safe)
    root = Sqrt (ratio)
    unit = Constant <value_float = 1.0> ()
    flag_int = Constant <value_int: int = @norm_scale> ()
    flag = Cast <to = 9> (flag_int)
    scale = Where (flag, root, unit)

    down = Slice (lora_down, zero, r, zero)
    down32 = Cast <to = 1> (down)
    down32_t = Transpose <perm = [1, 0]> (down32)
    low = MatMul (z32, down32_t)
    low_scaled = Div (low, scale)
    alive = Greater (scale, none)
    low_safe = Where (alive, low_scaled, none)
    low_rounded = CastLike (low_safe, x)
    low32 = Cast <to = 1> (low_rounded)
    leading = Slice (shape, zero, minus_one, zero)
    pairs = Div (r, two)
    pairs_shape = Concat <axis = 0> (leading, pairs, two)
    low_pairs = Reshape <allowzero = 1> (low32, pairs_shape)
    no_pairs = ConstantOfShape (pairs_shape)
    low_groups = Concat <axis = -1> (low_pairs, no_pairs)
    width = Mul (r, two)
    low_shape = Concat <axis = 0> (leading, width)
    low_spread = Reshape <allowzero = 1> (low_groups, low_shape)

    operand = Concat <axis = -1> (kept, low_spread)
    used = Add (channels, width)
    weight_used = Slice (weight, zero, used, one)
    weight32 = Cast <to = 1> (weight_used)
    weight32_t = Transpose <perm = [1, 0]> (weight32)
    product = MatMul (operand, weight32_t)
    scaled = Mul (product, scale)
    bias32 = Cast <to = 1> (bias)
    y32 = Add (scaled, bias32)
    out_channels = Shape (bias)
    pair_gate = Constant <value_int = 0> ()
EPILOGUE
}
"""

# Both layouts are decoded, as [Np / 16, m % 8, K / 16], and the attribute chooses.
WEIGHT_FUNCTION = """
<domain: "lynx", opset_import: ["" : OPSET]>
LynxSparseWeightLinear <metadata_layout, out_channels, activation: int = 0, activation_from: int = 0,
    gated: int = 0, plugin_namespace, plugin_version>
    (x, values, metadata, bias) => (y)
{
    zero = Constant <value_ints = [0]> ()
    one = Constant <value_ints = [1]> ()
    two = Constant <value_ints = [2]> ()
    four = Constant <value_ints = [4]> ()
    eight = Constant <value_ints = [8]> ()
    rest = Constant <value_ints = [-1]> ()
    channels = Shape <start = -1> (x)
    out_scalar = Constant <value_int: int = @out_channels> ()
    out_channels = Reshape (out_scalar, one)

    words = Cast <to = 7> (metadata)
    thirty_two = Constant <value_ints = [32]> ()
    steps_of_32 = Div (channels, thirty_two)
    shape_80 = Concat <axis = 0> (steps_of_32, rest, eight, two, two)
    words_80 = Reshape (words, shape_80)
    ordered_80 = Transpose <perm = [1, 3, 2, 0, 4]> (words_80)
    sixty_four = Constant <value_ints = [64]> ()
    steps_of_64 = Div (channels, sixty_four)
    shape_90 = Concat <axis = 0> (steps_of_64, rest, four, two, eight, two)
    words_90 = Reshape (words, shape_90)
    ordered_90 = Transpose <perm = [1, 2, 4, 0, 5, 3]> (words_90)
    sixteen = Constant <value_ints = [16]> ()
    blocks = Div (channels, sixteen)
    pairs_shape = Concat <axis = 0> (rest, eight, blocks)
    pairs_80 = Reshape (ordered_80, pairs_shape)
    pairs_90 = Reshape (ordered_90, pairs_shape)
    layout = Constant <value_int: int = @metadata_layout> ()
    hopper = Constant <value_int = 90> ()
    is_90 = Equal (layout, hopper)
    pairs = Where (is_90, pairs_90, pairs_80)

    half_word = Constant <value_int = 65536> ()
    row = Mod (pairs, half_word)
    above = Sub (pairs, row)
    shifted = Div (above, half_word)
    row_8 = Mod (shifted, half_word)
    row_alone = Unsqueeze (row, one)
    row_8_alone = Unsqueeze (row_8, one)
    rows = Concat <axis = 1> (row_alone, row_8_alone)
    rows_alone = Unsqueeze (rows, rest)
    units = Constant <value_ints = [1, 16, 256, 4096]> ()
    lowered = Div (rows_alone, units)
    nibble_range = Constant <value_int = 16> ()
    nibbles = Mod (lowered, nibble_range)
    groups = Div (channels, four)
    groups_shape = Concat <axis = 0> (rest, groups, one)
    nibble = Reshape (nibbles, groups_shape)
    low = Mod (nibble, four)
    high = Div (nibble, four)

    values32 = Cast <to = 1> (values)
    kept_shape = Concat <axis = 0> (rest, groups, two)
    kept = Reshape (values32, kept_shape)
    kept_low, kept_high = Split <axis = -1, num_outputs = 2> (kept)
    positions = Constant <value_ints = [0, 1, 2, 3]> ()
    at_low = Equal (low, positions)
    at_high = Equal (high, positions)
    nothing = Constant <value_float = 0.0> ()
    placed_low = Where (at_low, kept_low, nothing)
    placed = Where (at_high, kept_high, placed_low)
    weight_shape = Concat <axis = 0> (rest, channels)
    padded_weight = Reshape (placed, weight_shape)
    weight = Slice (padded_weight, zero, out_channels, zero)

    x32 = Cast <to = 1> (x)
    weight_t = Transpose <perm = [1, 0]> (weight)
    product = MatMul (x32, weight_t)
    bias32 = Cast <to = 1> (bias)
    y32 = Add (product, bias32)
    pair_gate = Constant <value_int: int = @gated> ()
EPILOGUE
}
"""

# z [..., K], as made by the producer -> y.
MULTIPLY = """
    y = lynx.LynxSparseLinear <rank: int = @rank, norm_scale: int = @norm_scale, activation: int = @activation,
        activation_from: int = @activation_from>
        (z, weight, lora_down, bias)
"""

# x -> z. Each row of gain and shift serves as many consecutive tokens.
NORMALIZE = """
    shape = Shape (x)
    channels = Shape <start = -1> (x)
    last = Constant <value_ints = [-1]> ()
    one = Constant <value_ints = [1]> ()
    none = Constant <value_float = 0.0> ()
    unit = Constant <value_float = 1.0> ()
    x32 = Cast <to = 1> (x)
    mean = ReduceMean <keepdims = 1> (x32, last)
    rms_int = Constant <value_int: int = @rms> ()
    rms_on = Cast <to = 9> (rms_int)
    offset = Where (rms_on, none, mean)
    centred = Sub (x32, offset)
    squares = Mul (centred, centred)
    variance = ReduceMean <keepdims = 1> (squares, last)
    epsilon = Constant <value_float: float = @epsilon> ()
    safe = Add (variance, epsilon)
    deviation = Sqrt (safe)
    factor = Div (unit, deviation)
    normed = Mul (centred, factor)

    gain_shape = Concat <axis = 0> (last, one, channels)
    gain_rows = Reshape (gain, gain_shape)
    shift_rows = Reshape (shift, gain_shape)
    gain32 = Cast <to = 1> (gain_rows)
    shift32 = Cast <to = 1> (shift_rows)
    rows = Shape <end = 1> (gain_rows)
    served_shape = Concat <axis = 0> (rows, last, channels)
    served = Reshape (normed, served_shape)
    amplified = Mul (served, gain32)
    shifted = Add (amplified, shift32)
    z32 = Reshape (shifted, shape)
    z = CastLike (z32, x)
"""

NORM_FUNCTION = """
<domain: "lynx", opset_import: ["" : OPSET, "lynx" : 1]>
LynxNormSparseLinear <rank, norm_scale, activation: int = 0,
    activation_from: int = 0, rms, epsilon, plugin_namespace, plugin_version>
    (x, weight, lora_down, bias, gain, shift) => (y)
{
NORMALIZE
MULTIPLY
}
"""

GELU_FUNCTION = """
<domain: "lynx", opset_import: ["" : OPSET, "lynx" : 1]>
LynxGeluSparseLinear <rank, norm_scale, activation: int = 0,
    activation_from: int = 0, producer_activation: int = 1, plugin_namespace, plugin_version>
    (x, weight, lora_down, bias) => (y)
{
APPLY_GELU
MULTIPLY
}
"""

# x -> z
APPLY_GELU = """
    to_activate = Cast <to = 1> (x)
    chosen = Constant <value_int: int = @producer_activation> ()
ACTIVATE
    z = CastLike (activated, x)
"""

GATED_FUNCTION = """
<domain: "lynx", opset_import: ["" : OPSET, "lynx" : 1]>
LynxGatedSparseLinear <rank, norm_scale, activation: int = 0, activation_from: int = 0,
    producer_activation: int = 3, halves: int = 0, plugin_namespace, plugin_version>
    (x, weight, lora_down, bias, gate) => (y)
{
APPLY_GATE
MULTIPLY
}
"""

# x and gate -> z. What is no half is taken whole: from channel 0 on, all of them.
APPLY_GATE = """
    last = Constant <value_ints = [-1]> ()
    one = Constant <value_ints = [1]> ()
    two = Constant <value_ints = [2]> ()
    shape = Shape (x)
    gate_like_x = Reshape (gate, shape)
    halves_scalar = Constant <value_int: int = @halves> ()
    halves_1 = Reshape (halves_scalar, one)
    is_half = Min (halves_1, one)
    gate_first = Div (halves_1, two)
    x_first = Sub (is_half, gate_first)
    all_channels = Shape <start = -1> (x)
    parts = Add (is_half, one)
    channels = Div (all_channels, parts)
    x_begin = Mul (channels, gate_first)
    x_end = Add (x_begin, channels)
    gate_begin = Mul (channels, x_first)
    gate_end = Add (gate_begin, channels)
    own = Slice (x, x_begin, x_end, last)
    own_gate = Slice (gate_like_x, gate_begin, gate_end, last)
    to_activate = Cast <to = 1> (own)
    chosen = Constant <value_int: int = @producer_activation> ()
ACTIVATE
    gate32 = Cast <to = 1> (own_gate)
    z32 = Mul (activated, gate32)
    z = CastLike (z32, x)
"""

# Text that stands for more text; what a part holds of others comes behind it.
PARTS = FP8_PARTS | {
    "APPLY_GELU": APPLY_GELU,
    "APPLY_GATE": APPLY_GATE,
    "EPILOGUE": EPILOGUE,
    "ACTIVATE": ACTIVATE,
    "MULTIPLY": MULTIPLY,
    "NORMALIZE": NORMALIZE,
    "KEEP_2_OF_4": KEEP_2_OF_4,
}

FUNCTIONS = {
    OP: (
        ACTIVATION_FUNCTION,
        "2:4 activation sparsity with compensation; see lynx_compile/ops/sparse_linear.py.",
    ),
    NORM_OP: (NORM_FUNCTION, "LynxSparseLinear of norm(x) * gain + shift."),
    GELU_OP: (GELU_FUNCTION, "LynxSparseLinear of gelu(x)."),
    GATED_OP: (GATED_FUNCTION, "LynxSparseLinear of activation(x) * gate."),
    WEIGHT_OP: (WEIGHT_FUNCTION, "2:4 weight sparsity; see lynx_compile/ops/sparse_weight_linear.py."),
} | FP8_FUNCTIONS
