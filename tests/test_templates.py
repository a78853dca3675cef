"""Published templates: ids and masks are those of the code that published them, and promises no template may break."""

import dataclasses
import hashlib

import numpy as np
import pytest

from configs import templates
from tcjax.config import Template
from tcjax.pipeline.chat import BadConversation, Chat, Unsupervised
from tcjax.pipeline.sample import Turn
from tcjax.pipeline.tokenizer import Marks
from tcjax.record import from_dict, to_dict
from tests.chats import as_golden, golden, of_golden, samples, tokenizer

LONG = 10_000
PUBLISHED = {  # golden rows: (template, tokenizer)
    "llava v1/legacy": (templates.VICUNA_V1, "legacy"),
    "llava v1/new": (templates.VICUNA_V1, "new"),
    "llava v1-several/legacy": (templates.VICUNA_V1, "legacy"),
    "llava v1-several/new": (templates.VICUNA_V1, "new"),
    "llava llava_llama_2/legacy": (templates.LLAMA_2, "legacy"),
    "llava llava_llama_2/new": (templates.LLAMA_2, "new"),
    "llava plain/legacy": (templates.PLAIN, "legacy"),
    "llava plain/new": (templates.PLAIN, "new"),
    "next qwen": (templates.QWEN_LLAVA_NEXT, "bytes"),
    "next llama_3": (templates.LLAMA_3_LLAVA_NEXT, "bytes"),
    "nano": (templates.CHATML, "bytes"),
    "prismatic vicuna": (templates.PRISMATIC_VICUNA, "legacy"),
    "prismatic llama_2": (templates.PRISMATIC_LLAMA_2, "legacy"),
    "prismatic base": (templates.PRISMATIC_BASE, "legacy"),
    "prismatic align": (templates.PRISMATIC_ALIGN, "legacy"),
    "honeybee chat": (templates.HONEYBEE, "legacy"),
    "honeybee caption": (templates.HONEYBEE_PRETRAIN, "legacy"),
}
NAMED = {name: value for name, value in vars(templates).items() if isinstance(value, Template)}
OWN = {"boards": Template()} | NAMED
TURNS = [
    Turn("<image>\nWhat is this?", "A red bus."),
    Turn("How many people?", "Two"),
    Turn("The sky?", "Blue and\nclear"),
]


def chat_of(template: Template) -> Chat:
    """With a tokenizer that has its marks, the image token added where it has none."""
    kind = "bytes" if "<|" in template.end else "legacy"
    made = tokenizer(kind).from_str(tokenizer(kind).to_str())
    made.add_special_tokens([mark for mark in (template.image, template.pad, template.begin) if mark])
    if template == Template():
        made.add_special_tokens([template.user, template.assistant, template.end])
    return Chat(made, template, Marks(pad_id=0))


def turns_for(template: Template) -> list[Turn]:
    return TURNS if template.question else TURNS[:1]


@pytest.mark.parametrize("case", PUBLISHED)
def test_ids_and_masks_are_those_of_the_published_code(case):
    template, kind = PUBLISHED[case]
    rows = golden()
    for key in case.split(" "):
        rows = rows[key]
    chat, seen = Chat(tokenizer(kind), template, Marks(pad_id=0)), 0
    of_kind = samples(120 if "v1/" in case else 60, several="several" in case)
    of_kind = of_kind if len(rows) == len(of_kind) else [sample for sample in of_kind if sample[0]]
    for (num_images, turns), row in zip(of_kind, rows, strict=True):
        if row.get("warned"):
            continue
        turns = turns if template.question else turns[:1]
        found = chat.compose(turns, num_queries=1, text_length=LONG, num_images=num_images)
        assert as_golden(found.ids, found.is_image, found.supervised) == of_golden(row)
        seen += 1
    assert seen >= (100 if "v1/" in case else 48)


def test_the_system_text_and_a_rendering_of_two_turns_are_llavas_to_the_byte():
    assert len(templates.VICUNA_SYSTEM) == 154
    assert hashlib.sha256(templates.VICUNA_SYSTEM.encode()).hexdigest().startswith("1fa69e2371b762d1")
    chat = Chat(tokenizer("new"), templates.VICUNA_V1)
    found = chat.compose(
        [Turn("<image>\nQ1", "A1"), Turn("Q2", "A2")], num_queries=1, text_length=LONG
    )  # decoded around the image, as LLaVA writes it
    place = found.is_image.index(True)
    text = chat.tokenizer.decode(found.ids[1:place], skip_special_tokens=False) + "<image>"
    text += chat.tokenizer.decode(found.ids[place + 1 :], skip_special_tokens=False)
    assert (len(text), hashlib.sha256(text.encode()).hexdigest()[:16]) == (215, "03b0543a529ad701")
    assert text == golden()["llava"]["v1/prompt"]


