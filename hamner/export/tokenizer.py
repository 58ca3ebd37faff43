"""The module makes of a run's tokenizer one that gives the same ids in other programs.

Training leaves out what a `tokenizer.json` may add to a text (a token that begins it, a limit of
its length, padding) and writes the tokens of conversations itself; so their exported definition
does. What still differs, if anything does, is found out on texts that tokenizers differ on.
"""

import contextlib
import json
from collections.abc import Iterable
from itertools import zip_longest

import tokenizers

from hamner.data.chat_template import Message, render, spell
from hamner.data.tokenizer import Tokenizer
from hamner.errors import UserError

HARD_TEXTS = (
    "",
    " ",
    "The cat sat on the mat.",
    " leading and trailing ",
    "two  three   four    spaces, a\ttab,\t\ttwo tabs",
    "lines\nends\n\nof\r\nall\r\n\r\nkinds \n \n\n\n  x\n",
    "I'm you're DON'T we'Ll they'd 'tis rock'n'roll l’été",
    "0 7 42 365 2026 12345 1234567 3.14 1,000,000 1e-10 0x7f ٣٤٥ Ⅷ x² ½",
    "def f(x):\n    return x[1:] != {'a': 1}  # ok?\n\n\n\tfor(;;){i++;}\n",
    "https://example.org/a_b?q=%20&x=1#y me@example.org C:\\dir\\file.txt",
    "?!... --- ((nested)) [[[]]] $$$ 50% #tag @name ~/path <b>bold</b> a/b|c",
    "naïve façade Straße İstanbul ÅNGSTRÖM Ωμέγα Привет שלום مرحبا",
    "你好，世界。日本語のテキスト 한국어 ไทย",
    "ﬁne ｆｕｌｌ ①²™ \u00a0no-break\u3000wide\u2009thin\u200bzero\ufeffmark",
    "\U0001f600 \U0001f469\u200d\U0001f469\u200d\U0001f467 \U0001f1eb\U0001f1f7 \u2764\ufe0f",
    "\x00 \x1b[0m \x7f \x85 \u2028 \ufffd \ue000 \U0010ffff",
    "SHOUTING camelCase snake_case XMLHttpRequest2 aAaAbB",
    "supercalifragilisticexpialidocious " + "a" * 150,
    "long " * 1_100 + "\nand its end",
)
"""What tokenizers are known to differ on: spaces, line ends, apostrophes, numbers, scripts, signs
that look alike, control characters, and lengths at which texts are cut."""

MARKED_TEXTS = ("e\u0301tude a\u030angstro\u0308m", "नमस्ते दुनिया", "กำลังทดสอบ", "שָׁלוֹם عَرَبِيّ")
"""The same with combining marks."""

CONVERSATION = (
    Message("system", "Be terse."),
    Message("user", "What is 2 + 2?\n\nSay why — naïvely."),
    Message("assistant", "4.\n\nBecause 你好  I counted."),
    Message("user", "1"),
    Message("assistant", "(No.)"),
    Message("user", "'s that so?"),
    Message("assistant", "yes"),
)
OWN_TOKENS = 2_000
"""of a tokenizer's own tokens, how many are compared too"""


def exported_definition(tokenizer: Tokenizer) -> dict:
    """The definition gives in other programs what training has: a text's own tokens.

    Reserved tokens become special ones there, found exactly as they are spelled.
    """
    definition = tokenizer.definition
    added = {token["content"]: token for token in definition.get("added_tokens") or []}
    exact = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    for name in tokenizer.reserved:
        token = added.get(name, {"id": tokenizer.special_id(name), "content": name})
        added[name] = token | exact | {"special": True}
    changes = {
        "truncation": None,
        "padding": None,
        "added_tokens": sorted(added.values(), key=lambda token: token["id"]),
        "model": {k: None if k == "dropout" else v for k, v in definition["model"].items()},
    }
    # The one kind that adds no tokens.
    if (definition.get("post_processor") or {}).get("type") != "ByteLevel":
        changes["post_processor"] = None
    return definition | changes


def first_difference(
    tokenizer: Tokenizer, backend: tokenizers.Tokenizer, texts: Iterable[str], *, is_chat: bool
) -> str | None:
    """The function compares the ids that another program gives with those of training.

    Args:
        tokenizer: of training.
        backend: as the other program uses it.
        texts: to compare on, where training could encode them.
        is_chat: whether conversations must have the same ids too.

    Returns:
        What text differs and how, for people; None if none does.
    """
    expected = {}
    for text in texts:
        # Of a vocabulary of digits, say, other text cannot be made.
        with contextlib.suppress(UserError):
            expected[text] = tokenizer.encode(text)
    if is_chat:
        with contextlib.suppress(UserError):
            text = spell(CONVERSATION, text_tags=tokenizer.text_tags)
            expected[text] = render(CONVERSATION, tokenizer).ids
    for text, ours in expected.items():
        theirs = backend.encode(text).ids
        if theirs == ours:
            continue
        pairs = enumerate(zip_longest(theirs, ours))
        start = next(position for position, (their, our) in pairs if their != our)
        tokens = [[*map(tokenizer.text_of, ids[start : start + 3])] for ids in (theirs, ours)]
        begins = f"{text[:60]!r}{' ...' if text[60:] else ''}"
        return f"{begins} has {tokens[0]} where training has {tokens[1]}"
    return None


def require_same_ids(tokenizer: Tokenizer, definition: dict, *, is_chat: bool) -> None:
    """The function checks that `definition` gives the ids of training in other programs.

    Raises:
        UserError: the ids are other ones.
    """
    backend = tokenizers.Tokenizer.from_str(json.dumps(definition))
    texts = (*HARD_TEXTS, *MARKED_TEXTS, _own_text(tokenizer))
    if found := first_difference(tokenizer, backend, texts, is_chat=is_chat):
        raise UserError(
            f"--to hf: with the tokenizer {tokenizer.name} other programs would give the model "
            f"other tokens than training did: {found}; use hamner.chat, or train with another"
        )


def _own_text(tokenizer: Tokenizer) -> str:
    """The text has what a tokenizer's first tokens spell; empty if that happens to be reserved."""
    first = range(min(tokenizer.vocab_size, OWN_TOKENS))
    text = tokenizer.decode([i for i in first if tokenizer.text_of(i) not in tokenizer.reserved])
    return "" if any(name in text for name in tokenizer.reserved) else text
