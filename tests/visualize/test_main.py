"""The command: every picture of a tiny model, and that wrong input is one line and nothing else."""

import numpy as np
import pytest
from PIL import Image

from dinov2_jax.convert import write_model
from dinov2_jax.visualize import sheets
from dinov2_jax.visualize.__main__ import main
from tests.convert.models import make_params, make_spec


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    spec = make_spec("registers")
    params = make_params(spec)
    # At unit variance attention is all or nothing, and hangs on the last digit.
    params["blocks"]["attn"]["qkv"]["kernel"] *= 0.1
    path = tmp_path_factory.mktemp("model") / "m.safetensors"
    write_model(path, spec, params, format="safetensors")
    params["norm"]["bias"][:] = np.nan
    write_model(path.with_name("nan.safetensors"), spec, params, format="safetensors")
    params["norm"]["bias"][:], params["norm"]["scale"][:] = 1, 0
    write_model(path.with_name("collapsed.safetensors"), spec, params, format="safetensors")
    return path


@pytest.fixture
def images(tmp_path, monkeypatch):
    """Five photographs in a folder, one of them broken; the working directory is beside it."""
    rng = np.random.default_rng(0)
    (tmp_path / "in").mkdir()
    for i in range(4):
        coarse = rng.integers(0, 256, (5, 6, 3), np.uint8)
        photo = Image.fromarray(coarse).resize((30, 24), Image.Resampling.BICUBIC)
        photo.save(tmp_path / "in" / f"{i}.png")
    (tmp_path / "in" / "4.png").write_bytes((tmp_path / "in" / "0.png").read_bytes()[:60])
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(capsys, *arguments) -> tuple[int, list[str], list[str]]:
    code = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out.splitlines(), captured.err.splitlines()


SMALL = ("--tile-px", 24)


@pytest.mark.parametrize(
    ("arguments", "title"),
    [
        (["pca", "in", "--size-px", 16], "What the patch features tell apart"),
        (["pca", "in", "--square", "--no-foreground", "--block", 0], "What the patch features"),
        (["attention", "in", "--size-px", 16, "--max-images", 2], "Attention of CLS in block 1"),
        (["attention", "in/1.png", "--size-px", 16, "--block", 0], "Attention of CLS in block 0"),
        (["neighbors", "in", "--num-neighbors", 2], "Nearest neighbours"),
        (["neighbors", "in/1.png", "--gallery", "in"], "Nearest neighbours"),
        (["matches", "in/0.png", "in/1.png", "--size-px", 16], "Patches that correspond"),
        (["matches", "in/0.png", "in/1.png", "--size-px", 16, "--foreground", "--flip"], "Patches"),
    ],
    ids=lambda x: "-".join(map(str, x)).replace("/", "_") if isinstance(x, list) else "",
)
def test_every_picture(arguments, title, model, images, capsys):
    code, out, err = run(capsys, *arguments, "--model", model, *SMALL)
    assert code == 0
    name = f"{arguments[0]}.png"
    assert out[-1].startswith(f"wrote {name}: {title}")
    broken = ["left out in/4.png: "] if "in" in arguments else []
    assert [line[: len(broken[0])] for line in err] == broken * (arguments[0] != "attention")
    with Image.open(images / name) as image:
        assert image.format == "PNG" and image.width > 24
    before = sorted(p.name for p in images.iterdir())
    assert before == sorted(["in", name])


def test_pictures_are_the_same_every_time_and_html_shows_the_same(model, images, capsys):
    for out in ("a.png", "b.png", "c.html"):
        code, *_ = run(capsys, "pca", "in", "--size-px", 16, "--model", model, *SMALL, "--out", out)
        assert code == 0
    assert (images / "a.png").read_bytes() == (images / "b.png").read_bytes()
    assert (images / "c.html").read_text().count("data:image/png;base64,") == 4


