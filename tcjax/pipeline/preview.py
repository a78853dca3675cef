"""A page to look at before training: images beside the rendered conversation, supervised tokens coloured.

What is shown is what `Chat.render` gives to the loss, id by id, not the text it was made from.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

from PIL import Image

from tcjax.config import Pixels
from tcjax.pipeline import images
from tcjax.pipeline.chat import Chat, Rendered
from tcjax.pipeline.conversation import MARK
from tcjax.pipeline.sample import Records

_STYLE = """
body { font: 15px/1.6 system-ui, sans-serif; margin: 2rem auto; max-width: 60rem; color: #222; }
section { display: flex; gap: 1.5rem; margin-bottom: 2rem; align-items: flex-start; }
img { width: 16rem; image-rendering: pixelated; flex: none; }
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
    sections = []
    for index in rows:
        record = prepared[index]
        image_YX3 = images.decode(record.images[0], pixels, record.image_id)
        png = io.BytesIO()
        Image.fromarray(image_YX3).save(png, "PNG")
        rendered = chat.render(record.turns, num_queries=num_queries, text_length=text_length, name=record.image_id)
        sections.append(
            f'<section><img alt="{html.escape(record.image_id)}" src="data:image/png;base64,'
            f'{base64.b64encode(png.getvalue()).decode()}"><div><p><i>{html.escape(record.image_id)}: '
            f"{int(rendered.supervised_S.sum())} of {int(rendered.valid_S.sum())} tokens supervised, "
            f"{rendered.dropped} turns dropped</i></p><p>{_conversation(chat, rendered)}</p></div></section>"
        )
    title = html.escape(f"{prepared.name} {prepared.split}")
    page = f"<!doctype html><meta charset=utf-8><title>{title}</title><style>{_STYLE}</style>" + "\n".join(sections)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(page)
    return out


def _conversation(chat: Chat, rendered: Rendered) -> str:
    """Runs of equal kind as HTML: <b> supervised, <i> image positions; a new line for every user mark."""
    shown = rendered.valid_S
    kinds = zip(rendered.tokens_S[shown], rendered.is_image_S[shown], rendered.supervised_S[shown], strict=True)
    parts = []
    for (is_image, supervised), run in groupby(kinds, key=lambda token: (bool(token[1]), bool(token[2]))):
        ids = [int(token[0]) for token in run]
        if is_image:
            parts.append(f"<i>{html.escape(chat.template.image or MARK)} x {len(ids)}</i>")
            continue
        text = html.escape(chat.tokenizer.decode(ids, skip_special_tokens=False))
        parts.append(f"<b>{text}</b><br>" if supervised else text)
    return " ".join(parts)
