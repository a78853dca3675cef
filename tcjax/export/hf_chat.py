"""The conversation's part of a Hugging Face directory: tokenizer files, chat_template.jinja, and whether they say the same.

    tokenizer.json            the run's own; one made from a tokenizer.model is written as such
    tokenizer_config.json     its pad, begin and end marks, and the image token
    chat_template.jinja       the run's template, one conversation in, the text of `Chat.ask` out

transformers tokenises a prompt in one pass, images included, and lets the tokenizer put its own begin mark in front. A
template whose ids come out differently that way is refused, by name, before anything is published.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tcjax.config import Run, Template
from tcjax.export.folder import to_json
from tcjax.pipeline.chat import Chat, open_chat
from tcjax.pipeline.conversation import pieces
from tcjax.pipeline.sample import Turn


def chat_of(run: Run, root: Path) -> Chat:
    """The chat of the run; ValueError if it has no tokenizer."""
    return open_chat(root / run.data.tokenizer, run.data.template)


def why_not(run: Run, *, told: bool = False) -> str:
    """Why no processor of transformers writes this run's prompts; "" if one may. told: the compressor finds the question."""
    template = run.data.template
    if not template.image:
        return (
            "Template.image is empty, and transformers finds images by their token; name one that text never holds, for "
            'instance dataclasses.replace(template, image="<unk>", pad="</s>")'
        )
    if template.place not in ("begin", "front"):
        return f"no chat_template is written for Template.place={template.place!r}, only for 'begin' and 'front'"
    if told and template.passes != "span":
        return (
            f"the compressor is told the question, which is found in a prompt only where it is tokenised alone, not with "
            f"Template.passes={template.passes!r}"
        )
    return ""


def token_ids(chat: Chat) -> dict[str, Any]:
    """pad_token_id, bos_token_id, eos_token_id as configs call them; several ends are a list."""
    ends = list(chat.stop_ids or chat.end_ids[-1:])
    found = {"pad_token_id": chat.pad_id, "eos_token_id": ends if len(ends) > 1 else ends[0]}
    begin = chat.tokenizer.token_to_id(chat.template.begin) if chat.template.begin else None
    return found if begin is None else {"bos_token_id": begin, **found}


def prompt(chat: Chat, question: str) -> str:
    """The text of `Chat.ask` with one image token, for a tool that lets the tokenizer put its begin mark in front."""
    text = chat.prompt_text(question)
    return text.removeprefix(chat.template.begin) if puts_begin(chat) else text


def puts_begin(chat: Chat) -> bool:
    """Whether the tokenizer itself puts the template's begin mark in front of a text."""
    return bool(chat.template.begin) and _own_begin(chat) == chat.encode(chat.template.begin)


def check(chat: Chat) -> None:
    """ValueError if one pass over the text of a conversation of two turns gives other ids than training did."""
    template = chat.template
    if chat.image_id == chat.pad_id:
        raise ValueError(
            f"Template.image and Template.pad are both id {chat.pad_id}: padding would be taken for images. Name another "
            f"pad, for instance dataclasses.replace(template, pad={template.stop or template.end!r})."
        )
    text = words(chat, 3)
    turns = [Turn(text, text)] * (2 if template.question else 1)
    trained = chat.compose(turns, num_queries=2, text_length=10**6).ids
    written = "".join(p.text * (2 if p.image else 1) for p in pieces(template, turns, 1))
    found = chat.tokenizer.encode(written if puts_begin(chat) else template.begin + written).ids
    if found != trained:
        raise ValueError(
            f"transformers would tokenise a conversation of this template to {found}, training gave {trained}: it "
            f"reads a text in one pass, begin mark {template.begin!r} and image token {template.image!r} included, not "
            f"with Template.passes={template.passes!r}. Nothing was exported; the artifact holds the compressor without "
            f"a chat."
        )


