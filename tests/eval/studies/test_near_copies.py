"""Near-copies of training pictures: copies and mirrored copies count, new pictures of the same kind do not."""

import io

import numpy
import pytest
import torch
from PIL import Image

from dist_t2i.data.shard_set import open_set
from dist_t2i.eval.judges.features import load_features
from dist_t2i.eval.measure import Features
from dist_t2i.eval.metrics import unit
from dist_t2i.eval.studies.near_copies import ALARM, RARE, NearCopies, limit_of, memorizing, nearest
from models_on_disk import write_tone_set


def features_of(fake, held_out):
    return Features(fake[None], {"real": held_out}, None)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return open_set(write_tone_set(tmp_path_factory.mktemp("sets") / "set", roles=60))


def pictures(data, split):
    samples = data.samples(split)
    shown = [Image.open(io.BytesIO(samples[i].image_bytes)).convert("RGB") for i in range(len(samples))]
    return torch.from_numpy(numpy.stack([numpy.asarray(image) for image in shown])).permute(0, 3, 1, 2)


def test_copies_count_and_new_pictures_do_not(small):
    pytest.importorskip("efficientnet_lite_pytorch")
    network = load_features("efficientnet-lite0", "cpu")
    train, test = (pictures(small, split) for split in ("train", "test"))
    copies = NearCopies(small, 32, mirrored=True)
    assert copies.small
    real = network(test)
    half_copied = torch.cat([train[:8], train[8:16].flip(-1)])
    slightly_changed = (train[16:24].int() + 2).clamp(0, 255).to(torch.uint8)
    assert copies.share(features_of(network(half_copied), real), network) == 1.0
    assert copies.share(features_of(network(slightly_changed), real), network) == 1.0
    assert copies.share(features_of(real, real), network) <= 0.05
    plain = NearCopies(small, 32, mirrored=False)
    assert 0.5 <= plain.share(features_of(network(half_copied), real), network) < 1.0


def test_about_one_percent_of_real_pictures_count():
    """Also where the held-out pictures lie closer to the training pictures than these to each other."""
    random = torch.Generator().manual_seed(0)
    rows = torch.randn(2000, 8, generator=random)
    training, held_out, new = unit(rows[:1000])[None], rows[1000:1500], rows[1500:]
    near = rows[:500] + 0.05 * torch.randn(500, 8, generator=random)
    for real in (None, held_out, held_out[:10]):
        assert (nearest(new, training) < limit_of(training, real)).double().mean() == pytest.approx(RARE, abs=0.01)
    assert (nearest(near, training) < limit_of(training, near)).double().mean() == pytest.approx(RARE, abs=0.005)


def test_a_large_set_is_left_out(small, monkeypatch):
    monkeypatch.setattr("dist_t2i.eval.studies.near_copies.LARGEST", 3)
    assert not NearCopies(small, 32, mirrored=False).small


def test_a_large_share_gives_a_warning_that_says_what_to_do():
    assert memorizing(RARE) == memorizing(ALARM) == ""
    said = memorizing(0.34)
    assert said.startswith("34% of the generated pictures are near-copies")
    assert all(key in said for key in ("augment.*", "train.init", "earlier checkpoint"))
