"""Frames of videos as a source of images: folders of frames, or video files by PyAV.

Of each video the same few frames, evenly spaced in time, are the records, one after the other.
"""

import concurrent.futures
import os
import pathlib
import re
import threading
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np

from dinov2_jax.data.image_ops import IMAGE_SUFFIXES
from dinov2_jax.data.records import BadImage, DataError, Record, Source

VIDEO_SUFFIXES = (".avi", ".mp4", ".webm", ".mkv", ".mov", ".m4v", ".mpg", ".mpeg")
# Whose frames are kept while threads ask for them: they run ahead over a few videos.
_NUM_VIDEOS_KEPT = 16


def spaced_frames(num_frames: int, count: int) -> list[int]:
    """The middle frame of each of `count` equal parts; a short video gives some more than once."""
    return [(2 * i + 1) * num_frames // (2 * count) for i in range(count)]


def in_time(name: str) -> tuple[list[str | int], str]:
    """The key that sorts names of frames: frame_2 comes before frame_10."""
    parts = re.split(r"(\d+)", name)
    return [int(part) if i % 2 else part for i, part in enumerate(parts)], name


class VideoFrames(Source):
    """The frames of videos: record `i` is frame `i % frames_per_video` of video
    `i // frames_per_video`. A video that cannot be read makes all of its records bad images.
    """

    def __init__(self, videos: Sequence[str], *, frames_per_video: int, path: str):
        """Binds videos.

        Args:
          videos: files, or folders of frames, which are sorted by `in_time`.
          frames_per_video: of each.
          path: what named them.

        Raises:
          DataError: there is none, or a package is missing.
        """
        if not videos:
            raise DataError(f"{path} names no video that is there")
        if not all(map(os.path.isdir, videos)):
            _require_av()
        self.path, self.kind, self.rejected = path, "videos", []
        self.frames_per_video = frames_per_video
        self._videos = videos
        self._start_anew()

    def _start_anew(self):
        self._lock, self._decoded = threading.Lock(), OrderedDict()

    def __getstate__(self):
        return {k: v for k, v in vars(self).items() if k not in ("_lock", "_decoded")}

    def __setstate__(self, state):
        vars(self).update(state)
        self._start_anew()

    def __len__(self) -> int:
        return len(self._videos) * self.frames_per_video

    def name(self, index: int) -> str:
        video, frame = divmod(index, self.frames_per_video)
        return f"{self._videos[video]}#{frame}"

    def __getitem__(self, index: int) -> Record:
        video, frame = divmod(index, self.frames_per_video)
        return Record(self._frames(video)[frame], self.name(index), None)

    def _frames(self, video: int) -> list[bytes | np.ndarray]:
        """All frames of a video: the thread that asks first decodes, the others wait for it."""
        with self._lock:
            is_first = video not in self._decoded
            future = self._decoded.setdefault(video, concurrent.futures.Future())
            while len(self._decoded) > _NUM_VIDEOS_KEPT:
                self._decoded.popitem(last=False)
        if is_first:
            try:
                future.set_result(read_frames(self._videos[video], self.frames_per_video))
            except BaseException as error:
                future.set_exception(error)
        return future.result()


def read_frames(video: str, count: int) -> list[bytes | np.ndarray]:
    """Evenly spaced frames of a file or a folder, encoded or decoded.

    Raises:
      BadImage: it has no frame, or cannot be read.
    """
    if os.path.isdir(video):
        found = [x for x in os.listdir(video) if x.lower().endswith(IMAGE_SUFFIXES)]
        found.sort(key=in_time)
        if not found:
            raise BadImage("a folder without frames")
        names = [os.path.join(video, found[i]) for i in spaced_frames(len(found), count)]
        try:
            return [pathlib.Path(name).read_bytes() for name in names]
        except OSError as error:
            raise BadImage(error.strerror or "unreadable") from error
    return _decode(video, count)


def _decode(video: str, count: int) -> list[np.ndarray]:
    """Frames of a file: its packets say how many there are, mostly; if they do not, once more."""
    av = _require_av()
    try:
        with av.open(video) as container:
            num_frames = sum(1 for x in container.demux(video=0) if x.size)
        for _ in range(2):
            wanted = spaced_frames(num_frames, count)
            found, seen = {}, 0
            with av.open(video) as container:
                for seen, frame in enumerate(container.decode(video=0), 1):
                    if seen - 1 in wanted:
                        found[seen - 1] = frame.to_ndarray(format="rgb24")
                    if seen > wanted[-1]:
                        break
            if len(found) == len(set(wanted)):
                return [found[i] for i in wanted]
            num_frames = seen
    except (av.FFmpegError, OSError, ValueError, IndexError) as error:
        raise BadImage(str(error)[:120] or type(error).__name__) from error
    raise BadImage("a video without frames")


def _require_av():
    try:
        import av
    except ImportError as error:
        raise DataError("video files need PyAV: pip install 'dinov2_jax[video]'") from error
    return av
