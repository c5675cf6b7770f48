"""Accelerators that can be compiled for without having one, and their public figures.

TPUs: peak, HBM and interconnect are those of cloud.google.com/tpu/docs (v4, v5e, v5p, v6e, tpu7x).
Clocks follow from the peak: 2 x (multiply-adds of the matrix units in a cycle) x clock; v4's 1.05
GHz is published too (Jouppi et al. 2023, arXiv 2304.01433, Table 4). GPUs: NVIDIA's data sheets and
the CUDA programming guide's table of compute capabilities.
"""

import dataclasses
import re

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One accelerator; all figures are of one jax device, of which a TPU7x chip has two.

    Attributes:
      name: as in a topology.
      peak_flops: a second, bfloat16.
      hbm_bytes: what a program may use.
      hbm_bandwidth: bytes a second.
      ring_bandwidth: bytes a second that one device sends round a ring over one axis of the torus,
        both ways together: its interconnect bandwidth over its number of ports.
      dcn_bandwidth: bytes a second to other slices.
      clock_hz: of the compiler's cycles; None where it states none.
      axes: of the torus; of GPUs, hosts and devices of a host.
      devices_per_chip: 1, or 2.
      example: a topology that works.
      slice_chips: of the largest slice that there is; None for GPUs.
    """

    name: str
    peak_flops: float
    hbm_bytes: int
    hbm_bandwidth: float
    ring_bandwidth: float
    dcn_bandwidth: float
    clock_hz: float | None
    axes: int
    example: str
    devices_per_chip: int = 1
    slice_chips: int | None = None


def _tpu(
    name,
    *,
    tflops,
    clock_ghz,
    hbm_gib,
    hbm_gbs,
    ring_gbs,
    dcn_gbs,
    axes,
    example,
    slice_chips,
    devices=1,
):
    return Chip(
        name=name,
        peak_flops=tflops * 1e12 / devices,
        hbm_bytes=int(hbm_gib * GIB),  # of a device: what the compiler's refusals name
        hbm_bandwidth=hbm_gbs * 1e9 / devices,
        ring_bandwidth=ring_gbs * 1e9 / devices,
        dcn_bandwidth=dcn_gbs * 1e9 / devices,
        clock_hz=clock_ghz * 1e9,
        axes=axes,
        example=example,
        devices_per_chip=devices,
        slice_chips=slice_chips,
    )


TPUS = {
    chip.name: chip
    for chip in (
        _tpu(
            "v4",
            tflops=275,
            clock_ghz=1.05,
            hbm_gib=30.75,
            hbm_gbs=1228,
            ring_gbs=300 / 6,
            dcn_gbs=6.25,
            axes=3,
            example="v4:4x4x4",
            slice_chips=4096,
        ),
        _tpu(
            "v5e",
            tflops=197,
            clock_ghz=1.5,
            hbm_gib=15.75,
            hbm_gbs=819,
            ring_gbs=400 / 4,
            dcn_gbs=3.125,
            axes=2,
            example="v5e:16x16",
            slice_chips=256,
        ),
        _tpu(
            "v5p",
            tflops=459,
            clock_ghz=1.75,
            hbm_gib=95.74,
            hbm_gbs=2765,
            ring_gbs=1200 / 6,
            dcn_gbs=6.25,
            axes=3,
            example="v5p:4x4x8",
            slice_chips=6144,
        ),
        _tpu(
            "v6e",
            tflops=918,
            clock_ghz=1.75,
            hbm_gib=31.25,
            hbm_gbs=1640,
            ring_gbs=800 / 4,
            dcn_gbs=12.5,
            axes=2,
            example="v6e:16x16",
            slice_chips=256,
        ),
        _tpu(
            "tpu7x",
            tflops=2307,
            clock_ghz=2.2,
            hbm_gib=94.75,
            hbm_gbs=7380,
            ring_gbs=1200 / 6,
            dcn_gbs=12.5,
            axes=3,
            example="tpu7x:4x4x4",
            slice_chips=9216,
            devices=2,
        ),
    )
}


@dataclasses.dataclass(frozen=True)
class Gpu:
    """What XLA must know of a GPU that is not there.

    Attributes:
      chip: the public figures.
      memory_bytes: of the device.
      compute_capability, num_cores, clock_ghz, l2_bytes: of the device.
      fpus_per_core, shared_per_core, shared_per_block: of a multiprocessor.
    """

    chip: Chip
    memory_bytes: int
    compute_capability: tuple[int, int]
    num_cores: int
    clock_ghz: float
    l2_bytes: int
    fpus_per_core: int
    shared_per_core: int
    shared_per_block: int

    def target_config(self) -> str:
        """As the text of XLA's GpuTargetConfigProto."""
        major, minor = self.compute_capability
        return f"""
            gpu_device_info {{
              cuda_compute_capability {{ major: {major} minor: {minor} }}
              core_count: {self.num_cores}
              clock_rate_ghz: {self.clock_ghz}
              fpus_per_core: {self.fpus_per_core}
              device_memory_size: {self.memory_bytes}
              memory_bandwidth: {int(self.chip.hbm_bandwidth)}
              l2_cache_size: {self.l2_bytes}
              shared_memory_per_core: {self.shared_per_core}
              shared_memory_per_block: 49152
              shared_memory_per_block_optin: {self.shared_per_block}
              threads_per_warp: 32
              threads_per_block_limit: 1024
              threads_per_core_limit: 2048
              registers_per_core_limit: 65536
              registers_per_block_limit: 65536
              block_dim_limit_x: 2147483647
              block_dim_limit_y: 65535
              block_dim_limit_z: 65535
            }}
            platform_name: "CUDA"
            dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
            device_description_str: "{self.chip.name}"
        """


