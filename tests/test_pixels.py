"""Bytes normalised on the device are the host's float32, bit for bit, whatever the compiler fuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import towers
from tcjax.config import Pixels
from tcjax.nn.pixels import normalised
from tcjax.pipeline.images import normalise

VALUES = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, -1)
CASES = {
    "boards": Pixels(size_YX=(16, 16)),
    "clip": towers.clip_l_336().pixels,
    "imagenet": Pixels(size_YX=(16, 16), mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)),
}


@pytest.mark.parametrize("name", CASES)
def test_every_byte_is_the_hosts(name):
    host = normalise(VALUES, CASES[name])
    assert host.dtype == np.float32
    device = jax.jit(lambda x: normalised(x, CASES[name], jnp.float32))(VALUES)
    np.testing.assert_array_equal(device, host)
    np.testing.assert_array_equal(normalised(jnp.asarray(VALUES), CASES[name], jnp.float32), host)
    exact = (VALUES / 255 - np.array(CASES[name].mean)) / np.array(CASES[name].std)
    np.testing.assert_allclose(host, exact, atol=5e-7)


def test_pixels_that_are_normalised_stay_as_they_are():
    images_BYX3 = jnp.ones((1, 2, 2, 3), jnp.bfloat16)
    assert normalised(images_BYX3, CASES["clip"], jnp.float32) is images_BYX3
