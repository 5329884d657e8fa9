# SPDX-License-Identifier: Apache-2.0
"""``python -m lynx_compile.tools.write_prompts``: make ``data/prompts.txt``, the prompts for a recipe that names none.

Calibration wants breadth: subjects, styles, lights, text to be drawn, counts, colours and places, in sentences of two
words to sixty. Every prompt is put together from the words below, by a fixed seed; none is anybody's caption.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from lynx_compile.files.atomic import save_text
from lynx_compile.recipe import DEFAULT_PROMPTS

COUNT = 2048

PEOPLE = (
    "an old fisherman", "a young violinist", "a surgeon in green scrubs", "two children with paper boats",
    "a welder behind a dark visor", "a grandmother kneading dough", "a ballet dancer in mid-air", "a beekeeper",
    "a chess player with rolled-up sleeves", "a mountain guide", "a street musician with an accordion",
    "a firefighter covered in soot", "a librarian on a ladder", "a tailor with pins between the lips",
    "a cyclist in a yellow raincoat", "a crowd waiting for a tram", "a bride holding wild flowers",
    "an astronaut without a helmet", "a watchmaker with a loupe", "a goalkeeper diving for the ball",
    "a farmer leaning on a fence", "a newborn asleep on a shoulder", "a pilot in a leather jacket",
    "a girl with freckles and braided hair", "a man with a long white beard", "a pottery teacher at her wheel",
    "a nurse at the end of a night shift", "three friends on a park bench", "a teenager with headphones",
    "a conductor with raised baton",
)  # fmt: skip
ANIMALS = (
    "a lynx in deep snow", "a red fox", "a sleeping tabby cat", "a border collie leaping", "a barn owl",
    "a herd of elephants", "an octopus among corals", "a hummingbird at a flower", "a horse shaking its mane",
    "a tree frog on a wet leaf", "a swarm of starlings", "a snow leopard on a ledge", "a hermit crab", "a peacock",
    "a whale breaching", "a hedgehog in autumn leaves", "an iguana basking on a rock", "a rooster at sunrise",
    "a bee covered in pollen", "a school of silver fish", "a giraffe drinking", "a black swan", "a mole in a garden",
    "a panda eating bamboo", "a jellyfish glowing in the dark", "a donkey with a straw hat", "an emperor penguin",
    "a chameleon on a branch", "a pair of otters holding hands", "a stag in morning mist",
)  # fmt: skip
THINGS = (
    "a brass telescope", "a chipped teapot", "a stack of old atlases", "a pair of muddy boots", "a glass chess set",
    "a bicycle without a saddle", "a music box", "an hourglass half run out", "a typewriter with a blank page",
    "a bowl of cherries", "a loaf of dark bread", "a cup of espresso", "a plate of sushi", "a birthday cake",
    "a jar of pickled lemons", "a bunch of keys", "a leather suitcase with stickers", "a paper lantern",
    "a circuit board", "a ceramic vase with a crack", "a pocket knife", "a broken umbrella", "a toy robot",
    "a silver locket", "a violin without strings", "a cactus in a tin can", "a ship in a bottle",
    "a blue perfume bottle", "a wooden rocking horse", "a bowl of steaming ramen", "a wristwatch, its lid open",
    "a globe with a dent", "a running shoe", "a folded origami crane", "a candle burnt down to a stump",
)  # fmt: skip
MACHINES = (
    "a steam locomotive", "a vintage sports car", "a cargo ship in a lock", "a biplane above the clouds",
    "a rusty tractor", "a scooter", "a satellite with open panels", "a submarine at the pier",
    "a fire engine", "a hot-air balloon", "a tram on wet rails", "a robot arm on an assembly line", "a harvester",
    "a lunar rover", "a motorcycle with a sidecar", "a rescue helicopter", "a sailing boat heeling over",
    "a cable car in fog", "a container crane", "a wind turbine under repair",
)  # fmt: skip
PLACES = (
    "a narrow alley in Lisbon", "a fjord with a single red cabin", "a salt flat after rain", "a rainforest canopy",
    "a medieval market square", "a brutalist housing block", "a Japanese garden in winter", "a desert with tall dunes",
    "a lighthouse on a cliff", "an abandoned swimming pool", "a vineyard in October", "a glacier cave",
    "a subway station at midnight", "a village of stilt houses", "a terraced rice field", "a Gothic cathedral",
    "a greenhouse full of orchids", "a container port", "a mountain lake at dawn", "a ruined castle on a hill",
    "a city of glass towers", "a suburban street with sprinklers", "a birch forest", "a volcano at night",
    "a canyon with a river far below", "an underground archive", "an orbital station above the Pacific",
    "a savanna with one acacia", "a frozen waterfall", "a library with spiral stairs", "a bazaar of spices",
    "a pier in heavy fog", "a lavender field", "a tiny attic room", "an empty theatre", "a bakery before opening",
)  # fmt: skip
IDEAS = (
    "the sound of rain as a landscape", "time running backwards", "a city that grows like a plant",
    "the last page of a dream", "gravity taking a day off", "memory as a house with many doors", "silence after snow",
    "a map of a country that never was", "music turning into birds", "a clockwork sun", "an argument between colours",
    "the weather inside a bottle", "a staircase to the moon", "homesickness", "a forest of umbrellas",
    "an island carried by a turtle", "a tea party under water", "the invention of fire, told as a comic",
    "a castle built of books", "a train made of clouds",
)  # fmt: skip
DOING = (
    "waiting for the rain to stop", "seen from far above", "half hidden behind a curtain", "reflected in a puddle",
    "running out of the picture", "lit by a single bulb", "casting a long shadow", "in the middle of an empty square",
    "surrounded by paper lanterns", "behind a rain-streaked window", "on a rough oak table", "under a bridge",
    "at the edge of a cliff", "in front of a wall of faded posters", "floating in zero gravity", "covered in snow",
    "between tall sunflowers", "at the bottom of the sea", "on a rooftop at dusk", "wrapped in morning fog",
    "inside a glass dome", "seen through a keyhole", "in a field of poppies", "on a carousel", "beside a campfire",
)  # fmt: skip
STYLES = (
    "oil painting with thick strokes", "watercolour on rough paper", "35 mm film photograph", "pencil sketch",
    "isometric 3D render", "flat vector illustration", "woodcut print", "stained glass window", "pixel art",
    "charcoal drawing", "studio product photograph", "comic panel with heavy ink", "low-poly model", "embroidery",
    "macro photograph", "long-exposure photograph", "children's book illustration", "architectural blueprint",
    "ukiyo-e print", "art deco poster", "claymation still", "infrared photograph", "impressionist painting",
    "paper cut-out collage", "cyanotype", "fresco with cracks", "cinematic still, anamorphic lens",
    "technical cross-section drawing", "polaroid with faded colours", "baroque still life", "marble sculpture",
    "neon sign", "risograph print in two colours", "drone photograph", "scientific illustration", "graffiti mural",
)  # fmt: skip
LIGHTS = (
    "soft morning light", "harsh noon sun", "golden hour", "overcast sky", "candlelight", "blue hour", "moonlight",
    "neon light from the left", "backlit, with lens flare", "light through blinds", "a storm coming up",
    "studio light with a grey backdrop", "aurora overhead", "underwater caustics", "flickering torchlight",
    "headlights in the rain", "diffuse light, no shadows", "low key, almost black", "high key, almost white",
)  # fmt: skip
VIEWS = (
    "close-up", "wide angle", "from below", "bird's-eye view", "shallow depth of field", "symmetrical composition",
    "over the shoulder", "centred, with much empty space", "fisheye", "telephoto, compressed", "Dutch angle",
    "in profile", "filling the frame", "split in two halves", "as a panorama",
)  # fmt: skip
MOODS = (
    "calm", "melancholic", "cheerful", "eerie", "solemn", "chaotic", "tender", "lonely", "majestic", "playful",
    "tense", "nostalgic", "dreamlike", "austere",
)  # fmt: skip
COLOURS = (
    "crimson", "teal", "ochre", "ivory", "cobalt blue", "olive green", "magenta", "charcoal grey", "copper",
    "pale pink", "lemon yellow", "turquoise", "burgundy", "lilac", "jet black", "sand",
)  # fmt: skip
MATERIALS = ("glass", "velvet", "rusted iron", "porcelain", "birch wood", "wool", "ice", "concrete", "gold leaf",
             "cardboard", "jade", "wet clay", "chrome", "moss", "paper", "sugar")  # fmt: skip
COUNTABLE = ("apples", "lanterns", "cats", "balloons", "books", "candles", "teacups", "kites", "ladders", "stones",
             "umbrellas", "robots", "sunflowers", "bottles", "drums", "doors")  # fmt: skip
NUMBERS = ("two", "three", "four", "five", "six", "seven", "nine", "a dozen")
RELATIONS = ("to the left of", "behind", "on top of", "next to", "underneath", "in front of", "inside", "facing",
             "twice as large as", "between two copies of")  # fmt: skip
SIGNS = ("OPEN LATE", "Fresh Bread", "Platform 9", "LYNX", "No Entry", "Sale 50%", "Welcome home", "3:47 am",
         "Hotel Aurora", "EST. 1924", "mind the gap", "Chapter Seven", "E = mc²", "Bonne nuit", "今日は休み", "出口",
         "Grüße aus Wien", "Спасибо", "#0417", "to be continued")  # fmt: skip
BEARERS = ("a neon sign", "a shop window", "the cover of a book", "a crumpled note", "a road sign", "a T-shirt",
           "a birthday card", "a chalkboard", "a ticket", "the side of a truck", "a tombstone", "a street banner",
           "a pixelated screen", "a jar's label")  # fmt: skip
CHINESE_SUBJECTS = (
    "一只雪地里的猞猁", "一位老木匠", "江南水乡的石桥", "夜晚的霓虹街道", "一碗热气腾腾的面", "山顶的寺庙",
    "穿红裙子的女孩", "一辆旧自行车", "雨后的竹林", "海边的灯塔", "一盏纸灯笼", "未来城市的天际线",
)  # fmt: skip
CHINESE_STYLES = (
    "水墨画",
    "油画",
    "胶片摄影",
    "工笔画",
    "像素风格",
    "电影感光线",
    "剪纸",
    "微距摄影",
    "低多边形",
    "儿童插画",
)
CHINESE_SCENES = (
    "清晨的薄雾中",
    "黄昏",
    "大雪纷飞",
    "烛光下",
    "倒映在水面上",
    "背景是远山",
    "空无一人",
    "从高处俯瞰",
)


def main() -> None:
    save_text(DEFAULT_PROMPTS, "\n".join(default_prompts()) + "\n")


def default_prompts() -> list[str]:
    """``COUNT`` different prompts, always the same; forms take turns, so that any beginning of the list is as broad."""
    random_words = random.Random(0)
    prompts: dict[str, None] = {}
    while len(prompts) < COUNT:
        form = FORMS[len(prompts) % len(FORMS)]
        prompt = form(random_words.choice)
        prompts.setdefault(prompt[0].upper() + prompt[1:] if len(prompts) % 3 else prompt)
    return list(prompts)


Choice = Callable[[tuple[str, ...]], str]


def _subject(choice: Choice) -> str:
    return choice((choice(PEOPLE), choice(ANIMALS), choice(THINGS), choice(MACHINES), choice(PLACES)))


def _short(choice: Choice) -> str:
    return choice((_subject(choice), choice(IDEAS)))


def _style(choice: Choice) -> str:
    return f"{_subject(choice)}, {choice(STYLES)}"


def _scene(choice: Choice) -> str:
    subject = choice((choice(PEOPLE), choice(ANIMALS), choice(THINGS), choice(MACHINES)))
    return f"{subject} {choice(DOING)}, {choice(LIGHTS)}, {choice(VIEWS)}"


def _place(choice: Choice) -> str:
    return f"{choice(STYLES)} of {choice(PLACES)}, {choice(LIGHTS)}, {choice(MOODS)} mood"


def _relation(choice: Choice) -> str:
    first, second = choice((choice(ANIMALS), choice(THINGS))), choice((choice(THINGS), choice(MACHINES)))
    return f"{first} {choice(RELATIONS)} {second}, {choice(STYLES)}"


def _count(choice: Choice) -> str:
    kind = choice(COUNTABLE)
    first, second = f"{choice(NUMBERS)} {choice(COLOURS)}", f"{choice(NUMBERS)} {kind} of {choice(MATERIALS)}"
    return f"{first} {kind} and {second}, {choice(VIEWS)}"


def _sign(choice: Choice) -> str:
    return f'{choice(BEARERS)} that says "{choice(SIGNS)}", {choice(STYLES)}, {choice(LIGHTS)}'


def _idea(choice: Choice) -> str:
    return (
        f"{choice(IDEAS)}, {choice(STYLES)}, mostly {choice(COLOURS)} and {choice(COLOURS)}, {choice(MOODS)}"
    )


def _material(choice: Choice) -> str:
    subject = choice((choice(ANIMALS), choice(THINGS), choice(MACHINES)))
    return f"{subject}, made entirely of {choice(MATERIALS)}, {choice(LIGHTS)}"


def _long(choice: Choice) -> str:
    return (
        f"{choice(STYLES)}: {choice(PEOPLE)} {choice(DOING)}. In the background {choice(PLACES)} in {choice(LIGHTS)};"
        f" in the foreground, {choice(THINGS)} {choice(RELATIONS)} {choice(THINGS)}. The palette is {choice(COLOURS)},"
        f" {choice(COLOURS)} and {choice(COLOURS)}, the mood {choice(MOODS)}, the composition {choice(VIEWS)}."
    )


def _chinese(choice: Choice) -> str:
    return f"{choice(CHINESE_SUBJECTS)}，{choice(CHINESE_SCENES)}，{choice(CHINESE_STYLES)}"


FORMS: tuple[Callable[[Choice], str], ...] = (
    _scene, _style, _long, _place, _sign, _short, _relation, _count, _scene, _idea, _material, _long, _chinese,
)  # fmt: skip

if __name__ == "__main__":
    main()
