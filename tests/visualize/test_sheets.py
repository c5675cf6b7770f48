"""Sheets: where things stand, and that an HTML page needs nothing but itself."""

import base64
import html.parser
import io

import numpy as np
import pytest
from PIL import Image

from dinov2_jax.visualize import sheets
from dinov2_jax.visualize.sheets import Cell, Sheet, named, rgb, save

RED, BLUE = (255, 0, 0), (0, 0, 255)
CELLS = (
    Cell(Image.new("RGB", (40, 30), RED), 'a <b> & "c".jpg'),
    Cell(Image.new("RGB", (20, 50), BLUE), "d.jpg"),
)


def count(image: Image.Image, color) -> int:
    return int((np.asarray(image) == color).all(axis=-1).sum())


@pytest.mark.parametrize("width_px", [1320, 0], ids=["beside", "below"])
def test_all_cells_are_in_the_picture(width_px):
    sheet = Sheet("Title", "A caption.", CELLS, width_px=width_px).draw()
    assert count(sheet, RED) == 40 * 30
    assert count(sheet, BLUE) == 20 * 50
    where = [np.argwhere((np.asarray(sheet) == c).all(axis=-1)).min(axis=0) for c in (RED, BLUE)]
    apart = where[1] - where[0]
    if width_px:
        assert apart.tolist() == [0, 40 + sheets.MARGIN_PX]
    else:
        assert apart.tolist() == [30 + sheets.LINE_PX + 2 * sheets.GAP_PX, 0]


def test_headers_stand_above_every_column_and_captions_wrap():
    with_headers = Sheet("T", "c", CELLS, headers=(("photo", 0),)).draw()
    assert with_headers.height == Sheet("T", "c", CELLS).draw().height + sheets.LINE_PX
    longer = Sheet("T", "word " * 20, CELLS).draw()
    assert longer.height > Sheet("T", "c", CELLS).draw().height
    assert longer.width == 2 * 40 + 3 * sheets.MARGIN_PX


def test_names_are_cut_to_the_picture():
    short = named(CELLS[1].image, "x")
    long = named(CELLS[1].image, "x" * 200)
    assert short.size == long.size == (20, 50 + sheets.LINE_PX)
    assert count(short, sheets.BACKGROUND) < 20 * sheets.LINE_PX  # some ink


@pytest.mark.parametrize("width_px", [1, 2])
def test_no_name_fits_a_tile_of_a_few_pixels(width_px):
    tile = named(Image.new("RGB", (width_px, 4), RED), "name.jpg")
    assert count(tile, sheets.BACKGROUND) == width_px * sheets.LINE_PX


def test_grey_and_more_channels_become_rgb():
    grey = np.full((2, 2, 1), 7, np.uint8)
    assert rgb(grey).shape == (2, 2, 3) and (rgb(grey) == 7).all()
    assert rgb(np.arange(16, dtype=np.uint8).reshape(2, 2, 4)).tolist()[0][0] == [0, 1, 2]


class Page(html.parser.HTMLParser):
    """What a page consists of."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.links, self.text = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.links += [value for name, value in attributes if name in ("src", "href", "srcset")]

    def handle_data(self, data):
        self.text.append(data)


def test_html_is_self_contained(tmp_path):
    sheet = Sheet("Title & more", "A caption.", CELLS, headers=(("photo", 0), ("map", 40)))
    save(sheet, tmp_path / "x.html")
    text = (tmp_path / "x.html").read_text(encoding="utf-8")
    page = Page(text)
    assert not {"script", "link", "iframe", "object", "base"} & set(page.tags)
    assert "http" not in text and "url(" not in text and "@import" not in text
    prefix = "data:image/png;base64,"
    assert len(page.links) == 2 and all(link.startswith(prefix) for link in page.links)
    for link, cell in zip(page.links, CELLS, strict=True):
        image = Image.open(io.BytesIO(base64.b64decode(link.removeprefix(prefix))))
        np.testing.assert_array_equal(image, cell.image)
    shown = " ".join(page.text)
    assert "Title & more" in shown and 'a <b> & "c".jpg' in shown and "d.jpg" in shown
    assert "From left to right: photo, map. A caption." in shown


def test_files_are_written_whole_and_replaced(tmp_path):
    path = tmp_path / "x.png"
    for cells in (CELLS[:1], CELLS[1:]):
        save(Sheet("T", "c", cells), path)
    assert [p.name for p in tmp_path.iterdir()] == ["x.png"]
    with Image.open(path) as image:
        assert count(image.convert("RGB"), BLUE) == 20 * 50


@pytest.mark.parametrize(
    ("name", "message"),
    [("x.jpg", r"x\.jpg must end in \.png or \.html"), ("gone/x.png", "is not there; create it")],
)
def test_wrong_targets(tmp_path, name, message):
    with pytest.raises(ValueError, match=message):
        save(Sheet("T", "c", CELLS), tmp_path / name)
    assert not list(tmp_path.iterdir())
