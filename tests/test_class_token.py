"""A compressor that reads the class token, from training with cached features to answers, pictures and the artifact."""

import dataclasses
import json

import numpy as np
import pytest

from tcjax.answer import evaluate_run, looks
from tcjax.assemble import assemble
from tcjax.compressors import avg_pool, qformer
from tcjax.compressors.base import Widths
from tcjax.config import EvaluateConfig, Pixels, Run, Source, TrainConfig
from tcjax.evaluate.cost import cost, tower_flops
from tcjax.export.run import export_run
from tcjax.job import train_run, trained
from tcjax.study import looks as pictures
from tcjax.study.catalogue import catalogue_line
from tcjax.towers.patch_labels import PatchLabelsConfig
from tcjax.train.feature_store import Features
from tcjax.vlm import VlmConfig
from tests.hosted import LLMS, TOWERS
from tests.tiny_boards import SOURCE, data_config, make_project

TOWER = dataclasses.replace(TOWERS["clip"], pixels=Pixels(size_YX=(64, 64)), patch=16)
QFORMER = qformer.Config(num_queries=3, depth=2, width=8, heads=2, feed_forward=8, class_token=True)
RUN = Run(
    name="tiny/class",
    model=VlmConfig(tower=TOWER, compressor=QFORMER, llm=LLMS["llama"]),
    data=data_config(batch=8),
    train=TrainConfig(steps=2, feature_cache="float32", save_every=2),
    evaluate=EvaluateConfig(source=Source(path=SOURCE.path, split="test"), boards=2, batch=4, controls=("blank",)),
)


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """The trained run lies in its folder `run`."""
    root = make_project(tmp_path_factory.mktemp("project"), train=16, test=2)
    train_run(RUN, root=root, out=root / "run", quiet=True)
    return root


def test_the_cache_holds_it_and_the_answers_use_it(project):
    model, identity, step = trained(RUN, root=project, out=project / "run")
    scores = evaluate_run(RUN, model, identity, root=project, out=project / "run", quiet=True)
    assert step == 2 and scores["visual_tokens"] == 3 and scores["accuracy"]
    caches = [Features(folder) for folder in (project / "runs/features").iterdir()]
    assert {(len(cache), *cache.shape) for cache in caches} == {(16, 17, 16), (2, 17, 16)}


def test_pictures_show_the_grid_alone(project):
    model, _, _ = trained(RUN, root=project, out=project / "run")
    found = np.load(looks(model, RUN, root=project, out=project, boards=2))
    assert found["assign"].shape == (2, 3, 16)
    assert (found["assign"].sum(-1) < 1).all() and (
        found["assign"].sum(-1) > 0.5
    ).all()  # the rest is the class token's
    drawn = pictures.read(project)
    assert drawn is not None and pictures.draw(drawn, "class", project / "looks.png").is_file()


def test_the_artifact_says_so_and_starts_a_tower_without_one(project):
    model, identity, _ = trained(RUN, root=project, out=project / "run")
    out = export_run("artifact", RUN, model, identity, out=project / "artifact", root=project)
    facts = json.loads((out / "compressor_config.json").read_text())
    manifest = json.loads((out / "manifest.json").read_text())
    assert (facts["extra"], manifest["provenance"]["class_token"]) == (1, "kept")
    assert "17, the class token and a 4 x 4 grid, row by row" in (out / "README.md").read_text()
    without = VlmConfig(
        tower=TOWERS["siglip"], compressor=dataclasses.replace(QFORMER, class_token=False), llm=LLMS["llama"]
    )
    started, _ = assemble(without, root=project, start={"compressor": "artifact"})
    np.testing.assert_array_equal(started.compressor.queries[...], model.compressor.queries[...])


def test_it_costs_the_tower_nothing_and_is_no_patch():
    kept = RUN.model.seen
    assert (kept.num_tokens, TOWER.num_tokens) == (17, 16)
    assert tower_flops(kept) == tower_flops(TOWER)
    assert cost(RUN.model, 10).ratio == 16 / 3
    with pytest.raises(ValueError, match="keep_class=True, but labels belong to patches"):
        PatchLabelsConfig(tower=kept, kinds=(2,))
    pooled = VlmConfig(tower=kept, compressor=avg_pool.Config(num_queries=4), llm=LLMS["llama"])
    with pytest.raises(
        ValueError, match=r"before its 4x4: the class token\. Build the tower with VitConfig.keep_class"
    ):
        pooled.num_queries  # noqa: B018


@pytest.mark.parametrize("text", [False, True])
def test_the_catalogue_asks_only_towers_that_have_one(text):
    widths = Widths(grid_HW=(4, 4), vision_C=64, llm_D=128, text_D=128)
    line = catalogue_line("class", lambda num: dataclasses.replace(QFORMER, num_queries=num, text=text), widths)
    assert line["queries"] == "1 – 16" and {"hf", "hf-remote"} <= set(line["exports"])
