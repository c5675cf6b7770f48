"""Layouts of video sets, drawn in empty files."""

import json

import pytest

from dinov2_jax.data.records import DataError
from dinov2_jax.evals.video_sets import open_videos


def touch(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def found(split, root):
    return {
        path.removeprefix(f"{root}/"): int(label)
        for path, label in zip(split.paths, split.labels, strict=True)
    }


def test_folders(tmp_path):
    touch(tmp_path, "train/b/1.mp4", "train/a/2.avi", "train/a/notes.txt", "train/b/3/0.jpg")
    touch(tmp_path, "val/a/4.webm", "val/b/5.mp4")
    videos = open_videos(str(tmp_path))
    assert videos.kind == "folders" and videos.label_names == ("a", "b")
    assert found(videos.train, tmp_path) == {"train/a/2.avi": 0, "train/b/1.mp4": 1, "train/b/3": 1}
    assert found(videos.test, tmp_path) == {"val/a/4.webm": 0, "val/b/5.mp4": 1}


@pytest.mark.parametrize("lists, videos_in", [("", ""), ("ucfTrainTestlist/", "UCF-101/")])
def test_ucf(tmp_path, lists, videos_in):
    touch(tmp_path, f"{lists}classInd.txt", f"{videos_in}Jump/v_1.avi", f"{videos_in}Jump/v_2.avi")
    touch(tmp_path, f"{videos_in}Run/v_3/0.jpg", f"{videos_in}Run/v_4.avi")
    (tmp_path / f"{lists}trainlist02.txt").write_text("Jump/v_1.avi 1\nRun/v_3.avi 2\n")
    (tmp_path / f"{lists}testlist02.txt").write_text("Jump/v_2.avi\nRun/v_4.avi\nRun/v_5.avi\n")
    videos = open_videos(str(tmp_path), ucf_split=2)
    assert videos.kind == "ucf101" and videos.label_names == ("Jump", "Run")
    expected = {f"{videos_in}Jump/v_1.avi": 0, f"{videos_in}Run/v_3": 1}
    assert found(videos.train, tmp_path) == expected
    assert (videos.train.num_missing, videos.test.num_missing) == (0, 1)
    with pytest.raises(DataError, match=r"trainlist01\.txt is not there"):
        open_videos(str(tmp_path))


def test_kinetics(tmp_path):
    header = "label,youtube_id,time_start,time_end,split\n"
    (tmp_path / "train.csv").write_text(
        header + 'archery,-abc,2,12,train\n"tap, dancing",x.y,100,110,train\n'
    )
    (tmp_path / "val.csv").write_text('clips/a,archery\nclips/b,"tap, dancing"\n')
    touch(tmp_path, "train/-abc_000002_000012.mp4", "train/x.y_000100_000110.mp4")
    touch(tmp_path, "clips/a.mp4", "clips/b/0.jpg")
    videos = open_videos(str(tmp_path))
    assert videos.kind == "kinetics" and videos.label_names == ("archery", "tap, dancing")
    assert found(videos.train, tmp_path) == {
        "train/-abc_000002_000012.mp4": 0,
        "train/x.y_000100_000110.mp4": 1,
    }
    assert found(videos.test, tmp_path) == {"clips/a.mp4": 0, "clips/b": 1}
    (tmp_path / "val.csv").write_text("clips/a\n")
    with pytest.raises(DataError, match="must have lines 'path,class'"):
        open_videos(str(tmp_path))


def test_something_something(tmp_path):
    for name, numbers in (("train", (1, 2)), ("validation", (3, 4))):
        clips = [
            {"id": str(numbers[0]), "label": "x", "template": "Pushing [something] left"},
            {"id": numbers[1], "label": "y", "template": "Holding [something]"},
        ]
        (tmp_path / f"something-something-v2-{name}.json").write_text(json.dumps(clips))
    touch(tmp_path, *(f"20bn-something-something-v2/{i}.webm" for i in range(1, 5)))
    videos = open_videos(str(tmp_path))
    assert videos.kind == "ssv2"
    assert videos.label_names == ("Holding something", "Pushing something left")
    assert found(videos.test, tmp_path) == {
        "20bn-something-something-v2/3.webm": 1,
        "20bn-something-something-v2/4.webm": 0,
    }


def test_errors_show_the_layout(tmp_path):
    with pytest.raises(DataError, match="holds no videos in a known layout; expected one of"):
        open_videos(str(tmp_path))
    touch(tmp_path, "train/a/1.mp4", "train/b/2.mp4", "val/c/3.mp4")
    with pytest.raises(DataError, match=r"classes \['c'\] of the test split"):
        open_videos(str(tmp_path))
    (tmp_path / "val" / "c").rename(tmp_path / "val" / "a")
    with pytest.raises(DataError, match="of 1 videos of the test split 1 are there; two of"):
        open_videos(str(tmp_path))
