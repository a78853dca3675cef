"""A run with a published template and a checkpoint's tokenizer.model: from conversations to trained, evaluated and refused."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
from flax import nnx

from configs import templates
from tcjax.answer import evaluate_run
from tcjax.assemble import assemble
from tcjax.batch import Batch
from tcjax.compressors import avg_pool
from tcjax.config import EvaluateConfig, Run, Source, TrainConfig
from tcjax.job import load_run, train_run, trained
from tcjax.pipeline.chat import Chat, open_chat
from tcjax.pipeline.input import make_input
from tcjax.pipeline.questions import questions
from tcjax.pipeline.source import open_source
from tcjax.vlm import VlmConfig
from tests.chats import MODEL, samples, tokenizer
from tests.hosted import LLMS, TOWERS
from tests.planted import noise
from tests.tiny_boards import PIXELS, SOURCE, data_config, make_project

Q = 4
LLM = dataclasses.replace(LLMS["llama"], vocab=800)
TOWER = dataclasses.replace(TOWERS["siglip"], pixels=PIXELS, patch=16)
RUN = Run(
    name="tiny/vicuna",
    model=VlmConfig(tower=TOWER, compressor=avg_pool.Config(num_queries=Q), llm=LLM),
    data=data_config(batch=8, tokenizer="llm", template=templates.VICUNA_V1, text_length=160),
    train=TrainConfig(steps=2, save_every=2),
    evaluate=EvaluateConfig(source=Source(path=SOURCE.path, split="test"), boards=1, batch=8, controls=()),
)


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    root = make_project(tmp_path_factory.mktemp("project"), train=8, test=2)
    (root / "llm").mkdir()
    shutil.copy(MODEL, root / "llm/tokenizer.model")
    (root / "llm/tokenizer_config.json").write_text(
        json.dumps({"legacy": False, "bos_token": "<s>", "eos_token": "</s>"})
    )
    return root


def test_it_trains_evaluates_and_is_read_back(project):
    train_run(RUN, root=project, out=project / "run", quiet=True)
    assert load_run(project / "run").data.template == templates.VICUNA_V1
    model, identity, step = trained(RUN, root=project, out=project / "run")
    scores = evaluate_run(RUN, model, identity, root=project, out=project / "run", quiet=True)
    assert step == 2 and scores["visual_tokens"] == Q and scores["accuracy"]
    asked = json.loads((project / "run/answers.jsonl").read_text().splitlines()[0])
    assert asked["answer"] and isinstance(asked["generated"], str)


def test_image_positions_are_known_without_an_id_of_their_own(project):
    """<unk> is at image positions, at padding, and may be in a text: the mask alone tells them apart."""
    prepared, chat = open_source(project, RUN.evaluate.source), open_chat(project / "llm", templates.VICUNA_V1)
    assert chat.image_id == chat.pad_id == 0
    asked = questions(prepared, chat, num_queries=Q)
    for row in range(len(asked.tokens_BS)):
        prompt = chat.ask(str(asked.question_B[row]), num_queries=Q)
        padded = asked.tokens_BS.shape[1] - len(prompt.ids)
        assert asked.is_image_BS[row].tolist() == [False] * padded + prompt.is_image
        assert asked.tokens_BS[row].tolist() == [0] * padded + prompt.ids
        answer = [i for i in asked.answer_BT[row].tolist() if i >= 0]
        assert answer[-1] == 2 and chat.decode(answer) == str(asked.answer_B[row])
    batch = next(make_input(RUN.data, PIXELS, Q, root=project))
    assert (batch.is_image_BS.sum(1) == Q).all()
    assert (batch.tokens_BS[batch.is_image_BS] == 0).all()


def test_a_tokenizer_of_another_llm_is_refused_before_anything_is_built(project, tmp_path):
    smaller = RUN.replace(model=dataclasses.replace(RUN.model, llm=LLMS["llama"]))
    with pytest.raises(ValueError, match=r"736 tokens beyond the LLM's vocab=64: .*own checkpoint"):
        train_run(smaller, root=project, out=tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["VICUNA_V1", "LLAMA_2", "PRISMATIC_VICUNA", "HONEYBEE"])
def test_left_and_right_padding_give_the_same_loss(name):
    chat = Chat(tokenizer("legacy"), getattr(templates, name))
    turns = [turns for images, turns in samples(40) if images][:3]
    rows = [chat.compose(each, num_queries=Q, text_length=1000) for each in turns]
    longest = max(len(row.ids) for row in rows)
    model, _ = assemble(RUN.model, root=MODEL.parent, seed=1)

    def loss(left: bool) -> float:
        def padded(values: list, fill) -> list:
            free = [fill] * (longest - len(values))
            return [*free, *values] if left else [*values, *free]

        batch = Batch(
            tokens_BS=np.array([padded(row.ids, chat.pad_id) for row in rows], np.int32),
            is_image_BS=np.array([padded(row.is_image, False) for row in rows]),
            supervised_BS=np.array([padded(row.supervised, False) for row in rows]),
            valid_BS=np.array([padded([True] * len(row.ids), False) for row in rows]),
            images_BYX3=noise(3, 64, 64, 3),
        )
        terms = nnx.merge(*nnx.split(model)).loss_terms(batch)
        assert terms.count == sum(sum(row.supervised) for row in rows)
        return float(terms.total / terms.count)

    np.testing.assert_allclose(loss(left=True), loss(left=False), rtol=1e-6)
