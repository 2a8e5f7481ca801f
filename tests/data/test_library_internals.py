"""The undocumented parts of libraries that `data` and `storage` use, each with a test that fails when the library changes it.

| library     | part                                                        | used by                  |
|-------------|-------------------------------------------------------------|--------------------------|
| torch       | DataLoader's iterator: `_worker_result_queue._writer`       | data/stream/workers.py   |
| torch       | DataLoader's iterator: `_workers`, `_shutdown_workers()`    | data/stream/workers.py   |
| torch       | DataLoader's handler of SIGCHLD                             | data/stream/workers.py   |
| torch       | `UntypedStorage._new_shared`                                | data/stream/decode_stage |
| torch       | `from_numpy` keeps the array itself alive                   | data/stream/buffers.py   |
| torch       | `ops.aten._upsample_bilinear2d_aa.out`                      | data/images.py           |
| webdataset  | `utils.enforce_security`                                    | data/stream/stream.py    |
| tokenizers  | its file has no further keys                                | data/tokenizer.py        |
| simplejpeg  | words of the error about a CMYK picture                     | data/images.py           |
| obstore     | words of its errors: the status of an answer, no connection | storage/clients.py       |
| tarfile     | `TarFile.members` may be emptied, `TarFile.offset`          | data/tar_reader.py       |
"""

import gc
import io
import json
import signal
import subprocess
import sys
import tarfile
import threading
import weakref
from http.server import BaseHTTPRequestHandler, HTTPServer

import numpy
import pytest
import simplejpeg
import tokenizers
import torch
import webdataset
from PIL import Image

from dist_t2i.data.tokenizer import Tokenizer
from dist_t2i.distributed.launch import free_ports


class Endless(torch.utils.data.IterableDataset):
    def __iter__(self):
        while True:
            yield torch.zeros(4)


@pytest.fixture
def iterator():
    if sys.platform != "linux":
        pytest.skip("workers are forked on Linux only")
    loader = torch.utils.data.DataLoader(Endless(), batch_size=None, num_workers=1, multiprocessing_context="fork")
    iterator = iter(loader)
    yield iterator
    iterator._shutdown_workers()


def test_the_end_of_a_workers_pipe_can_be_closed_and_its_death_is_then_noticed(iterator):
    iterator._worker_result_queue._writer.close()
    assert iterator._worker_result_queue._writer.closed
    assert torch.equal(next(iterator), torch.zeros(4))
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    iterator._workers[0].kill()
    with pytest.raises((RuntimeError, OSError, EOFError)):
        for _ in range(100):
            next(iterator)


def test_the_workers_are_processes_that_shutdown_ends(iterator):
    (worker,) = iterator._workers
    assert worker.is_alive()
    iterator._shutdown_workers()
    worker.join(10)
    assert not worker.is_alive()


@pytest.mark.skipif(sys.platform != "linux", reason="workers are forked on Linux only")
def test_the_first_loader_of_a_process_installs_a_handler_of_sigchld():
    program = """if True:
        import signal, torch
        loader = torch.utils.data.DataLoader([1], num_workers=1, multiprocessing_context="fork")
        before = signal.getsignal(signal.SIGCHLD)
        next(iter(loader))
        print(before is signal.getsignal(signal.SIGCHLD))
    """
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout == "False\n"


def test_shared_storage_without_a_file_of_ours():
    storage = torch.UntypedStorage._new_shared(12)
    assert torch.empty(0, dtype=torch.uint8).set_(storage).fill_(7).sum() == 84 and storage.is_shared()


def test_a_tensor_keeps_the_very_array_that_it_was_made_from():
    array = numpy.zeros(8, dtype=numpy.uint8)
    gone = threading.Event()
    weakref.finalize(array, gone.set)
    view = torch.from_numpy(array)[2:4]
    del array
    gc.collect()
    assert not gone.is_set()
    del view
    gc.collect()
    assert gone.is_set()


def test_antialiased_resizing_into_given_memory_is_interpolate():
    image = torch.randint(256, (1, 3, 40, 50), dtype=torch.uint8).contiguous(memory_format=torch.channels_last)
    out = torch.empty(1, 3, 16, 16, dtype=torch.uint8).contiguous(memory_format=torch.channels_last)
    torch.ops.aten._upsample_bilinear2d_aa.out(image, [16, 16], False, None, None, out=out)
    assert torch.equal(out, torch.nn.functional.interpolate(image, (16, 16), mode="bilinear", antialias=True))


def test_webdataset_asks_the_variable_before_it_runs_a_command(monkeypatch, tmp_path):
    monkeypatch.setattr(webdataset.utils, "enforce_security", True)
    with pytest.raises(ValueError):
        webdataset.gopen(f"pipe:touch {tmp_path / 'ran'}")
    assert not (tmp_path / "ran").exists()


def test_the_file_of_tokenizers_has_no_room_for_further_keys():
    plain = json.loads(tokenizers.Tokenizer(tokenizers.models.BPE()).to_str())
    tokenizers.Tokenizer.from_str(json.dumps(plain))
    with pytest.raises(Exception, match="expected"):
        tokenizers.Tokenizer.from_str(json.dumps({**plain, "known_words": []}))
    assert Tokenizer.__reduce__ is not object.__reduce__, "ours travels as its text"


def test_a_cmyk_jpeg_is_told_by_its_color_space_or_by_the_words_of_the_error():
    out = io.BytesIO()
    Image.new("CMYK", (16, 16)).save(out, "JPEG")
    assert simplejpeg.decode_jpeg_header(out.getvalue())[2] in ("CMYK", "YCCK")


def test_the_status_of_an_answer_stands_in_the_text_of_obstores_error():
    from obstore.store import from_url

    class Busy(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(503)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    options = {"client_options": {"allow_http": True}, "retry_config": {"max_retries": 0}}
    server = HTTPServer(("127.0.0.1", 0), Busy)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with pytest.raises(Exception, match=r"status code: 503\b"):
        from_url(f"http://127.0.0.1:{server.server_port}", **options).get("a")
    server.shutdown()
    server.server_close()
    with pytest.raises(Exception, match=r"(?i)connection refused"):
        from_url(f"http://127.0.0.1:{free_ports(1)[0]}", **options).get("a")


def test_a_tar_file_forgets_its_members_and_knows_where_it_stopped():
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name in "abc":
            tar.addfile(tarfile.TarInfo(name))
    data = bytearray(out.getvalue())
    names = []
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:", ignore_zeros=True) as tar:
        for info in tar:
            tar.members = []
            names.append(info.name)
        assert names == ["a", "b", "c"] and tar.offset >= 3 * tarfile.BLOCKSIZE
