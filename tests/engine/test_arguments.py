# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput

from lynx_compile.engine.arguments import (
    TensorType,
    bind,
    differences,
    flatten,
    parameters,
    schema,
    spread,
    unflatten,
)
from lynx_compile.errors import InputError

A, B, C = torch.ones(2), torch.zeros(2, 3, dtype=torch.bfloat16), torch.tensor(3)
NESTED = {
    "x": [[A, None], [B]],
    "image_rotary_emb": (A, (B, C)),
    "added_cond_kwargs": {"resolution": A, "aspect_ratio": None},
    "controlnet_block_samples": {0: A, 4: B},
    "img_shapes": [[(1, 4, 6)]],
    "empty": [],
    "mode": "write",
    "scale": 0.5,
    "return_dict": False,
}


class Module(torch.nn.Module):
    def forward(self, x: Any, t: Any = None, *, scale: float = 1.0, shape: Any = (1, 2), **rest: Any) -> Any:
        return x


def test_names_are_paths_and_constants_are_kept() -> None:
    flat = flatten(NESTED)
    assert list(flat.tensors) == [
        "x.0.0",
        "x.1.0",
        "image_rotary_emb.0",
        "image_rotary_emb.1.0",
        "image_rotary_emb.1.1",
        "added_cond_kwargs.resolution",
        "controlnet_block_samples.0",
        "controlnet_block_samples.4",
    ]
    assert flat.tensors["image_rotary_emb.1.1"] is C
    assert flat.constants == {
        "x.0.1": None,
        "added_cond_kwargs.aspect_ratio": None,
        "img_shapes.0.0.0": 1,
        "img_shapes.0.0.1": 4,
        "img_shapes.0.0.2": 6,
        "mode": "write",
        "scale": 0.5,
        "return_dict": False,
    }


def test_back_through_json_with_other_tensors() -> None:
    flat = flatten(NESTED)
    structure = json.loads(json.dumps(flat.structure))
    back = unflatten(structure, flat.tensors)
    assert back["x"][0][0] is A and back["image_rotary_emb"][1] == (B, C)
    assert list(back["controlnet_block_samples"]) == [0, 4]  # integer keys stay integers
    assert {k: v for k, v in back.items() if k not in ("x",)} | {"x": 0} == NESTED | {"x": 0}
    assert type(back["img_shapes"][0][0]) is tuple and type(back["x"]) is list
    with pytest.raises(InputError, match="'x.0.0' is missing"):
        unflatten(structure, {})


@pytest.mark.parametrize("output", [A, (A,), (A, None), [A, B], ([A, B], None), (A, B)])
def test_results(output: Any) -> None:
    flat = flatten(output, "output")
    assert all(name.startswith("output") for name in flat.tensors)
    back = unflatten(json.loads(json.dumps(flat.structure)), flat.tensors)
    assert type(back) is type(output)
    assert list(flatten(back, "output").tensors.items()) == list(flat.tensors.items())


def test_a_dataclass_comes_back_as_what_it_was() -> None:
    flat = flatten(Transformer2DModelOutput(sample=[A, B]), "output")
    assert list(flat.tensors) == ["output.sample.0", "output.sample.1"]
    back = unflatten(json.loads(json.dumps(flat.structure)), flat.tensors)
    assert type(back) is Transformer2DModelOutput
    assert back.sample[1] is B and back[0][0] is A


def test_a_dataclass_is_never_imported() -> None:
    structure = {"dataclass": "lynx_evil:Output", "fields": []}
    with pytest.raises(InputError, match="not imported"):
        unflatten(structure, {})
    assert "lynx_evil" not in sys.modules
    with pytest.raises(InputError, match="os:system is not imported"):  # imported, and no dataclass
        unflatten({"dataclass": "os:system", "fields": []}, {})


def test_numpy_is_taken_as_well() -> None:
    flat = flatten({"x": np.zeros((2, 2), np.float32), "scale": np.float64(0.5), "n": np.int64(3)})
    assert schema(flat).tensors == {"x": TensorType("float32", 2)}
    assert flat.constants == {"scale": 0.5, "n": 3}
    assert json.dumps(flat.structure)


@dataclass
class DynamicCache:
    layers: list[Any]


class PlainCache:
    pass


class BlockMask:
    pass


@pytest.mark.parametrize(
    ("leaf", "message"),
    [
        (DynamicCache([A]), "'kv.0' is a .*DynamicCache: a cache"),
        (PlainCache(), "'kv.0' is a .*PlainCache: a cache that the model reads and fills"),
        (BlockMask(), "'kv.0' is a .*BlockMask: a mask of flex_attention"),
        (len, "'kv.0' is a builtins.builtin_function_or_method: code"),
        (torch.device("cpu"), "'kv.0' is a torch.device: a Python object"),
        (b"bytes", "'kv.0' is a builtins.bytes"),
        ({(1, 2): 3}, "key of 'kv.0'"),
    ],
)
def test_what_no_graph_takes_is_refused_by_name(leaf: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        flatten({"kv": [leaf]})


def test_two_arguments_of_one_name() -> None:
    with pytest.raises(InputError, match="Two arguments are called 'a.b'"):
        flatten({"a.b": 1, "a": {"b": 2}})


def test_bind_by_position_with_defaults_and_back() -> None:
    known = parameters(Module.forward)
    assert [p.name for p in known] == ["x", "t", "scale", "shape", "rest"]
    assert known == parameters(Module().forward)
    bound = bind(known, (A,), {"extra": B})
    assert bound == {"x": A, "t": None, "scale": 1.0, "shape": (1, 2), "rest": {"extra": B}}
    assert spread(known, bound) == ((), {"x": A, "t": None, "scale": 1.0, "shape": (1, 2), "extra": B})
    with pytest.raises(InputError, match=r"missing a required argument: 'x'. It takes x, t, scale"):
        bind(known, (), {})


def test_spread_where_python_wants_positions() -> None:
    def forward(a: int, /, b: int, *rest: int, c: int = 0) -> tuple[int, ...]:
        return (a, b, *rest, c)

    known = parameters(forward)
    for given in ((1, 2), (1, 2, 3, 4)):
        args, kwargs = spread(known, bind(known, given, {"c": 5}))
        assert forward(*args, **kwargs) == (*given, 5)


def test_differences_are_readable() -> None:
    expected = schema(flatten({"x": A, "mask": B, "shape": [1, 2], "flag": True, "kind": None, "one": 1}))
    assert differences(expected, expected) == ()
    same = {"x": torch.ones(7), "mask": torch.zeros(1, 9, dtype=torch.bfloat16)}  # other sizes
    same |= {"shape": (1, 2), "flag": True, "kind": None, "one": 1.0}
    assert differences(expected, schema(flatten(same))) == ()
    given = {"x": A.double(), "mask": None, "shape": [1], "flag": 1, "kind": C, "one": 2, "more": [A]}
    assert differences(expected, schema(flatten(given))) == (
        "'shape.1' is missing, and should be 2",
        "'flag' is 1, not True",
        "'kind' is a tensor (int64, 0 dimensions), not None",
        "'one' is 2, not 1",
        "'x' is a tensor (float64, 1 dimensions), not a tensor (float32, 1 dimensions)",
        "'mask' is None, not a tensor (bfloat16, 2 dimensions)",
        "'more.0' is a tensor (float32, 1 dimensions), and should not be there",
    )


def test_the_runtime_gets_no_torch_with_it() -> None:
    script = "import sys, lynx_compile.engine.arguments; print(*({'torch', 'diffusers', 'yaml'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.split() == []
