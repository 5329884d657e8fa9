# SPDX-License-Identifier: Apache-2.0
"""The prompts to calibrate and to judge with: names of emoji, and emoji that nobody drew; no prompt is in both lists.

``python -m calib.emoji_flux.prompts texts emoji.safetensors`` writes ``prompts.txt`` and ``held_out.txt``,
``python -m calib.emoji_flux.prompts encode`` with the trained words ``conditioning.safetensors`` and
``held_out.safetensors`` beside them, under the names of ``FluxPipeline``'s arguments. Prompts to calibrate beyond those
of the list, which a longer tuning can use, name two emoji of it each.
"""

from __future__ import annotations

import argparse
import math
import random
from collections.abc import Container
from pathlib import Path

import torch
from safetensors.torch import save_file

from calib.emoji_flux import data, sampler, text

CALIBRATION, HELD_OUT = sampler.HERE / "prompts.txt", sampler.HERE / "held_out.txt"
CONDITIONING = sampler.HERE / "conditioning.safetensors"
COUNTS = {CALIBRATION: 2048, HELD_OUT: 256}
INVENTED = 0.25  # of the prompts name two emoji at once
SHORT = 3  # words of a name that another may be joined to
SEED = 0
PIPELINE_NAMES = {"encoder_hidden_states": "prompt_embeds", "pooled_projections": "pooled_prompt_embeds"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("texts").add_argument("data", type=Path, help="what calib.emoji_flux.data wrote")
    encode = commands.add_parser("encode")
    encode.add_argument("--model", type=Path, default=sampler.MODEL)
    encode.add_argument("--out", type=Path, default=sampler.HERE, help="folder for the rows")
    encode.add_argument("--prompts", type=int, default=COUNTS[CALIBRATION], help="to calibrate with")
    given = parser.parse_args()
    if given.command == "texts":
        for path, prompts in choose(data.load(given.data)).items():
            path.write_text("\n".join(prompts) + "\n")
        return
    table = text.WordTable.load(given.model / sampler.WORDS)
    held_out = read(HELD_OUT)
    for path, prompts in {
        CALIBRATION: extended(read(CALIBRATION), held_out, given.prompts),
        HELD_OUT: held_out,
    }.items():
        save_file(rows(table, prompts), given.out / output(path).name)


def choose(emoji: data.Emoji) -> dict[Path, list[str]]:
    """Distinct prompts for both lists, drawn by ``SEED``."""
    chance = random.Random(SEED)
    names = sorted({" ".join(data.words(some[0])[: text.TOKENS]) for some in emoji.texts})
    short = sorted({name.split(maxsplit=1)[1] for name in names if 2 <= len(name.split()) <= SHORT + 1})
    total = sum(COUNTS.values())
    invented = _pairs(short, math.ceil(INVENTED * total), names, chance)
    prompts = [*invented, *chance.sample(names, total - len(invented))]
    chance.shuffle(prompts)
    first = COUNTS[CALIBRATION]
    return {CALIBRATION: prompts[:first], HELD_OUT: prompts[first:]}


def extended(prompts: list[str], held_out: list[str], count: int) -> list[str]:
    """The first of ``prompts``, or all and pairs of the emoji that they name; ``count`` in all, none ``held_out``."""
    names = {prompt.split(maxsplit=1)[1] for prompt in prompts if " with " not in prompt}
    short = sorted(name for name in names if len(name.split()) <= SHORT)
    more = max(count - len(prompts), 0)
    return [*prompts[:count], *_pairs(short, more, {*prompts, *held_out}, random.Random(SEED))]


def _pairs(names: list[str], count: int, taken: Container[str], chance: random.Random) -> list[str]:
    """So many distinct prompts that are not ``taken``."""
    found: dict[str, None] = {}
    while len(found) < count:
        first, second = chance.sample(names, 2)
        prompt = f"{chance.choice(data.STYLES)} {first} with {second}"
        if prompt not in taken:
            found[prompt] = None
    return list(found)


def read(path: Path) -> list[str]:
    """A prompt a line."""
    return path.read_text().splitlines()


def rows(table: text.WordTable, prompts: list[str]) -> dict[str, torch.Tensor]:
    """fp16, a row per prompt of every argument; those without words, for guidance, are zero."""
    found = table.encode(prompts)
    positive = {PIPELINE_NAMES[name]: value.half().contiguous() for name, value in found.items()}
    return positive | {f"negative_{name}": torch.zeros_like(value) for name, value in positive.items()}


def output(path: Path) -> Path:
    """Where the rows of a list of prompts are."""
    return CONDITIONING if path == CALIBRATION else path.with_suffix(".safetensors")


if __name__ == "__main__":
    main()
