import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.test_util import check_grads
from ml_collections import ConfigDict

from sire_jax import configuration, objectives
from sire_jax.configuration import objectives as objective_sections
from sire_jax.losses import (
    LOSSES,
    SmoothedCrossEntropy,
    binary_cross_entropy,
    binary_squared_error,
    classifies,
    cross_entropy,
    mean_squared_error,
    negative_probability,
)
from sire_jax.objectives import Objective

LOG = np.log
# Softmax of these: 1/6, 2/6, 3/6 and 1/2, 1/4, 1/4.
LOGITS = jnp.asarray([[0.0, LOG(2), LOG(3)], [LOG(2), 0.0, 0.0]], jnp.float32)


def test_cross_entropy_by_hand():
    losses = cross_entropy(LOGITS + 7.0, jnp.asarray([2, 1]))
    np.testing.assert_allclose(losses, [LOG(2), LOG(4)], rtol=1e-5)


def test_cross_entropy_sums_over_positions():
    two = jnp.stack([LOGITS, LOGITS[::-1]])
    losses = cross_entropy(two, jnp.asarray([[0, 0], [2, 1]]))
    np.testing.assert_allclose(losses, [LOG(6) + LOG(2), LOG(4) + LOG(3)], rtol=1e-5)


def test_negative_probability_by_hand():
    losses = negative_probability(LOGITS - 3.0, jnp.asarray([1, 0]))
    np.testing.assert_allclose(losses, [-1 / 3, -1 / 2], rtol=1e-5)


def test_negative_probability_sums_over_positions():
    two = jnp.stack([LOGITS, LOGITS[::-1]])
    losses = negative_probability(two, jnp.asarray([[0, 0], [2, 1]]))
    np.testing.assert_allclose(losses, [-1 / 6 - 1 / 2, -1 / 4 - 1 / 3], rtol=1e-5)


def test_binary_cross_entropy_by_hand():
    logit = jnp.asarray([[0.0], [LOG(3)], [LOG(3)]], jnp.float32)
    losses = binary_cross_entropy(logit, jnp.asarray([1, 1, 0]))
    np.testing.assert_allclose(losses, [LOG(2), LOG(4 / 3), LOG(4)], rtol=1e-5)


def test_binary_squared_error_by_hand():
    logit = jnp.asarray([[0.0], [LOG(3)], [LOG(3)]], jnp.float32)
    losses = binary_squared_error(logit, jnp.asarray([1, 1, 0]))
    np.testing.assert_allclose(losses, [1 / 4, 1 / 16, 9 / 16], rtol=1e-5)


def test_mean_squared_error_is_a_mean_over_all_of_an_example():
    output = jnp.asarray([[[1.0, 2.0], [3.0, 4.0]], [[0.0, 0.0], [0.0, 2.0]]])
    target = jnp.asarray([[[1.0, 1.0], [1.0, 1.0]], [[0.0, 0.0], [0.0, -2.0]]])
    assert mean_squared_error(output, target).tolist() == [(0 + 1 + 4 + 9) / 4, 4.0]
    assert mean_squared_error(jnp.asarray([3.0, 1.0]), jnp.asarray([1.0, 1.0])).tolist() == [4, 0]


EXTREME = {
    "cross_entropy": [0.0, 2e30],
    "negative_probability": [-1.0, 0.0],
    "binary_cross_entropy": [0.0, 2e30],
    "binary_squared_error": [0.0, 1.0],
}


