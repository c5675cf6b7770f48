"""Layouts of depth data sets: where images and depth maps lie, their unit, range, crop and mask.

In: a folder. Out: a `DepthSet`, whose depth is read in metres, 0 where nothing was measured. Facts
of NYU, KITTI and SUN RGB-D: the paper's section 7.4 and the public Monocular-Depth-Estimation
Toolbox. Numpy only; no protocol.
"""

import dataclasses
import pathlib

import numpy as np

from dinov2_jax.data.records import DataError
from dinov2_jax.evals.dense.pairs import (
    Pair,
    first_folder,
    folder_pairs,
    listed_pairs,
    read_pair,
    read_target,
)

LAYOUT = (
    "a folder in one of these layouts, depth as PNG files of 16 bits, 0 where there is none: "
    "(plain) color/ and depth/ (or images/, rgb/), the same names in both, in train/ and val/ or "
    "with train/ and val/ in each, or without a split; (nyu) nyu_train.txt and nyu_test.txt with a "
    "line IMAGE DEPTH each; (kitti) kitti_eigen_train.txt and kitti_eigen_test.txt likewise, "
    "images in input/ and depth in gt_depth/, or both beside the lists; (sunrgbd) "
    "SUNRGBD_val_splits.txt likewise"
)
_IMAGES, _DEPTHS = ("color", "images", "rgb", "image"), ("depth", "depths", "gt")
# Eigen's crop, in pixels of NYU's 480 x 640; Garg's, in shares of the height and width.
EIGEN_PX = (45, 471, 41, 601)
GARG = (0.40810811, 0.99189189, 0.03594771, 0.96405229)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DepthLayout:
    """What is known of a data set before a file is read.

    Attributes:
      scale: units of the file in a metre.
      depth_range: of depths that count, in metres; both ends excluded.
      mask: which pixels are judged: "eigen", "garg" or "all".
      clip: depth above it counts as this, in the truth and in the prediction; None: none.
      lists: files with pairs, of training and of testing.
    """

    scale: float = 1000.0
    depth_range: tuple[float, float] = (0.001, 10.0)
    mask: str = "all"
    clip: float | None = None
    lists: tuple[str, str] = ("", "")


