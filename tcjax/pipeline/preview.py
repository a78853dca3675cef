"""A page to look at before training: images as the tower sees them beside the composed conversation, supervised tokens
coloured.

What is shown is what `Chat.compose` gives to the loss, id by id, not the text it was made from, and what `images.shown`
gives to the tower. A row that cannot be used is shown with its reason.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path

from PIL import Image

from tcjax.config import Pixels
from tcjax.pipeline import images
from tcjax.pipeline.chat import Chat, Composed
from tcjax.pipeline.conversation import MARK
from tcjax.pipeline.sample import BadSample, BrokenShard, CorruptImage, Record, Records

_STYLE = """
body { font: 15px/1.6 system-ui, sans-serif; margin: 2rem auto; max-width: 60rem; color: #222; }
section { display: flex; gap: 1.5rem; margin-bottom: 2rem; align-items: flex-start; }
figure { flex: none; margin: 0; width: 16rem; } img { width: 100%; image-rendering: pixelated; }
p { overflow-wrap: anywhere; } .text { white-space: pre-wrap; } .refused { color: #b91c1c; }
b { background: #fde68a; font-weight: 600; padding: 0 .15em; } i { color: #888; font-style: normal; }
"""


def preview(
    prepared: Records,
    chat: Chat,
    pixels: Pixels,
    out: Path,
    *,
    num_queries: int,
    text_length: int,
    rows: Sequence[int],
) -> Path:
    """Writes one self-contained HTML file with the records `rows` of the split, and returns its path."""
    sections = [_section(prepared, index, chat, pixels, num_queries, text_length) for index in rows]
    title = html.escape(f"{prepared.name} {prepared.split}")
    page = f"<!doctype html><meta charset=utf-8><title>{title}</title><style>{_STYLE}</style>" + "\n".join(sections)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(page, encoding="utf-8")
    return out


def _section(prepared: Records, index: int, chat: Chat, pixels: Pixels, num_queries: int, text_length: int) -> str:
    try:
        record = prepared[index]
        row = chat.compose(
            record.turns,
            num_queries=num_queries,
            text_length=text_length,
            num_images=len(record.images),
            name=record.image_id,
        )
        pictures = "".join(_picture(record, number, pixels) for number in range(len(record.images)))
    except (BadSample, BrokenShard, CorruptImage, ValueError) as error:
        return f'<section><p class="refused">row {index}: {html.escape(str(error))}</p></section>'
    facts = (
        f"row {index}, {record.image_id}: {len(record.images)} images, {sum(row.supervised)} of {len(row.ids)} tokens "
        f"supervised, {row.dropped} turns dropped"
    )
    return (
        f"<section><figure>{pictures}</figure><div><p><i>{html.escape(facts)}</i></p>"
        f'<p class="text">{_conversation(chat, row)}</p></div></section>'
    )


def _picture(record: Record, number: int, pixels: Pixels) -> str:
    """An <img>: the pixels the tower gets."""
    shown_YX3 = images.shown(record.images[number], pixels, record.image_id)
    png = io.BytesIO()
    Image.fromarray(shown_YX3).save(png, "PNG")
    return (
        f'<img alt="{html.escape(record.image_id)}" src="data:image/png;base64,'
        f'{base64.b64encode(png.getvalue()).decode()}">'
    )


def _conversation(chat: Chat, row: Composed) -> str:
    """Runs of equal kind as HTML: <b> supervised, <i> image positions; a new line after every answer."""
    kinds: Iterable[tuple[int, bool, bool]] = zip(row.ids, row.is_image, row.supervised, strict=True)
    parts = []
    for (is_image, supervised), run in groupby(kinds, key=lambda token: (bool(token[1]), bool(token[2]))):
        ids = [int(token[0]) for token in run]
        if is_image:
            parts.append(f"<i>{html.escape(chat.template.image or MARK)} x {len(ids)}</i>")
            continue
        text = html.escape(chat.tokenizer.decode(ids, skip_special_tokens=False))
        parts.append(f"<b>{text}</b><br>" if supervised else text)
    return " ".join(parts)
