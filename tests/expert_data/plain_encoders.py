"""Encoders without weights, small enough for tests, and pictures to give to them."""

from __future__ import annotations

import numpy as np
from PIL import Image


class WordEncoder:
    """A text encoder small enough for tests: a token a word between two special ones, states from the bytes."""

    name, digest, dim = "words", "0" * 64, 4

    def lengths(self, texts):
        return np.array([min(len(text.split()) + 2, 9) for text in texts], dtype=np.int16)

    def encode(self, texts, tokens=None):
        lengths = self.lengths(texts)
        states = np.zeros((len(texts), tokens or int(lengths.max()), self.dim), dtype=np.float16)
        for row, text in enumerate(texts):
            for place, word in enumerate(["<", *text.split()[:7], ">"]):
                states[row, place] = np.frombuffer(word.encode()[:4].ljust(4), dtype=np.uint8) / 64
        return states, lengths


class MeanColour:
    """A feature encoder small enough for tests: the mean colour of the image and of its upper half."""

    name, digest, dim, size = "mean-colour", "1" * 64, 6, 8

    def encode(self, images):
        upper = images[:, : images.shape[1] // 2]
        return np.concatenate([images.mean((1, 2)), upper.mean((1, 2))], axis=1).astype(np.float32)


def picture(number: int, size: tuple[int, int] = (40, 30)) -> Image.Image:
    values = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(values)
