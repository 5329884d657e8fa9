# SPDX-License-Identifier: Apache-2.0
"""Checkpoints as people have them: taken, or refused from their files' names and headers, with what to do."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import accelerate
import diffusers
import pytest
import torch
from diffusers import (
    DiTTransformer2DModel,
    FluxTransformer2DModel,
    WanTransformer3DModel,
    ZImageTransformer2DModel,
)
from safetensors.torch import load_file, save_file

from lynx_compile.errors import InputError
from lynx_compile.files.tensors import map_tensor
from lynx_compile.models.checkpoint import Checkpoint, open_checkpoint, open_module
from lynx_compile.models.source import fetch, only_variant, pipeline_parts
from lynx_compile.models.weight_files import StoredTensor, read_headers
from tests.conftest import TINY

NAME = "diffusion_pytorch_model.safetensors"
Tensors = dict[str, torch.Tensor]
WAN = {
    "num_attention_heads": 2, "attention_head_dim": 12, "text_dim": 32, "freq_dim": 64, "ffn_dim": 32, "num_layers": 1,
    "rope_max_seq_len": 32,
}  # fmt: skip
Z_IMAGE = {
    "all_patch_size": (2,), "all_f_patch_size": (1,), "in_channels": 16, "dim": 32, "n_layers": 2,
    "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2, "qk_norm": True, "cap_feat_dim": 16,
    "axes_dims": [8, 4, 4], "axes_lens": [256, 32, 32],
}  # fmt: skip


@pytest.fixture
def folder(tiny: Path, tmp_path: Path) -> Path:
    """A copy of the tiny transformer's folder that a test may break."""
    return Path(shutil.copytree(tiny / "model" / "transformer", tmp_path / "model" / "transformer"))


def _open(folder: Path, **settings: object) -> Checkpoint:
    return open_checkpoint(folder.parent, folder.name, **settings)  # type: ignore[arg-type]


def _edit(change: Callable[[Tensors], object]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        tensors = load_file(folder / NAME)
        change(tensors)
        save_file(tensors, folder / NAME)

    return edit


def _config(**values: object) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text()) | values
        config = {name: value for name, value in config.items() if value is not ...}
        (folder / "config.json").write_text(json.dumps(config))

    return edit