# Of a GPU's memory a run gets this share with XLA_PYTHON_CLIENT_MEM_FRACTION=0.9 (default 0.75).
GPU_SHARE = 0.9


def _gpu(name, *, tflops, hbm_gbs, memory_mib, nvlink_gbs, **device):
    memory = memory_mib * 2**20
    chip = Chip(
        name=name,
        peak_flops=tflops * 1e12,
        hbm_bytes=int(GPU_SHARE * memory),
        hbm_bandwidth=hbm_gbs * 1e9,
        ring_bandwidth=nvlink_gbs * 1e9 / 2,
        dcn_bandwidth=50e9,  # 400 Gbit/s a GPU
        clock_hz=None,
        axes=2,
        example=f"cuda:{name}:1x8",
    )
    return Gpu(chip=chip, memory_bytes=memory, **device)


_HOPPER = dict(
    compute_capability=(9, 0),
    num_cores=132,
    clock_ghz=1.98,
    l2_bytes=50 * 2**20,
    fpus_per_core=128,
    shared_per_core=228 * 2**10,
    shared_per_block=227 * 2**10,
)
GPUS = {
    gpu.chip.name: gpu
    for gpu in (
        _gpu(
            "a100",
            tflops=312,
            hbm_gbs=2039,
            memory_mib=81920,
            nvlink_gbs=600,
            compute_capability=(8, 0),
            num_cores=108,
            clock_ghz=1.41,
            l2_bytes=40 * 2**20,
            fpus_per_core=64,
            shared_per_core=164 * 2**10,
            shared_per_block=163 * 2**10,
        ),
        _gpu("h100", tflops=989, hbm_gbs=3352, memory_mib=81559, nvlink_gbs=900, **_HOPPER),
        _gpu("h200", tflops=989, hbm_gbs=4800, memory_mib=143771, nvlink_gbs=900, **_HOPPER),
    )
}

# What jax calls them (`device.device_kind`). GPUs of other boards have other peaks.
_DEVICE_KINDS = {
    "TPU v4": "v4",
    "TPU v5e|TPU v5 lite": "v5e",
    "TPU v5p?": "v5p",
    "TPU v6e|TPU v6 lite": "v6e",
    "TPU7x": "tpu7x",
    r"NVIDIA A100-.*": "a100",
    "NVIDIA H100 80GB HBM3": "h100",  # the SXM board
    "NVIDIA H200": "h200",
}


def chip_of(device_kind: str) -> Chip | None:
    """The figures of a jax device by its `device_kind`; None where they are not known."""
    known = TPUS | {name: gpu.chip for name, gpu in GPUS.items()}
    for pattern, name in _DEVICE_KINDS.items():
        if re.fullmatch(pattern, device_kind):
            return known[name]
    return None


# Boards with the memory that `GPUS` says, and what jax calls a topology's devices. An A100 of 40 GB
# has another, and so has a slice of a GPU (MIG).
_GPU_KINDS = {
    "NVIDIA A100-SXM4-80GB|NVIDIA A100 80GB PCIe|a100": "a100",
    "NVIDIA H100 80GB HBM3|h100": "h100",
    "NVIDIA H200|h200": "h200",
}


def gpu_memory_bytes(device_kind: str) -> int | None:
    """All the memory of a GPU, which may be a topology's; None where it is not known."""
    for pattern, name in _GPU_KINDS.items():
        if re.fullmatch(pattern, device_kind):
            return GPUS[name].memory_bytes
    return None