@pytest.mark.parametrize("name", OWN)
def test_what_is_supervised_reads_as_the_answers_and_their_end_marks(name):
    template = OWN[name]
    chat, turns = chat_of(template), turns_for(template)
    found = chat.compose(turns, num_queries=2, text_length=LONG)
    learned = [i for i, on in zip(found.ids, found.supervised, strict=True) if on]
    text = chat.tokenizer.decode(learned, skip_special_tokens=False)
    if template.supervise_assistant:  # headers, and marks of user and system
        assert all(turn.answer in text for turn in turns)
        return
    expected = "".join(f"{template.lead}{turn.answer}{template.end}" for turn in turns)
    assert "".join(text.split()) == "".join(expected.split())  # strings tokenised alone begin with a blank


@pytest.mark.parametrize("name", OWN)
def test_q_repeats_the_image_and_changes_nothing_else(name):
    template = OWN[name]
    chat, turns = chat_of(template), turns_for(template)
    one = chat.compose(turns, num_queries=1, text_length=LONG)
    for Q in (0, 5):
        found = chat.compose(turns, num_queries=Q, text_length=LONG)
        assert sum(found.is_image) == Q
        assert {i for i, on in zip(found.ids, found.is_image, strict=True) if on} <= {chat.image_id}
        for field in ("ids", "supervised", "turn"):
            kept = [
                [value for value, image in zip(getattr(row, field), row.is_image, strict=True) if not image]
                for row in (one, found)
            ]
            assert kept[0] == kept[1]
        assert not any(on and image for on, image in zip(found.supervised, found.is_image, strict=True))


@pytest.mark.parametrize("name", OWN)
def test_a_prompt_and_the_right_answer_are_the_training_row(name):
    template = OWN[name]
    chat, (question, answer) = chat_of(template), TURNS[0]
    row = chat.compose(TURNS[:1], num_queries=3, text_length=LONG)
    asked = chat.ask(question, num_queries=3)
    assert [*asked.ids, *chat.answer_ids(answer)] == row.ids
    assert asked.is_image == row.is_image[: len(asked.ids)]
    assert asked.ids == chat.render_question(question, num_queries=3)
    assert not any(asked.supervised)
    assert chat.decode([*chat.answer_ids(answer), *chat.answer_ids("Two")]) == answer
    assert len(chat.stop_ids) == 1


@pytest.mark.parametrize("name", [name for name, template in OWN.items() if template.question])
def test_a_long_conversation_loses_turns_then_the_end_of_the_first_answer_and_never_an_image(name):
    chat = chat_of(OWN[name])
    whole = chat.compose(TURNS, num_queries=4, text_length=LONG, name="b-7")
    prompt = len(chat.ask(TURNS[0].question, num_queries=0).ids)
    lengths = [len(chat.compose(TURNS[:n], num_queries=0, text_length=LONG).ids) for n in (1, 2, 3)]
    for room in range(prompt, lengths[-1] + 1):
        kept = sum(length <= room for length in lengths)
        if room == prompt:
            with pytest.raises(Unsupervised, match=rf"sample 'b-7' has 3 turns and none fits.*text_length={room}"):
                chat.compose(TURNS, num_queries=4, text_length=room, name="b-7")
            continue
        found = chat.compose(TURNS, num_queries=4, text_length=room, name="b-7")
        assert found.dropped == 3 - max(kept, 1)
        assert found.truncated == max(0, lengths[0] - room)
        assert sum(found.is_image) == 4
        assert len(found.ids) - 4 == (lengths[kept - 1] if kept else room)
        assert found.ids == whole.ids[: len(found.ids)]
        assert found.supervised == whole.supervised[: len(found.ids)]
        assert len(found.instruction) == sum(len(chat.instruction(turn.question)) for turn in TURNS[: max(kept, 1)])


