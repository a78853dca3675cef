"""The random-image control of the boards: noise with the colours of the images, the same every time, cached tower or not."""

import dataclasses

import numpy as np
import pytest
from flax import nnx

from tcjax.answer import CONTROLS, Images, evaluate_run
from tcjax.compressors import avg_pool
from tcjax.config import EvaluateConfig, Run, Source, TrainConfig
from tcjax.pipeline.images import normalise
from tcjax.vlm import VlmConfig
from tests.hosted import LLMS, TOWERS
from tests.tiny_boards import PIXELS, SOURCE, data_config, make_project

MODEL = VlmConfig(
    tower=dataclasses.replace(TOWERS["siglip"], pixels=PIXELS, patch=16),
    compressor=avg_pool.Config(num_queries=4),
    llm=LLMS["llama"],
)
SCORED = EvaluateConfig(source=Source(path=SOURCE.path, split="test"), boards=4, batch=4, controls=CONTROLS)
RUN = Run(name="random", model=MODEL, data=data_config(), train=TrainConfig(steps=0), evaluate=SCORED)
IDENTITY = {"tower.weights": "random from seed 0"}


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    return make_project(tmp_path_factory.mktemp("project"), train=2, test=4)


@pytest.fixture(scope="module")
def model():
    return MODEL.build(nnx.Rngs(0))


def test_noise_has_the_colours_of_the_images(project, model):
    images = Images(model, IDENTITY, RUN, root=project, quiet=True)
    index_B = np.arange(4)
    own, noise = normalise(images.of(index_B)["images_BYX3"], PIXELS), images.random(index_B)["images_BYX3"]
    assert noise.shape == own.shape and noise.dtype == np.float32
    np.testing.assert_allclose(noise.mean((0, 1, 2)), own.mean((0, 1, 2)), atol=0.02)
    np.testing.assert_allclose(noise.std((0, 1, 2)), own.std((0, 1, 2)), rtol=0.05)
    np.testing.assert_array_equal(images.random(index_B[::-1])["images_BYX3"], noise[::-1])


def test_every_control_is_scored_with_and_without_a_feature_cache(project, model, tmp_path):
    found = []
    for cached in ("", "float32"):
        run = RUN.replace(train=dataclasses.replace(RUN.train, feature_cache=cached))
        found.append(evaluate_run(run, model, IDENTITY, root=project, out=tmp_path, quiet=True))
    assert tuple(found[0]["controls"]) == ("blank", "shuffled", "random")
    assert found[0]["controls"] == found[1]["controls"] and found[0]["accuracy"] == found[1]["accuracy"]
