"""Layouts of segmentation data sets: where images and masks lie, and what the numbers mean.

In: a folder. Out: a `MaskSet`, whose masks are read as class numbers from 0, with `IGNORED` where
nothing is asked. Numpy only; no protocol.
"""

import dataclasses
import itertools
import pathlib
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from dinov2_jax.data.ahead import map_ahead
from dinov2_jax.data.records import DataError
from dinov2_jax.evals.dense.pairs import (
    Pair,
    first_folder,
    folder_pairs,
    listed_pairs,
    read_pair,
    read_target,
)

IGNORED = -1
LAYOUT = (
    "a folder in one of these layouts, masks as PNG files that hold class numbers: "
    "(plain) train/ and trainannot/, val/ and valannot/; or images/train and annotations/train "
    "(or masks/, labels/); or train/images and train/masks; with the same names in both; "
    "(ade20k) images/training and annotations/training, images/validation and "
    "annotations/validation; (voc) JPEGImages, SegmentationClass and "
    "ImageSets/Segmentation/train.txt; (cityscapes) leftImg8bit/train and gtFine/train; "
    "classes.txt beside them may name the classes, one a line, a number first or not"
)
LAYOUTS = ("ade20k", "voc", "cityscapes", "plain")
_IMAGES, _MASKS = ("images", "image", "img", "rgb"), ("annotations", "masks", "labels", "mask")
VOC_CLASSES = (
    "background aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse "
    "motorbike person pottedplant sheep sofa train tvmonitor"
).split()
CITYSCAPES_CLASSES = (
    "road,sidewalk,building,wall,fence,pole,traffic light,traffic sign,vegetation,terrain,sky,"
    "person,rider,car,truck,bus,train,motorcycle,bicycle"
).split(",")
# In the order of the classes: their numbers in *_labelIds.png.
CITYSCAPES_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
ADE_NUM_CLASSES = 150
_DEFAULT_IGNORED = 255


@dataclasses.dataclass(frozen=True, kw_only=True)
class MaskSet:
    """Pairs of images and masks of a split, and the classes.

    Attributes:
      pairs: in order.
      layout: among `LAYOUTS`.
      class_names: of class 0, 1, ..
      ids: the number of each class in the files.
      ignored: numbers in the files that stand for no class.
      others_ignored: whether all other numbers are ignored too, and not an error.
    """

    pairs: list[Pair]
    layout: str
    class_names: tuple[str, ...]
    ids: tuple[int, ...]
    ignored: tuple[int, ...]
    others_ignored: bool = False

    def __len__(self) -> int:
        return len(self.pairs)

    @property
    def names(self) -> dict[int, str]:
        """Names of the classes by their numbers in the files."""
        return dict(zip(self.ids, self.class_names, strict=True))

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """An image, uint8 `[height, width, 3]`, and its classes, int16 `[height, width]`.

        Raises:
          DataError: a file cannot be read, sizes differ, or a number is no class.
        """
        image, numbers = read_pair(self.pairs[index], read_target)
        return image, self.classes(numbers, at=str(self.pairs[index].target))

    def classes(self, numbers: np.ndarray, *, at: str) -> np.ndarray:
        """Classes from 0 of the numbers in a file; `IGNORED` where they stand for none."""
        table = np.full(max(numbers.max(), *self.ids, *self.ignored) + 1, IGNORED - 1, np.int16)
        if self.others_ignored:
            table[:] = IGNORED
        table[list(self.ignored)] = IGNORED
        table[list(self.ids)] = np.arange(len(self.ids))
        classes = table[numbers]
        if classes.min() < IGNORED:
            wrong = sorted(set(numbers[classes < IGNORED].tolist()))
            raise DataError(
                f"{at} holds {wrong[:5]}, and the {len(self.ids)} classes are "
                f"{_span(self.ids)}, ignored {list(self.ignored)}; name all classes in "
                "classes.txt, or leave numbers out with --ignore"
            )
        return classes


def open_mask_set(
    data: str,
    split: Sequence[str],
    *,
    layout: str = "auto",
    classes_file: pathlib.Path | None = None,
    ignored: Sequence[int] | None = None,
    names: Mapping[int, str] | None = None,
    num_threads: int = 1,
) -> MaskSet:
    """Finds a split of a data set.

    Args:
      data: the folder.
      split: names, the preferred first, such as ("val", "test").
      layout: among `LAYOUTS`, or "auto".
      classes_file: names of classes; None: classes.txt of `data`, or what the layout has.
      ignored: numbers that stand for no class; None: 255, and 0 in ADE20K.
      names: of classes by number, where they are known already; None: those of `classes_file`; or
        where nothing names them, the numbers in the masks, of which all are read.
      num_threads: that read them.

    Raises:
      DataError: nothing is there, it is not whole, or it has less than two classes.
    """
    root = pathlib.Path(data).expanduser()
    if not root.is_dir():
        raise DataError(f"{root} is not a folder; expected: {LAYOUT}")
    root = first_folder(root, ("VOCdevkit/VOC2012", "VOC2012", "ADEChallengeData2016")) or root
    layout = _detect(root) if layout == "auto" else layout
    pairs, is_label_ids = _find_pairs(root, layout, split)
    if ignored is None:
        ignored = (0,) if layout == "ade20k" else (_DEFAULT_IGNORED,)
    if names is None:
        known = _known_names(layout, is_label_ids)
        names = _named(root, classes_file, ignored, known) or known
    if not names:
        names = {number: str(number) for number in _numbers_in(pairs, num_threads)}
    names = {number: name for number, name in names.items() if number not in ignored}
    if len(names) < 2:
        raise DataError(
            f"{root} has {len(names)} classes besides the ignored {list(ignored)}, and must have "
            f"two or more; expected: {LAYOUT}"
        )
    return MaskSet(
        pairs=pairs,
        layout=layout,
        class_names=tuple(names.values()),
        ids=tuple(names),
        ignored=tuple(ignored),
        others_ignored=is_label_ids,
    )


