# SPDX-License-Identifier: Apache-2.0
"""ONNX files as models: their linears are found and measured as those of a module, or they are refused by name."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from lynx_compile.errors import InputError
from lynx_compile.files.float32 import float32_copy
from lynx_compile.models.onnx_model import open_onnx
from lynx_compile.models.onnx_module import build_module
from lynx_compile.models.structure import find_structure
from lynx_compile.ops.functions import DOMAIN, FUNCTIONS, lynx_functions
from lynx_compile.passes.adopt import adopt
from lynx_compile.passes.match import import_graph, match

K = 32


class Block(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_q = torch.nn.Linear(K, K)
        self.to_k = torch.nn.Linear(K, K, bias=False)
        self.modulation = torch.nn.Linear(K, K)
        self.mlp = torch.nn.Sequential(
            torch.nn.Linear(K, 2 * K), torch.nn.GELU("tanh"), torch.nn.Linear(2 * K, K)
        )

    def forward(self, x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        y = x * (1 + self.modulation(time)[:, None])
        attention: torch.Tensor = torch.softmax(self.to_q(y) @ self.to_k(y).mT, -1) @ y
        return x + attention + self.mlp(y)


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = torch.nn.ModuleList(Block() for _ in range(2))
        self.out = torch.nn.Linear(K, 8)

    def forward(self, hidden_states: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            hidden_states = block(hidden_states, time)
        return self.out(hidden_states)


ARGUMENTS = {"hidden_states": torch.randn(2, 16, K), "time": torch.randn(2, K)}


@pytest.fixture(scope="module")
def net() -> Net:
    torch.manual_seed(0)
    return Net().eval().half().float()  # in numbers that float16 holds


@pytest.fixture(scope="module")
def exported(net: Net, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``net`` as torch exports it, in float16, with external data."""
    path = tmp_path_factory.mktemp("onnx") / "net.onnx"
    half = Net().half()
    half.load_state_dict(net.state_dict())
    arguments = tuple(value.half() for value in ARGUMENTS.values())
    program = torch.onnx.export(
        half.eval(), arguments, input_names=list(ARGUMENTS), output_names=["y"], dynamo=True, verbose=False,
        opset_version=18,
    )  # fmt: skip
    assert program is not None
    program.save(path, external_data=True)
    return path


@pytest.fixture
def file(exported: Path, tmp_path: Path) -> Path:
    """A copy that a test may break."""
    return Path(shutil.copytree(exported.parent, tmp_path / "copy")) / exported.name


def test_linears_are_those_of_the_module(net: Net, exported: Path) -> None:
    checkpoint = open_onnx(exported, torch.float16)
    linears = {name: m for name, m in net.named_modules() if isinstance(m, torch.nn.Linear)}
    assert {linear.path for linear in checkpoint.linears} == set(linears)
    for linear in checkpoint.linears:
        module = linears[linear.path]
        assert (linear.in_channels, linear.out_channels) == (module.in_features, module.out_features)
        assert (linear.bias is None) == (module.bias is None)
        assert torch.equal(checkpoint.tensor(f"{linear.path}.weight").float(), module.weight)
        if module.bias is not None:
            assert torch.equal(checkpoint.tensor(f"{linear.path}.bias").float(), module.bias)
    shapes = {linear.path: linear.shape for linear in checkpoint.linears}
    assert shapes["blocks.0.to_q"] == (2, 16, K) and shapes["blocks.1.modulation"] == (2, K)
    assert [(t.name, t.dtype, t.shape) for t in checkpoint.inputs] == [
        ("hidden_states", torch.float16, (2, 16, K)), ("time", torch.float16, (2, K)),
    ]  # fmt: skip


