"""A network unlike a trunk with exits: branches off two places, a shared head, a probe, a state."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from planned import normal

from sire_jax import traced

IMAGES, TARGETS = normal(0, 5, 4), normal(1, 5, 2)
KEY = jax.random.key(0)
# Values that a zero step written as an addition, or weight decay, would change.
UNREACHED = np.asarray([-0.0, 1e-30, 7.7], np.float32)

# Who reaches what, from shallow to deep: "side" and "early" leave after w1, "middle" after w2, with
# the head of "early"; "probe" sees w2 and "main" sees "read" behind a stop_gradient.
REACHED = {
    "probe": {"probe"},
    "side": {"w1", "side"},
    "early": {"w1", "shared"},
    "middle": {"w1", "w2", "shared"},
    "main": {"w1", "w2", "w3", "main"},
}
SHARED = {"w1", "w2", "shared"}
WEIGHTS = {"probe": 0.7, "side": 0.5, "early": 0.6, "middle": 1.5, "main": 0.9}
# Sums of WEIGHTS: of side, early and middle; of early and middle; of middle.
DIVISORS = {"probe": 1.0, "side": 2.6, "early": 2.1, "middle": 1.5, "main": 1.0}


def params(seed=0):
    shapes = {"w1": (4, 3), "w2": (3, 3), "w3": (3, 3)}
    shapes |= dict.fromkeys(("shared", "main", "side", "probe"), (3, 2))
    made = {name: normal(10 * seed + i, *shape) for i, (name, shape) in enumerate(shapes.items())}
    return {**made, "read": jnp.asarray(UNREACHED), "unused": jnp.asarray(UNREACHED)}


def state():
    zeros = {name: jnp.zeros(3) for name in ("one", "two", "three", "kept")}
    return {**zeros, "aside": jnp.zeros(2), "both": jnp.zeros(()), "count": jnp.int32(4)}


def losses(params, state):
    one = jnp.tanh(IMAGES @ params["w1"])
    two = jnp.tanh(one @ params["w2"])
    three = jnp.tanh(two @ params["w3"])
    outputs = {
        "main": three @ params["main"] + lax.stop_gradient(params["read"]).sum(),
        "middle": two @ params["shared"],
        "probe": lax.stop_gradient(two) @ params["probe"],
        "early": one @ params["shared"],
        "side": one @ params["side"],
    }
    seen = {
        "one": one.mean(0),
        "two": two.mean(0),
        "three": three.mean(0),
        "aside": outputs["side"].mean(0),
        "both": outputs["side"].mean() + outputs["early"].mean(),
        "count": state["count"] + 1,
        "kept": state["kept"],
    }
    named = {name: ((output - TARGETS) ** 2).mean() for name, output in outputs.items()}
    return named, (outputs, seen)


@functools.cache
def reach():
    return traced.reach(lambda p: losses(p, state())[0], params())


def weights(**given):
    return {name: jnp.float32(weight) for name, weight in {**WEIGHTS, **given}.items()}


@jax.jit
def _gradients(params):
    def one(name):
        return jax.grad(lambda p: losses(p, state())[0][name])(params)

    return {name: one(name) for name in REACHED}


def gradient(params, name):
    """Returns the gradient of one loss, by reverse mode through all of the network."""
    return _gradients(params)[name]


def run(rule, steps=1, start=None, given=None, losses=losses, model_state=None):
    """Takes steps of a rule and returns what the last one did."""
    given = given or weights()
    update = jax.jit(lambda *each: rule.update(losses, given, *each, KEY))
    now, model_state = start or params(), model_state or state()
    own = rule.init(now)
    for _ in range(steps):
        updated = update(now, model_state, own)
        now, model_state, own = updated.params, updated.model_state, updated.state
    return updated


def assert_close(found, expected, rtol=1e-5, atol=1e-6):
    chex.assert_trees_all_close(found, expected, rtol=rtol, atol=atol)
