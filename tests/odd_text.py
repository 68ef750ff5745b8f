"""Texts that tokenizers get wrong."""

from __future__ import annotations

import random

ODD = [
    "",
    " ",
    "hello world",
    " one space first",
    "  two spaces first",
    "trailing  ",
    "a\n\n\nb\t\tc \n d",
    "\r\nwindows\r\n\r\nlines\r",
    "👨‍👩‍👧‍👦 family 🏳️‍🌈 👍🏽",
    "e\u0301 and é, n\u0303 and ñ, \u0301alone, a\u0308\u0323\u0331",
    "日本語のテキスト 中文字符 한국어 ไทย हिन्दी",
    "עברית \u202eright to left\u202c عربى",
    "def f(x):\n    return x ** 2  # square\n\n\tif x: pass\n",
    '{"a": [1, 2.50, -3e10], "b": null}\n',
    "<|im_start|>user\n<|im_end|><|endoftext|>",
    "<s>[INST] hi [/INST]</s><unk><pad>",
    "<bos><eos><start_of_turn>user<end_of_turn>",
    "<0x0A><0xFF> is not a byte",
    "NUL \x00 and \x01\x1f\x7f\x80\x9f",
    "12345 67 890 1,234.56 ١٢٣ Ⅷ ½",
    "I'm don't WE'LL they'Re 'tis ''s",
    "▁lower▁one▁ eighth▁▁block",
    "Ġbyte Ċlevel ĉletters",
    "\ufeffBOM, \ufffd, \u200b zero width, \ufdd0 nonchar, \U0010ffff last",
    "ﬃ ﬁ Å Å ① ｆｕｌｌ",
    "x" * 3000,
    "!?" * 500,
    " " * 30,
    "\n" * 70,
    "\t" * 40,
    "the quick brown fox " * 200,
]


def random_texts(count: int, seed: int) -> list[str]:
    """Texts in which the troublesome follows upon the troublesome."""
    rng = random.Random(seed)
    parts = [
        " ",
        "  ",
        "a",
        "B",
        "é",
        "e\u0301",
        "日",
        "👩",
        "\u200d",
        "1",
        "23",
        "\n",
        "\r\n",
        "<",
        ">",
        "s",
        "|",
        "'s",
        "_",
        "\t",
    ]
    return ["".join(_part(rng, parts) for _ in range(rng.randrange(1, 60))) for _ in range(count)]


def _part(rng: random.Random, parts: list[str]) -> str:
    return chr(rng.randrange(0x20, 0x3000)) if rng.random() < 0.1 else rng.choice(parts)
