"""The lint shows what fine-tuning is about to learn from, before it starts."""

from collections.abc import Sequence
from itertools import groupby

from rich.console import Console
from rich.text import Text

from hamner.cli import for_terminal
from hamner.data.conversations.examples import ConversationSource, Example, UnusableRows
from hamner.data.tokenizer import Tokenizer

NAMED = 5
"""dropped or cut conversations named in full; the rest are counted"""
PREVIEW_TOKENS = 400
LEARNED_STYLE, MASKED_STYLE = "bold green", "dim"


def show(sources: Sequence[ConversationSource], tokenizer: Tokenizer, console: Console) -> None:
    """`show` prints counts of every source, what was dropped or cut, and an example's mask."""
    for source in sources:
        for line in describe(source):
            console.print(Text(for_terminal(line)), soft_wrap=True)
    example = next((example for source in sources for example in source.train), None)
    if example is not None:
        console.print(preview(example, tokenizer, coloured=console.color_system is not None))


def show_unusable(error: UnusableRows, console: Console) -> None:
    """`show_unusable` prints the kinds of rows that cannot be used where the sentence of the error
    is too short for all."""
    if error.is_shortened:
        for source in error.sources:
            console.print(Text(f"{source.name}: cannot be used:"), soft_wrap=True)
            for text in source.describe_unusable():
                console.print(Text(for_terminal(f"  {text}")), soft_wrap=True)


def describe(source: ConversationSource) -> list[str]:
    """The lines say a source's size, then one each what kinds of odd conversations it has."""
    tokens = sum(len(example.ids) for example in source.train)
    learned = sum(int(example.learned.sum()) for example in source.train)
    times = "" if source.weight == 1 else f", {source.weight:g} times an epoch"
    lines = [
        f"{source.name}: {len(source.train):,} conversations to train on{times}, "
        f"{len(source.validation):,} held out; {tokens:,} tokens, "
        f"{learned / max(1, tokens):.1%} of them supervised"
    ]
    lines += [f"  cannot be used and left out: {text}" for text in source.describe_unusable()]
    lost = f"({source.tokens_cut:,} tokens lost)"
    for what, origins in {
        "dropped, no answer to learn": source.nothing_learned,
        "dropped, the first answer ends beyond --seq-len": source.too_long,
        f"cut after the last answer within --seq-len {lost}": source.cut,
    }.items():
        if origins:
            rest = len(origins) - NAMED
            more = f" and {rest:,} more" if rest > 0 else ""
            lines.append(f"  {len(origins):,} {what}: {'; '.join(origins[:NAMED])}{more}")
    if source.duplicates:
        lines.append(f"  {source.duplicates:,} repeat an earlier conversation and are kept")
    return lines


def preview(example: Example, tokenizer: Tokenizer, *, coloured: bool) -> Text:
    """The preview is the beginning of an example, what is learned in colour, or in brackets."""
    opening, closing = ("", "") if coloured else ("[[", "]]")
    text = Text("what is learned of one conversation (the rest is masked):\n")
    tokens = list(zip(example.ids.tolist(), example.learned.tolist(), strict=True))
    for learned, group in groupby(tokens[:PREVIEW_TOKENS], key=lambda token: token[1]):
        span = for_terminal(tokenizer.decode([token for token, _ in group]))
        if learned:
            text.append(f"{opening}{span}{closing}", LEARNED_STYLE)
        else:
            text.append(span, MASKED_STYLE)
    if len(tokens) > PREVIEW_TOKENS:
        text.append(f"\n... {len(tokens) - PREVIEW_TOKENS:,} tokens more")
    return text
