"""The photographs that the scikit-image and scikit-learn wheels contain: a data set offline.

`photos:` is all of each, `photos:left` the left three quarters and `photos:right` the rest, so
that the two parts share no pixel. The label is which photo. Only real photographs are taken: no
drawings, text, binary or synthetic images, and one picture of the stereo pair. Sides above 640 px
are scaled down to it.
"""

import importlib.util
import os

import numpy as np

from dinov2_jax.data.image_ops import decode, resize_box, to_pillow
from dinov2_jax.data.records import BadImage, DataError, Record, Source, require_images

_PIP = "pip install -e '.[quickstart]'"
_PHOTOS = {
    "skimage/data": (
        "astronaut.png",
        "brick.png",
        "camera.png",
        "cell.png",
        "chelsea.png",
        "clock_motion.png",
        "coffee.png",
        "coins.png",
        "grass.png",
        "gravel.png",
        "hubble_deep_field.jpg",
        "ihc.png",
        "microaneurysms.png",
        "moon.png",
        "motorcycle_left.png",
        "retina.jpg",
        "rocket.jpg",
    ),
    "sklearn/datasets/images": ("china.jpg", "flower.jpg"),
}
_PARTS = ("", "left", "right")
_MAX_SIDE_PX = 640  # three photographs are larger, and would take a third of the host's time


class PhotosSource(Source):
    """The photographs, decoded once in each process and kept: they are few."""

    def __init__(self, part: str):
        """Finds the files; the packages are not imported.

        Args:
          part: "", "left" or "right".

        Raises:
          DataError: another part, or the packages are missing.
        """
        if part not in _PARTS:
            raise DataError(f"photos:{part} must be one of {[f'photos:{p}' for p in _PARTS]}")
        self.path, self.kind, self.rejected = f"photos:{part}", "the installed wheels", []
        self._part = part
        self._files: list[str] = []
        for folder, names in _PHOTOS.items():
            package, _, below = folder.partition("/")
            spec = importlib.util.find_spec(package)
            if spec is None:
                raise DataError(f"{self.path} needs the package {package}: {_PIP}")
            for name in names:
                file = os.path.join(spec.submodule_search_locations[0], *below.split("/"), name)
                if os.path.isfile(file):
                    self._files.append(file)
                else:  # another version of the package
                    self.rejected.append((file, "missing"))
        self.label_names = tuple(self.name(i) for i in range(len(self._files)))
        self._decoded: dict[int, np.ndarray] = {}
        require_images(self, cure=_PIP)

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> Record:
        image = self._decoded.get(index)
        if image is None:
            image = self._decoded[index] = self._decode(self._files[index])
        return Record(image, self.name(index), index)

    def name(self, index: int) -> str:
        return os.path.basename(self._files[index])

    def _decode(self, file: str) -> np.ndarray:
        try:
            with open(file, "rb") as opened:
                image = decode(opened.read())
        except OSError as error:
            raise BadImage(error.strerror or "unreadable") from error
        scale = min(1.0, _MAX_SIDE_PX / max(image.shape[:2]))
        cut = image.shape[1] * 3 // 4
        columns = {"": slice(None), "left": slice(cut), "right": slice(cut, None)}[self._part]
        image = np.ascontiguousarray(image[:, columns])
        if scale < 1:  # after the cut, so that no pixel mixes both sides of it
            height, width = image.shape[:2]
            new_size = (round(scale * height), round(scale * width))
            image = resize_box(to_pillow(image), (0, 0, width, height), *new_size)
        image.flags.writeable = False
        return image

    def __getstate__(self):
        return self.__dict__ | {"_decoded": {}}
