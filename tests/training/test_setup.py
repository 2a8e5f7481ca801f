"""The parts of a run, as they are built at its start."""

import pytest

from dist_t2i.config.sections import DataConfig
from dist_t2i.data.open_data import open_data
from dist_t2i.training.setup import mirrored_captions
from runs import Run, make_set
from shard_tool import shard


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes")
    shard("scenes", "--count", 40, "--size", 32, "--out", folder / "set")
    return folder / "set"


def test_a_run_warns_once_if_mirrored_pictures_have_captions_that_say_left_or_right(tmp_path, scenes):
    warned = Run(tmp_path / "warned", scenes, "train.total_images=16")
    assert warned.train() == 0, warned.output()
    (line,) = [line for line in warned.output().splitlines() if "data.flip" in line]
    count = open_data(DataConfig(train=str(scenes))).manifest["splits"]["train"]["captions"]["left_or_right"]
    assert count > 20 and f"{count} of " in line and line.endswith("data.flip mirrors pictures: set data.flip=false")
    silent = Run(tmp_path / "silent", scenes, "train.total_images=16", "data.flip=false")
    assert silent.train() == 0, silent.output()
    assert "mirrors" not in silent.output()


def test_the_warning_counts_the_captions_of_all_sets(tmp_path, scenes):
    plain = make_set(tmp_path)
    assert mirrored_captions(open_data(DataConfig(train=str(plain)))) == ""
    one, both = (open_data(DataConfig(train=names)) for names in ([str(scenes)], [str(scenes), str(plain)]))
    parts = [data.manifest["splits"]["train"]["captions"] for data in (one, both)]
    assert parts[0]["left_or_right"] == parts[1]["left_or_right"] > 0
    assert f"{parts[0]['left_or_right']} of {parts[0]['count'] + 96} captions" in mirrored_captions(both)
