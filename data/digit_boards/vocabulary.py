"""Writes the tokenizer of the digit boards: one word, one id, exactly 64 ids.

    python -m data.digit_boards.vocabulary configs/boards_base/tokenizer.json

The file is committed: a trained model's embedding rows mean these ids. New words replace spare tokens and never shift
an id that exists.
"""

from __future__ import annotations

import sys
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers

from .boards import COLOUR_NAMES

SIZE = 64
SPECIAL = ("<pad>", "<bos>", "<image>", "<user>", "<assistant>", "<end>", "<unk>")
WORDS = (
    *map(str, range(10)),
    *COLOUR_NAMES,
    *("colour", "of", "count", "left", "right", "above", "below", "read", "word", "at", ":", "or", "any"),
    *("list", "board", "?", "yes", "no"),
)


def tokenizer() -> Tokenizer:
    """Whitespace-separated words out of a closed vocabulary."""
    named = (*SPECIAL, *WORDS)
    tokens = (*named, *(f"<spare{i}>" for i in range(SIZE - len(named))))
    made = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.add_special_tokens([token for token in SPECIAL if token != "<unk>"])
    return made


if __name__ == "__main__":
    path = Path(sys.argv[1])
    path.parent.mkdir(parents=True, exist_ok=True)
    tokenizer().save(str(path))
    print(f"{path}: {tokenizer().get_vocab_size()} tokens")
