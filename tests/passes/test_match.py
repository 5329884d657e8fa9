# SPDX-License-Identifier: Apache-2.0
"""What makes a node's input is found in what torch exports, fused where that is exact, and left alone where not."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnx.helper as oh
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto
from torch.nn import functional

from lynx_compile.models.structure import Linear, LinearGroup
from lynx_compile.ops.functions import DOMAIN, GATED_OP, GELU_OP, NORM_OP, OP
from lynx_compile.ops.sparse_linear import expand_low_rank
from lynx_compile.passes import rewrite as rewrite_module
from lynx_compile.passes.compensate import SparseLinearWeights, save_weights
from lynx_compile.passes.export import DenseOnnx, export
from lynx_compile.passes.rewrite import LynxOnnx, rewrite
from lynx_compile.passes.select import SparsityPlan, select
from lynx_compile.recipe import Sparsity, load_recipe
from tests.conftest import open_dit

BATCH, TOKENS, CHANNELS, HIDDEN = 2, 8, 64, 128


class Block(torch.nn.Module):
    """adaLN ── q; MLP with GELU; MLP with SiLU * gate."""

    def __init__(self, channels: int = CHANNELS, q_channels: int = CHANNELS) -> None:
        super().__init__()
        self.norm = torch.nn.LayerNorm(channels, elementwise_affine=False, eps=1e-6)
        self.q = torch.nn.Linear(channels, q_channels)
        self.up, self.gate, self.value = (torch.nn.Linear(channels, HIDDEN) for _ in range(3))
        self.down, self.gated_down = (torch.nn.Linear(HIDDEN, q_channels) for _ in range(2))

    def forward(
        self, x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, return_dict: bool = False
    ) -> tuple[torch.Tensor]:
        z = self.norm(x) * (1 + scale[:, None]) + shift[:, None]
        mlp = self.down(functional.gelu(self.up(z), approximate="tanh"))
        return (self.q(z) + mlp + self.gated_down(functional.silu(self.gate(z)) * self.value(z)),)


GROUPS = (("q", "up", "gate", "value"), ("down",), ("gated_down",))


def _block(dtype: torch.dtype = torch.float32, **sizes: int) -> Any:
    """A ``DiT`` as far as export and rewrite read one."""
    torch.manual_seed(0)
    module = Block(**sizes)
    channels = module.q.in_features
    inputs = {"x": torch.randn(BATCH, TOKENS, channels), "scale": 0.3 * torch.randn(BATCH, channels)}
    inputs |= {"shift": 0.3 * torch.randn(BATCH, channels)}
    groups = tuple(
        LinearGroup(names[0], tuple(_linear(module, name) for name in names), 8) for names in GROUPS
    )
    return SimpleNamespace(
        module=module,
        module_on_cpu=lambda dtype: copy.deepcopy(module).to(dtype),
        dtype=dtype,
        inputs={name: value.to(dtype) for name, value in inputs.items()},
        arguments={name: value.to(dtype) for name, value in inputs.items()},
        axes=(),
        groups=groups,
        linears=[linear for group in groups for linear in group.linears],
    )


def _linear(module: torch.nn.Module, path: str) -> Linear:
    linear = module.get_submodule(path)
    return Linear(path, linear.in_features, linear.out_features, linear.bias is not None, None)


def _naive(dit: Any, plan: SparsityPlan, folder: Path) -> list[Path]:
    """The linears' own weights, compensated by nothing: one file per group of the plan."""
    files = []
    for index, group in enumerate(plan.groups):
        linears = [dit.module.get_submodule(linear.path) for linear in group.linears]
        weight = torch.cat([linear.weight.detach().float() for linear in linears])
        solved = SparseLinearWeights(
            tuple(linear.path for linear in group.linears), tuple(len(linear.weight) for linear in linears),
            expand_low_rank(weight, torch.zeros(len(weight), 0)), torch.zeros(1, weight.shape[1]),
            torch.cat([linear.bias.detach().float() for linear in linears]), 0, False, (0.0,) * len(linears),
        )  # fmt: skip
        files.append(folder / f"{index}.safetensors")
        save_weights(files[-1], solved)
    return files


Pair = tuple[LynxOnnx, LynxOnnx]


