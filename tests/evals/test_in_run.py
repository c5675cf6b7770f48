"""Evaluation during training, on small sources whose answers are known."""

import jax
import numpy as np
import pytest

from dinov2_jax.data.records import BadImage
from dinov2_jax.evals import image_sets
from dinov2_jax.evals.in_run import crop_identity, labelled_knn
from dinov2_jax.models.vit import VisionTransformer
from dinov2_jax.sharding import make_mesh, tree_sharding
from tests.evals.stand_ins import ListSource, color_apply, colored_source, noise_apply

MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
NORMAL = dict(mean=MEAN, std=STD)


def labelled(bank, queries, *, apply=color_apply, **settings):
    settings = dict(num_neighbors=3, resize_size_px=18, crop_size_px=14, batch_size=4) | settings
    return labelled_knn(
        name="colors", bank=bank, queries=queries, apply=apply, **NORMAL, **settings
    )


def test_labelled_knn_and_its_baselines():
    evaluation = labelled(colored_source(15), colored_source(9, seed=1))
    params = np.float32(1)
    assert evaluation(params) == {"knn/colors/cls": 1.0, "knn/colors/mean_patch": 1.0}
    baselines = evaluation.baselines(params)
    assert {key.removeprefix("knn/colors/") for key in baselines} == {
        "chance",
        "raw_pixels",
        "color_stats",
        "random_init_cls",
        "random_init_mean_patch",
        "num_bank",
        "num_queries",
        "bad_images",
    }
    assert baselines["knn/colors/chance"] == pytest.approx(1 / 3)
    assert baselines["knn/colors/color_stats"] == 1.0
    assert baselines["knn/colors/raw_pixels"] == 1.0
    assert baselines["knn/colors/num_bank"] == 15
    assert baselines["knn/colors/num_queries"] == 9
    assert all(type(value) is float for value in baselines.values())


def test_features_that_say_nothing_score_like_chance():
    evaluation = labelled(colored_source(60), colored_source(90, seed=1), apply=noise_apply)
    assert evaluation(np.float32(0))["knn/colors/cls"] < 0.55
    baselines = evaluation.baselines(np.float32(0))
    assert baselines["knn/colors/random_init_cls"] < 0.55
    assert baselines["knn/colors/color_stats"] > 0.95


def test_classes_are_matched_by_name_not_by_number():
    queries = colored_source(8, classes=("green", "blue"), seed=1)  # green is 0 here, 1 in the bank
    assert labelled(colored_source(15), queries)(np.float32(1))["knn/colors/cls"] == 1.0


def test_unreadable_images_are_left_out_and_counted():
    bank, queries = colored_source(15), colored_source(9, seed=1)
    bank.records[2] = bank.records[2]._replace(image=b"not an image")
    queries.records[0] = queries.records[0]._replace(image=BadImage("gone"))
    queries.records[4] = queries.records[4]._replace(image=b"")
    evaluation = labelled(bank, queries)
    assert evaluation(np.float32(1))["knn/colors/cls"] == 1.0
    assert evaluation.num_bad == 3
    assert evaluation.queries.bad["red/1_0.png"] == "gone"
    baselines = evaluation.baselines(np.float32(1))
    assert baselines["knn/colors/bad_images"] == 3
    assert baselines["knn/colors/num_queries"] == 7


def test_what_another_host_cannot_read_is_left_out_here_too(monkeypatch):
    """Of four queries this host lacks the first, the other one the last; both compute all four."""
    queries = colored_source(4, classes=("red", "green"), seed=1)
    queries.records[0] = queries.records[0]._replace(image=b"")
    evaluation = labelled(colored_source(15), queries)
    gathered = []

    def gather(own):
        other = own.copy()
        if len(own) == 4:
            gathered.append(own.tolist())
            other[:] = [0, *own[1:3], image_sets.UNREADABLE]
        return np.stack([own, other])

    monkeypatch.setattr("jax.process_count", lambda: 2)
    monkeypatch.setattr("jax.experimental.multihost_utils.process_allgather", gather)
    baselines = evaluation.baselines(np.float32(1))
    assert len(gathered) == 2 and all(own[0] == -1 and min(own[1:]) >= 0 for own in gathered)
    assert baselines["knn/colors/num_queries"] == 2
    assert baselines["knn/colors/color_stats"] == 1.0


def test_a_set_of_which_nothing_can_be_read_is_an_error():
    queries = colored_source(3, seed=1)
    queries.records = [record._replace(image=b"") for record in queries.records]
    with pytest.raises(ValueError, match=r"none of the 3 images can be read \(images of 3 cl"):
        labelled(colored_source(15), queries)(np.float32(1))