def write(building: Path, run: Run, chat: Chat, root: Path) -> None:
    """Tokenizer and template."""
    marks, path = chat.template, root / run.data.tokenizer
    content = path.read_bytes() if path.suffix == ".json" else chat.tokenizer.to_str(pretty=True).encode()
    (building / "tokenizer.json").write_bytes(content)
    ends = chat.stop_ids or chat.end_ids[-1:]
    special = {"pad_token": chat.tokenizer.id_to_token(chat.pad_id), "eos_token": chat.tokenizer.id_to_token(ends[0])}
    special |= {"bos_token": marks.begin} if marks.begin else {}
    tokenizer = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": 10**9,
        "clean_up_tokenization_spaces": False,
        "padding_side": "left",
        **special,
        "extra_special_tokens": {"image_token": marks.image},
    }
    (building / "tokenizer_config.json").write_text(to_json(tokenizer))
    (building / "chat_template.jinja").write_text(jinja(marks, begin=not puts_begin(chat)))


def jinja(marks: Template, *, begin: bool = True) -> str:
    """One conversation as `conversation.pieces` writes it, its images in front. begin: with the begin mark."""
    image = marks.image_before + marks.image + marks.image_after
    gap = f"{{{{ {_quoted(marks.image_gap)} if text else {_quoted(marks.image_gap.rstrip())} }}}}"
    images = "message['content'] | selectattr('type', 'equalto', 'image') | list | length"
    in_front = f"{{% for i in range(images) %}}{_say(image)}{gap}{{% endfor %}}" if marks.place == "front" else ""
    shown = f"{{% if message['content'] is not string %}}{{% for i in range({images}) %}}{_say(image)}{{% set seen.any = 1 %}}"
    shown += "{% endfor %}{% endif %}"
    trimmed = "text | trim" if marks.strip else "(text | trim) if images else text"
    return "".join(
        (
            _say(marks.begin) if begin else "",
            "{% set seen = namespace(any=0) %}",
            f"{{% for message in messages %}}{shown}{{% endfor %}}" if marks.place == "begin" else "",
            f"{{% if seen.any %}}{_say(marks.image_gap)}{{% endif %}}" if marks.place == "begin" else "",
            _say(marks.system),
            "{% for message in messages %}",
            "{% if message['content'] is string %}{% set text = message['content'] %}{% set images = 0 %}",
            "{% else %}{% set text = message['content'] | selectattr('type', 'equalto', 'text') | map(attribute='text') ",
            f"| join(' ') %}}{{% set images = {images} %}}{{% endif %}}{{% set text = {trimmed} %}}",
            "{% if message['role'] == 'user' %}",
            f"{{% if not loop.first %}}{_say(marks.again)}{{% endif %}}" if marks.again else "",
            _say(marks.user),
            f"{{% if loop.first %}}{_say(marks.first)}{{% endif %}}" if marks.first else "",
            in_front,
            "{{ text }}" if marks.question else "",
            _say(marks.close),
            f"{{% elif message['role'] == 'assistant' %}}{_say(marks.assistant + marks.lead)}{{{{ text }}}}{_say(marks.end)}",
            "{% else %}{{ raise_exception('this model was trained with one system text; leave the system message out') }}",
            "{% endif %}{% endfor %}",
            f"{{% if add_generation_prompt %}}{_say(marks.assistant)}{{% endif %}}",
        )
    )


def words(chat: Chat, number: int) -> str:
    """A question of a few pieces of this vocabulary, one token each; any text will do that the tokenizer reads as itself."""
    special = set(chat.render_question("", num_queries=1)) | {chat.pad_id, *chat.end_ids}
    found = []
    for token in range(chat.tokenizer.get_vocab_size()):
        text = chat.tokenizer.decode([token], skip_special_tokens=True).strip()
        if token not in special and text.isalnum() and not chat.unknown_words(text):
            found.append(text)
        if len(found) == number:
            break
    return " ".join(found)


def _own_begin(chat: Chat) -> tuple[int, ...]:
    """The ids that the tokenizer puts in front of any text by itself."""
    with_marks = chat.tokenizer.encode("", add_special_tokens=True)
    return tuple(with_marks.ids)


def _say(text: str) -> str:
    """An expression, as blocks swallow a newline behind them."""
    return f"{{{{ {_quoted(text)} }}}}" if text else ""


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