@pytest.mark.parametrize("name", EXTREME)
def test_losses_and_gradients_of_extreme_logits_are_finite(name):
    big = 1e30 if "binary" not in name else 2e30
    # The first is right beyond doubt, the second as wrong.
    if "binary" in name:
        logits, labels = jnp.asarray([[-big], [big]]), jnp.asarray([0, 0])
    else:
        logits, labels = jnp.asarray([[big, -big, 0.0]] * 2), jnp.asarray([0, 1])
    np.testing.assert_allclose(LOSSES[name](logits, labels), EXTREME[name], rtol=1e-5)
    gradient = jax.grad(lambda x: LOSSES[name](x, labels).sum())(logits)
    assert jnp.isfinite(gradient).all()
    assert not gradient[0].any()


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_equal_finite_differences(name):
    random = np.random.default_rng(0)
    if "binary" in name:
        output, target = random.normal(size=(4, 1)), jnp.asarray([0, 1, 1, 0])
    elif name == "mean_squared_error":
        output = random.normal(size=(3, 2, 2))
        target = jnp.asarray(random.normal(size=(3, 2, 2)), jnp.float32)
    else:
        output, target = random.normal(size=(3, 2, 4)), jnp.asarray([[0, 3], [1, 1], [2, 0]])
    loss = jax.jit(lambda x: LOSSES[name](x, target))
    output = jnp.asarray(output, jnp.float32)
    check_grads(loss, (output,), 1, modes=["rev"], atol=1e-2, rtol=1e-2)
    assert float(jnp.abs(jax.grad(lambda x: loss(x).sum())(output)).max()) > 0.05


def test_cross_entropys_gradient_is_the_probability_less_one_at_the_label():
    gradient = jax.grad(lambda x: cross_entropy(x, jnp.asarray([2, 1])).sum())(LOGITS)
    expected = [[1 / 6, 1 / 3, -1 / 2], [1 / 2, -3 / 4, 1 / 4]]
    np.testing.assert_allclose(gradient, expected, rtol=1e-5)


def test_a_weight_is_a_number_or_a_schedule():
    number = Objective("main", "label", cross_entropy, 0.3)
    schedule = Objective("main", "label", cross_entropy, optax.linear_schedule(1.0, 0.0, 4))
    for step in (1, jnp.asarray(1, jnp.int32)):
        assert number.weight_at(step) == jnp.float32(0.3)
        assert schedule.weight_at(step) == 0.75
        assert schedule.weight_at(step).dtype == number.weight_at(step).dtype == jnp.float32
        assert schedule.weight_at(step).shape == ()
    assert schedule.weight_at(9) == 0
    assert Objective("main", "label", cross_entropy).weight_at(5) == 1
    assert jax.jit(schedule.weight_at)(jnp.asarray(2, jnp.int32)) == 0.5
    weights = objectives.weights({"a": number, "b": schedule}, 3)
    assert {k: float(v) for k, v in weights.items()} == {"a": pytest.approx(0.3), "b": 0.25}


def test_each_objective_is_evaluated_on_its_output_and_target_without_its_weight():
    chosen = {
        "class": Objective("main", "label", cross_entropy, 0.5),
        "copy": Objective("code", "image", mean_squared_error, 7.0),
    }
    outputs = {"main": LOGITS, "code": jnp.asarray([1.0, 4.0])}
    batch = {"label": jnp.asarray([2, 1]), "image": jnp.asarray([1.0, 1.0])}
    found = objectives.evaluate(chosen, outputs, batch)
    np.testing.assert_allclose(found["class"], [LOG(2), LOG(4)], rtol=1e-5)
    assert found["copy"].tolist() == [0, 9]


def test_check_names_what_is_missing():
    logits, label = jax.ShapeDtypeStruct((2, 3), "float32"), jax.ShapeDtypeStruct((2,), "int32")
    outputs, batch = {"main": logits, "exit_1": logits}, {"image": logits, "label": label}
    objectives.check({"o": Objective("main", "label", cross_entropy)}, outputs, batch)
    with pytest.raises(ValueError, match="There is no objective"):
        objectives.check({}, outputs, batch)
    with pytest.raises(ValueError, match=r"'o' is on the output 'exit1'.*Did you mean 'exit_1'"):
        objectives.check({"o": Objective("exit1", "label", cross_entropy)}, outputs, batch)
    with pytest.raises(ValueError, match=r"'o' is on the target 'zzz'.*Known: image, label"):
        objectives.check({"o": Objective("main", "zzz", cross_entropy)}, outputs, batch)