def _pair(dit: Any, dense: DenseOnnx, folder: Path, sparsity: Sparsity | None = None) -> Pair:
    """The rewritten file, and the same without any fused producer."""
    plan = select(dit.groups, sparsity or Sparsity())
    files = _naive(dit, plan, folder)
    fused = rewrite(dense, plan, files, folder / "fused.onnx")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rewrite_module, "find_producer", lambda x, dense: None)
        plain = rewrite(dense, plan, files, folder / "plain.onnx")
    assert {node.producer for node in plain.sparse} == {None} and plain.nodes == fused.nodes
    return fused, plain


def _run(model: Path | bytes, feed: dict[str, np.ndarray]) -> np.ndarray:
    y: np.ndarray = ort.InferenceSession(model, providers=["CPUExecutionProvider"]).run(None, feed)[0]
    return y


def _error(pair: Pair, dit: Any) -> float:
    """Largest difference of the two files' outputs, relative to the largest output."""
    feed = {name: value.numpy() for name, value in dit.inputs.items()}
    y, expected = (_run(lynx.path, feed) for lynx in pair)
    return float(np.abs(y - expected).max() / np.abs(expected).max())


def _producers(lynx: LynxOnnx) -> dict[str, str | None]:
    """{first linear: producer} of every node; the ops in the file must agree."""
    model = onnx.load(lynx.path, load_external_data=False)
    ops = {node.name: node.op_type for node in model.graph.node if node.domain == DOMAIN}
    assert ops == {node.name: node.op for node in lynx.sparse}
    assert {function.name for function in model.functions} == {OP, *ops.values()}
    return {node.name.rsplit(".", 1)[0]: node.producer for node in lynx.sparse}


def _left(lynx: LynxOnnx, op: str) -> int:
    return sum(node.op_type == op for node in onnx.load(lynx.path, load_external_data=False).graph.node)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> DenseOnnx:
    return export(_block(), tmp_path_factory.mktemp("block") / "dense.onnx")


def test_norm_and_gate_are_fused_and_gelu_goes_into_the_epilogue(dense: DenseOnnx, tmp_path: Path) -> None:
    """An epilogue has it for nothing, so it comes first."""
    dit = _block()
    fused, _ = pair = _pair(dit, dense, tmp_path)
    assert _producers(fused) == {"q": "layer norm", "down": None, "gated_down": "gated"}
    assert (fused.sparse[0].activation, fused.sparse[0].activation_from) == (1, 64 + 2 * HIDDEN)
    assert [_left(fused, op) for op in ("LayerNormalization", "Sigmoid", "Tanh")] == [0, 0, 0]
    assert fused.plugins == {
        OP: (),
        NORM_OP: ("activation", "activation_from", "rms", "epsilon"),
        GATED_OP: ("producer_activation", "halves"),
    }
    assert _error(pair, dit) < 2e-5


def test_gelu_of_a_dense_linear_is_fused_behind_it(dense: DenseOnnx, tmp_path: Path) -> None:
    """The dense linear reads the normed tensor too, which therefore stays."""
    dit = _block()
    fused, _ = pair = _pair(dit, dense, tmp_path, Sparsity(operand={"up": "none"}))
    assert _producers(fused) == {"q": None, "down": "gelu", "gated_down": "gated"}
    assert _left(fused, "Tanh") == 0 and GELU_OP in fused.plugins
    assert _error(pair, dit) < 2e-5


def test_a_gelu_that_no_epilogue_can_start_with_is_fused_behind_it(tmp_path: Path) -> None:
    """It would begin with output channel 8 + 2 * 128, and the kernels' epilogues only with multiples of 64."""
    dit = _block(q_channels=8)
    fused, plain = pair = _pair(dit, export(dit, tmp_path / "dense.onnx"), tmp_path)
    assert _producers(fused) == {"q": "layer norm", "down": "gelu", "gated_down": "gated"}
    assert {(node.activation, node.activation_from) for node in fused.sparse} == {(0, 0)}
    assert fused.sparse[0].linears == ("q", "up", "gate", "value")
    assert (_left(plain, "Tanh"), _left(fused, "Tanh")) == (1, 0)
    assert _error(pair, dit) < 2e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_producers_are_found_in_half_precision(tmp_path: Path, dtype: torch.dtype) -> None:
    dit = _block(dtype, q_channels=8)
    fused, _ = _pair(dit, export(dit, tmp_path / "dense.onnx", dtype), tmp_path)
    assert _producers(fused) == {"q": "layer norm", "down": "gelu", "gated_down": "gated"}


