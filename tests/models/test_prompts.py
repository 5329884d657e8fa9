# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file

from lynx_compile.errors import InputError
from lynx_compile.models import prompts


@pytest.mark.parametrize("name", ["prompts.txt", "PROMPTS.TXT", "prompts"])
def test_text_is_a_prompt_a_line(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes("\ufeffa cat, sitting\r\n\n  016 \r\neine Küche\u2028hell".encode())
    assert prompts.read(path) == [
        {"prompt": "a cat, sitting"},
        {"prompt": "016"},
        {"prompt": "eine Küche\u2028hell"},
    ]


def test_numbers_in_yaml_stay_text(tmp_path: Path) -> None:
    text = "- 016\n- yes\n- 1.50\n- 2024-01-01\n- ~\n- {prompt: 007, negative_prompt: no}\n"
    (tmp_path / "p.yaml").write_text(text)
    expected = [{"prompt": p} for p in ("016", "yes", "1.50", "2024-01-01", "~")]
    expected.append({"prompt": "007", "negative_prompt": "no"})
    assert prompts.read(tmp_path / "p.yaml") == expected
    node = yaml.compose(f"calibration:\n  prompts: [{text.split()[1]}, 0x10]\n", Loader=yaml.SafeLoader)
    assert prompts.of_node(node.value[0][1].value[0][1], tmp_path) == [{"prompt": "016"}, {"prompt": "0x10"}]


def test_columns_of_a_csv_are_arguments(tmp_path: Path) -> None:
    path = tmp_path / "p.CSV"
    path.write_text('id,prompt\n1,"a cat, sitting"\n2,b\n3,\n')
    assert prompts.read(path) == [{"id": "1", "prompt": "a cat, sitting"}, {"id": "2", "prompt": "b"}]


def test_images_are_read_from_beside_the_file(tmp_path: Path) -> None:
    Image.new("RGBA", (4, 2), "red").save(tmp_path / "cat.png")
    (tmp_path / "p.yaml").write_text("- {prompt: x, image: [cat.png, cat.PNG.txt]}\n")
    image, text = prompts.read(tmp_path / "p.yaml")[0]["image"]
    assert image.size == (4, 2) and image.mode == "RGB" and text == "cat.PNG.txt"
    (tmp_path / "p.yaml").write_text("- {prompt: x, image: dog.png}\n")
    with pytest.raises(InputError, match="dog.png cannot be read"):
        prompts.read(tmp_path / "p.yaml")


def test_encoded_prompts_are_rows(tmp_path: Path) -> None:
    embeds, pooled = torch.randn(3, 5, 4), torch.randn(3, 2)
    save_file({"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}, tmp_path / "p.safetensors")
    rows = prompts.read(tmp_path / "p.safetensors")
    assert len(rows) == 3
    assert torch.equal(rows[1]["prompt_embeds"], embeds[1:2])
    assert torch.equal(rows[2]["pooled_prompt_embeds"], pooled[2:3])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.txt", b"\xff\xfe\x00", r"not UTF-8 text \(byte 0\)"),
        ("p.txt", b" \n\n", "holds no prompt"),
        ("p.csv", b"a cat, sitting\nb, c\n", r"no column 'prompt' \(its first line is 'a cat, sitting'\)"),
        ("p.csv", b"prompt\na cat, sitting\n", "row 2 does not have 1 columns"),
        ("p.csv", b'prompt\n"a\n', "this is not CSV"),
        ("p.pdf", b"%PDF", "'.pdf' is not known"),
        ("p.yaml", b"prompt: x\n", "p.yaml:1: prompts are a list"),
        ("p.yaml", b"- x\n- [y]\n", "p.yaml:2: a prompt is a text"),
        ("p.yaml", b"- &b {prompt: *b}\n", "p.yaml is not valid YAML"),
        ("p.yaml", b"- [", "not valid YAML"),
        ("p.safetensors", b"12345678", "cannot be read"),
    ],
)
def test_bad_files_are_one_clear_error(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        prompts.read(tmp_path / name)


def test_missing_files_and_uneven_rows(tmp_path: Path) -> None:
    for name in ("p.txt", "p.safetensors", "p.csv"):
        with pytest.raises(InputError, match=name):
            prompts.read(tmp_path / name)
    save_file({"a": torch.zeros(2, 1), "b": torch.zeros(3, 1)}, tmp_path / "p.safetensors")
    with pytest.raises(InputError, match="do not have the same number of rows"):
        prompts.read(tmp_path / "p.safetensors")


def test_embeddings_in_float8_are_refused(tmp_path: Path) -> None:
    save_file({"prompt_embeds": torch.zeros(2, 4, 8).to(torch.float8_e4m3fn)}, tmp_path / "p.safetensors")
    with pytest.raises(InputError, match="'prompt_embeds' is float8_e4m3fn, .* Write it in the dtype"):
        prompts.read(tmp_path / "p.safetensors")


def test_prompts_are_held_out_by_their_content() -> None:
    rows = [{"prompt": f"prompt {number % 80}"} for number in range(160)]  # each of them twice
    split = prompts.split(rows)
    assert not split.shared and len(split.held_out) == 2 * 10
    texts = [{rows[number]["prompt"] for number in side} for side in (split.calibration, split.held_out)]
    assert not texts[0] & texts[1] and len(texts[1]) == 10
    assert sorted(split.calibration + split.held_out) == list(range(160))
    assert prompts.split(rows) == split and prompts.split(rows, 10) == split
    assert len(prompts.split([{"prompt": str(n)} for n in range(5000)]).held_out) == prompts.MOST_HELD_OUT


def test_few_prompts_are_shared_unless_it_is_asked_for() -> None:
    rows = [{"prompt_embeds": torch.full((1, 2, 3), float(n))} for n in range(10)]
    split = prompts.split(rows)
    assert split.shared and split.held_out == split.calibration == tuple(range(10))
    assert len(prompts.split(rows, 3).held_out) == 3
    assert len(prompts.split(rows, 100).calibration) == 1, "one stays"
    assert prompts.split(rows[:1], 1).shared