@pytest.mark.parametrize(("max_cached_mb", "reads"), [(100, 9), (0, 27)])
def test_images_are_decoded_once_if_they_fit(max_cached_mb, reads):
    queries = colored_source(9, seed=1)
    evaluation = labelled(colored_source(15), queries, max_cached_mb=max_cached_mb, num_threads=2)
    results = [evaluation(np.float32(1)) for _ in range(3)]
    assert results[0] == results[1] == results[2]
    assert queries.num_reads == reads


def test_max_images_takes_the_same_ones_every_time():
    evaluations = [
        labelled(colored_source(30), colored_source(20, seed=1), max_images=12) for _ in range(2)
    ]
    chosen = [[image.tobytes() for image, _ in evaluation.queries] for evaluation in evaluations]
    assert chosen[0] == chosen[1]
    assert len(chosen[0]) == 12
    everything = [
        x.tobytes() for x, _ in labelled(colored_source(30), colored_source(20, seed=1)).queries
    ]
    assert [x for x in everything if x in chosen[0]] == chosen[0]
    assert chosen[0] != everything[:12]  # sorted sources would lose classes


def test_images_are_prepared_as_the_protocol_says():
    gradient = np.tile(np.arange(0, 240, 4, dtype=np.uint8)[None, :, None], (40, 1, 3))
    source = ListSource([gradient, gradient], ["a", "b"], [0, 1], ["x", "y"])
    evaluation = labelled(source, source, num_neighbors=1, resize_size_px=20, crop_size_px=16)
    (image, _), _ = evaluation.queries
    # 40 x 60 becomes 20 x 30, of which columns 7 to 23 remain: levels 4 * (2 * 7 + 0.5) and so on.
    assert image.shape == (16, 16, 3)
    np.testing.assert_allclose(image[8, :, 0], 4 * (2 * np.arange(7, 23) + 0.5), atol=1)


def test_labelled_errors():
    source = colored_source(15)
    with pytest.raises(ValueError, match="needs at least two labelled classes, found 0"):
        labelled(ListSource([np.zeros((9, 9, 3), np.uint8)], ["a"]), source)
    with pytest.raises(ValueError, match="needs at least two labelled classes, found 1"):
        labelled(source, colored_source(4, classes=("red",)))
    with pytest.raises(ValueError, match=r"classes \['blue'\] .* not among the bank's 2"):
        labelled(colored_source(8, classes=("red", "green")), source)
    with pytest.raises(ValueError, match="num_neighbors=16 must be between 1 and the bank's 15"):
        labelled(source, source, num_neighbors=16)
    with pytest.raises(ValueError, match="crop_size_px=20 must not exceed resize_size_px=18"):
        labelled(source, source, crop_size_px=20)


