import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sire_jax.data.augmentation import AUGMENTATIONS, Affine, Crop, Flip, Swap, chain
from sire_jax.data.tasks import ordered


def _apply(augmentation, batch, seed=0):
    return jax.jit(augmentation)(jax.random.key(seed), batch)


def _pairs(number=1000, side=2):
    first, second = jax.random.split(jax.random.key(9))
    digits = jax.random.randint(first, (number, 2), 0, 4)
    image = jax.random.uniform(second, (number, 2, side, side, 1))
    return {"image": image, "digits": digits, "label": ordered(digits)}


def _same(a, b):
    return a.keys() == b.keys() and all(jnp.array_equal(a[k], b[k]) for k in a)


def test_every_pair_is_swapped_with_probability_one():
    batch = _pairs()
    swapped = _apply(Swap(1.0), batch)
    assert jnp.array_equal(swapped["image"], batch["image"][:, ::-1])
    assert jnp.array_equal(swapped["digits"], batch["digits"][:, ::-1])
    a, b = np.asarray(batch["digits"]).T
    assert np.array_equal(swapped["label"], (b <= a).astype(np.int32))
    assert (a == b).sum() > 100
    assert (np.asarray(swapped["label"])[a == b] == 1).all()
    assert swapped["label"].dtype == batch["label"].dtype


@pytest.mark.parametrize("augmentation", [Swap(0.0), Flip(0.0), Crop(0)])
def test_nothing_changes_with_probability_zero(augmentation):
    batch = _pairs()
    assert _same(_apply(augmentation, batch), batch)


@pytest.mark.parametrize("augmentation", [Swap(), Flip()])
def test_the_same_change_twice_is_none(augmentation):
    batch = _pairs()
    once = _apply(augmentation, batch)
    assert not _same(once, batch)
    assert _same(_apply(augmentation, once), batch)
    assert not _same(_apply(augmentation, batch, seed=1), once)


def test_about_half_of_the_pairs_are_swapped_all_of_a_pair_together():
    batch = _pairs()
    swapped = _apply(Swap(), batch)
    changed = np.asarray((swapped["image"] != batch["image"]).any((1, 2, 3, 4)))
    # 500 +- 16.
    assert 420 < changed.sum() < 580
    other = np.where(changed[:, None], batch["digits"][:, ::-1], batch["digits"])
    assert np.array_equal(swapped["digits"], other)
    assert np.array_equal(swapped["label"], ordered(jnp.asarray(other)))


def test_flip_mirrors_left_to_right():
    image = jnp.arange(12.0).reshape(1, 2, 3, 2)
    flipped = _apply(Flip(1.0), {"image": image, "label": jnp.array([3])})
    assert flipped["image"][0, :, :, 0].tolist() == [[4, 2, 0], [10, 8, 6]]
    assert flipped["image"][0, :, :, 1].tolist() == [[5, 3, 1], [11, 9, 7]]
    assert flipped["label"].tolist() == [3]


def test_each_image_of_a_pair_is_flipped_on_its_own():
    batch = _pairs()
    flipped = _apply(Flip(), batch)
    mirrored = jnp.all(flipped["image"] == batch["image"][..., ::-1, :], (2, 3, 4))
    kept = jnp.all(flipped["image"] == batch["image"], (2, 3, 4))
    assert jnp.array_equal(mirrored, ~kept)
    # Neither, one or both of a pair: about a quarter, half, a quarter.
    shares = np.bincount(np.asarray(mirrored.sum(1)), minlength=3) / 1000
    assert shares == pytest.approx([0.25, 0.5, 0.25], abs=0.08)
    assert jnp.array_equal(flipped["digits"], batch["digits"])


def test_crop_takes_a_window_of_the_padded_image():
    images = np.asarray(jax.random.uniform(jax.random.key(0), (100, 2, 3, 4, 2))) + 1
    cropped = np.asarray(_apply(Crop(1), {"image": jnp.asarray(images)})["image"])
    assert cropped.shape == images.shape
    found = []
    for image, crop in zip(images.reshape(-1, 3, 4, 2), cropped.reshape(-1, 3, 4, 2), strict=True):
        padded = np.pad(image, ((1, 1), (1, 1), (0, 0)))
        windows = [(i, j) for i in range(3) for j in range(3)]
        here = [w for w in windows if np.array_equal(padded[w[0] :, w[1] :][:3, :4], crop)]
        assert len(here) == 1
        found += here
    # All nine shifts occur, and an image moves apart from the other of its pair.
    counts = np.bincount([3 * i + j for i, j in found], minlength=9)
    assert counts.min() > 5
    assert sum(a != b for a, b in zip(found[::2], found[1::2], strict=True)) > 70


