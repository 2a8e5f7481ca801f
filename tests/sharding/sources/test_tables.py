"""Tables of paths and URLs, downloaded from a real server that also misbehaves."""

import http.server
import json
import threading
from urllib.parse import quote

import pytest

from dist_t2i.data.shard_set import open_set
from pictures import encoded, make_folder, picture
from shard_tool import captions_by_key, contents, problems, reasons, shard


class Server(http.server.ThreadingHTTPServer):
    """Serves /p0000.png ...; /flaky fails twice, /dead always, /cut stops early, everything else is 404."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked, self.mended = [], False
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        name = self.path.partition("?")[0]
        self.server.asked.append(name)
        data = encoded(picture(sum(map(ord, name))))
        dead = name.startswith("/dead") and not self.server.mended
        if dead or (name.startswith("/flaky") and self.server.asked.count(name) < 3):
            self.send_error(503)
        elif name.startswith("/none"):
            self.send_error(404)
        else:
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data[:50] if name.startswith("/cut") else data)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server():
    server = Server()
    yield server
    server.shutdown()
    server.server_close()


def write_table(path, form, rows, columns=("url", "caption")):
    """`rows` of (picture, caption) as a table."""
    if form == "parquet":
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        parquet.write_table(pyarrow.table(dict(zip(columns, zip(*rows, strict=True), strict=True))), path)
    elif form == "jsonl":
        path.write_text("".join(json.dumps(dict(zip(columns, row, strict=True))) + "\n" for row in rows))
    else:
        mark = "\t" if form == "tsv" else ","
        path.write_text("\n".join(mark.join(row) for row in [columns, *rows]))
    return path


@pytest.mark.parametrize("form", ["jsonl", "csv", "tsv", "parquet"])
def test_urls_in_every_form(tmp_path, server, form):
    rows = [(f"{server.url}/some/p{number:04d}.png?w=300&é", f"number {number}") for number in range(12)]
    write_table(tmp_path / f"t.{form}", form, [*rows, (rows[0][0], "said again")], ("ADDRESS", "TEXT"))
    columns = ("--image-column", "ADDRESS", "--caption-column", "TEXT")
    shard(form, tmp_path / f"t.{form}", *columns, "--out", tmp_path / "set", "--holdout", 0)
    found = captions_by_key(tmp_path / "set")
    assert found == {f"some/p{number:04d}": (f"number {number}",) for number in range(12)} | {
        "some/p0000": ("number 0", "said again")
    }
    sample = open_set(tmp_path / "set").samples("train")[0]
    assert sample.attributes["url"] in {url for url, _ in rows}
    assert sample.image_bytes == encoded(picture(sum(map(ord, f"/{sample.key}.png"))))
    assert reasons(tmp_path / "set") == set()


def test_what_cannot_be_downloaded_is_tried_again_or_listed(tmp_path, server):
    names = ["p.png", "flaky.png", "dead.png", "cut.png", "none.png"]
    rows = [(f"{server.url}/{name}", f"this is {name}") for name in names]
    rows += [("http://127.0.0.1:9/x.png", "refused"), ("pipe:touch ran", "a command"), ("ftp://h/x.png", "ftp")]
    rows += [("python::https://h/x.png", "chained"), ("nowhere.png", "no file")]
    shard("jsonl", write_table(tmp_path / "t.jsonl", "jsonl", rows), "--out", tmp_path / "set", cwd=tmp_path)
    assert set(captions_by_key(tmp_path / "set")) == {"p", "flaky"}
    assert reasons(tmp_path / "set") == {
        ("dead", "picture cannot be downloaded: HTTP 503"),
        ("cut", "picture cannot be downloaded: the server stopped before the end"),
        ("none", "picture cannot be downloaded: HTTP 404"),
        ("x", "picture cannot be downloaded: Connection refused"),
        ("pipe:touch ran", "URLs of this kind are not supported"),
        ("ftp://h/x.png", "URLs of this kind are not supported"),
        ("python::https://h/x.png", "URLs of this kind are not supported"),
        ("nowhere.png", "picture is missing"),
    }
    assert server.asked.count("/dead.png") == 3 and server.asked.count("/none.png") == 1
    assert not (tmp_path / "ran").exists()


def test_what_could_not_be_downloaded_is_asked_for_again(tmp_path, server):
    """In shards of two pictures. Some shards are empty at first, so later shards get other numbers; the others stay."""
    names = [f"{'dead' if number in (0, 3, 4, 9, 10) else 'p'}{number:02d}.png" for number in range(12)]
    table = write_table(tmp_path / "t.jsonl", "jsonl", [(f"{server.url}/{name}", f"this is {name}") for name in names])
    words = ("jsonl", table, "--shard-samples", 2, "--holdout", 0)
    shard(*words, "--out", tmp_path / "set")
    assert len(captions_by_key(tmp_path / "set")) == 7 and not (tmp_path / "set" / "train-00005.tar").exists()
    said, asked = shard(*words, "--out", tmp_path / "set").stderr, len(server.asked)
    assert "an earlier run could not read 5 pictures; --retry-failed tries these again" in said
    server.mended = True
    said = shard(*words, "--out", tmp_path / "set", "--retry-failed").stderr
    assert "shards exist already" in said and 5 <= len(server.asked) - asked < 12
    shard(*words, "--out", tmp_path / "whole")
    assert contents(tmp_path / "set") == contents(tmp_path / "whole") and reasons(tmp_path / "set") == set()


def test_several_tables_of_paths(tmp_path):
    make_folder(tmp_path / "pictures", 8)
    for part in range(2):
        rows = [(f"p{number:04d}.png", f"number {number}") for number in range(4 * part, 4 * part + 4)]
        write_table(tmp_path / f"part-{part}.parquet", "parquet", rows, ("image", "caption"))
    arguments = ("parquet", str(tmp_path) + "/part-{0..1}.parquet", "--images", tmp_path / "pictures")
    shard(*arguments, "--out", tmp_path / "one", "--processes", 1, "--shard-samples", 3, "--holdout", 0.3)
    shard(*arguments, "--out", tmp_path / "two", "--processes", 2, "--shard-samples", 3, "--holdout", 0.3)
    assert captions_by_key(tmp_path / "one") == {f"p{number:04d}": (f"number {number}",) for number in range(8)}
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_lists_of_captions_and_rows_that_are_none(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    make_folder(tmp_path, 4)
    columns = {
        "path": [f"p{number:04d}.png" for number in range(4)] + [None],
        "text": [["one", "two"], [], None, ["three"], ["lost"]],
    }
    parquet.write_table(pyarrow.table(columns), tmp_path / "t.parquet")
    shard("parquet", tmp_path / "t.parquet", "--out", tmp_path / "set")
    assert captions_by_key(tmp_path / "set") == {"p0000": ("one", "two"), "p0003": ("three",)}
    assert problems(tmp_path / "set") == {
        ("t.parquet:4", "", "row has no picture"),
        ("t.parquet:1", "p0001", "picture is left without a caption"),
        ("t.parquet:2", "p0002", "caption is empty"),
        ("t.parquet:2", "p0002", "picture is left without a caption"),
    }


def test_mistakes_with_tables_are_reported(tmp_path):
    def error(form, *arguments):
        done = shard(form, *arguments, "--out", tmp_path / "set", check=False)
        assert done.returncode == 2 and "Traceback" not in done.stderr
        return done.stderr

    assert "cannot read the table" in error("csv", tmp_path / "none.csv")
    table = write_table(tmp_path / "t.parquet", "parquet", [("a.png", "x")], ("link", "words"))
    assert "with --image-column; the table has link, words" in error("parquet", table)
    assert "with --caption-column" in error("parquet", table, "--image-column", "link", "--caption-column", "said")
    table = write_table(tmp_path / "t.csv", "csv", [("a.png", "x")])
    assert "`picture` and `caption`" in error("csv", table, "--image-column", "picture")
    (tmp_path / "t.parquet").write_bytes(b"PAR1 not really")
    assert "cannot be read as Parquet" in error("parquet", tmp_path / "t.parquet")
    assert quote("é") not in error("csv", tmp_path / "é.csv")


def test_a_table_without_pyarrow_names_what_to_install(tmp_path):
    (tmp_path / "pyarrow.py").write_text("raise ImportError('not here')")
    (tmp_path / "t.parquet").write_bytes(b"PAR1")
    from shard_tool import ROOT

    path = f"{tmp_path}:{ROOT}"
    done = shard("parquet", tmp_path / "t.parquet", "--out", tmp_path / "set", check=False, PYTHONPATH=path)
    assert done.returncode == 2 and "pip install 'dist_t2i[parquet]'" in done.stderr