def test_a_wide_norm_is_found(tmp_path: Path) -> None:
    """Its scale of ones is external data."""
    dit = _block(channels=3072)
    dense = export(dit, tmp_path / "dense.onnx")
    norm = next(node for node in onnx.load(dense.path).graph.node if node.op_type == "LayerNormalization")
    model = onnx.load(dense.path, load_external_data=False)
    scale = next(tensor for tensor in model.graph.initializer if tensor.name == norm.input[1])
    assert scale.data_location == TensorProto.EXTERNAL
    fused, _ = pair = _pair(dit, dense, tmp_path)
    assert _producers(fused)["q"] == "layer norm"
    assert _error(pair, dit) < 2e-5


def test_linears_with_sparse_weights_leave_their_producers(dense: DenseOnnx, tmp_path: Path) -> None:
    """Here the norm: one of its readers is such a linear."""
    plan = select(_block().groups, Sparsity(operand={"up": "weight", "*": "activation"}))
    assert len(plan.groups) == 4
    files = _naive(_block(), plan, tmp_path)
    for index, group in enumerate(plan.groups):
        if group.operand == "weight":
            up = _block().module.up
            kept = up.weight.detach().unflatten(1, (-1, 4)) * torch.tensor([1.0, 1, 0, 0])
            solved = SparseLinearWeights(
                ("up",), (HIDDEN,), kept.flatten(1), torch.zeros(1, CHANNELS), up.bias.detach(), 0, False, (0.0,),
                "weight",
            )  # fmt: skip
            save_weights(files[index], solved)
    lynx = rewrite(dense, plan, files, tmp_path / "mixed.onnx")
    assert {node.name.split(".")[0]: node.producer for node in lynx.sparse} == {
        "q": None,
        "up": None,
        "down": None,
        "gated_down": "gated",
    }


class Chain:
    """The adaLN of an exported Block, to be spoiled."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.model = model
        self.norm = self._node("LayerNormalization")
        self.scale = self._reader(self.norm.output[0])
        self.shift = self._reader(self.scale.output[0])
        self.sigmoid = self._node("Sigmoid")

    def _node(self, op: str) -> onnx.NodeProto:
        return next(node for node in self.model.graph.node if node.op_type == op)

    def _reader(self, tensor: str) -> onnx.NodeProto:
        return next(node for node in self.model.graph.node if tensor in node.input)

    def constant(self, value: np.ndarray, name: str = "spoiled") -> str:
        """A tensor that some node makes; shape inference then tells its shape."""
        self.model.graph.initializer.append(
            onnx.numpy_helper.from_array(value.astype(np.float32), f"{name}.c")
        )
        self.model.graph.node.insert(0, oh.make_node("Identity", [f"{name}.c"], [name], name))
        return name

    def result(self, tensor: str) -> None:
        """One more reader, whose result is one of the graph's."""
        shape = [BATCH, TOKENS, CHANNELS]
        self.model.graph.node.append(oh.make_node("Neg", [tensor], ["kept"], "reader"))
        self.model.graph.output.append(oh.make_tensor_value_info("kept", TensorProto.FLOAT, shape))

    def ones(self, value: float, *shape: int) -> str:
        tensor = onnx.numpy_helper.from_array(np.full(shape, value, np.float32), "other_scale")
        self.model.graph.initializer.append(tensor)
        return "other_scale"


def _set(node: onnx.NodeProto, **attributes: int) -> None:
    for attribute in node.attribute:
        if attribute.name in attributes:
            attribute.i = attributes[attribute.name]


def _replace_input(node: onnx.NodeProto, kept: str, other: str) -> None:
    node.input[list(node.input).index(next(name for name in node.input if name != kept))] = other


def _over_tokens_too(chain: Chain) -> None:
    _set(chain.norm, axis=1)
    chain.norm.input[1] = chain.ones(1, TOKENS, CHANNELS)


def _with_bias(chain: Chain) -> None:
    chain.norm.input.append(chain.ones(1, CHANNELS))


def _gain(*shape: int) -> Callable[[Chain], None]:
    def spoil(chain: Chain) -> None:
        made = chain.constant(np.random.default_rng(0).normal(size=shape))
        _replace_input(chain.scale, chain.norm.output[0], made)

    return spoil