def _shard(folder: Path) -> None:
    """Two shards and their index instead of the whole file."""
    tensors = load_file(folder / NAME)
    names = sorted(tensors)
    index = {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        file = f"diffusion_pytorch_model-{number:05d}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file)
        index.update(dict.fromkeys(part, file))
    (folder / f"{NAME}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    (folder / NAME).unlink()


def _variant(*variants: str) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        for variant in variants:
            shutil.copy(folder / NAME, folder / f"diffusion_pytorch_model.{variant}.safetensors")
        (folder / NAME).unlink()

    return edit


def _rename(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / NAME).rename(folder / name) and None


def _whole_and_shards(folder: Path) -> None:
    whole = (folder / NAME).read_bytes()
    _shard(folder)
    (folder / NAME).write_bytes(whole)


def _stale_index(folder: Path) -> None:
    _whole_and_shards(folder)
    for shard in folder.glob("*-of-*"):
        shard.unlink()


def _lost_shard(folder: Path) -> None:
    _shard(folder)
    (folder / "diffusion_pytorch_model-00002-of-00002.safetensors").unlink()


def _loose_shards(folder: Path) -> None:
    _shard(folder)
    (folder / f"{NAME}.index.json").unlink()


def _dangling(folder: Path) -> None:
    (folder / NAME).unlink()
    (folder / NAME).symlink_to("../../../blobs/0123abcd")


def _only(name: str, content: bytes = b"x") -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        (folder / NAME).unlink()
        (folder / name).write_bytes(content)

    return edit


def _truncate(folder: Path) -> None:
    (folder / NAME).write_bytes((folder / NAME).read_bytes()[:-100])


def _fp8(tensors: Tensors) -> None:
    tensors["proj_out.weight"] = tensors["proj_out.weight"].to(torch.float8_e4m3fn)


def _only_lora(folder: Path) -> None:
    save_file({"transformer.x_embedder.lora_A.weight": torch.zeros(2, 4)}, folder / NAME)


@pytest.mark.parametrize(
    ("change", "settings", "files"),
    [
        (lambda f: None, {}, [NAME]),
        (_variant("fp16"), {}, ["diffusion_pytorch_model.fp16.safetensors"]),
        (_variant("fp16", "bf16"), {"variant": "bf16"}, ["diffusion_pytorch_model.bf16.safetensors"]),
        (_shard, {}, [f"diffusion_pytorch_model-0000{n}-of-00002.safetensors" for n in (1, 2)]),
        (_loose_shards, {}, [f"diffusion_pytorch_model-0000{n}-of-00002.safetensors" for n in (1, 2)]),
        (_stale_index, {}, [NAME]),
        (_rename("flux1-mine.safetensors"), {}, ["flux1-mine.safetensors"]),
        (_config(patch_size=..., num_attention_heads=2, pooled_projection_dim=16, out_channels=...), {}, [NAME]),
    ],
)  # fmt: skip
def test_weights_are_found_whatever_their_files_are_called(
    folder: Path, change: Callable[[Path], None], settings: dict[str, str], files: list[str]
) -> None:
    weights = load_file(folder / NAME)
    change(folder)
    checkpoint = _open(folder, **settings)
    assert [path.name for path in checkpoint.files] == files
    assert checkpoint.tensors.keys() == weights.keys()
    assert all(torch.equal(checkpoint.tensor(name), weights[name]) for name in weights)
    assert checkpoint.config["patch_size"] == 1 and checkpoint.config["out_channels"] is None


@pytest.mark.parametrize(
    ("change", "settings", "message"),
    [
        (_variant("fp16", "bf16"), {}, "holds the variants bf16 and fp16 .* Choose one: 'variant: bf16' under 'model'"),
        (lambda f: None, {"variant": "fp16"}, "no weights of the variant 'fp16'. Remove model.variant"),
        (_variant("bf16"), {"variant": "fp16"}, "no weights of the variant 'fp16'. Set model.variant to bf16"),
        (_whole_and_shards, {}, "holds its weights twice: whole in .*, and in the shards .* Remove those"),
        (_lost_shard, {}, "00002-of-00002.safetensors is missing, .* Fetch the checkpoint again"),
        (_dangling, {}, "is a link to ../../../blobs/0123abcd, which is not there: .* Fetch the checkpoint again"),
        (_truncate, {}, "is damaged or cut off .* Fetch the checkpoint again"),
        (lambda f: (f / NAME).write_bytes(b"version https://git-lfs.github.com/spec/v1\n"), {}, "Run 'git lfs pull'"),
        (lambda f: (f / NAME).unlink(), {}, "holds no weights .* Fetch the checkpoint again"),
        (_only("flux1-dev-Q4_K.gguf"), {}, "quantized weights .*GGUF.* Give the unquantized checkpoint"),
        (_only("model.safetensors", b"GGUF" + bytes(100)), {}, "quantized weights .GGUF.* Give the unquantized"),
        (_only("diffusion_pytorch_model.bin"), {}, "as a pickle .*model.bin.* save_pretrained.*safe_serialization"),
        (_only("flux.ckpt"), {}, "as a pickle .flux.ckpt.*never loaded"),
        (_only("pytorch_lora_weights.safetensors"), {}, "holds an adapter .* and no model. Give the pipeline it was"),
        (_only_lora, {}, "holds an adapter .* and no model"),
        (_edit(lambda t: t.update({"x_embedder.lora_A.weight": torch.zeros(2, 4)})), {}, "are not merged"),
        (_edit(lambda t: t.update({"x_embedder.base_layer.weight": t.pop("x_embedder.weight")})), {}, "not merged"),
        (_edit(_fp8), {}, "quantized weights .'proj_out.weight' is F8_E4M3.*Give the unquantized"),
        (_edit(lambda t: t.update({"proj_out.weight": t["proj_out.weight"].to(torch.int8)})), {}, "is I8.*unquantized"),
        (_edit(lambda t: t.update({"proj_out.weight.absmax": torch.ones(3)})), {}, "absmax' is F32.*unquantized"),
        (_edit(lambda t: t.update({"proj_out.scale_weight": torch.ones(1)})), {}, "scale_weight.*unquantized"),
        (_config(quantization_config={"quant_method": "torchao"}), {}, "are quantized .torchao.*unquantized"),
        (
            _edit(lambda t: t.update({"transformer_blocks.0.attn.to_qkv.weight": torch.zeros(192, 64)})), {},
            "fused projections .'transformer_blocks.0.attn.to_qkv.weight'.*unfuse_qkv_projections",
        ),
        (
            _config(in_channels=8), {},
            r"'x_embedder.weight' is \[64, 4\] in the weights, and \[64, 8\] in a FluxTransformer2DModel of this",
        ),
        (_config(num_layers=2), {}, r"lack 'transformer_blocks.1.norm1.linear.weight' \[384, 64\] and \d+ more"),
        (_config(guidance_embeds=False), {}, r"hold 'time_text_embed.guidance_embedder.linear_1.bias' \[64\] and 3"),
        (_config(num_layers="many"), {}, "does not describe a FluxTransformer2DModel .TypeError"),
        (_config(_class_name="MyTransformer"), {}, "'MyTransformer' is no model of .*'module: package:Class'"),
        (_config(_class_name="FlowMatchEulerDiscreteScheduler"), {}, "is no model of diffusers"),
        (_config(_class_name=...), {}, "names no class"),
        (lambda f: (f / "config.json").unlink(), {}, "config.json does not exist. Give the folder or the hub id"),
        (lambda f: (f / "config.json").write_text("{"), {}, "cannot be read as JSON"),
        (lambda f: (f / "config.json").write_text("[]"), {}, "holds no mapping"),
        (lambda f: save_file({"blocks.0.qkv": torch.zeros(2)}, f / NAME), {}, "does not|lack"),
        (lambda f: save_file({f"double.{i}": torch.zeros(2) for i in range(9)}, f / NAME), {}, "in another layout"),
    ],
)  # fmt: skip
def test_what_cannot_be_compiled_is_refused_with_what_to_do(
    folder: Path, change: Callable[[Path], object], settings: dict[str, str], message: str
) -> None:
    change(folder)
    with pytest.raises(InputError, match=message) as caught:
        _open(folder, **settings)
    assert "\n" not in str(caught.value) and caught.value.exit_code == 2
    assert "install" not in str(caught.value).lower()


def test_the_class_of_an_older_config_is_found_in_the_pipelines_index(folder: Path) -> None:
    _config(_class_name=...)(folder)
    (folder.parent / "model_index.json").write_text(
        '{"transformer": ["diffusers", "FluxTransformer2DModel"]}'
    )
    assert _open(folder).model_class == "diffusers:FluxTransformer2DModel"


def test_the_class_that_diffusers_split_is_the_one_its_norm_says(tmp_path: Path) -> None:
    model = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, num_layers=1, sample_size=8
    )
    model.save_pretrained(tmp_path / "transformer")
    _config(_class_name="Transformer2DModel")(tmp_path / "transformer")
    assert _open(tmp_path / "transformer").class_name == "DiTTransformer2DModel"


@pytest.mark.parametrize(("channels", "out"), [(384, 64), (128, 64)])
def test_fill_canny_and_depth_are_what_their_config_says(tmp_path: Path, channels: int, out: int) -> None:
    config = TINY | {"in_channels": channels, "out_channels": out}
    FluxTransformer2DModel(**config).save_pretrained(tmp_path / "transformer")
    module = _open(tmp_path / "transformer").load()
    assert isinstance(module, FluxTransformer2DModel)
    assert (module.x_embedder.in_features, module.proj_out.out_features) == (channels, out)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("model_class", "config"),
    [(FluxTransformer2DModel, TINY), (WanTransformer3DModel, WAN), (ZImageTransformer2DModel, Z_IMAGE)],
)
def test_a_loaded_module_is_the_one_that_diffusers_loads(
    tmp_path: Path, model_class: type[torch.nn.Module], config: dict[str, object], dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    model_class(**config).save_pretrained(tmp_path)  # type: ignore[operator]
    checkpoint = open_checkpoint(tmp_path, None)
    wanted, found = model_class.from_pretrained(tmp_path, torch_dtype=dtype), checkpoint.load(dtype)  # type: ignore[attr-defined]
    assert not found.training
    for kind in ("named_parameters", "named_buffers"):
        of_diffusers, ours = dict(getattr(wanted, kind)()), dict(getattr(found, kind)())
        assert of_diffusers.keys() == ours.keys()
        for name, value in of_diffusers.items():
            assert value.dtype == ours[name].dtype and torch.equal(value, ours[name]), name
    on_meta = checkpoint.build("meta", dtype)
    assert all(parameter.is_meta for parameter in on_meta.parameters())
    assert {n: p.dtype for n, p in on_meta.named_parameters()} == {
        n: p.dtype for n, p in found.named_parameters()
    }


def test_a_block_is_filled_alone(folder: Path) -> None:
    checkpoint = _open(folder)
    module = checkpoint.build("cpu", torch.bfloat16)
    block = module.get_submodule("transformer_blocks.0")
    checkpoint.fill(block, "transformer_blocks.0", torch.bfloat16)
    assert {parameter.device.type for parameter in block.parameters()} == {"cpu"}
    assert module.x_embedder.weight.is_meta  # type: ignore[union-attr]
    weights = load_file(folder / NAME)
    assert torch.equal(
        block.ff.net[2].weight,
        weights["transformer_blocks.0.ff.net.2.weight"].bfloat16(),  # type: ignore[union-attr, index]
    )


def test_weights_stored_in_the_asked_dtype_take_no_memory_of_their_own(tmp_path: Path) -> None:
    """They are mapped from the file, whose pages the system can drop at any time."""
    torch.manual_seed(0)
    config = TINY | {"num_single_layers": 24, "attention_head_dim": 128, "axes_dims_rope": (32, 48, 48)}
    FluxTransformer2DModel(**config).to(torch.bfloat16).save_pretrained(tmp_path)
    checkpoint = open_checkpoint(tmp_path, None)
    assert checkpoint.bytes > 50e6
    before, mapped = _anonymous_bytes(), _status("VmSize")
    module = checkpoint.load(torch.bfloat16)
    assert _status("VmSize") - mapped < 2 * checkpoint.bytes  # and each range of the file is mapped once
    assert sum(float(parameter.sum()) for parameter in module.parameters()) != 0
    assert _anonymous_bytes() - before < checkpoint.bytes / 2


def test_accelerate_is_there_so_that_diffusers_fills_empty_modules() -> None:
    assert diffusers.utils.is_accelerate_available() and accelerate.__version__


def _anonymous_bytes() -> int:
    return _status("RssAnon")


def _status(name: str) -> int:
    """Bytes that the system counts for this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def test_tensors_say_where_their_bytes_lie(folder: Path) -> None:
    stored = _open(folder).tensors["proj_out.weight"]
    with stored.file.open("rb") as file:
        file.seek(stored.offset)
        found = torch.frombuffer(bytearray(file.read(stored.bytes)), dtype=stored.dtype).reshape(stored.shape)
    assert torch.equal(found, load_file(folder / NAME)["proj_out.weight"])


def test_a_file_larger_than_all_memory_is_opened(tmp_path: Path) -> None:
    """Its first tensor is a hole of 4 TB, behind which a small one lies."""
    hole, last = 4 << 40, torch.arange(3, dtype=torch.bfloat16)
    header = {
        "hole": {"dtype": "BF16", "shape": [hole // 2], "data_offsets": [0, hole]},
        "last": {"dtype": "BF16", "shape": [3], "data_offsets": [hole, hole + 6]},
    }
    text = json.dumps(header).encode()
    with (tmp_path / "large.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.seek(hole, os.SEEK_CUR)
        file.write(last.view(torch.uint8).numpy().tobytes())
    stored = read_headers([tmp_path / "large.safetensors"])["last"]
    assert torch.equal(map_tensor(stored.file, stored.offset, stored.dtype, stored.shape), last)


def test_the_digest_follows_content_and_not_place(tiny: Path, folder: Path) -> None:
    before = _open(folder).digest()
    assert before == _open(tiny / "model" / "transformer").digest()
    _config(patch_size=...)(folder)  # is its default
    assert before == _open(folder).digest()
    _edit(lambda t: t["proj_out.bias"].add_(1))(folder)
    assert before != _open(folder).digest()


def test_hashing_shows_how_far_it_is(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lynx_compile.files.digest.PIECE_BYTES", 1 << 18)
    _edit(lambda t: t.update({"extra": torch.zeros(3 << 18)}))(folder)  # 3 MiB
    stored = {"extra": StoredTensor(folder / NAME, torch.float32, (3 << 18,), 0, 3 << 20)}
    checkpoint = Checkpoint(folder, "diffusers:FluxTransformer2DModel", {}, (folder / NAME,), stored)
    shown: list[tuple[str, int, int]] = []
    digest = checkpoint.digest(lambda *of: shown.append(of))
    assert {what for what, *_ in shown[:-1]} == {f"reading {NAME}"}
    done = [count for _, count, _ in shown]
    assert done == sorted(done) and {0, 1, 2, 3} <= set(done) and shown[-1][1] == shown[-1][2] >= 3
    shown.clear()
    assert (
        checkpoint.digest(lambda *of: shown.append(of)) == digest and len(shown) == 1
    )  # it is not read again


def test_the_only_variant_of_any_component(tmp_path: Path) -> None:
    for name, files in {
        "vae": [NAME],
        "transformer": ["diffusion_pytorch_model.fp16.safetensors"],
        "scheduler": [],
    }.items():
        (tmp_path / name).mkdir()
        for file in files:
            (tmp_path / name / file).touch()
    assert only_variant(tmp_path, ["vae", "transformer", "scheduler"]) == "fp16"
    (tmp_path / "transformer" / NAME).touch()
    assert only_variant(tmp_path, ["vae", "transformer", "scheduler"]) is None


def test_a_quantized_text_encoder_is_refused_with_its_pipeline(tiny: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny / "model", tmp_path / "model"))
    (folder / "model_index.json").write_text('{"text_encoder": ["transformers", "T5EncoderModel"]}')
    (folder / "text_encoder").mkdir()
    (folder / "text_encoder" / "model.safetensors").touch()
    (folder / "text_encoder" / "config.json").write_text(
        '{"quantization_config": {"quant_method": "bitsandbytes"}}'
    )
    with pytest.raises(
        InputError, match=r"text_encoder.config.json: the weights are quantized \(bitsandbytes\)"
    ):
        pipeline_parts(folder)


def _huge(tensors: Tensors) -> None:
    for name in tensors:
        tensors[name] = tensors[name].bfloat16()
    tensors["proj_out.weight"][1, 2] = -70000


def test_a_weight_beyond_float16_is_named(folder: Path) -> None:
    _edit(_huge)(folder)
    checkpoint = _open(folder)
    checkpoint.check_values(torch.bfloat16)
    message = r"'proj_out.weight' in .* reaches 70144, more than float16 holds \(65504\). Set 'dtype: bf16'"
    with pytest.raises(InputError, match=message):
        checkpoint.check_values(torch.float16)
    with pytest.raises(InputError, match=message):
        checkpoint.load(torch.float16)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_weight_that_is_not_finite_is_named(folder: Path, value: float) -> None:
    _edit(lambda t: t["proj_out.weight"][0].fill_(value))(folder)
    shown: list[str] = []
    with pytest.raises(InputError, match="'proj_out.weight' in .* is not finite"):
        _open(folder).check_values(torch.float32, lambda what, done, total: shown.append(what))
    assert shown[-1] == "proj_out.weight"


def _to_authors_layout(folder: Path) -> None:
    """A Z-Image transformer's tensors as its authors publish them: other names, q, k and v in one."""
    tensors = load_file(folder / NAME)
    names = {"all_final_layer.2-1.": "final_layer.", "all_x_embedder.2-1.": "x_embedder.", ".to_out.0.": ".out.",
             ".norm_q.": ".q_norm.", ".norm_k.": ".k_norm."}  # fmt: skip
    original: Tensors = {}
    for name, tensor in tensors.items():
        if name.endswith(".to_q.weight"):
            path = name.removesuffix("to_q.weight")
            parts = [tensors[f"{path}to_{part}.weight"] for part in "qkv"]
            original[f"model.diffusion_model.{path}qkv.weight"] = torch.cat(parts)
        elif not name.endswith((".to_k.weight", ".to_v.weight")):
            for ours, theirs in names.items():
                name = name.replace(ours, theirs)
            original[f"model.diffusion_model.{name}"] = tensor
    (folder / NAME).unlink()
    save_file(original, folder / "z_image_turbo_bf16.safetensors")


def test_the_authors_own_layout_is_converted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    folder = tmp_path / "model" / "transformer"
    ZImageTransformer2DModel(**Z_IMAGE).to(torch.bfloat16).save_pretrained(folder)
    weights = load_file(folder / NAME)
    _to_authors_layout(folder)
    with pytest.raises(InputError, match="in another layout .*Convert them once: ZImage.*from_single_file"):
        _open(folder)
    checkpoint = _open(folder, converted=tmp_path / "converted")
    assert checkpoint.tensors.keys() == weights.keys()
    assert all(torch.equal(checkpoint.tensor(name), weights[name]) for name in weights)
    monkeypatch.setattr(
        ZImageTransformer2DModel, "from_single_file", None
    )  # would fail if it were called again
    assert _open(folder, converted=tmp_path / "converted").files == checkpoint.files
    (folder / "z_image_turbo_bf16.safetensors").rename(tmp_path / "z_image.safetensors")
    with pytest.raises(
        InputError, match="holds weights alone .* Give the folder of the diffusers pipeline, with this"
    ):
        fetch(str(tmp_path / "z_image.safetensors"))


def test_a_pipelines_missing_folder_is_named(tiny: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny / "model", tmp_path / "model"))
    (folder / "model_index.json").unlink(missing_ok=True)
    with pytest.raises(InputError, match=r"no pipeline \(model_index.json is missing\).*'recording'"):
        pipeline_parts(folder)
    index = {
        "_class_name": "FluxPipeline", "transformer": ["diffusers", "FluxTransformer2DModel"],
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"], "image_encoder": [None, None],
    }  # fmt: skip
    (folder / "model_index.json").write_text(json.dumps(index))
    assert list(pipeline_parts(folder)) == ["transformer", "scheduler"]
    shutil.rmtree(folder / "scheduler")
    with pytest.raises(InputError, match=r"no folder 'scheduler' \(FlowMatchEulerDiscreteScheduler\)"):
        pipeline_parts(folder)
    assert open_checkpoint(folder, "transformer").tensors  # the transformer alone can do without


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("flux.gguf", "GGUF.*unquantized"),
        ("flux.ckpt", "as a pickle"),
        ("notes.txt", "is a file and no model folder"),
        ("none", "does not exist. Correct model.source"),
    ],
)
def test_sources_that_are_no_folder(tmp_path: Path, name: str, message: str) -> None:
    if name != "none":
        (tmp_path / name).write_text("x")
    with pytest.raises(InputError, match=message):
        fetch(str(tmp_path / name))