# ---- Smoothed labels.


def test_smoothed_cross_entropy_by_hand():
    # Means of -log p: (log 6 + log 3 + log 2) / 3 and (log 2 + 2 log 4) / 3.
    losses = SmoothedCrossEntropy(0.3)(LOGITS + 7.0, jnp.asarray([2, 1]))
    first = 0.7 * LOG(2) + 0.3 * (LOG(6) + LOG(3) + LOG(2)) / 3
    second = 0.7 * LOG(4) + 0.3 * (LOG(2) + 2 * LOG(4)) / 3
    np.testing.assert_allclose(losses, [first, second], rtol=1e-5)
    # Smoothed labels q: -sum q log p.
    q = np.array([[0.1, 0.1, 0.8], [0.1, 0.8, 0.1]])
    p = np.array([[1 / 6, 2 / 6, 3 / 6], [1 / 2, 1 / 4, 1 / 4]])
    np.testing.assert_allclose(losses, -(q * np.log(p)).sum(-1), rtol=1e-5)


def test_smoothed_cross_entropy_sums_over_positions():
    two = jnp.stack([LOGITS, LOGITS[::-1]])
    labels = jnp.asarray([[0, 0], [2, 1]])
    one = SmoothedCrossEntropy(0.2)
    expected = sum(one(two[:, i], labels[:, i]) for i in range(2))
    np.testing.assert_allclose(one(two, labels), expected, rtol=1e-5)


def test_without_smoothing_it_is_cross_entropy():
    logits = 20 * jnp.asarray(np.random.default_rng(0).normal(size=(50, 7)), jnp.float32)
    labels = jnp.arange(50) % 7
    found = SmoothedCrossEntropy(0.0)(logits, labels)
    np.testing.assert_array_equal(found, cross_entropy(logits, labels))


def test_the_gradient_of_smoothed_cross_entropy():
    labels = jnp.asarray([2, 1])
    loss = SmoothedCrossEntropy(0.3)
    check_grads(jax.jit(lambda x: loss(x, labels)), (LOGITS,), 1, ["rev"], atol=1e-2, rtol=1e-2)
    gradient = jax.grad(lambda x: loss(x, labels).sum())(LOGITS)
    # The probability less the smoothed label.
    p = np.array([[1 / 6, 2 / 6, 3 / 6], [1 / 2, 1 / 4, 1 / 4]])
    q = np.array([[0.1, 0.1, 0.8], [0.1, 0.8, 0.1]])
    np.testing.assert_allclose(gradient, p - q, rtol=1e-5)
    # It is 0 where the probabilities are the smoothed labels, not where they are 1.
    best = jnp.log(jnp.asarray(q, jnp.float32))
    gradient = jax.grad(lambda x: loss(x, labels).sum())(best)
    np.testing.assert_allclose(gradient, 0, atol=1e-6)


@pytest.mark.parametrize("smoothing", [-0.1, 1.0, 2.0, float("nan")])
def test_an_impossible_smoothing_is_refused(smoothing):
    with pytest.raises(ValueError, match=rf"smoothing is {smoothing}; it should be at least 0 and"):
        SmoothedCrossEntropy(smoothing)


def test_losses_that_classify():
    found = {name for name, loss in LOSSES.items() if classifies(loss)}
    assert found == {"cross_entropy", "negative_probability"}
    assert classifies(SmoothedCrossEntropy(0.2))
    assert not classifies(lambda logits, labels: logits.sum(-1))


def _created(loss):
    sections = ConfigDict({"main": configuration.objective("main", "label", loss)})
    return objective_sections.create(sections, {}, {}, {})["main"]


