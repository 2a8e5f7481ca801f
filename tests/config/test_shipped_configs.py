"""The project's configurations load, and the networks have the documented sizes."""

import pytest

from dist_t2i.config.files import load
from models_on_disk import networks_of
from ranks import ROOT

FILES = sorted((ROOT / "configs").glob("*.yaml"))
CONFIGS = [path for path in FILES if not path.name.startswith("ablation-")]  # ablations are lists of runs


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_configuration_builds(path):
    config = load(path, ["data.train=somewhere"])
    networks = networks_of(config, 500)
    assert networks.generator.generator.noise_width == config.model.generator.noise


def test_the_peer_has_the_peers_size():
    config = load(ROOT / "configs" / "bench-peer64.yaml", ["data.train=somewhere"])
    networks = networks_of(config, 500)

    def millions(module) -> float:
        return sum(p.numel() for p in module.parameters()) / 1e6

    assert config.data.image_size == 64 and config.train.global_batch == 32
    assert millions(networks.generator.generator) == pytest.approx(4.9, abs=0.05)
    assert millions(networks.discriminator.discriminator) == pytest.approx(3.5, abs=0.05)