@pytest.mark.parametrize(("border", "mode"), [("zeros", "constant"), ("reflection", "reflect")])
@pytest.mark.parametrize("padding", [0, 1, 3])
def test_every_crop_is_a_window_of_what_numpy_pads(border, mode, padding, monkeypatch):
    image = np.asarray(jax.random.uniform(jax.random.key(0), (4, 5, 2))) + 1
    padded = np.pad(image, ((padding, padding), (padding, padding), (0, 0)), mode)
    windows = np.array(list(np.ndindex(2 * padding + 1, 2 * padding + 1)))
    # Each offset in turn, in place of random ones.
    start = jnp.asarray(windows, jnp.int32)
    monkeypatch.setattr(jax.random, "randint", lambda key, *_: start[key])
    crop = jax.jit(jax.vmap(Crop(padding, border)._crop, (0, None)))
    found = np.asarray(crop(jnp.arange(len(start)), jnp.asarray(image)))
    for (i, j), each in zip(windows, found, strict=True):
        np.testing.assert_array_equal(each, padded[i : i + 4, j : j + 5])


def test_reflected_crops_move_in_all_directions_and_bring_no_zeros():
    images = jax.random.uniform(jax.random.key(0), (100, 2, 3, 4, 2)) + 1
    cropped = np.asarray(_apply(Crop(2, "reflection"), {"image": images})["image"])
    assert cropped.min() >= 1
    found = set()
    for image, crop in zip(
        np.asarray(images).reshape(-1, 3, 4, 2), cropped.reshape(-1, 3, 4, 2), strict=True
    ):
        padded = np.pad(image, ((2, 2), (2, 2), (0, 0)), "reflect")
        here = [w for w in np.ndindex(5, 5) if np.array_equal(padded[w[0] :, w[1] :][:3, :4], crop)]
        assert here
        found |= set(here)
    assert found == set(np.ndindex(5, 5))


def test_bad_crops_are_refused():
    with pytest.raises(ValueError, match=r"crop: padding is -1; it should be at least 0"):
        Crop(-1)
    message = r"crop: border is 'reflect'. Did you mean 'reflection'\? Known: reflection, zeros"
    with pytest.raises(ValueError, match=message):
        Crop(4, "reflect")
    image = {"image": jnp.ones((2, 3, 4, 1))}
    _apply(Crop(2, "reflection"), image)
    message = r"padding is 3, but images of 3 x 4 can be reflected by at most 2"
    with pytest.raises(ValueError, match=message):
        Crop(3, "reflection")(jax.random.key(0), image)
    # Zeros may be as many as one likes.
    assert Crop(5)(jax.random.key(0), image)["image"].shape == (2, 3, 4, 1)


def test_affine_of_zero_amounts_changes_nothing():
    batch = _pairs(20, 5)
    moved = _apply(Affine(0.0, 0.0, 0.0), batch)
    assert jnp.allclose(moved["image"], batch["image"], atol=1e-5)
    assert jnp.array_equal(moved["digits"], batch["digits"])


