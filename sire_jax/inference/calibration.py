"""Whether probabilities are as often right as they say, and a temperature that makes them so."""

import numpy as np

# Temperatures that are tried: outside, probabilities are all but equal or certain.
LEAST, MOST = 0.01, 100.0


def probabilities(logits: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    """Returns ``softmax(logits / T)``.

    Args:
        logits: ``[n, classes]``.
        temperature: T, above 0.

    Returns:
        ``[n, classes]``, float64.
    """
    scaled = _shifted(logits) / temperature
    powers = np.exp(scaled)
    return powers / powers.sum(-1, keepdims=True)


def _shifted(logits: np.ndarray) -> np.ndarray:
    wide = np.asarray(logits, np.float64)
    return wide - wide.max(-1, keepdims=True)


def expected_calibration_error(predicted: np.ndarray, labels: np.ndarray, bins: int = 15) -> float:
    """The mean distance between confidence and accuracy (Guo et al., 2017, Eq. 3).

    ``ECE = sum_m |B_m| / n |acc(B_m) - conf(B_m)|``, where ``B_m`` has the examples whose largest
    probability is in ``((m - 1) / M, m / M]``.

    >>> predicted = np.array([[0.8, 0.2], [0.8, 0.2]])
    >>> round(expected_calibration_error(predicted, np.array([0, 1])), 4)  # half are right
    0.3

    Args:
        predicted: Probabilities ``[n, classes]``.
        labels: Integers ``[n]``.
        bins: M, the number of bins.

    Returns:
        The error, in [0, 1].

    Raises:
        ValueError: If there are no examples, the first argument holds no probabilities, labels are
            not whole numbers in [0, classes), one each, or there is no bin.
    """
    if not len(labels):
        raise ValueError("There are no examples to measure calibration on.")
    if bins < 1:
        raise ValueError(f"Calibration is to be measured in {bins} bins; it should be at least 1.")
    _check_labels(labels, predicted)
    _check_probabilities(predicted)
    confidence = np.asarray(predicted.max(-1), np.float64)
    right = predicted.argmax(-1) == labels
    bin_of = np.digitize(confidence, np.arange(1, bins) / bins, right=True)
    # |B_m| cancels: the sum over a bin of (right - confidence), not its mean.
    gaps = np.bincount(bin_of, weights=right - confidence, minlength=bins)
    return float(np.abs(gaps).sum() / len(labels))


def fit_temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """Finds the temperature with the least negative log likelihood (Guo et al., 2017, Section 4.2).

    ``T = argmin_T -1/n sum_i log softmax(z_i / T)[y_i]``, by Newton's method in ``b = 1 / T``, in
    which it is convex, and bisection where a step leaves the bracket.

    Args:
        logits: z, ``[n, classes]``, finite.
        labels: y, integers ``[n]``.

    Returns:
        T, in [0.01, 100]; 0.01 where all labels have the largest logit, which no temperature is
        too low for.

    Raises:
        ValueError: If there are no examples, a logit is not finite, or labels are not whole numbers
            in [0, classes), one each.
    """
    if not len(labels):
        raise ValueError("There are no examples to fit a temperature on.")
    if not np.isfinite(logits).all():
        raise ValueError("Logits are not finite, so that they have no temperature.")
    _check_labels(labels, logits)
    z = _shifted(logits)
    right = z[np.arange(len(z)), labels].mean()
    low, high = 1 / MOST, 1 / LEAST
    b = 1.0
    while high - low > 1e-12 * high:
        p = probabilities(z, 1 / b)
        mean = (p * z).sum(-1)
        slope = mean.mean() - right
        low, high = (low, b) if slope > 0 else (b, high)
        curvature = ((p * z**2).sum(-1) - mean**2).mean()
        step = b - slope / curvature if curvature > 0 else low
        if abs(step - b) <= 1e-9 * b:
            break
        # T is sought over four orders of magnitude: the middle is that of logarithms.
        b = step if low < step < high else (low * high) ** 0.5
    return float(1 / b)


def _check_labels(labels: np.ndarray, scores: np.ndarray) -> None:
    classes, kind = scores.shape[-1], np.asarray(labels).dtype
    if kind.kind not in "iub" or np.shape(labels) != scores.shape[:-1]:
        raise ValueError(
            f"Labels are {kind}{list(np.shape(labels))}; they should be whole numbers, one for each"
            f" of the examples {list(scores.shape)}."
        )
    outside = np.flatnonzero((np.asarray(labels) < 0) | (np.asarray(labels) >= classes))
    if len(outside):
        raise ValueError(
            f"{len(outside)} labels are outside of the {classes} classes 0..{classes - 1}: the"
            f" first is {labels[outside[0]]} at index {outside[0]}. Leave such examples out."
        )


def _check_probabilities(predicted: np.ndarray) -> None:
    sums = np.asarray(predicted, np.float64).sum(-1)
    negative = np.asarray(predicted).min() < 0
    # Of float32, and of half precision.
    if negative or not np.allclose(sums, 1, atol=1e-2):
        worst = float(sums[np.argmax(np.abs(sums - 1))])
        raise ValueError(
            f"Calibration is measured of probabilities, at least 0 with the sum 1; these have the"
            f" sum {worst:.4g} and the least value {float(np.min(predicted)):.4g}. Of logits take"
            " calibration.probabilities(logits)."
        )
