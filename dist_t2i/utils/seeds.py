"""Random numbers as pure functions of integers such as (seed, images seen, purpose), equal on every machine.

`mix` computes seeds for torch's generators. `random_bits` returns 64 random bits, which the training stream uses
directly. Each of the two functions has its own enum of purposes. Each window of the stream's order has a purpose of its
own in `random_bits`, a number from `StreamPurpose.WINDOWS` on. The results of a run depend on the values in both enums,
so existing values must never change, and a new purpose must get a new value.
"""

from __future__ import annotations

import hashlib
from enum import IntEnum

_MASK = (1 << 64) - 1


class Purpose(IntEnum):
    """Purposes of `mix`. Some values have several uses, because separate values would change the results of existing
    runs. So training/sample_grid.py also keeps selecting sources by `mix(seed, number)`, without a purpose."""

    TRAINING_NOISE = 1  # noise, conditioning noise and augmentation of one row of a training batch
    FD_R1_PIXELS = 2  # the perturbation of one row's picture in finite-difference R1
    NEGATIVES_AND_INFERENCE_NOISE = 3  # region negatives of a step, or the noise of a grid column or of a picture
    EVALUATION_NOISE = 4  # noise of one picture generated or edited in an evaluation
    R_PRECISION_CANDIDATES = 5
    REFERENCE_PICTURES = 6  # how real pictures are degraded for reference scores
    SCENE_CLASSIFIER = 7  # the scenes that train the detector of attributes, and its first weights
    SAME_CAPTION = 8  # further real pictures of a caption that the project renders
    MODE_SEEKING_NOISE = 9  # noise and conditioning noise of the second fake of one row of a training batch
    NEW_TOKENS = 0x544F4B454E  # embeddings of the characters that a trained model lacks
    SCENES = 0x5343454E  # all properties of one rendered scene


class StreamPurpose(IntEnum):
    """Purposes of `random_bits`. Tests use further numbers."""

    SHARDS = 1  # the order of the shards in one epoch
    WINDOWS = 2  # shuffles one window of the order; purpose: this value plus the window's offset in its epoch
    CAPTION = 100
    FLIP = 101
    CROP_SHARE = 102
    CROP_ACROSS = 103
    CROP_DOWN = 104
    EDIT_KIND = 110  # whether a picture's source is itself, another picture, or missing
    EDIT_SOURCE = 111
    MIXTURE = 0x4D495854  # the slots of one cycle of a mixture of sets


def mix(*values: int) -> int:
    """A 63-bit hash of integers, computed with splitmix64's finalizer over a running sum (Steele et al. 2014)."""
    state = 0
    for value in values:
        state = (state + value + 0x9E3779B97F4A7C15) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state >> 1


def random_bits(seed: int, position: int, purpose: int) -> int:
    """64 random bits for one position in the training stream. Uses the finalizer of `mix`, but another sum."""
    value = seed & _MASK
    for part in (purpose, position):
        value = (value * 31 + part + 1) * 0x9E3779B97F4A7C15 & _MASK
        value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
        value = (value ^ (value >> 27)) * 0x94D049BB133111EB & _MASK
        value ^= value >> 31
    return value


def unit_hash(text: str) -> float:
    """A number in [0, 1) that depends only on `text`: the first 64 bits of the SHA-256 of `text`."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64
