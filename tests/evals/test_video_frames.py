"""Frames of folders and files, chosen in time; videos that are broken."""

import io
import os
import pickle
import sys
import threading
import types

import numpy as np
import pytest
from PIL import Image

from dinov2_jax.data.records import BadImage, DataError
from dinov2_jax.evals import video_frames
from dinov2_jax.evals.video_frames import VideoFrames, in_time, read_frames, spaced_frames


def write_frames(folder, count):
    folder.mkdir(parents=True)
    for i in range(count):
        Image.new("RGB", (8, 6), (10 * i, 0, 0)).save(folder / f"{i:03d}.png")
    return str(folder)


def color(image) -> int:
    if isinstance(image, bytes):
        return next(i for i in range(26) if _png(i) == image)
    return int(image[..., 0].mean())


def _png(i):
    file = io.BytesIO()
    Image.new("RGB", (8, 6), (10 * i, 0, 0)).save(file, "PNG")
    return file.getvalue()


def test_frames_are_the_middles_of_equal_parts():
    assert spaced_frames(16, 8) == [1, 3, 5, 7, 9, 11, 13, 15]
    assert spaced_frames(8, 8) == list(range(8))
    assert spaced_frames(3, 8) == [0, 0, 0, 1, 1, 2, 2, 2]
    assert spaced_frames(100, 1) == [50]
    for n in range(1, 60):
        found = spaced_frames(n, 8)
        expected = [min(int(n * (i + 0.5) / 8), n - 1) for i in range(8)]
        assert found == expected


def test_folders_of_frames(tmp_path):
    videos = [write_frames(tmp_path / "a", 6), write_frames(tmp_path / "b", 2)]
    source = VideoFrames(videos, frames_per_video=3, path="list")
    assert len(source) == 6
    assert [color(source[i].image) for i in range(6)] == [1, 3, 5, 0, 1, 1]
    assert source.name(4) == f"{videos[1]}#1" and source[4].label is None
    again = pickle.loads(pickle.dumps(source))
    assert again[5].image == source[5].image
    os.mkdir(tmp_path / "empty")
    source = VideoFrames([str(tmp_path / "empty")], frames_per_video=2, path="list")
    for i in range(2):
        with pytest.raises(BadImage, match="a folder without frames"):
            source[i]
    with pytest.raises(DataError, match="list names no video"):
        VideoFrames([], frames_per_video=2, path="list")


def test_numbers_of_frames_are_numbers(tmp_path):
    """As text, frame_10 comes before frame_2."""
    (tmp_path / "a").mkdir()
    for i in range(1, 13):
        (tmp_path / "a" / f"frame_{i}.png").write_bytes(_png(i))
    found = [color(x) for x in read_frames(str(tmp_path / "a"), 12)]
    assert found == list(range(1, 13))
    names = ["b1", "a10_2", "a10_10", "a9", "a", "a09", "7"]
    assert sorted(names, key=in_time) == ["7", "a", "a09", "a9", "a10_2", "a10_10", "b1"]


def test_a_video_is_read_once_by_many_threads(tmp_path, monkeypatch):
    videos = [write_frames(tmp_path / name, 4) for name in "ab"]
    reads, read = [], read_frames

    def counted(video, count):
        reads.append(video)
        return read(video, count)

    monkeypatch.setattr(video_frames, "read_frames", counted)
    source = VideoFrames(videos, frames_per_video=4, path="list")
    threads = [threading.Thread(target=source.__getitem__, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(reads) == videos
    assert len(VideoFrames(videos * 20, frames_per_video=1, path="list")._decoded) == 0


class FakeContainer:
    """A video of `frames` frames, whose packets promise `packets`."""

    def __init__(self, frames, packets):
        self.frames, self.packets = frames, packets

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def demux(self, *, video):
        return [types.SimpleNamespace(size=5)] * self.packets + [types.SimpleNamespace(size=0)]

    def decode(self, *, video):
        for i in range(self.frames):
            frame = np.full((6, 8, 3), i, np.uint8)
            yield types.SimpleNamespace(to_ndarray=lambda format, frame=frame: frame)


@pytest.mark.parametrize("frames, packets", [(16, 16), (10, 16), (16, 10), (3, 3)])
def test_files_whose_packets_lie(monkeypatch, frames, packets):
    """Fewer frames than promised: chosen once more, of those that there are."""
    av = types.SimpleNamespace(open=lambda _: FakeContainer(frames, packets), FFmpegError=OSError)
    monkeypatch.setattr(video_frames, "_require_av", lambda: av)
    found = [color(x) for x in read_frames("x.mp4", 8)]
    assert found == spaced_frames(min(frames, packets), 8)


def test_files_by_pyav(tmp_path):
    av = pytest.importorskip("av")
    path = str(tmp_path / "a.mp4")
    with av.open(path, "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for i in range(20):
            image = np.full((48, 64, 3), 12 * i, np.uint8)
            for packet in stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    found = read_frames(path, 4)
    assert [x.shape for x in found] == [(48, 64, 3)] * 4
    levels = [x.mean() / 12 for x in found]
    np.testing.assert_allclose(levels, spaced_frames(20, 4), atol=0.6)
    (tmp_path / "b.mp4").write_bytes((tmp_path / "a.mp4").read_bytes()[:300])
    with pytest.raises(BadImage):
        read_frames(str(tmp_path / "b.mp4"), 4)


def test_without_pyav_files_say_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(DataError, match=r"pip install 'dinov2_jax\[video\]'"):
        VideoFrames([str(tmp_path / "a.mp4")], frames_per_video=2, path="list")