def _transforms(augmentation, images=64, height=12, width=20):
    """Recovers the matrix and the shift of each image from what it does to coordinates."""
    rows, columns = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")
    image = np.stack([rows, columns, np.ones_like(rows)], -1).astype(np.float32)
    batch = {"image": jnp.asarray(np.broadcast_to(image, (images // 2, 2, *image.shape)))}
    moved = np.asarray(_apply(augmentation, batch)["image"]).reshape(images, -1, 3)
    centre = (np.array([height, width]) - 1) / 2
    grid = np.stack([rows.ravel(), columns.ravel()], -1) - centre
    found = []
    for each in moved:
        inside = each[:, 2] > 1 - 1e-6
        assert inside.sum() > 50
        known = np.concatenate([grid, np.ones((len(grid), 1))], -1)[inside]
        fit, *_ = np.linalg.lstsq(known, each[inside, :2] - centre, rcond=None)
        assert np.allclose(known @ fit, each[inside, :2] - centre, atol=1e-3)
        found.append(fit.T)
    found = np.array(found)
    return found[:, :, :2], found[:, :, 2]


def _fills(values, amount):
    """Whether values are spread over [-amount, amount]."""
    return bool(
        np.abs(values).max() <= amount * 1.001
        and values.max() > 0.8 * amount
        and values.min() < -0.8 * amount
    )


def test_affine_rotates_about_the_centre():
    matrix, shift = _transforms(Affine(rotation=15.0, translation=0.0, shear=0.0))
    assert np.allclose(matrix @ matrix.transpose(0, 2, 1), np.eye(2), atol=1e-3)
    assert np.allclose(np.linalg.det(matrix), 1, atol=1e-3)
    assert np.allclose(shift, 0, atol=1e-3)
    assert _fills(np.rad2deg(np.arctan2(matrix[:, 1, 0], matrix[:, 0, 0])), 15)


def test_affine_translates_by_a_share_of_each_side():
    matrix, shift = _transforms(Affine(rotation=0.0, translation=0.1, shear=0.0))
    assert np.allclose(matrix, np.eye(2), atol=1e-3)
    assert _fills(shift[:, 0], 1.2)
    assert _fills(shift[:, 1], 2.0)
    assert abs(np.corrcoef(shift.T)[0, 1]) < 0.5


def test_affine_shears_along_the_rows():
    matrix, shift = _transforms(Affine(rotation=0.0, translation=0.0, shear=20.0))
    assert np.allclose(matrix[:, [0, 0, 1], [0, 1, 1]], [1, 0, 1], atol=1e-3)
    assert np.allclose(shift, 0, atol=1e-3)
    assert _fills(np.rad2deg(np.arctan(matrix[:, 1, 0])), 20)


def test_affine_keeps_a_centred_blob():
    distance = (np.arange(21) - 10.0) ** 2
    blob = np.exp(-(distance[:, None] + 0.3 * distance[None]) / 8).astype(np.float32)
    batch = {"image": jnp.asarray(np.tile(blob[None, :, :, None], (16, 1, 1, 1)))}
    turned = np.asarray(_apply(Affine(45.0, 0.0, 0.0), batch)["image"])[..., 0]
    assert turned.sum((1, 2)) == pytest.approx(np.full(16, blob.sum()), rel=0.02)
    across = (turned.sum(1) * np.arange(21)).sum(-1) / turned.sum((1, 2))
    assert across == pytest.approx(np.full(16, 10.0), abs=0.1)
    assert len({each.round(4).tobytes() for each in turned}) == 16


def test_affine_is_finite_and_brings_zeros_in_from_outside():
    moved = _apply(Affine(90.0, 1.0, 60.0), {"image": jnp.ones((50, 2, 6, 6, 1))})["image"]
    assert bool(jnp.isfinite(moved).all())
    assert float(moved.min()) == 0
    assert float(moved.max()) <= 1 + 1e-6


def test_a_chain_applies_each_in_order_under_its_own_key():
    seen = []

    def times(key, batch):
        seen.append(jax.random.key_data(key).tolist())
        return {**batch, "image": batch["image"] * 2}

    def plus(key, batch):
        seen.append(jax.random.key_data(key).tolist())
        return {**batch, "image": batch["image"] + 1}

    batch = {"image": jnp.array([3.0]), "label": jnp.array([1])}
    key = jax.random.key(5)
    assert chain({"b": times, "a": plus})(key, batch)["image"].tolist() == [7]
    assert chain({"a": plus, "b": times})(key, batch)["image"].tolist() == [8]
    assert seen[0] != seen[1]
    assert seen[:2] == seen[2:]
    chain({"a": plus})(jax.random.key(6), batch)
    assert seen[4] not in seen[:4]


def test_an_empty_chain_changes_nothing():
    batch = _pairs(3)
    assert _same(chain({})(jax.random.key(0), batch), batch)


@pytest.mark.parametrize("name", ["swap", "flip"])
@pytest.mark.parametrize("value", [-0.1, 1.5, float("nan")])
def test_an_impossible_probability_is_refused(name, value):
    with pytest.raises(ValueError, match=rf"{name}: probability is {value}.*\[0, 1\]"):
        AUGMENTATIONS[name](value)
