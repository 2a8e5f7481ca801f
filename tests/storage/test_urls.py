"""Names of data: their meaning, and refused names."""

import pytest

from dist_t2i.data.open_data import is_list
from dist_t2i.errors import DataError
from dist_t2i.storage.urls import base_name, checked, expand, join, parent, scheme_of, with_suffix


@pytest.mark.parametrize(
    ("patterns", "names"),
    [
        ("s3://b/train-{000..002}.tar", [f"s3://b/train-00{i}.tar" for i in range(3)]),
        ("https://h:1/a-{0,7}.tar?x=1", ["https://h:1/a-0.tar?x=1", "https://h:1/a-7.tar?x=1"]),
        (["gs://b/a.tar", "gs://c/{x,y}/{1..2}.tar"], ["gs://b/a.tar"] + [f"gs://c/{f}/{n}.tar" for f in "xy" for n in "12"]),
        ("/data/a b/c.tar", ["/data/a b/c.tar"]),
        ("file:///data/{1..2}.tar", ["/data/1.tar", "/data/2.tar"]),
    ],
)  # fmt: skip
def test_lists_as_people_write_them(patterns, names):
    assert expand(patterns) == names


def test_globs_of_local_files(tmp_path):
    for name in ("b-1.tar", "b-0.tar", "c-[x].tar", "note.txt"):
        (tmp_path / name).write_text("")
    assert expand(f"{tmp_path}/b-*.tar") == [f"{tmp_path}/b-0.tar", f"{tmp_path}/b-1.tar"]
    assert expand(f"{tmp_path}/c-[x].tar") == [f"{tmp_path}/c-[x].tar"], "a file of that very name"
    assert expand("b-?.tar", directory=tmp_path) == expand(f"{tmp_path}/b-*.tar")
    with pytest.raises(DataError, match="no file matches"):
        expand(f"{tmp_path}/z-*.tar")
    with pytest.raises(DataError, match="is named twice"):
        expand([f"{tmp_path}/b-*.tar", f"{tmp_path}/b-0.tar"])
    with pytest.raises(DataError, match="globs match only local files; write numbers in braces"):
        expand("s3://bucket/a-*.tar")


@pytest.mark.parametrize("url", ["pipe:cat a.tar", " PIPE:x", "|cat", "exec:ls", "simplecache::pipe:ls", "s3://a::|ls"])
def test_commands_are_refused(url):
    for refusing in (checked, expand, is_list):
        with pytest.raises(DataError, match="commands are not run"):
            refusing(url)


def test_parts_of_names():
    assert scheme_of("S3://b/k") == "s3" and scheme_of("C:/x") == "" and scheme_of("/a/b") == ""
    assert join("s3://b/set/", "a.tar") == "s3://b/set/a.tar" and join("/set", "a.tar") == "/set/a.tar"
    assert join("s3://b/set", "s3://c/a.tar") == "s3://c/a.tar" and join("https://h/s?k=1", "a") == "https://h/s/a?k=1"
    assert (
        with_suffix("https://h/a.tar?k=1", ".index") == "https://h/a.index?k=1"
        and with_suffix("/x/a.tar", ".index") == "/x/a.index"
    )
    assert parent("s3://b/set/manifest.json") == "s3://b/set" and base_name("s3://b/a/t.tar?x") == "t.tar"


def test_what_is_a_list_of_tars():
    for name in ("a.tar", "s3://b/{0..9}.tar", "/data/*.tar", "https://h/a.tar?x=1"):
        assert is_list(name)
    for name in ("s3://b/set", "/data/set", "s3://b/set/manifest.json", ""):
        assert not is_list(name)