def test_several_images_stand_where_the_template_puts_them():
    marked = [Turn("<image>\n<image>\nWhich is red?", "One"), Turn("And this?\n<image>", "No")]
    chat = chat_of(templates.VICUNA_V1)
    found = chat.compose(marked, num_queries=2, text_length=LONG, num_images=3)
    assert (sum(found.is_image), found.num_images) == (6, 3)
    starts = [place for place in np.flatnonzero(found.is_image) if not found.is_image[place - 1]]
    assert len(starts) == 3
    assert found.turn[starts[1]] == 0
    assert found.turn[starts[2]] == 2
    first = chat.compose(marked, num_queries=2, text_length=starts[2] - 4, num_images=3)
    assert (first.num_images, sum(first.is_image), first.dropped) == (2, 4, 1)
    unmarked = chat.compose([Turn("Which?", "One")], num_queries=2, text_length=LONG, num_images=2)
    assert sum(unmarked.is_image) == 4


@pytest.mark.parametrize(
    "place, written",
    [
        ("begin", "##user\nWhich  is  red?\nassistant\n"),
        ("front", "user\nWhich # is # red?\nassistant\n"),  # several in one turn stay where they are
        ("mark", "user\nWhich # is # red?\nassistant\n"),
        ("message", "user\nWhich#user\nis#user\nred?\nassistant\n"),
    ],
)
def test_the_places_of_two_images_in_one_question(place, written):
    chat = chat_of(dataclasses.replace(templates.CHATML, place=place))
    asked = chat.ask("Which <image> is <image> red?", num_queries=1, num_images=2)
    shown = zip(asked.ids, asked.is_image, strict=True)
    assert "".join("#" if image else chat.tokenizer.decode([i]) for i, image in shown) == written


def test_text_alone_needs_no_image_and_its_answers_are_learned():
    chat = chat_of(templates.VICUNA_V1)
    found = chat.compose(TURNS[1:], num_queries=4, text_length=LONG, num_images=0)
    assert not any(found.is_image)
    assert sum(found.supervised) == len(chat.answer_ids("Two")) + len(chat.answer_ids("Blue and\nclear"))


@pytest.mark.parametrize(
    ("turns", "num_images", "error", "message"),
    [
        ([Turn("<image>\nA?", "b")], 2, BadConversation, "1 <image> marks and 2 images"),
        ([Turn("<image>\nA?", "b")], 0, BadConversation, "1 <image> marks and 0 images"),
        ([Turn("A?", "b <image>")], 1, BadConversation, "answer of turn 1 holds <image>"),
        ([Turn("A?", "b"), Turn("C?", " ")], 1, Unsupervised, "answer of turn 2 is empty"),
        ([], 1, Unsupervised, "has 0 turns"),
    ],
)
def test_a_sample_that_cannot_be_learned_is_refused_by_name(turns, num_images, error, message):
    chat = chat_of(templates.VICUNA_V1)
    with pytest.raises(error, match=f"sample 'c-3'.*{message}"):
        chat.compose(turns, num_queries=1, text_length=LONG, num_images=num_images, name="c-3")
    with pytest.raises(BadConversation, match="sample 'c-3' has 3 turns, and a template without questions"):
        chat_of(templates.PLAIN).compose(TURNS, num_queries=1, text_length=LONG, name="c-3")


def test_templates_that_do_not_fit_say_so():
    with pytest.raises(ValueError, match=r"Template.place='top' is unknown; choose one of"):
        Template(place="top")
    with pytest.raises(ValueError, match=r"Template.passes='all' is unknown; choose one of"):
        Template(passes="all")
    with pytest.raises(ValueError, match="needs an image token"):
        Template(passes="whole", image="")
    with pytest.raises(
        ValueError, match=r"Template.image='<picture>' is not one token.*reserved_special.*image=\"\" needs none"
    ):
        Chat(tokenizer("bytes"), dataclasses.replace(templates.QWEN, image="<picture>"))
    with pytest.raises(ValueError, match=r'Template.pad="" takes the tokenizer\'s own pad'):
        Chat(tokenizer("bytes"), templates.CHATML)
    with pytest.raises(ValueError, match=r"Template.everywhere names 'a red bus'"):
        Chat(tokenizer("bytes"), dataclasses.replace(templates.QWEN_LLAVA_NEXT, everywhere=("a red bus",)))
    with pytest.raises(ValueError, match=r"11 tokens beyond the LLM's vocab=600.*'<\|endoftext\|>' = 600"):
        chat_of(templates.QWEN).check_vocab(600)
    chat_of(templates.QWEN).check_vocab(611)


@pytest.mark.parametrize("name", NAMED)
def test_a_template_survives_the_runs_file(name):
    assert from_dict(to_dict(NAMED[name])) == NAMED[name]
