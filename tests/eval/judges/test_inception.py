"""torch-fidelity's Inception with random weights from a file gives the scores of torch-fidelity's own program."""

import importlib.util
import io

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset

from dist_t2i.errors import UserError
from dist_t2i.eval import metrics
from dist_t2i.eval.evaluate import load_networks
from dist_t2i.eval.judges import features, inception, resizing
from dist_t2i.eval.judges.weights import weights_file
from dist_t2i.eval.protocol import Protocol, load_protocol
from dist_t2i.eval.scoring import subset_kid
from pictures import shapes

if not importlib.util.find_spec("torch_fidelity"):
    pytest.skip("needs torch-fidelity", allow_module_level=True)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A file of random weights in torch-fidelity's format, with which the features of pictures differ."""
    module = inception.torch_fidelity("feature_extractor_inceptionv3")

    class Fresh(module.FeatureExtractorInceptionV3):
        def load_state_dict(self, state):
            """Keeps the sampled weights."""

    nothing = io.BytesIO()
    torch.save({}, nothing)
    nothing.seek(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = Fresh("inception", ["2048"], feature_extractor_weights_path=nothing)
        for parameter in network.parameters():
            if parameter.ndim > 1:
                torch.nn.init.kaiming_normal_(parameter)
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.save(network.state_dict(), path)
    return path


class Pictures(Dataset):
    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, row):
        return self.images[row]


def two_sets(count=10):
    """Colored rectangles at 40 px, and others with noise."""
    images = shapes(2 * count, side=40)
    noise = torch.randint(-30, 31, images[count:].shape, generator=torch.Generator().manual_seed(1))
    return images[:count], (images[count:].int() + noise).clamp(0, 255).to(torch.uint8)


@pytest.mark.slow
def test_legacy_numbers_are_torch_fidelitys(weights):
    """FID, KID, Inception Score, precision and recall of the same pictures with the same weights, by torch-fidelity's
    program."""
    inception.torch_fidelity("metrics")
    import torch_fidelity

    a, b = two_sets()
    options = {"kid_subsets": 5, "kid_subset_size": 8, "isc_splits": 2, "prc_neighborhood": 3}
    theirs = torch_fidelity.calculate_metrics(
        input1=Pictures(a),
        input2=Pictures(b),
        fid=True,
        kid=True,
        isc=True,
        prc=True,
        feature_extractor="inception-v3-compat",
        feature_extractor_weights_path=str(weights),
        cuda=False,
        batch_size=5,
        dataloader_num_workers=1,
        cache=False,
        verbose=False,
        **options,
    )
    judge = features.load_features("inception-legacy", "cpu", str(weights))
    ours = judge(a), judge(b)
    assert metrics.frechet(*ours) == pytest.approx(theirs["frechet_inception_distance"], rel=1e-3)
    protocol = Protocol("test", kid_subsets=5, kid_subset_size=8)
    # KID is a small difference of kernel values near 1, so its error is absolute, not relative.
    assert subset_kid(*ours, protocol) == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-3, abs=1e-5)
    isc = inception.torch_fidelity("metric_isc").isc_features_to_metric(ours[0] @ judge.classifier.T, 2)
    assert isc["inception_score_mean"] == pytest.approx(theirs["inception_score_mean"], rel=1e-5)
    assert metrics.in_manifold(*ours, 3).mean().item() == pytest.approx(theirs["precision"], abs=1e-6)
    assert metrics.in_manifold(*reversed(ours), 3).mean().item() == pytest.approx(theirs["recall"], abs=1e-6)


@pytest.mark.parametrize("side", [40, 350])
def test_clean_resizing_is_clean_fids(side):
    """clean-fid resizes each channel with Pillow, in floating point, and clips (cleanfid/resize.py, make_resizer)."""
    (image,) = shapes(1, side=side)
    channels = [Image.fromarray(channel.numpy().astype(np.float32)) for channel in image]
    resized = [np.asarray(channel.resize((299, 299), Image.Resampling.BICUBIC)).clip(0, 255) for channel in channels]
    ours = resizing.clean(image[None].float(), 299)[0]
    assert np.abs(ours.numpy() - np.stack(resized)).max() < 1e-2


