"""Initial values of PyTorch's layers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sire_jax import configuration
from sire_jax.configuration import experiment
from sire_jax.layers.initialization import as_pytorch

CONFIGS = configuration.repository_configs()
KEY = jax.random.key(3)


@pytest.mark.parametrize(
    ("shape", "inputs"),
    [((3, 3, 16, 64), 144), ((400, 30), 400), ((3, 3, 64, 16), 576)],
    ids=["convolution", "dense", "transposed convolution from 16 to 64"],
)
def test_kernels_and_biases_are_uniform_within_the_inverse_root_of_the_inputs(shape, inputs):
    params = {"layer": {"kernel": jnp.zeros(shape), "bias": jnp.zeros(shape[-1])}}
    drawn = as_pytorch(KEY, params)["layer"]
    limit = 1 / np.sqrt(inputs)
    assert np.abs(drawn["kernel"]).max() == pytest.approx(limit, rel=0.01)
    assert np.std(drawn["kernel"]) == pytest.approx(limit / np.sqrt(3), rel=0.05)
    assert limit / 2 < np.abs(drawn["bias"]).max() <= limit
    assert abs(np.mean(drawn["kernel"])) < limit / 20


def test_what_is_no_kernel_or_its_bias_stays_and_no_two_are_alike():
    kernel = {"kernel": jnp.zeros((9, 9), jnp.bfloat16), "bias": jnp.zeros(9)}
    norm = {"scale": jnp.ones(9), "bias": jnp.zeros(9)}
    drawn = as_pytorch(KEY, {"a": {"conv": kernel, "norm": norm}, "b": kernel, "c": norm})
    for each in (drawn["a"]["norm"], drawn["c"]):
        np.testing.assert_array_equal(each["scale"], np.ones(9))
        np.testing.assert_array_equal(each["bias"], np.zeros(9))
    assert drawn["b"]["kernel"].dtype == jnp.bfloat16
    first, second = (
        np.asarray(each["kernel"], np.float32) for each in (drawn["b"], drawn["a"]["conv"])
    )
    assert not np.array_equal(first, second)
    assert not np.array_equal(drawn["b"]["bias"], drawn["a"]["conv"]["bias"])


def test_kernels_of_several_layers_in_one_are_refused():
    params = {"layers": {"kernel": jnp.zeros((5, 3, 4))}}
    with pytest.raises(ValueError, match=r"'layers/kernel' has the shape \(5, 3, 4\); .* alone"):
        as_pytorch(KEY, params)


def test_a_config_begins_with_them_and_with_those_of_its_modules_by_default():
    chosen = "--config.initialization=pytorch"
    for overrides in ([], [chosen]):
        config = configuration.load(f"{CONFIGS}/quickstart.py:main_only", overrides)
        begin = jax.jit(experiment.build(config).initial_state)
        params = begin(jnp.int32(1)).params["backbone"]
        drawn = chosen in overrides
        assert bool(np.any(params["branch"]["conv_1"]["bias"])) == drawn
        assert bool(np.any(params["output"]["bias"])) == drawn
