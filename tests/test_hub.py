"""Names become files: found, fetched, checked, remembered. A server on loopback stands for the
real one, and tiny models for the released ones."""

import functools
import http.server
import threading

import pytest

from dinov2_jax import hub
from dinov2_jax.convert import write_model
from tests.convert.models import make_params, make_spec

NAME = "dinov2_vits14"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache. The released sizes are those of a tiny model; nothing can be fetched."""
    spec = make_spec("mlp", depth=1)
    monkeypatch.setenv(hub.CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setenv(hub.URL_VARIABLE, (tmp_path / "nowhere").as_uri())
    monkeypatch.setitem(hub.RELEASED, NAME, (spec.variant, spec.num_register_tokens))
    monkeypatch.setattr(hub, "PATCH_SIZE", spec.patch_size)
    monkeypatch.setattr(hub, "POSITIONS", spec.pos_embed_grid)
    return tmp_path / "cache"


def write(path, format: str, name: str = "mlp") -> bytes:
    path.parent.mkdir(parents=True, exist_ok=True)
    spec = make_spec(name, depth=1)
    write_model(path, spec, make_params(spec), format=format)
    return path.read_bytes()


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A folder that is served on loopback."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        lie_bytes = 0  # promised and not sent

        def log_message(self, *_):
            pass

        def send_header(self, keyword, value):
            if keyword == "Content-Length":
                value = str(int(value) + self.lie_bytes)
            super().send_header(keyword, value)

    root = tmp_path / "served"
    root.mkdir()
    handler = functools.partial(Handler, directory=str(root))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as served:
        thread = threading.Thread(target=served.serve_forever)
        thread.start()
        monkeypatch.setenv(hub.URL_VARIABLE, f"http://127.0.0.1:{served.server_port}")
        yield root, Handler
        served.shutdown()
        thread.join()


def test_a_path_goes_before_a_name(cache, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / NAME, "safetensors")
    assert hub.find(NAME) == (tmp_path / NAME).relative_to(tmp_path)


def test_a_file_in_the_cache_is_checked_once_and_remembered(cache):
    path = cache / f"{NAME}.safetensors"
    content = write(path, "safetensors")
    assert hub.find(NAME) == path
    digest, name = path.with_name(f"{path.name}.sha256").read_text().split()
    assert (len(digest), name) == (64, path.name)
    assert hub.find(NAME) == path
    path.write_bytes(content[:-1] + b"x")
    with pytest.raises(ValueError, match=f"has the sha256 .*, but {digest} when it was first"):
        hub.find(NAME)


def test_an_empty_record_counts_as_none(cache):
    path = cache / f"{NAME}.safetensors"
    write(path, "safetensors")
    record = path.with_name(f"{path.name}.sha256")
    record.write_text("")
    assert hub.find(NAME) == path
    assert len(record.read_text().split()[0]) == 64
    assert sorted(p.name for p in cache.iterdir()) == [path.name, record.name]


def test_a_file_that_is_not_what_its_name_says_is_refused(cache):
    path = cache / f"{NAME}.safetensors"
    write(path, "safetensors", "registers")
    with pytest.raises(ValueError, match=r"must be dinov2_vits14: .*, 0, \(3, 3\)\), not .*, 4, "):
        hub.find(NAME)
    assert not path.with_name(f"{path.name}.sha256").exists()


def test_offline_the_error_says_which_file_to_put_where(cache):
    pytest.importorskip("torch")
    with pytest.raises(FileNotFoundError) as error:
        hub.find(NAME)
    assert str(cache / "dinov2_vits14_pretrain.pth") in str(error.value)
    assert str(cache / f"{NAME}.safetensors") in str(error.value)
    assert not list(cache.iterdir())


def test_without_torch_nothing_is_fetched(cache, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torch", None)
    with pytest.raises(ModuleNotFoundError, match="pip install torch"):
        hub.find(NAME)
    assert not cache.exists()


def test_a_name_is_fetched_checked_and_kept(cache, server):
    pytest.importorskip("torch")
    root, _ = server
    content = write(root / NAME / "dinov2_vits14_pretrain.pth", "reference")
    path = hub.find(NAME)
    assert path == cache / "dinov2_vits14_pretrain.pth"
    assert path.read_bytes() == content
    (root / NAME / path.name).unlink()
    assert hub.find(NAME) == path
    assert sorted(p.name for p in cache.iterdir()) == [path.name, f"{path.name}.sha256"]


def test_two_processes_may_fetch_at_once(cache, server, monkeypatch):
    """The other one's unfinished part is left alone, and not taken for ours."""
    pytest.importorskip("torch")
    root, _ = server
    content = write(root / NAME / "dinov2_vits14_pretrain.pth", "reference")
    parts = []
    download = hub._download
    monkeypatch.setattr(hub, "_download", lambda url, p: (parts.append(p), download(url, p))[1])
    for pid in (7, 8):
        monkeypatch.setattr("os.getpid", lambda pid=pid: pid)
        hub.find(NAME).unlink()
    assert len(set(parts)) == 2
    assert hub.find(NAME).read_bytes() == content


def test_an_address_without_a_scheme_says_what_is_missing(cache, monkeypatch):
    pytest.importorskip("torch")
    monkeypatch.setenv(hub.URL_VARIABLE, "mirror.example/dinov2")
    with pytest.raises(ValueError, match=r"DINOV2_JAX_HUB_URL='mirror.*' must start with https://"):
        hub.find(NAME)


@pytest.mark.parametrize("fault", ["short", "damaged", "another model", "missing"])
def test_a_bad_download_leaves_nothing(cache, server, fault, monkeypatch):
    pytest.importorskip("torch")
    root, handler = server
    path = root / NAME / "dinov2_vits14_pretrain.pth"
    content = write(path, "reference", "registers" if fault == "another model" else "mlp")
    if fault == "short":
        monkeypatch.setattr(handler, "lie_bytes", 7)
    elif fault == "damaged":
        path.write_bytes(content[: len(content) // 2])
    elif fault == "missing":
        path.unlink()
    with pytest.raises((ValueError, FileNotFoundError)):
        hub.find(NAME)
    assert not list(cache.iterdir())


def test_released_names_are_the_references():
    assert len(hub.RELEASED) == 8
    assert hub.RELEASED["dinov2_vitg14_reg"] == ("vit_giant2", 4)


def test_files_have_the_references_addresses(cache, monkeypatch):
    pytest.importorskip("torch")
    monkeypatch.delenv(hub.URL_VARIABLE)
    asked = []

    def refuse(url, path):
        asked.append(url)
        raise OSError("offline")

    monkeypatch.setattr(hub, "_download", refuse)
    for name in ("dinov2_vits14", "dinov2_vitl14_reg"):
        with pytest.raises(FileNotFoundError, match="offline"):
            hub.find(name)
    base = "https://dl.fbaipublicfiles.com/dinov2"
    assert asked == [
        f"{base}/dinov2_vits14/dinov2_vits14_pretrain.pth",
        f"{base}/dinov2_vitl14/dinov2_vitl14_reg4_pretrain.pth",
    ]
