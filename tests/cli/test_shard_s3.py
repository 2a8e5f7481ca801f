"""A set on a real S3 server: written, resumed, inspected, verified, and read to write another set."""

import pytest

from dist_t2i.data.shard_set import open_set
from object_store import S3Server
from pictures import make_folder
from shard_tool import captions_by_key, contents, shard


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with S3Server(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.mark.slow
def test_from_a_folder_to_s3_and_back(tmp_path, server):
    captions = make_folder(tmp_path / "pictures", 30)
    base = ["folder", "--images", tmp_path / "pictures", "--captions", captions, "--shard-samples", 8, "--holdout", 0]
    shard(*base, "--out", tmp_path / "disk")
    url, known = "s3://data/some/set", {**server.environment, "TMPDIR": str(tmp_path)}
    shard(*base, "--out", url, "--processes", 2, **known)
    assert not list(tmp_path.glob("dist_t2i-*")), "the staging folder is removed"
    manifest = open_set(tmp_path / "disk").manifest
    done = shard("inspect", url, "--sheet", tmp_path / "sheet.png", **known)
    assert manifest["fingerprint"] in done.stdout and (tmp_path / "sheet.png").stat().st_size > 1000
    assert "all 4 shards" in shard("verify", url, **known).stdout

    server.put("some/set/train-00002.tar", b"hurt")
    done = shard("verify", url, check=False, **known)
    assert done.returncode == 1 and "train-00002.tar" in done.stdout and "train-00001.tar" not in done.stdout
    assert "3 of 4 shards exist already" in shard(*base, "--out", url, **known).stderr
    assert "all 4 shards" in shard("verify", url, **known).stdout

    shard("webdataset", url + "/train-{00000..00003}.tar", "--out", tmp_path / "again", "--shard-samples", 8, **known)
    assert captions_by_key(tmp_path / "again") == captions_by_key(tmp_path / "disk")
    tars = [name for name in contents(tmp_path / "disk") if name.endswith(".tar")]
    assert [contents(tmp_path / "again")[name] for name in tars] == [contents(tmp_path / "disk")[name] for name in tars]


def test_a_store_that_does_not_answer_is_reported(tmp_path):
    captions = make_folder(tmp_path / "pictures", 3)
    known = {"AWS_ENDPOINT_URL": "http://127.0.0.1:9", "AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"}
    done = shard("verify", "s3://data/set", check=False, **known)
    assert done.returncode == 2 and "cannot read the manifest of s3://data/set" in done.stderr
    assert "Traceback" not in done.stderr and captions.exists()
