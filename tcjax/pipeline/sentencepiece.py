"""A SentencePiece `tokenizer.model` as a tokenizer of the `tokenizers` library, read without the sentencepiece package.

The file is one protobuf message: pieces with scores and kinds, how they were trained, how text is normalised. Of Llama's kind
are byte-pair models without normalisation; others are refused. Merging takes the pair whose union scores highest, leftmost
first, so merges are all splits of a piece into two pieces, best score first, as in transformers' own conversion.

    legacy       every stretch between special tokens is prefixed with a blank, as sentencepiece does with a text
    not legacy   only the text's beginning is, unless it is blank already (transformers' fast tokenizers)

Unknown characters become their UTF-8 bytes' pieces (<0x0A>) where the model has them.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
BPE = 2  # of TrainerSpec.model_type: 1 unigram, 3 word, 4 char
BLANK = "▁"


class Piece(NamedTuple):
    """One id's text, its score (higher merges first) and its kind (NORMAL, ..., BYTE)."""

    text: str
    score: float
    kind: int


class Model(NamedTuple):
    """What a tokenizer.model says. dummy_prefix, keeps_blanks: text is prefixed with a blank; runs of blanks stay."""

    pieces: list[Piece]
    kind: int
    byte_fallback: bool
    dummy_prefix: bool
    keeps_blanks: bool
    charsmap: bytes


def read(path: Path) -> Model:
    """The parsed file; ValueError if it is not a whole SentencePiece model."""
    try:
        model = _parse(path.read_bytes())
    except (ValueError, TypeError, AttributeError, IndexError, struct.error) as error:  # whatever other bytes look like
        raise ValueError(
            f"{path} is not a whole SentencePiece model ({error}); copy it again from the checkpoint."
        ) from error
    texts = [piece.text for piece in model.pieces]
    if not texts or len(set(texts)) != len(texts) or not any(piece.kind == UNKNOWN for piece in model.pieces):
        raise ValueError(
            f"{path} is not a whole SentencePiece model (it lacks pieces); copy it again from the checkpoint."
        )
    return model


def tokenizer(path: Path, *, legacy: bool = True) -> Tokenizer:
    """The tokenizer of a Llama-like tokenizer.model, without begin mark: only the caller knows whether one is wanted.

    Raises:
        ValueError: the file is damaged, or is not a byte-pair model without normalisation.
    """
    model = read(path)
    others = {
        "is no byte-pair model": model.kind != BPE,
        "normalises characters": bool(model.charsmap),
        "removes repeated blanks": not model.keeps_blanks,
        "adds no blank in front": not model.dummy_prefix,
    }
    if any(others.values()):
        reasons = ", ".join(reason for reason, holds in others.items() if holds)
        raise ValueError(
            f"{path} {reasons}; only Llama's kind of tokenizer.model is converted. Save a tokenizer.json beside it: "
            f"transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(folder)."
        )
    unknown = next(piece.text for piece in model.pieces if piece.kind == UNKNOWN)
    made = Tokenizer(
        models.BPE(
            {piece.text: i for i, piece in enumerate(model.pieces)},
            merges(model.pieces),
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=model.byte_fallback,
        )
    )
    if legacy:
        made.normalizer = normalizers.Sequence([normalizers.Prepend(BLANK), normalizers.Replace(" ", BLANK)])
    else:
        made.pre_tokenizer = pre_tokenizers.Metaspace(replacement=BLANK, prepend_scheme="first", split=False)
    steps = [decoders.Replace(BLANK, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    made.decoder = decoders.Sequence(steps)
    special = [piece.text for piece in model.pieces if piece.kind in (UNKNOWN, CONTROL)]
    made.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in special])
    own = [piece.text for piece in model.pieces if piece.kind == USER_DEFINED]
    made.add_tokens([AddedToken(text, normalized=False, special=False) for text in own])
    return made


def merges(pieces: list[Piece]) -> list[tuple[str, str]]:
    """Every split of a piece into two others, the better scored piece first; of one piece the longer first half first."""
    usable = {piece.text for piece in pieces if piece.kind == NORMAL}
    ranked = []
    for piece in pieces:
        if piece.kind == NORMAL:
            for cut in range(1, len(piece.text)):
                first, second = piece.text[:cut], piece.text[cut:]
                if first in usable and second in usable:
                    ranked.append((-piece.score, -len(first), (first, second)))
    return [pair for _, _, pair in sorted(ranked, key=lambda entry: entry[:2])]


def _parse(message: bytes) -> Model:
    pieces, kind, byte_fallback = [], 1, False
    dummy_prefix, keeps_blanks, charsmap = True, False, b""
    for field, value in _fields(message):
        inner = dict(_fields(value)) if isinstance(value, bytes) and field in (1, 2, 3) else {}
        if field == 1:
            score = struct.unpack("<f", inner.get(2, bytes(4)))[0]
            pieces.append(Piece(inner[1].decode() if 1 in inner else "", score, inner.get(3, NORMAL)))
        elif field == 2:
            kind, byte_fallback = inner.get(3, 1), bool(inner.get(35, 0))
        elif field == 3:
            charsmap, dummy_prefix = inner.get(2, b""), bool(inner.get(3, 1))
            keeps_blanks = not inner.get(4, 1)
    return Model(pieces, kind, byte_fallback, dummy_prefix, keeps_blanks, charsmap)


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """(number, value) of a protobuf message's fields: whole numbers for varints, bytes for everything else."""
    at = 0
    while at < len(message):
        tag, at = _varint(message, at)
        wire, size = tag & 7, {1: 8, 5: 4}.get(tag & 7)
        if wire == 0:
            value, at = _varint(message, at)
            yield tag >> 3, value
            continue
        if wire == 2:
            size, at = _varint(message, at)
        if size is None:
            raise ValueError(f"wire type {wire} at byte {at}")
        if at + size > len(message):
            raise ValueError(f"it ends at byte {len(message)}, {at + size - len(message)} bytes short")
        yield tag >> 3, message[at : at + size]
        at += size


def _varint(message: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
        if shift > 63:
            raise ValueError(f"a number of more than 64 bits at byte {at}")