def test_hooks_see_what_the_modules_linears_read(net: Net, exported: Path, tmp_path: Path) -> None:
    module = build_module(open_onnx(exported, torch.float16), "cpu", tmp_path)
    assert isinstance(module.blocks, torch.nn.ModuleList) and len(module.blocks) == 2
    watched = ("blocks.0.to_q", "blocks.0.to_k", "blocks.1.mlp.2", "out")

    def read(of: torch.nn.Module) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        found: dict[str, torch.Tensor] = {}
        hooks = [
            of.get_submodule(path).register_forward_pre_hook(
                lambda _, x, path=path: found.update({path: x[0]})
            )
            for path in watched
        ]
        with torch.no_grad():
            result = of(**ARGUMENTS)
        for hook in hooks:
            hook.remove()
        return result.float(), found

    (y, ours), (wanted, theirs) = read(module), read(net)
    assert torch.allclose(y, wanted, atol=2e-2)  # the output is rounded to float16
    for path in watched:
        assert torch.allclose(ours[path], theirs[path], atol=1e-3), path  # its constants are float16
    assert ours["blocks.0.to_q"] is ours["blocks.0.to_k"]  # readers of one tensor are one group
    assert not list(tmp_path.glob("prepared*"))


def test_on_the_meta_device_nothing_runs(exported: Path, tmp_path: Path) -> None:
    module = build_module(open_onnx(exported, torch.float16), "meta", tmp_path)
    seen = []
    for path, linear in module.named_modules():
        if isinstance(linear, torch.nn.Linear):
            linear.register_forward_pre_hook(lambda _, x, path=path: seen.append((path, tuple(x[0].shape))))
    y = module(**{name: value.to("meta") for name, value in ARGUMENTS.items()})
    assert (y.is_meta, tuple(y.shape)) == (True, (2, 16, 8))
    assert seen[0] == ("blocks.0.modulation", (2, K)) and len(seen) == 11
    assert not list(tmp_path.iterdir())


def test_the_adopted_file_is_what_rewriting_takes(net: Net, exported: Path, tmp_path: Path) -> None:
    checkpoint = open_onnx(exported, torch.float16)
    dense = adopt(checkpoint, tmp_path / "dense" / "dense.onnx")
    graph = import_graph(onnx.load(dense.path, load_external_data=False), torch.float16, dense.path.parent)
    linears = [
        SimpleNamespace(path=linear.path, bias=linear.bias is not None, out_channels=linear.out_channels)
        for linear in checkpoint.linears
    ]
    matches, reasons = match(graph, linears)  # type: ignore[arg-type]
    assert set(matches) == {linear.path for linear in checkpoint.linears} and not reasons
    (found,) = matches["blocks.1.mlp.0"]
    assert found.gelu
    copy = float32_copy(dense.path, tmp_path / "float32.onnx")
    feed = {name: value.numpy() for name, value in ARGUMENTS.items()}
    (y,) = onnxruntime.InferenceSession(copy).run(None, feed)
    assert np.allclose(y, net(**ARGUMENTS).detach().numpy(), atol=1e-4)


@pytest.mark.parametrize("opset", [18, 20, 23])
def test_the_ops_functions_go_into_files_of_later_opsets(opset: int) -> None:
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT16, [1]) for name in "xy")
    graph = helper.make_graph([helper.make_node("Neg", ["x"], ["y"])], "g", [x], [y])
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid(DOMAIN, 1)]
    model = helper.make_model(
        graph, opset_imports=opsets, ir_version=10, functions=lynx_functions(FUNCTIONS, opset)
    )
    onnx.checker.check_model(model, full_check=True)


def test_the_digest_follows_external_data(exported: Path, file: Path) -> None:
    shown: list[tuple[str, int, int]] = []
    before = open_onnx(exported, torch.float16).digest(lambda *of: shown.append(of))
    assert before == open_onnx(file, torch.float16).digest() and shown[-1][1:] == (2, 2)
    data = bytearray((file.parent / "net.onnx.data").read_bytes())
    data[100] ^= 1
    (file.parent / "net.onnx.data").write_bytes(data)
    assert before != open_onnx(file, torch.float16).digest()