def test_a_loss_with_settings_is_chosen_by_a_section():
    assert _created("cross_entropy").loss is cross_entropy
    section = configuration.loss("smoothed_cross_entropy")
    assert section.to_dict() == {"name": "smoothed_cross_entropy", "smoothing": 0.1}
    assert _created(section).loss == SmoothedCrossEntropy(0.1)
    described = configuration.loss("smoothed_cross_entropy", smoothing=0.3)
    assert _created(described).loss == SmoothedCrossEntropy(0.3)
    config = configuration.default()
    config.objectives.main = configuration.objective("main", "label", section)
    changed = configuration.override(config, ["--config.objectives.main.loss.smoothing=0.2"])
    found = objective_sections.create(changed.objectives, {}, {}, {})["main"]
    assert found.loss == SmoothedCrossEntropy(0.2)


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        ({"name": "cross_entropy"}, r"no loss 'cross_entropy'. Did you mean 'smoothed_cross_ent"),
        ({"name": "smoothed_cross_entropy", "share": 0.1}, r"no setting 'share'"),
        ({"name": "smoothed_cross_entropy", "smoothing": "a"}, r"smoothing is 'a', a str; it shou"),
        ({"name": "smoothed_cross_entropy", "smoothing": 1.5}, r"label smoothing is 1.5"),
        ({"smoothing": 0.1}, r"A loss needs a 'name'; it has only \['smoothing'\]"),
        ("smoothed_cross_entropy", r"no loss 'smoothed_cross_entropy'"),
    ],
)
def test_a_bad_section_of_a_loss_is_refused(loss, message):
    sections = ConfigDict({"main": {"output": "main", "target": "label", "loss": loss}})

    def create():
        objective_sections.check("main", sections.main)
        objective_sections.create(sections, {}, {}, {})

    with pytest.raises(ValueError, match=message):
        create()
    with pytest.raises(ValueError, match=r"no loss 'smothed_cross_entropy'. Did you mean 'smooth"):
        configuration.loss("smothed_cross_entropy")
    with pytest.raises(ValueError, match=r"has no setting 'smoothin'. Did you mean 'smoothing'"):
        configuration.loss("smoothed_cross_entropy", smoothin=0.2)


# ---- Labels outside of their classes.


@pytest.mark.parametrize("label", [-1, 3, 255])
@pytest.mark.parametrize("loss", [cross_entropy, negative_probability, SmoothedCrossEntropy(0.1)])
def test_a_loss_of_a_label_outside_of_its_classes_is_not_a_number(loss, label):
    losses = loss(LOGITS, jnp.asarray([label, 1]))
    np.testing.assert_array_equal(np.isnan(losses), [True, False])
    np.testing.assert_array_equal(losses[1], loss(LOGITS, jnp.asarray([0, 1]))[1])


@pytest.mark.parametrize("loss", [binary_cross_entropy, binary_squared_error])
def test_a_binary_loss_of_what_is_no_probability_is_not_a_number(loss):
    losses = loss(jnp.ones((5, 1)), jnp.asarray([-1, 0, 1, 2, 255]))
    assert np.isnan(losses).tolist() == [True, False, False, True, True]
    soft = loss(jnp.ones((2, 1)), jnp.asarray([0.25, 1.5]))
    assert np.isnan(soft).tolist() == [False, True]


def test_sections_may_say_what_counts():
    section = configuration.objective("main", "label", "cross_entropy", ignore=255, mask="known")
    made = objective_sections.create(ConfigDict({"main": section}), {}, {}, {})["main"]
    assert (made.ignore, made.mask, made.classifies) == (255, "known", None)
    assert "ignore" not in configuration.objective("main", "label", "cross_entropy")
    wrong = {**section.to_dict(), "ignore": "all"}
    with pytest.raises(ValueError, match=r"objectives.main.ignore is 'all', a str; .* a int"):
        objective_sections.check("main", ConfigDict(wrong))
