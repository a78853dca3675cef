"""A checkpoint's own tokenizer files -> a `tokenizers.Tokenizer`, and which ids pad and end a text.

A path is a tokenizer.json, a tokenizer.model, or a folder that holds one of them beside tokenizer_config.json,
special_tokens_map.json, added_tokens.json, generation_config.json and config.json (all optional; transformers is not needed).
A tokenizer.json wins over a tokenizer.model. Special and added tokens are never split.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import AddedToken, Tokenizer, processors

from tcjax.pipeline import sentencepiece

NAMED = ("pad_token", "unk_token", "eos_token")


class Marks(NamedTuple):
    """Ids that the files name. pad_id: of the pad token, else of the unknown, else of the end; None if they say nothing.

    end_ids: what ends a generation by tokenizer and generation config.
    """

    pad_id: int | None = None
    end_ids: tuple[int, ...] = ()


def load_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of a file or of a checkpoint's folder; ValueError if it is none or contradicts itself."""
    path = Path(path)
    if path.is_file():
        made = sentencepiece.tokenizer(path) if path.suffix == ".model" else _from_json(path)
        if path.suffix == ".model":
            _put_begin(made, "<s>")
        return made
    if not path.is_dir():
        raise ValueError(
            f"no tokenizer at {path}; DataConfig.tokenizer names a tokenizer.json, or a checkpoint's folder, below the "
            f"project root."
        )
    config = _json(path / "tokenizer_config.json")
    if (path / "tokenizer.json").is_file():
        made = _from_json(path / "tokenizer.json")
    elif (path / "tokenizer.model").is_file():
        made = sentencepiece.tokenizer(path / "tokenizer.model", legacy=config.get("legacy") is not False)
        if config.get("add_bos_token", True):
            _put_begin(made, _text(config.get("bos_token") or _json(path / "special_tokens_map.json").get("bos_token")))
    else:
        found = sorted(file.name for file in path.iterdir())[:12]
        raise ValueError(f"{path} holds neither a tokenizer.json nor a tokenizer.model, only {found}.")
    _add_tokens(made, path, config)
    return made


def read_marks(path: Path, tokenizer: Tokenizer) -> Marks:
    """What the files of a folder say of padding and ending; nothing for a single file."""
    path = Path(path)
    if not path.is_dir():
        return Marks()
    said = _json(path / "special_tokens_map.json") | _json(path / "tokenizer_config.json")
    model, generation = _json(path / "config.json"), _json(path / "generation_config.json")
    ids = {name: tokenizer.token_to_id(_text(said[name])) for name in NAMED if said.get(name)}
    ends = [ids.get("eos_token")]
    for source in (generation, model):
        of_config = source.get("eos_token_id")
        if of_config is not None:
            ends += of_config if isinstance(of_config, list) else [of_config]
            break
    candidates = (ids.get("pad_token"), generation.get("pad_token_id"), model.get("pad_token_id"))
    known = [i for i in (*candidates, ids.get("unk_token"), *ends) if i is not None and i >= 0]
    return Marks(known[0] if known else None, tuple(dict.fromkeys(i for i in ends if i is not None)))


def _from_json(path: Path) -> Tokenizer:
    try:
        made = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exceptions
        raise ValueError(f"{path} is not a tokenizer.json of the tokenizers library: {error}") from error
    made.no_truncation()
    made.no_padding()
    return made


def _put_begin(tokenizer: Tokenizer, begin: str) -> None:
    """Have the tokenizer itself put the begin mark in front of a text, as Llama's does."""
    begin = begin or "<s>"
    found = tokenizer.token_to_id(begin)
    if found is None:
        raise ValueError(f"the begin mark {begin!r} is not among the tokenizer's pieces; see bos_token of its files.")
    tokenizer.post_processor = processors.TemplateProcessing(f"{begin} $A", special_tokens=[(begin, found)])


def _add_tokens(tokenizer: Tokenizer, folder: Path, config: dict[str, Any]) -> None:
    """The tokens that the files add, at the ids they state."""
    added = {int(i): token for i, token in config.get("added_tokens_decoder", {}).items()}
    for text, i in _json(folder / "added_tokens.json").items():
        added.setdefault(i, {"content": text, "special": True})
    known = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    for i, token in sorted(added.items()):
        text, special = token["content"], token.get("special", False)
        if text not in known:
            options = {key: token.get(key, False) for key in ("single_word", "lstrip", "rstrip")}
            add = tokenizer.add_special_tokens if special else tokenizer.add_tokens
            add([AddedToken(text, normalized=False, special=special, **options)])
        if tokenizer.token_to_id(text) != i:
            raise ValueError(
                f"{folder} says that {text!r} has id {i}, its tokenizer says {tokenizer.token_to_id(text)}: the files are "
                f"of different versions; copy all of them from one checkpoint."
            )


def _text(token: Any) -> str:
    """A token as the files write it: a string, or a dict with its content."""
    return token.get("content", "") if isinstance(token, dict) else token or ""


def _json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; {} if there is none."""
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}; copy it again from the checkpoint.") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} does not hold a JSON object; copy it again from the checkpoint.")
    return found