def _edit(change: Callable[[onnx.ModelProto], object]) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        model = onnx.load(path, load_external_data=False)
        change(model)
        path.write_bytes(model.SerializeToString())

    return edit


def _foreign(model: onnx.ModelProto) -> None:
    model.graph.node[-1].domain = "com.microsoft"
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))


def _quantized(model: onnx.ModelProto) -> None:
    one = numpy_helper.from_array(np.float32(1), "one")
    model.graph.initializer.append(one)
    model.graph.node.append(helper.make_node("QuantizeLinear", ["one", "one"], ["q"]))


def _dynamic(model: onnx.ModelProto) -> None:
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_param = "batch"


def _outside(model: onnx.ModelProto) -> None:
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = "../net.onnx.data"


def _write_without_linears(path: Path) -> None:
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT16, [1])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT16, [1])
    graph = helper.make_graph([helper.make_node("Neg", ["x"], ["y"])], "g", [value], [y])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p.unlink(), "does not exist. Correct model.onnx"),
        (lambda p: p.write_bytes(b"no protobuf"), "is no ONNX file"),
        (
            lambda p: (p.parent / "net.onnx.data").unlink(),
            "net.onnx.data is missing, .* Copy it beside the ONNX file",
        ),
        (lambda p: (p.parent / "net.onnx.data").write_bytes(b"x"), "is cut off: .* ends at byte"),
        (_edit(_outside), "lie outside its folder"),
        (_edit(_foreign), "holds the op .* of 'com.microsoft', which TensorRT does not know"),
        (_edit(_quantized), "is quantized .it holds the op QuantizeLinear.*unquantized"),
        (_edit(_dynamic), "the input 'hidden_states' has no fixed shape"),
        (_edit(lambda m: setattr(m.opset_import[0], "version", 17)), "has opset 17. Export it with opset 18"),
        (_write_without_linears, "holds no linear"),
    ],
)
def test_what_cannot_be_compiled_is_refused(
    file: Path, change: Callable[[Path], object], message: str
) -> None:
    change(file)
    with pytest.raises(InputError, match=message) as caught:
        open_onnx(file, torch.float16)
    assert "\n" not in str(caught.value)


def test_weights_of_another_dtype(exported: Path) -> None:
    with pytest.raises(
        InputError, match="is float16, and model.dtype is bfloat16. Export the model in bfloat16"
    ):
        open_onnx(exported, torch.bfloat16)


def test_names_without_torchs_metadata(file: Path) -> None:
    def strip(model: onnx.ModelProto) -> None:
        for node in model.graph.node:
            del node.metadata_props[:]
            if node.op_type == "MatMul":
                node.name = f"/layers.{len(node.name)}/to q/MatMul"

    _edit(strip)(file)
    paths = [linear.path for linear in open_onnx(file, torch.float16).linears]
    assert len(set(paths)) == 11
    assert any(path.startswith("layers.") and path.endswith("to_q") for path in paths)
    assert "blocks.0.modulation" in paths  # a Gemm keeps its weight's name


def test_its_structure_is_that_of_the_module(exported: Path, tmp_path: Path) -> None:
    found = find_structure(build_module(open_onnx(exported, torch.float16), "meta", tmp_path), ARGUMENTS)
    with torch.device("meta"):
        wanted = find_structure(Net(), ARGUMENTS)
    assert (found.tokens, found.blocks) == (wanted.tokens, wanted.blocks)
    names = {frozenset(linear.path for linear in group.linears) for group in wanted.groups}
    # modulation reads one tensor in every block, and q, k and the MLP one in each
    assert {frozenset(linear.path for linear in group.linears) for group in found.groups} == names
    assert {x.path: x.refusal for x in found.linears} == {x.path: x.refusal for x in wanted.linears}
    assert len(found.candidates) == 8