def photos(side: int, num: int = 6, **replaced) -> ListSource:
    """`num` photos, of which each side shows other pixels: one texture's frequency a photo."""
    images, names = [], []
    for i in range(num):
        rng = np.random.default_rng([i, side])
        rows, columns = np.mgrid[:60, :60] + 60 * side
        wave = 127 + 100 * np.sin((rows * (i % 3) + columns * (i // 3 + 1)) / 2)
        tint = np.random.default_rng(i).uniform(0.6, 1.2, 3)
        image = (wave[..., None] * tint + rng.normal(0, 5, (60, 60, 3))).clip(0, 255)
        images.append(image.astype(np.uint8))
        names.append(f"photo_{i}")
    for name, image in replaced.items():
        images[names.index(name)] = image
    return ListSource(images, names)


def identity(bank, queries, *, apply=color_apply, **settings):
    settings = dict(num_neighbors=3, crop_size_px=14, crops_per_image=5, batch_size=8) | settings
    return crop_identity(
        name="photos", bank=bank, queries=queries, apply=apply, **NORMAL, **settings
    )


def test_crop_identity_counts_and_baselines():
    evaluation = identity(photos(0), photos(1))
    assert len(evaluation.bank) == len(evaluation.queries) == 30
    found, baselines = evaluation(np.float32(1)), evaluation.baselines(np.float32(1))
    assert found["knn/photos/cls"] > 1.5 / 6  # mean colour, jittered, still says something
    assert found["knn/photos/cls"] == baselines["knn/photos/random_init_cls"]
    assert baselines["knn/photos/chance"] == pytest.approx(1 / 6)
    blind = identity(photos(0), photos(1), apply=noise_apply)
    assert blind(np.float32(0))["knn/photos/cls"] < 0.45
    assert "30 queries (crops of 6 photos) against 30" in evaluation.describe()
    assert "standard error at most 9.1 points" in evaluation.describe()


def test_crops_are_the_same_at_every_build_and_in_any_order_of_records():
    first = identity(photos(0), photos(1))
    shuffled = photos(1)
    shuffled.records.reverse()
    second = identity(photos(0), shuffled)
    for name in ("bank", "queries"):
        ours, theirs = list(getattr(first, name)), list(getattr(second, name))
        assert [label for _, label in ours] == [label for _, label in theirs]
        for (a, _), (b, _) in zip(ours, theirs, strict=True):
            np.testing.assert_array_equal(a, b)
    assert first(np.float32(1)) == second(np.float32(1))


def test_crops_differ_and_bank_and_queries_see_their_own_side():
    dark = {f"photo_{i}": np.zeros((60, 60, 3), np.uint8) for i in range(6)}
    evaluation = identity(photos(0), photos(1, **dark))
    assert all((image == 0).all() for image, _ in evaluation.queries)
    crops = {image.tobytes() for image, _ in evaluation.bank}
    assert len(crops) == 30
    # Were the two sides' draws the same, each query would find its twin by crop and colours.
    twins = identity(photos(0), photos(0))
    assert crops.isdisjoint(image.tobytes() for image, _ in twins.queries)
    assert crops == {image.tobytes() for image, _ in twins.bank}


def test_crops_have_the_local_scale_flips_and_jitter():
    ramp = np.tile(np.arange(200, dtype=np.uint8)[None, :, None], (200, 1, 3))
    replaced = {f"photo_{i}": ramp for i in range(6)}
    still = dict(brightness=0, contrast=0, saturation=0, hue=0)
    plain = identity(photos(0, **replaced), photos(1), crops_per_image=20, **still)
    spans = np.array(
        [int(image[..., 0].max()) - int(image[..., 0].min()) for image, _ in plain.bank]
    )
    # A side of a crop is sqrt(area * ratio): 200 px times 0.19 to 0.65, seen at 14 px.
    assert 25 < spans.min() < 60 and 85 < spans.max() < 132
    falling = np.mean([image[0, 0, 0] > image[0, -1, 0] for image, _ in plain.bank])
    assert 0.3 < falling < 0.7
    greys = [np.ptp(image.astype(int), axis=-1).max() for image, _ in plain.bank]
    assert max(greys) <= 1
    jittered = identity(photos(0, **replaced), photos(1), crops_per_image=20)
    changed = [
        np.abs(a.astype(int) - b).max() > 3
        for (a, _), (b, _) in zip(plain.bank, jittered.bank, strict=True)
    ]
    assert np.mean(changed) > 0.9


def test_unreadable_photos_leave_both_sides():
    evaluation = identity(photos(0, photo_1=b"broken"), photos(1, photo_4=BadImage("gone")))
    assert len(evaluation.bank) == len(evaluation.queries) == 20
    assert evaluation.num_bad == 2
    assert evaluation.baselines(np.float32(1))["knn/photos/chance"] == pytest.approx(1 / 4)


def test_crop_identity_errors():
    with pytest.raises(ValueError, match=r"must hold the same photos.*the first is photo_5"):
        identity(photos(0), photos(1, num=5))
    with pytest.raises(ValueError, match="at least two readable photos"):
        identity(photos(0, num=1), photos(1, num=1))
    with pytest.raises(ValueError, match="num_neighbors=31 must be between 1 and the bank's 30"):
        identity(photos(0), photos(1), num_neighbors=31)


def test_eight_devices_agree_with_one():
    network = VisionTransformer(
        patch_size=7,
        embed_dim=32,
        depth=1,
        num_heads=2,
        pos_embed_grid=(2, 2),
        layer_scale_init=1.0,
    )
    dummy = np.zeros((1, 14, 14, 3), np.float32)
    params = jax.jit(network.init)(jax.random.key(0), dummy)["params"]

    def apply(params, images):
        return network.apply({"params": params}, images)

    one = identity(photos(0), photos(1), apply=apply)
    mesh = make_mesh(data=2, fsdp=4)
    eight = identity(photos(0), photos(1), apply=apply, mesh=mesh)
    sharded = jax.device_put(params, tree_sharding(params, mesh, min_size_to_shard_mb=0))
    with jax.set_mesh(mesh):
        assert eight(sharded) == one(params)
        assert eight.baselines(sharded) == one.baselines(params)


def test_broken_parameters_are_named():
    with pytest.raises(ValueError, match="rows are not finite"):
        identity(photos(0), photos(1))(np.float32(np.nan))


def test_jitter_is_drawn_within_its_strength():
    params = image_sets.draw_jitter(np.random.default_rng(0), 500, (0.4, 1.5, 0.2), 0.1)
    columns = dict(zip(image_sets.AUGMENT_COLUMNS, params.T, strict=True))
    for name, low, high in (
        ("brightness", 0.6, 1.4),
        ("contrast", 0, 2.5),
        ("saturation", 0.8, 1.2),
        ("hue", -0.1, 0.1),
        ("jitter_order", 0, 23),
    ):
        assert low - 1e-6 <= columns[name].min() < low + 0.1 * (high - low)
        assert high - 0.1 * (high - low) < columns[name].max() <= high + 1e-6
    assert (columns["jitter"] == 1).all()
    assert not any(columns[name].any() for name in ("grayscale", "blur_sigma", "solarize"))