def _shift(*shape: int) -> Callable[[Chain], None]:
    def spoil(chain: Chain) -> None:
        made = chain.constant(np.random.default_rng(0).normal(size=shape))
        _replace_input(chain.shift, chain.scale.output[0], made)

    return spoil


def _both(*shape: int) -> Callable[[Chain], None]:
    def spoil(chain: Chain) -> None:
        random = np.random.default_rng(0)
        _replace_input(
            chain.scale, chain.norm.output[0], chain.constant(random.normal(size=shape), "new_gain")
        )
        _replace_input(
            chain.shift, chain.scale.output[0], chain.constant(random.normal(size=shape), "new_shift")
        )

    return spoil


def _subtracted(chain: Chain) -> None:
    chain.shift.op_type = "Sub"


def _divided(chain: Chain) -> None:
    chain.scale.op_type = "Div"


SPOILED = {
    "normed over the tokens too": _over_tokens_too,
    "a bias": _with_bias,
    "gain and shift per position": _both(1, TOKENS, CHANNELS),
    "a gain per sample alone": _gain(BATCH, 1, 1),
    "fewer rows of shift than of gain": _shift(1, 1, CHANNELS),
    "a shift of rank 0": _shift(),
    "shift subtracted": _subtracted,
    "divided by the gain": _divided,
    "another reader of the normed": lambda chain: chain.result(chain.norm.output[0]),
    "another reader of the scaled": lambda chain: chain.result(chain.scale.output[0]),
    "another reader of the result": lambda chain: chain.result(chain.shift.output[0]),
}


def _spoil(dense: DenseOnnx, folder: Path, spoil: Callable[[Chain], None]) -> DenseOnnx:
    for file in dense.path.parent.glob("dense.onnx*"):
        shutil.copy(file, folder)
    model = onnx.load(folder / "dense.onnx", load_external_data=False)
    spoil(Chain(model))
    onnx.save(onnx.shape_inference.infer_shapes(model), folder / "dense.onnx")
    onnx.checker.check_model(folder / "dense.onnx", full_check=True)
    return DenseOnnx(folder / "dense.onnx")


@pytest.mark.parametrize("spoil", SPOILED.values(), ids=SPOILED)
def test_what_only_resembles_a_norm_stays_in_the_graph(
    dense: DenseOnnx, tmp_path: Path, spoil: Callable[[Chain], None]
) -> None:
    dit = _block()
    fused, _ = pair = _pair(dit, _spoil(dense, tmp_path, spoil), tmp_path)
    assert _producers(fused) == {"q": None, "down": None, "gated_down": "gated"}
    assert _left(fused, "LayerNormalization") == 1 and _error(pair, dit) < 2e-5


@pytest.mark.parametrize("shape", [(CHANNELS,), (1, 1, CHANNELS), (BATCH, TOKENS, CHANNELS)])
def test_a_row_for_all_tokens_or_for_each_is_fused_too(
    dense: DenseOnnx, tmp_path: Path, shape: tuple[int, ...]
) -> None:
    dit = _block()
    fused, _ = pair = _pair(dit, _spoil(dense, tmp_path, _both(*shape)), tmp_path)
    assert _producers(fused)["q"] == "layer norm" and _error(pair, dit) < 2e-5


def _other_sigmoid(chain: Chain) -> None:
    chain.sigmoid.input[0] = chain.constant(np.ones((BATCH, TOKENS, HIDDEN)))


def _tanh(chain: Chain) -> None:
    chain.sigmoid.op_type = "Tanh"


def _keep_sigmoid(chain: Chain) -> None:
    chain.model.graph.output.append(
        oh.make_tensor_value_info(chain.sigmoid.output[0], TensorProto.FLOAT, [BATCH, TOKENS, HIDDEN])
    )


@pytest.mark.parametrize("spoil", [_other_sigmoid, _tanh, _keep_sigmoid])
def test_what_only_resembles_a_gated_silu_stays_in_the_graph(
    dense: DenseOnnx, tmp_path: Path, spoil: Callable[[Chain], None]
) -> None:
    dit = _block()
    fused, _ = pair = _pair(dit, _spoil(dense, tmp_path, spoil), tmp_path)
    assert _producers(fused) == {"q": "layer norm", "down": None, "gated_down": None}
    assert _error(pair, dit) < 2e-5