@pytest.mark.slow
def test_clean_frechet_distance_is_that_of_clean_fids_pictures(weights):
    """The same network on pictures that Pillow resized as clean-fid does: 1e-3 of the distance."""
    a, b = two_sets(6)
    judge = features.load_features("inception-clean", "cpu", str(weights))

    def by_pillow(images):
        planes = [
            [Image.fromarray(c.numpy().astype(np.float32)).resize((299, 299), Image.Resampling.BICUBIC) for c in image]
            for image in images
        ]
        pixels = torch.tensor(np.stack([[np.asarray(c).clip(0, 255) for c in image] for image in planes]))
        return judge.module((pixels - 128) / 128)

    assert metrics.frechet(judge(a), judge(b)) == pytest.approx(metrics.frechet(by_pillow(a), by_pillow(b)), rel=1e-3)


def test_random_weights_give_no_published_name(weights):
    for key in ("inception-clean", "inception-legacy"):
        judge = features.load_features(key, "cpu", str(weights))
        name = judge.called("fid")
        assert name.startswith("Fréchet distance (InceptionV3, weights sha256 ") and judge.weights_sha256[:8] in name
        assert not {"FID", "KID", "Inception Score"} & {judge.called(m) for m in ("fid", "kid", "inception-score")}


def test_the_known_weights_do(weights, monkeypatch):
    """Only the hash decides the name."""
    monkeypatch.setattr(inception, "file_sha256", lambda path: inception.FID_SHA256)
    clean, legacy = (
        features.load_features(f"inception-{resize}", "cpu", str(weights)) for resize in ("clean", "legacy")
    )
    assert clean.called("fid") == "FID (clean resize)" and legacy.called("fid") == "FID (legacy resize)"
    assert legacy.called("inception-score") == "Inception Score"
    assert clean.called("inception-score").startswith("exp of the KL"), "it is defined by the legacy resizing"


def test_a_file_may_be_safetensors_but_no_code(weights, tmp_path):
    from safetensors.torch import save_file

    state = torch.load(weights, weights_only=True)
    save_file(state, tmp_path / "inception.safetensors")
    network = inception.load_network(tmp_path / "inception.safetensors")
    assert torch.equal(network.fc.weight, state["fc.weight"])
    torch.save({"a": Pictures(None)}, tmp_path / "code.pth")
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pth")
    for name in ("code.pth", "other.pth"):
        with pytest.raises(UserError, match=r"not the weights of InceptionV3 .* --weights inception=FILE") as raised:
            inception.load_network(tmp_path / name)
        assert "\n" not in str(raised.value)


def test_missing_weights_say_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    for given, said in (
        (str(tmp_path / "none.pth"), "no such file"),
        ("http://127.0.0.1:9/w.pth", "cannot be downloaded from"),
    ):
        with pytest.raises(UserError, match=f"{said}.*--weights inception=FILE or DIST_T2I_INCEPTION_WEIGHTS=FILE"):
            weights_file("inception", given, inception.URL)
    (tmp_path / "kept.pth").touch()
    monkeypatch.setenv("DIST_T2I_INCEPTION_WEIGHTS", str(tmp_path / "kept.pth"))
    assert weights_file("inception", None, inception.URL) == tmp_path / "kept.pth"
    monkeypatch.delenv("DIST_T2I_INCEPTION_WEIGHTS")
    kept = tmp_path / "hub" / "checkpoints" / inception.URL.rpartition("/")[2]
    kept.parent.mkdir(parents=True)
    kept.touch()
    assert weights_file("inception", None, inception.URL) == kept, "where torch-fidelity leaves its download"


def test_judges_may_be_left_out(weights):
    protocol = load_protocol("coco30k")
    judges = load_networks(protocol, "cpu", {"inception": str(weights)}, without=("clip",))
    assert list(judges) == ["inception-clean", "inception-legacy"]


def test_loading_a_judge_draws_nothing(weights):
    before = torch.get_rng_state()
    features.load_features("inception-clean", "cpu", str(weights))
    assert torch.equal(torch.get_rng_state(), before)