LAYOUTS = {
    "nyu": DepthLayout(mask="eigen", lists=("nyu_train.txt", "nyu_test.txt")),
    "kitti": DepthLayout(
        scale=256.0,
        depth_range=(0.001, 80.0),
        mask="garg",
        lists=("kitti_eigen_train.txt", "kitti_eigen_test.txt"),
    ),
    "sunrgbd": DepthLayout(
        depth_range=(0.001, 80.0), mask="eigen", clip=8.0, lists=("", "SUNRGBD_val_splits.txt")
    ),
    "plain": DepthLayout(),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class DepthSet:
    """Pairs of images and depth maps of a split.

    Attributes:
      pairs: in order.
      layout: among `LAYOUTS`.
      scale: units of the files in a metre.
    """

    pairs: list[Pair]
    layout: str
    scale: float

    def __len__(self) -> int:
        return len(self.pairs)

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """An image, uint8 `[height, width, 3]`, and its depth in metres, float32.

        Raises:
          DataError: a file cannot be read, or sizes differ.
        """
        image, units = read_pair(self.pairs[index], read_target)
        if self.layout == "sunrgbd":
            units = units.astype(np.uint16)
            units = (units >> 3) | (units << 13)  # the camera's own shift, undone
        depth = units.astype(np.float32) / np.float32(self.scale)
        return (kitti_crop(image), kitti_crop(depth)) if self.layout == "kitti" else (image, depth)


def open_depth_set(
    data: str,
    split: str,
    *,
    layout: str,
    scale: float | None = None,
    holdout: float = 0.2,
) -> DepthSet:
    """Finds a split of a data set.

    Args:
      data: the folder.
      split: "train" or "test"; in a plain folder, "val" stands for "test" where there is none.
      layout: among `LAYOUTS`, such as `find_layout` gives.
      scale: units of the files in a metre; None: the layout's.
      holdout: of a plain folder without splits, this last share of the names is the test: the
        frames of one recording, shuffled, would be tested on their neighbours.

    Raises:
      DataError: nothing is there, or it is not whole.
    """
    root = pathlib.Path(data).expanduser()
    if not root.is_dir():
        raise DataError(f"{root} is not a folder; expected: {LAYOUT}")
    if layout == "plain":
        pairs = _plain_pairs(root, split, holdout)
    else:
        pairs = _listed(root, layout, LAYOUTS[layout].lists[split != "train"])
    return DepthSet(pairs=pairs, layout=layout, scale=scale or LAYOUTS[layout].scale)


def kitti_crop(image: np.ndarray) -> np.ndarray:
    """The lowest 352 rows and the middle 1216 columns of an image or depth map `[h, w, ..]`."""
    height, width = 352, 1216
    top, left = image.shape[0] - height, int((image.shape[1] - width) / 2)
    if min(top, left) < 0:
        raise DataError(
            f"KITTI images must have 1216 x 352 pixels or more, not {image.shape[1]} x "
            f"{image.shape[0]}; use --layout plain"
        )
    return image[top : top + height, left : left + width]


def judged(shape: tuple[int, int], mask: str) -> np.ndarray:
    """Which pixels of a map are judged, bool `[height, width]`: see `DepthLayout.mask`."""
    height, width = shape
    if mask == "eigen":
        top, bottom, left, right = EIGEN_PX
    elif mask == "garg":
        rows, columns = [int(x * height) for x in GARG[:2]], [int(x * width) for x in GARG[2:]]
        top, bottom, left, right = *rows, *columns
    else:
        top, bottom, left, right = 0, height, 0, width
    is_judged = np.zeros(shape, bool)
    is_judged[top:bottom, left:right] = True
    return is_judged


def find_layout(data: str) -> str:
    """The layout of a folder by the lists in it; "plain" where there is none."""
    root = pathlib.Path(data).expanduser()
    for name, layout in LAYOUTS.items():
        if any(file and (root / file).is_file() for file in layout.lists):
            return name
    return "plain"


def _listed(root: pathlib.Path, layout: str, file: str) -> list[Pair]:
    path = root / file
    if not file or not path.is_file():
        what = f"{path} is missing" if file else f"{layout} has no training split"
        raise DataError(f"{what}; expected: {LAYOUT}")
    lines = [line.split() for line in path.read_text().splitlines() if line.strip()]
    short = next((line for line in lines if len(line) < 2), None)
    if short:
        raise DataError(f"{path} has a line {short[0]!r}, and must have IMAGE DEPTH in each")
    # KITTI's list says None where there is no depth: 45 of its 697 test images.
    names = [line[:2] for line in lines if line[1] != "None"]
    if layout == "kitti" and (root / "gt_depth").is_dir():
        names = [(f"input/{image}", f"gt_depth/{depth}") for image, depth in names]
    return listed_pairs(root, names, layout=LAYOUT)


def _plain_pairs(root: pathlib.Path, split: str, holdout: float) -> list[Pair]:
    for name in ("train",) if split == "train" else ("test", "val"):
        for patterns in ("{name}/{kind}", "{kind}/{name}"):
            images, depths = (
                first_folder(root, [patterns.format(name=name, kind=kind) for kind in kinds])
                for kinds in (_IMAGES, _DEPTHS)
            )
            if images and depths:
                return folder_pairs(images, depths, layout=LAYOUT)
    images, depths = first_folder(root, _IMAGES), first_folder(root, _DEPTHS)
    if not images or not depths:
        raise DataError(f"{root} holds no images and depth of a {split} split; expected: {LAYOUT}")
    pairs = folder_pairs(images, depths, layout=LAYOUT)
    count = max(round(holdout * len(pairs)), 1)
    if len(pairs) <= count:
        raise DataError(f"{root} holds {len(pairs)} pairs, of which {count} are held out; add some")
    return pairs[:-count] if split == "train" else pairs[-count:]