@pytest.fixture(scope="module")
def flux(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """The tiny FLUX in float32."""
    folder = tmp_path_factory.mktemp("flux")
    dit = open_dit(load_recipe(tiny / "tiny.yaml"))[0]
    return _pair(dit, export(dit, folder / "dense.onnx", torch.float32), folder)


NORMED = {
    "transformer_blocks.0.attn.to_q",
    "transformer_blocks.0.attn.add_q_proj",
    "transformer_blocks.0.ff.net.0.proj",
    "transformer_blocks.0.ff_context.net.0.proj",
    "single_transformer_blocks.0",
}


def test_flux_fuses_every_modulated_norm_of_its_blocks(flux: Pair) -> None:
    fused, plain = flux
    producers = _producers(fused)
    normed = {name for name, producer in producers.items() if producer == "layer norm"}
    assert {next(known for known in NORMED if name.startswith(known)) for name in normed} == NORMED
    assert len(normed) == 5 and {producers[name] for name in producers.keys() - normed} == {None}
    # The sixth norm, of the model's output, is in front of a linear that stays dense.
    assert (_left(plain, "LayerNormalization"), _left(fused, "LayerNormalization")) == (6, 1)


def _part(lynx: LynxOnnx, inputs: list[str], output: str) -> onnx.ModelProto:
    return onnx.utils.Extractor(onnx.load(lynx.path)).extract_model(inputs, [output])


def _norm_inputs(lynx: LynxOnnx) -> list[tuple[str, list[str], str]]:
    """Of each node with a norm: its name; x, scale (without the 1 +) and shift; and its output."""
    graph = onnx.load(lynx.path, load_external_data=False).graph
    maker = {output: node for node in graph.node for output in node.output}
    found = []
    for node in graph.node:
        if node.op_type == NORM_OP:
            one_plus = maker[node.input[-2]]
            assert one_plus.op_type == "Add"
            scale = next(name for name in one_plus.input if name in maker)
            found.append((node.name, [node.input[0], scale, node.input[-1]], node.output[0]))
    return found


def _random_inputs(part: onnx.ModelProto) -> dict[str, np.ndarray]:
    """Tokens of all sizes, also such where epsilon counts."""
    random = np.random.default_rng(0)
    feed = {}
    for index, value in enumerate(part.graph.input):
        shape = [dimension.dim_value for dimension in value.type.tensor_type.shape.dim]
        feed[value.name] = 0.3 * random.normal(size=shape).astype(np.float32)
        if index == 0:
            feed[value.name] *= np.logspace(-3, 2, shape[1], dtype=np.float32)[:, None]
    return feed


def _wrong_epsilon(node: onnx.NodeProto, inputs: list[str]) -> None:
    next(attribute for attribute in node.attribute if attribute.name == "epsilon").f = 1e-5


def _rms_norm(node: onnx.NodeProto, inputs: list[str]) -> None:
    _set(node, rms=1)


def _scale_for_gain(node: onnx.NodeProto, inputs: list[str]) -> None:
    node.input[-2] = inputs[1]


def _no_shift(node: onnx.NodeProto, inputs: list[str]) -> None:
    node.input[-1] = inputs[1]


@pytest.mark.parametrize("fault", [None, _wrong_epsilon, _rms_norm, _scale_for_gain, _no_shift])
def test_flux_nodes_equal_norm_and_node_apart(flux: Pair, fault: Callable[..., None] | None) -> None:
    """Node by node on equal inputs, since end to end one flipped choice of channels spreads."""
    fused, plain = flux
    found = _norm_inputs(fused)
    assert len(found) == 5
    for name, inputs, output in found:
        part = _part(fused, inputs, output)
        node = next(node for node in part.graph.node if node.name == name)
        assert {other.op_type for other in part.graph.node} <= {NORM_OP, "Add", "Identity"}
        if fault:
            fault(node, inputs)
        apart = _part(plain, inputs, output)
        assert "LayerNormalization" in {other.op_type for other in apart.graph.node}
        feed = _random_inputs(part)
        y, expected = (_run(model.SerializeToString(), feed) for model in (part, apart))
        error = (np.abs(y - expected).max(-1) / np.abs(expected).max(-1)).max()
        assert error > 1e-2 if fault else error < 2e-5, name
