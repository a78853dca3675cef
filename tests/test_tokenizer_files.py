"""Tokenizer files of a checkpoint: ids are sentencepiece's and transformers' own, damaged files are named."""

import json
import shutil
import struct

import pytest
import sentencepiece as reference
import transformers
from hypothesis import given
from hypothesis import strategies as st

from configs import templates
from tcjax.config import Template
from tcjax.pipeline import sentencepiece
from tcjax.pipeline.chat import Chat, load_tokenizer, open_chat
from tcjax.pipeline.sample import Turn
from tcjax.pipeline.tokenizer import Marks, read_marks
from tests.chats import FOLDER, MODEL, golden, tokenizer

VICUNA = {  # lmsys/vicuna-7b-v1.5 ships a tokenizer.model and no tokenizer.json
    "tokenizer_config.json": {
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": {"__type": "AddedToken", "content": "<s>", "normalized": False},
        "eos_token": {"__type": "AddedToken", "content": "</s>", "normalized": False},
        "legacy": False,
        "pad_token": None,
        "tokenizer_class": "LlamaTokenizer",
        "unk_token": {"__type": "AddedToken", "content": "<unk>", "normalized": False},
    },
    "special_tokens_map.json": {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
    "generation_config.json": {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0},
}
REFERENCE = reference.SentencePieceProcessor(model_file=str(MODEL))


def folder_of(tmp_path, files: dict, **changes):
    """A checkpoint's folder with the small tokenizer.model."""
    shutil.copy(MODEL, tmp_path / "tokenizer.model")
    for name, content in (files | changes).items():
        (tmp_path / name).write_text(json.dumps(content))
    return tmp_path


@pytest.mark.parametrize("kind", ["legacy", "new"])
def test_a_tokenizer_model_gives_the_ids_of_sentencepiece_and_of_the_slow_llama_tokenizer(kind):
    strings, made = golden()["strings"], tokenizer(kind)
    assert len(strings["texts"]) == 433
    for text, plain, slow in zip(strings["texts"], strings["sentencepiece"], strings[kind], strict=True):
        found = made.encode(text, add_special_tokens=False).ids
        if kind == "legacy" or text[:1] not in (" ", "▁"):  # then transformers' fast tokenizers add no second blank
            assert found == slow
            assert found == plain or "</s>" in text


@given(st.text(st.characters(codec="utf-8", exclude_categories=("Cs",)), max_size=40))
def test_any_text_gives_the_ids_of_sentencepiece_and_comes_back(text):
    made = tokenizer("legacy")
    if any(mark in text for mark in ("<s>", "</s>", "<unk>")):
        return
    ids = made.encode(text, add_special_tokens=False).ids
    assert ids == REFERENCE.encode(text)
    assert made.decode(ids) == text.replace("▁", " ")


@pytest.mark.parametrize("legacy", [True, False])
def test_a_folder_with_only_a_tokenizer_model_gives_the_ids_of_transformers(tmp_path, legacy):
    config = VICUNA["tokenizer_config.json"] | {"legacy": legacy}
    folder = folder_of(tmp_path, VICUNA, **{"tokenizer_config.json": config})
    made, theirs = load_tokenizer(folder), transformers.LlamaTokenizer.from_pretrained(folder)
    texts = [text for text in golden()["strings"]["texts"] if not text.startswith((" ", "▁")) and "</s> " not in text]
    assert len(texts) > 400
    for text in texts:
        assert made.encode(text).ids == theirs(text)["input_ids"]
    for text in ("<s>a</s>USER: b", "a</s>b<unk>c"):  # never split
        assert set(made.encode(text).ids) >= {theirs.convert_tokens_to_ids(mark) for mark in ("</s>",)}


def test_a_folder_names_its_marks_and_renders(tmp_path):
    chat = open_chat(folder_of(tmp_path, VICUNA), templates.VICUNA_V1)
    assert (chat.pad_id, chat.image_id, chat.stop_ids, chat.end_ids) == (0, 0, (2,), (2,))
    row = chat.compose([Turn("<image>\nA?", "b")], num_queries=2, text_length=200)
    assert (row.ids[0], row.ids[-1], row.is_image.count(True)) == (1, 2, 2)
    assert (
        Chat(load_tokenizer(MODEL), templates.VICUNA_V1)
        .compose(  # by itself the file is of the legacy kind
            [Turn("<image>\nA?", "b")], num_queries=2, text_length=200
        )
        .ids[:5]
        == row.ids[:5]
    )


def test_several_ends_and_a_pad_are_read_from_the_configs(tmp_path):
    shutil.copy(FOLDER / "bytes.json", tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|eot_id|>"}))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [600, 609]}))
    made = load_tokenizer(tmp_path)
    assert read_marks(tmp_path, made) == Marks(609, (609, 600))
    chat = open_chat(tmp_path, templates.LLAMA_3)
    assert (chat.pad_id, chat.stop_ids) == (609, (609, 600))
    assert chat.decode([*chat.encode("a bus"), 600, *chat.encode("never")]) == "a bus"
    (tmp_path / "config.json").write_text(json.dumps({"pad_token_id": 600}))
    assert read_marks(tmp_path, made).pad_id == 600
    assert read_marks(tmp_path / "tokenizer.json", made) == Marks()


def test_added_tokens_are_whole_and_have_the_ids_the_files_state(tmp_path):
    added = {"added_tokens.json": {"<image>": 800, "<pad>": 801}}
    made = load_tokenizer(folder_of(tmp_path, VICUNA | added))
    assert made.encode("a<image><image>b<pad>", add_special_tokens=False).ids.count(800) == 2
    assert made.token_to_id("<pad>") == 801
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<image>": 32000}))
    with pytest.raises(ValueError, match=r"says that '<image>' has id 32000, its tokenizer says 800: .*one checkpoint"):
        load_tokenizer(tmp_path)


def test_a_tokenizer_json_neither_truncates_nor_pads(tmp_path):
    made = load_tokenizer(FOLDER / "bytes.json")
    made.enable_truncation(4)
    made.enable_padding(length=12)
    made.save(str(tmp_path / "tokenizer.json"))
    again, text = load_tokenizer(tmp_path / "tokenizer.json"), "a red bus with two people in it"
    assert again.encode(text).ids == tokenizer("bytes").encode(text).ids


def varint(value: int) -> bytes:
    return bytes([value]) if value < 128 else bytes([value & 127 | 128]) + varint(value >> 7)


def field(number: int, content: bytes | int) -> bytes:
    if isinstance(content, int):
        return varint(number << 3) + varint(content)
    return varint(number << 3 | 2) + varint(len(content)) + content


def test_a_damaged_tokenizer_model_is_refused(tmp_path):
    whole, path = MODEL.read_bytes(), tmp_path / "tokenizer.model"
    for spoiled in (b"", whole[:-1], whole[: len(whole) // 2], b"version https://git-lfs", b"\xff" * 40, whole[3:]):
        path.write_bytes(spoiled)
        with pytest.raises(ValueError, match=r"tokenizer.model is not a whole SentencePiece model .*copy it again"):
            load_tokenizer(tmp_path)
    path.write_bytes(whole)
    assert len(sentencepiece.read(path).pieces) == 800


@pytest.mark.parametrize(
    "trained, normalised, reason",
    [
        (field(3, 1), field(4, 0), "is no byte-pair model"),
        (field(3, 2), field(2, b"map") + field(4, 0), "normalises characters"),
        (field(3, 2), field(4, 1), "removes repeated blanks"),
        (field(3, 2), field(3, 0) + field(4, 0), "adds no blank in front"),
    ],
)
def test_another_kind_of_tokenizer_model_is_refused_with_a_way_out(tmp_path, trained, normalised, reason):
    unknown = field(1, b"<unk>") + varint(2 << 3 | 5) + struct.pack("<f", 0.0) + field(3, 2)
    (tmp_path / "tokenizer.model").write_bytes(field(1, unknown) + field(2, trained) + field(3, normalised))
    with pytest.raises(ValueError, match=rf"{reason}; only Llama's kind.*save_pretrained"):
        load_tokenizer(tmp_path)


def test_files_that_are_missing_or_no_json_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"no tokenizer at .*a tokenizer.json, or a checkpoint's folder"):
        load_tokenizer(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(
        ValueError, match=r"holds neither a tokenizer.json nor a tokenizer.model, only \['config.json'\]"
    ):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer_config.json is not JSON"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"tokenizer_config.json does not hold a JSON object"):
        load_tokenizer(tmp_path)


def test_byte_level_offsets_are_not_moved_by_a_post_processor(tmp_path):
    """Llama 3's tokenizer.json trims blanks off offsets: the header's two newlines would seem to belong to the answer."""
    from tokenizers import processors

    made = load_tokenizer(FOLDER / "bytes.json")
    made.post_processor = processors.ByteLevel(trim_offsets=True)
    chats = [Chat(each, templates.LLAMA_3, Marks(609)) for each in (made, tokenizer("bytes"))]
    rows = [chat.compose([Turn("A?", " b \n")], num_queries=1, text_length=99) for chat in chats]
    assert rows[0] == rows[1]


def test_the_boards_template_asks_nothing_of_the_files():
    assert Template().pad == "<pad>"
    assert Chat(_boards()).stop_ids == (5,)


def _boards():
    from data.digit_boards import vocabulary

    return vocabulary.tokenizer()