def test_neighbours_leave_the_query_out(model, images, capsys, monkeypatch):
    drawn = []
    original = sheets.Sheet.draw
    monkeypatch.setattr(sheets.Sheet, "draw", lambda self: (drawn.append(self), original(self))[1])
    names = []
    named = sheets.named
    monkeypatch.setattr(
        "dinov2_jax.visualize.neighbors.named",
        lambda image, name, **ink: (names.append(name), named(image, name, **ink))[1],
    )
    arguments = ["in/1.png", "--gallery", "in", "--model", model, *SMALL]
    assert run(capsys, "neighbors", *arguments)[0] == 0
    assert names[0] == "1.png"
    assert sorted(name.split()[1] for name in names[1:]) == ["0.png", "2.png", "3.png"]
    similarities = [float(name.split()[0]) for name in names[1:]]
    assert similarities == sorted(similarities, reverse=True)
    assert len(drawn) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["pca", "nowhere", "--model", "{model}"], "nothing found at 'nowhere'"),
        (["pca", "in", "nowhere.png", "--model", "{model}"], "nothing found at 'nowhere.png'"),
        (["pca", "in/4.png", "--model", "{model}"], "pca must have 1 image that can be read; in/4"),
        (["matches", "in/1.png", "--model", "{model}"], "must have two images, not 1"),
        (["matches", "in", "--model", "{model}"], "must have two images, not 5; name two files"),
        (["matches", "in/1.png", "in/4.png", "--model", "{model}"], "2 images that can be read"),
        (["neighbors", "in/1.png", "--model", "{model}"], "must hold another photo than the query"),
        (["neighbors", "in/4.png", "--model", "{model}"], "1 image that can be read; in/4.png"),
        (["pca", "in", "--model", "nothing.pth"], "nothing.pth"),
        (["pca", "in"], "the following arguments are required: --model"),
        (["map", "in"], "invalid choice: 'map'"),
        (
            ["pca", "in", "--model", "{model}", "--tile-px", "0"],
            "argument --tile-px: '0' must be a whole number, at least 1",
        ),
        (["pca", "in", "--model", "{model}", "--tile-px", "x"], "'x' must be a whole number"),
        (["pca", "in", "--model", "{model}", "--out", "x.gif"], "x.gif must end in .png or .html"),
        (["pca", "in", "--model", "{model}", "--out", "in/1.png"], "is one of the images"),
        (
            ["neighbors", "in/1.png", "--gallery", "in", "--model", "{model}", "--out", "in/2.png"],
            "in/2.png is one of the images",
        ),
        (["pca", "in", "--model", "{model}", "--threshold", "9"], "threshold=9.0 must be below"),
        (["pca", "in", "--model", "{model}", "--block", "2"], "different blocks of 0..1"),
        (["attention", "in", "--model", "{model}", "--block", "2"], "must be one of 0..1"),
        (["pca", "in", "--model", "{folder}/nan.safetensors"], "patch features must be finite"),
        (["neighbors", "in", "--model", "{folder}/nan.safetensors"], "CLS features must be finite"),
        (["pca", "in", "--model", "{folder}/collapsed.safetensors"], "patch features must differ"),
        (
            ["neighbors", "in", "--model", "{folder}/collapsed.safetensors"],
            "CLS features must differ",
        ),
    ],
)
def test_wrong_input(arguments, message, model, images, capsys):
    arguments = [text.format(model=model, folder=model.parent) for text in arguments]
    sizes = ["--size-px", 16] if arguments[0] in ("pca", "attention", "matches") else []
    code, _, err = run(capsys, *arguments, *sizes)
    assert code == 2
    errors = [line for line in err if not line.startswith("left out in/4.png: ")]
    assert len(errors) == 1 and errors[0].startswith("error: ") and message in errors[0], err
    assert [p.name for p in images.iterdir()] == ["in"]


@pytest.mark.parametrize("cause", ["too large", "interrupted"])
def test_nothing_is_read_for_a_size_that_cannot_be_drawn(cause, model, images, capsys, monkeypatch):
    def read(*_):
        if cause == "interrupted":
            raise KeyboardInterrupt
        raise AssertionError("read")

    monkeypatch.setattr("dinov2_jax.visualize.photos.PhotoReader.sample", read)
    size_px = 12_000 if cause == "too large" else 16
    code, _, err = run(capsys, "pca", "in", "--model", model, "--size-px", size_px)
    expected = {
        "too large": (
            2,
            "error: size_px=12000 makes more than 16384 patches of an image; lower it ",
        ),
        "interrupted": (130, "interrupted; nothing was written"),
    }
    assert (code, err[0][: len(expected[cause][1])]) == expected[cause]
    assert [p.name for p in images.iterdir()] == ["in"]
