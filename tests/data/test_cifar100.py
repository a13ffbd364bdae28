"""The real CIFAR-100, where there is one, split as SIRe's config says."""

import numpy as np
import pytest
import real

from sire_jax import configuration
from sire_jax.configuration import experiment
from sire_jax.runs.loading import load_data

pytestmark = pytest.mark.slow  # Decodes 60,000 images.


@pytest.fixture(scope="module")
def cifar(tmp_path_factory):
    directory = real.directory_with("cifar100")
    config = configuration.load(
        f"{configuration.repository_configs()}/sire.py:cnn_base",
        [
            f"--config.data.dir={directory}",
            f"--config.data.cache={tmp_path_factory.mktemp('cache')}",
            "--config.seeds=2",
        ],
    )
    return config, *load_data(experiment.build(config))


def test_cifar_100_is_split_into_45000_5000_and_10000(cifar):
    _, dataset, draws = cifar
    assert dataset.classes == {"label": 100, "coarse_label": 20}
    assert dataset.train.image.shape == (50_000, 32, 32, 3)
    assert dataset.test.image.shape == (10_000, 32, 32, 3)
    labels = dataset.train.labels["label"]
    for draw in draws:
        assert [len(each) for each in draw] == [45_000, 5_000, 10_000]
        # Every training image once, in one of the two.
        assert np.array_equal(np.sort(np.concatenate(draw[:2])), np.arange(50_000))
        assert np.bincount(labels[draw.validation]).tolist() == [50] * 100
        assert np.bincount(labels[draw.train]).tolist() == [450] * 100
        assert np.array_equal(draw.test, np.arange(10_000))
    assert np.bincount(dataset.test.labels["label"]).tolist() == [100] * 100
    # Another draw for each seed: about a tenth of the validation images in common.
    common = np.intersect1d(draws[0].validation, draws[1].validation)
    assert 300 < len(common) < 700


def test_cifar_100_has_its_published_mean_and_coarse_labels(cifar):
    _, dataset, _ = cifar
    np.testing.assert_allclose(
        dataset.train.image.mean((0, 1, 2)) / 255, (0.5071, 0.4865, 0.4409), atol=1e-4
    )
    fine, coarse = (dataset.train.labels[kind] for kind in ("label", "coarse_label"))
    # Five classes in each of twenty groups, and no class in two.
    pairs = np.unique(np.stack([fine, coarse], 1), axis=0)
    assert len(pairs) == 100
    assert np.bincount(pairs[:, 1]).tolist() == [5] * 20
    names = [dataset.names[kind] for kind in ("label", "coarse_label")]
    fish = [names[0][i] for i, j in pairs if names[1][j] == "fish"]
    assert fish == ["aquarium_fish", "flatfish", "ray", "shark", "trout"]


def test_a_config_that_says_another_number_of_images_is_refused(cifar):
    config, _, _ = cifar
    wrong = configuration.override(config, ["--config.data.images=60000"])
    with pytest.raises(ValueError, match=r"data\.images is 60000, but .* has 50000 training"):
        load_data(experiment.build(wrong))