def _detect(root: pathlib.Path) -> str:
    if (root / "leftImg8bit").is_dir():
        return "cityscapes"
    if (root / "JPEGImages").is_dir():
        return "voc"
    return "ade20k" if (root / "images" / "training").is_dir() else "plain"


def _find_pairs(root: pathlib.Path, layout: str, split: Sequence[str]) -> tuple[list[Pair], bool]:
    """The pairs, and whether masks hold Cityscapes' own numbers, not the 19 of training."""
    if layout == "cityscapes":
        images = _required(root, [f"leftImg8bit/{name}" for name in split])
        masks = root / "gtFine" / images.name
        is_train_ids = next(masks.rglob("*_gtFine_labelTrainIds.png"), None) is not None
        end = "_gtFine_labelTrainIds" if is_train_ids else "_gtFine_labelIds"
        ends = dict(image_end="_leftImg8bit", target_end=end)
        return folder_pairs(images, masks, layout=LAYOUT, **ends), not is_train_ids
    if layout == "voc":
        folder = root / "ImageSets" / "Segmentation"
        files = [folder / f"{name}.txt" for name in split]
        file = next((path for path in files if path.is_file()), None)
        if file is None:
            raise DataError(f"{files[0]} is missing; expected: {LAYOUT}")
        is_augmented = (root / "SegmentationClassAug").is_dir() and file.stem == "trainaug"
        masks = "SegmentationClassAug" if is_augmented else "SegmentationClass"
        names = [(f"JPEGImages/{x}.jpg", f"{masks}/{x}.png") for x in file.read_text().split()]
        return listed_pairs(root, names, layout=LAYOUT), False
    if layout == "ade20k":
        words = {"train": "training", "val": "validation"}
        images = _required(root, [f"images/{words.get(name, name)}" for name in split])
        return folder_pairs(images, root / "annotations" / images.name, layout=LAYOUT), False
    return folder_pairs(*_plain_folders(root, split), layout=LAYOUT), False


def _plain_folders(root: pathlib.Path, split: Sequence[str]) -> tuple[pathlib.Path, pathlib.Path]:
    for name in split:
        if (root / f"{name}annot").is_dir():
            return root / name, root / f"{name}annot"
        for images, masks in (
            (first_folder(root, [f"{x}/{name}" for x in _IMAGES]), [f"{x}/{name}" for x in _MASKS]),
            (first_folder(root, [f"{name}/{x}" for x in _IMAGES]), [f"{name}/{x}" for x in _MASKS]),
        ):
            if images is not None:
                return images, first_folder(root, masks) or root / masks[0]
    raise DataError(f"{root} holds no split {' or '.join(split)}; expected: {LAYOUT}")


def _required(root: pathlib.Path, names: Sequence[str]) -> pathlib.Path:
    folder = first_folder(root, names)
    if folder is None:
        raise DataError(f"{root} holds no {' or '.join(names)}; expected: {LAYOUT}")
    return folder


def _known_names(layout: str, is_label_ids: bool) -> dict[int, str]:
    """Names by number; empty where the layout does not say."""
    if layout == "ade20k":
        return {number: str(number) for number in range(1, ADE_NUM_CLASSES + 1)}
    if layout == "voc":
        return dict(enumerate(VOC_CLASSES))
    if layout == "cityscapes":
        numbers = CITYSCAPES_IDS if is_label_ids else range(len(CITYSCAPES_CLASSES))
        return dict(zip(numbers, CITYSCAPES_CLASSES, strict=True))
    return {}


def _named(
    root: pathlib.Path, file: pathlib.Path | None, ignored: Sequence[int], known: Iterable[int]
) -> dict[int, str]:
    """Names by number of a text file; empty where there is none.

    Lines without numbers get those that the layout has, else 0, 1, .. without the ignored.
    """
    path = root / "classes.txt" if file is None else file
    if not path.is_file():
        if file is not None:
            raise DataError(f"{path} is not there; give a text file with a class a line")
        return {}
    lines = [line.split(maxsplit=1) for line in path.read_text().splitlines() if line.strip()]
    if all(len(words) == 2 and words[0].rstrip(":,").isdecimal() for words in lines):
        return {int(words[0].rstrip(":,")): words[1].strip() for words in lines}
    numbers = iter(known) if known else (i for i in itertools.count() if i not in ignored)
    return dict(zip(numbers, (" ".join(words) for words in lines), strict=False))


def _numbers_in(pairs: Sequence[Pair], num_threads: int) -> list[int]:
    """All that masks hold, ascending."""

    def numbers(pair: Pair) -> np.ndarray:
        return np.unique(read_target(pair.target))

    found = set()
    for unique in map_ahead(numbers, pairs, num_threads=num_threads, ahead=4 * num_threads):
        found |= set(unique.tolist())
    return sorted(found)


def _span(ids: Sequence[int]) -> str:
    if list(ids) == list(range(ids[0], ids[-1] + 1)):
        return f"{ids[0]} to {ids[-1]}"
    return str(list(ids))
