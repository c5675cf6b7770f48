"""Rates of a step: images and FLOPs a chip, and shares of the peak where it is known."""

import types

import pytest

from dinov2_jax.cost.chips import GPUS, TPUS, chip_of
from dinov2_jax.speed import FIELDS, Speed


def speed(device_kind, count):
    devices = [types.SimpleNamespace(device_kind=device_kind)] * count
    return Speed(images=64, model_flops=8e12, executed_flops=6e12, devices=devices)


@pytest.mark.parametrize(
    ("device_kind", "chip"),
    [
        ("TPU v4", TPUS["v4"]),
        ("TPU v5 lite", TPUS["v5e"]),
        ("TPU v5", TPUS["v5p"]),
        ("TPU v5p", TPUS["v5p"]),
        ("TPU v6 lite", TPUS["v6e"]),
        ("TPU7x", TPUS["tpu7x"]),
        ("NVIDIA A100-SXM4-80GB", GPUS["a100"].chip),
        ("NVIDIA H100 80GB HBM3", GPUS["h100"].chip),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA H200", GPUS["h200"].chip),
        ("TPU v3", None),
        ("cpu", None),
    ],
)
def test_chips_by_the_name_of_their_device(device_kind, chip):
    assert chip_of(device_kind) is chip


def test_on_known_chips_shares_of_the_peak():
    fields = speed("TPU v5 lite", 4).fields(0.5)
    assert tuple(fields) == FIELDS
    assert fields == {
        "step_secs": 0.5,
        "images_per_sec": 128,
        "images_per_sec_per_chip": 32,
        "tflops_per_chip": 6 / 0.5 / 4,
        "model_mfu": pytest.approx(8 / 0.5 / 4 / 197),
        "executed_mfu": pytest.approx(6 / 0.5 / 4 / 197),
    }


def test_two_devices_are_one_chip_where_they_are():
    fields = speed("TPU7x", 4).fields(1.0)
    assert fields["images_per_sec_per_chip"] == 32 and fields["tflops_per_chip"] == 3
    assert fields["executed_mfu"] == pytest.approx(3 / 2307)


def test_elsewhere_rates_alone():
    fields = speed("cpu", 2).fields(1.0)
    assert tuple(fields) == FIELDS[:-2] and fields["tflops_per_chip"] == 3
