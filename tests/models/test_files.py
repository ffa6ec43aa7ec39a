"""Tests of `priorityprop_jax.models.files`; the downloads go to a server on 127.0.0.1."""

from __future__ import annotations

import functools
import gzip
import hashlib
import http.server
import os
import sys
import threading

import pytest

from priorityprop_jax.models import files as data

# Its logger keeps the standard error of its first import: here, not in a test that captures it.
pytest.importorskip("pooch")

TEXT = b"to be, or not to be\n" * 500
NAME = "play.txt"


class _Handler(http.server.BaseHTTPRequestHandler):
    """Serves /good/, /wrong/, /short/ (the connection breaks half-way) and a 404 for the rest."""

    def do_GET(self):  # noqa: N802
        self.server.requested.append(self.path)
        kind = self.path.split("/")[1]
        if kind not in ("good", "wrong", "short"):
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(TEXT)))
        self.end_headers()
        body = {"good": TEXT, "wrong": TEXT.swapcase(), "short": TEXT[: len(TEXT) // 2]}[kind]
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    for name in list(os.environ):
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.requested = []
    server.home = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(
        target=functools.partial(server.serve_forever, poll_interval=0.02), daemon=True
    )
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def cache(monkeypatch, tmp_path):
    """An empty cache, and no folder from the environment."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv(data.ENV_VAR, raising=False)
    return tmp_path / "cache" / "priorityprop_jax"


def _play(*homes: str) -> data.DataFile:
    return data.DataFile(
        names=(NAME, NAME + ".gz", "old-play.txt"),
        urls=tuple(f"{home}/{NAME}" for home in homes or ("http://127.0.0.1:9/good",)),
        sha256=hashlib.sha256(TEXT).hexdigest(),
    )


def _one_line(error) -> str:
    message = str(error.value)
    assert "\n" not in message
    return message


class TestLocalFolders:
    @pytest.mark.parametrize("name", [NAME, NAME + ".gz", "old-play.txt"])
    def test_takes_every_name(self, cache, tmp_path, name):
        content = gzip.compress(TEXT, mtime=0) if name.endswith(".gz") else TEXT
        (tmp_path / name).write_bytes(content)
        assert data.read_file(_play(), data_dir=tmp_path) == TEXT
        assert not cache.exists()

    def test_keeps_gzip_of_a_home_that_serves_gzip(self, cache, tmp_path):
        packed = gzip.compress(TEXT, mtime=0)
        (tmp_path / "t.gz").write_bytes(packed)
        file = data.DataFile(
            ("t.gz",), ("http://127.0.0.1:9/t.gz",), hashlib.sha256(packed).hexdigest()
        )
        assert data.read_file(file, data_dir=str(tmp_path)) == packed

    def test_missing_in_data_dir_is_an_error_without_download(self, server, cache, tmp_path):
        with pytest.raises(data.DataError) as error:
            data.read_file(_play(server.home + "/good"), data_dir=tmp_path / "nowhere")
        message = _one_line(error)
        assert NAME in message and "nowhere" in message and server.home in message
        assert server.requested == [] and not cache.exists()

    def test_data_dir_wins_over_environment_and_cache(self, monkeypatch, cache, tmp_path):
        cache.mkdir(parents=True)
        (cache / NAME).write_bytes(b"damaged")
        monkeypatch.setenv(data.ENV_VAR, str(tmp_path / "also-missing"))
        (tmp_path / NAME).write_bytes(TEXT)
        assert data.read_file(_play(), data_dir=tmp_path) == TEXT

    def test_environment_wins_over_cache(self, monkeypatch, cache, tmp_path):
        cache.mkdir(parents=True)
        (cache / NAME).write_bytes(TEXT)
        (tmp_path / NAME).write_bytes(b"damaged")
        monkeypatch.setenv(data.ENV_VAR, str(tmp_path))
        with pytest.raises(data.DataError, match="damaged"):
            data.read_file(_play())
        (tmp_path / NAME).unlink()
        assert data.read_file(_play()) == TEXT  # Not there, so the cache serves.

    def test_environment_naming_no_folder(self, monkeypatch, cache, tmp_path):
        monkeypatch.setenv(data.ENV_VAR, str(tmp_path / "typo"))
        with pytest.raises(data.DataError, match="typo.*not a folder"):
            data.read_file(_play())

    @pytest.mark.parametrize("name", [NAME, NAME + ".gz"])
    @pytest.mark.parametrize("damage", ["truncated", "changed", "empty"])
    def test_damaged_file(self, cache, tmp_path, name, damage):
        content = gzip.compress(TEXT, mtime=0) if name.endswith(".gz") else TEXT
        content = {
            "truncated": content[: len(content) // 2],
            "changed": content[:20] + bytes([content[20] ^ 1]) + content[21:],
            "empty": b"",
        }[damage]
        (tmp_path / name).write_bytes(content)
        with pytest.raises(data.DataError, match="damaged") as error:
            data.read_file(_play(), data_dir=tmp_path)
        message = _one_line(error)
        assert str(tmp_path / name) in message and "delete it" in message and NAME in message
        assert (tmp_path / name).read_bytes() == content

    @pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root reads everything")
    def test_unreadable_file(self, cache, tmp_path):
        (tmp_path / NAME).write_bytes(TEXT)
        (tmp_path / NAME).chmod(0)
        with pytest.raises(data.DataError, match="cannot be read: Permission denied"):
            data.read_file(_play(), data_dir=tmp_path)

    def test_cache_without_xdg_is_under_home(self, monkeypatch, tmp_path):
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        monkeypatch.setenv("HOME", str(tmp_path))
        assert data.cache_folder() == tmp_path / ".cache" / "priorityprop_jax"


class TestDownload:
    def test_downloads_once(self, server, cache, capfd):
        file = _play(server.home + "/good")
        assert data.read_file(file) == TEXT
        assert data.read_file(file) == TEXT
        assert server.requested == [f"/good/{NAME}"]
        assert [path.name for path in cache.iterdir()] == [NAME]  # No temporary file is left.
        assert (cache / NAME).read_bytes() == TEXT
        assert "%" not in capfd.readouterr().err  # No bar where there is no terminal.

    @pytest.mark.parametrize(
        ("kind", "reason"),
        [("short", "Error"), ("wrong", "checksum does not match"), ("gone", "HTTP status 404")],
    )
    def test_bad_answer_leaves_nothing(self, server, cache, kind, reason):
        with pytest.raises(data.DataError) as error:
            data.read_file(_play(f"{server.home}/{kind}"))
        message = _one_line(error)
        assert reason in message and f"/{kind}/{NAME}" in message
        assert str(cache / NAME) in message and data.ENV_VAR in message
        assert list(cache.iterdir()) == []

    @pytest.mark.parametrize("kind", ["short", "wrong", "gone"])
    def test_next_home_serves_where_the_first_fails(self, server, cache, kind):
        file = _play(f"{server.home}/{kind}", f"{server.home}/good")
        assert data.read_file(file) == TEXT
        assert server.requested == [f"/{kind}/{NAME}", f"/good/{NAME}"]
        assert [path.name for path in cache.iterdir()] == [NAME]

    def test_no_network(self, server, cache):
        # Port 9 of this machine: nobody listens, so the connection is refused at once.
        with pytest.raises(data.DataError, match="ConnectionError") as error:
            data.read_file(_play())
        assert "put it at" in _one_line(error)

    @pytest.mark.parametrize("kind", ["short", "wrong", "gone", "good"])
    def test_good_copy_in_the_cache_is_never_lost(self, server, cache, kind):
        cache.mkdir(parents=True)
        (cache / (NAME + ".gz")).write_bytes(gzip.compress(TEXT, mtime=0))
        (cache / "other").write_bytes(b"someone's")
        assert data.read_file(_play(f"{server.home}/{kind}")) == TEXT
        assert server.requested == []
        assert {path.name for path in cache.iterdir()} == {NAME + ".gz", "other"}

    def test_good_copy_behind_a_damaged_one_is_used(self, server, cache):
        cache.mkdir(parents=True)
        (cache / NAME).write_bytes(TEXT[:-1])
        (cache / "old-play.txt").write_bytes(TEXT)
        assert data.read_file(_play(f"{server.home}/gone")) == TEXT
        assert server.requested == []

    def test_damaged_copy_in_the_cache_is_replaced(self, server, cache):
        cache.mkdir(parents=True)
        (cache / NAME).write_bytes(TEXT[:-1])
        assert data.read_file(_play(f"{server.home}/good")) == TEXT
        assert (cache / NAME).read_bytes() == TEXT

    def test_damaged_copy_stays_until_a_whole_one_is_there(self, server, cache):
        cache.mkdir(parents=True)
        (cache / NAME).write_bytes(TEXT[:-1])
        with pytest.raises(data.DataError, match="could not download"):
            data.read_file(_play(f"{server.home}/short"))
        assert [path.name for path in cache.iterdir()] == [NAME]

    def test_without_pooch(self, monkeypatch, cache):
        monkeypatch.setitem(sys.modules, "pooch", None)
        with pytest.raises(ImportError, match=r"play.txt.*package pooch: .*-e \"\.\[demo\]\""):
            data.read_file(_play())

    def test_cache_that_cannot_be_made(self, server, cache):
        cache.parent.write_bytes(b"a file where the folder should be")
        with pytest.raises(data.DataError, match="could not download") as error:
            data.read_file(_play(f"{server.home}/good"))
        _one_line(error)


@pytest.mark.parametrize("raw", [b"plain", gzip.compress(TEXT)[:-9]], ids=["plain", "cut"])
def test_gunzip_of_a_broken_stream(raw):
    with pytest.raises(data.DataError, match="images is damaged: not a whole gzip file"):
        data.gunzip(raw, source="images")
