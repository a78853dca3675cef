"""The cache of tower features: a hit is the tower itself, a kill costs a batch, another tower is another folder."""

import json

import jax
import numpy as np
import pytest
from flax import nnx

from tcjax.train import features
from tcjax.train.features import cached_features, feature_key
from tests.tiny import TOWER

NUM = 10
IMAGES = np.random.default_rng(0).normal(size=(NUM, 16, 16, 3)).astype(np.float32)
FACTS = {"tower": "a", "dataset": "b"}


@pytest.fixture
def tower(monkeypatch):
    monkeypatch.setattr(features, "BATCH", 4)
    return TOWER.build(nnx.Rngs(0))


def test_a_hit_equals_the_tower_inline(tmp_path, tower):
    tokens = cached_features(tower, lambda i: IMAGES[i], NUM, folder=tmp_path, facts=FACTS)
    assert tokens.shape == (NUM, 16, 16) and tokens.dtype == np.float32
    np.testing.assert_allclose(tokens, tower(IMAGES), atol=1e-6)
    again = cached_features(tower, lambda i: pytest.fail("read"), NUM, folder=tmp_path, facts=FACTS)
    np.testing.assert_array_equal(again, tokens)
    alone = jax.jit(lambda x: tower(x))(np.concatenate([IMAGES[4:8]]))
    np.testing.assert_array_equal(again[4:8], alone)


def test_a_build_that_was_killed_goes_on(tmp_path, tower):
    def until_six(i: int) -> np.ndarray:
        if i == 6:
            raise KeyboardInterrupt
        return IMAGES[i]

    with pytest.raises(KeyboardInterrupt):
        cached_features(tower, until_six, NUM, folder=tmp_path, facts=FACTS)
    (folder,) = tmp_path.iterdir()
    assert json.loads((folder / "progress.json").read_text()) == {"rows": 4}
    seen = []
    tokens = cached_features(tower, lambda i: seen.append(i) or IMAGES[i], NUM, folder=tmp_path, facts=FACTS)
    assert set(seen) - {0} == {4, 5, 6, 7, 8, 9}
    np.testing.assert_allclose(tokens, tower(IMAGES), atol=1e-6)


def test_an_unreadable_image_is_a_row_of_nan(tmp_path, tower):
    tokens = cached_features(tower, lambda i: None if i == 3 else IMAGES[i], NUM, folder=tmp_path, facts=FACTS)
    assert np.isnan(tokens[3]).all() and np.isfinite(np.delete(tokens, 3, 0)).all()


def test_nothing_readable_is_an_error(tmp_path, tower):
    with pytest.raises(ValueError, match="none of the 10 images can be read"):
        cached_features(tower, lambda i: None, NUM, folder=tmp_path, facts=FACTS)


def test_the_key_sees_every_fact():
    keys = {feature_key(f) for f in (FACTS, FACTS | {"tower": "c"}, FACTS | {"dataset": "d"}, FACTS | {"images": 3})}
    assert len(keys) == 4