def test_a_folder_without_any_config(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is no diffusers folder"):
        fetch(str(tmp_path))
    save_file({"double_blocks.0.img_attn.qkv.weight": torch.zeros(2)}, tmp_path / "flux1-dev.safetensors")
    with pytest.raises(InputError, match="flux1-dev.safetensors holds weights alone .'double_blocks"):
        fetch(str(tmp_path))


PACKAGE = """
import torch
class Net(torch.nn.Module):
    def __init__(self, width, depth=1):
        super().__init__()
        self.blocks = torch.nn.ModuleList(torch.nn.Linear(width, width) for _ in range(depth))
        self.register_buffer("table", torch.arange(width).float(), persistent=False)
    def forward(self, x):
        for block in self.blocks:
            x = block(x) + self.table
        return x
number = 3
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a package of the user's, its config and its weights, which is the working directory."""
    name = f"own_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(PACKAGE)
    (tmp_path / "config.json").write_text('{"width": 8, "depth": 2}')
    shapes = {"weight": (8, 8), "bias": (8,)}
    tensors = {f"blocks.{i}.{kind}": torch.randn(shape) for i in (0, 1) for kind, shape in shapes.items()}
    save_file(tensors, tmp_path / "net.safetensors")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("in_folder", [True, False])
def test_a_module_of_the_users_own(own: Path, in_folder: bool) -> None:
    path = own / "net.safetensors"
    if in_folder:
        (own / "weights").mkdir()
        path = path.rename(own / "weights" / path.name)
    name = f"own_{own.name}:Net"
    checkpoint = open_module(name, own / "config.json", path.parent if in_folder else path)
    module, weights = checkpoint.load(torch.bfloat16), load_file(path)
    assert type(module).__name__ == "Net" and checkpoint.class_name == "Net"
    assert {key: value.bfloat16() for key, value in weights.items()}.keys() == module.state_dict().keys()
    assert torch.equal(module.blocks[1].weight, weights["blocks.1.weight"].bfloat16())  # type: ignore[index, union-attr]
    assert torch.equal(module.table, torch.arange(8).float())  # type: ignore[arg-type]
    same = open_module(name, {"depth": 2, "width": 8}, path)
    digest = checkpoint.digest()
    assert same.digest() == digest
    with (own / f"own_{own.name}.py").open("a") as file:
        file.write("# edited\n")
    assert same.digest() != digest  # what the class does is part of it
    assert all(parameter.is_meta for parameter in checkpoint.build("meta").parameters())


@pytest.mark.parametrize(
    ("name", "config", "weights", "message"),
    [
        ("nowhere:Net", {}, "net.safetensors", "'nowhere:Net' cannot be imported .*Install its package"),
        ("{}:Nett", {}, "net.safetensors", "cannot be imported .AttributeError"),
        ("{}:number", {}, "net.safetensors", "is no class of torch modules"),
        ("{}:Net", {}, "net.safetensors", "does not describe a Net .TypeError: .*'width'"),
        ("{}:Net", {"width": 8}, "net.safetensors", r"hold 'blocks.1.bias' \[8\] and 1 more"),
        (
            "{}:Net",
            {"width": 4, "depth": 2},
            "net.safetensors",
            r"is \[8, 8\] in the .*, and \[4, 4\] in a Net",
        ),
        (
            "{}:Net",
            {"width": 8},
            "other.safetensors",
            "other.safetensors do not exist. Correct model.weights",
        ),
        ("{}:Net", {"width": 8}, "net.pt", "as a pickle"),
    ],
)
def test_modules_that_cannot_be_taken(
    own: Path, name: str, config: Tensors, weights: str, message: str
) -> None:
    (own / "net.pt").write_bytes(b"x")
    with pytest.raises(InputError, match=message):
        open_module(name.format(f"own_{own.name}"), config, own / weights)
