"""All figures of one set of pictures, as the plan's own rule for rows has them."""

from __future__ import annotations

import numpy as np

from paris_swarm.router.evaluation.measure import Prompts, Reference, measure
from paris_swarm.router.partition import nearest


class Corner:
    """The first two numbers of a picture."""

    name, size = "corner", 4

    def encode(self, images: np.ndarray) -> np.ndarray:
        return images[:, 0, 0, :2].astype(np.float32)


def test_own_cluster_follows_the_bounds_on_sizes():
    generator = np.random.default_rng(0)
    images = generator.integers(1, 255, (40, 4, 4, 3), dtype=np.uint8)
    centroids, biases = np.eye(2, dtype=np.float32), np.array([0.4, 0.0], dtype=np.float32)
    features = Corner().encode(images)
    labels = nearest(features, centroids, biases)
    assert (labels != nearest(features, centroids)).any()
    prompts, reference = Prompts(labels, [{"text": "x"}] * 40, images), Reference(features, 40)
    real = measure(images, prompts, reference, centroids, Corner(), biases=biases)
    assert real.cluster_accuracy == 1.0  # real pictures lie in their own cluster, by the rule that sorted them
    assert measure(images, prompts, reference, centroids, Corner()).cluster_accuracy < 1.0
