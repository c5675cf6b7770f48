"""How a search for neighbours is cut to fit the devices, and what memory it takes."""

import dataclasses

import jax
import numpy as np
from jax.sharding import Mesh

BANK_CHUNK_SIZE, QUERY_CHUNK_SIZE = 16_384, 1_024
# Of the bank in a host's memory, where CPU devices have theirs: what is on disk need not fit.
_HOST_PIECE_BYTES = 2 * 2**30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """How a search is cut, and what it takes. `make_plan` makes one.

    Attributes:
      num_queries, num_rows, width: of queries and bank.
      k: neighbours.
      query_chunk_size, bank_chunk_size: compared at once on a device.
      chunks_per_device: of the bank, on a device at once.
      num_devices: that share the bank.
    """

    num_queries: int
    num_rows: int
    width: int
    k: int
    query_chunk_size: int
    bank_chunk_size: int
    chunks_per_device: int
    num_devices: int

    @property
    def piece_rows(self) -> int:
        """Rows of the bank on all devices at once."""
        return self.chunks_per_device * self.bank_chunk_size * self.num_devices

    @property
    def num_pieces(self) -> int:
        """How often the devices are filled with bank."""
        return -(-self.num_rows // self.piece_rows)

    @property
    def num_steps(self) -> int:
        """Chunks of queries, each compared with every piece."""
        return self.num_pieces * -(-self.num_queries // self.query_chunk_size)

    @property
    def device_bytes(self) -> int:
        """At most on a device: a piece as it was sent and at unit length; queries likewise;
        similarities of a chunk and the best so far, before and after sorting, with their rows."""
        piece = self.chunks_per_device * self.bank_chunk_size * self.width
        queries = self.query_chunk_size * self.width
        table = self.query_chunk_size * (self.bank_chunk_size + self.k * (2 + self.num_devices))
        return 4 * (2 * piece + 2 * queries + 4 * table)


def make_plan(
    num_queries: int,
    num_rows: int,
    width: int,
    *,
    k: int,
    bank_chunk_size: int = BANK_CHUNK_SIZE,
    query_chunk_size: int = QUERY_CHUNK_SIZE,
    mesh: Mesh | None = None,
    piece_bytes: int | None = None,
) -> Plan:
    """Plans a search of so many queries in a bank; other arguments as `nearest_neighbors`."""
    mesh = mesh or local_mesh()
    bank_chunk_size = min(bank_chunk_size, num_rows)
    piece_bytes = _free_bytes(mesh) // 2 if piece_bytes is None else piece_bytes
    needed = -(-num_rows // (bank_chunk_size * mesh.size))
    fits = piece_bytes // (4 * bank_chunk_size * width)
    return Plan(
        num_queries=num_queries,
        num_rows=num_rows,
        width=width,
        k=k,
        query_chunk_size=min(query_chunk_size, max(num_queries, 1)),
        bank_chunk_size=bank_chunk_size,
        chunks_per_device=max(min(needed, fits), 1),
        num_devices=mesh.size,
    )


def local_mesh() -> Mesh:
    """All devices of this host, in a row."""
    return Mesh(np.array(jax.local_devices()), ("devices",))


def _free_bytes(mesh: Mesh) -> int:
    """Of one device; the same on every host, where there are several."""
    memory = mesh.local_devices[0].memory_stats()
    if memory is None or "bytes_limit" not in memory:
        return 2 * _HOST_PIECE_BYTES // len(mesh.local_devices)
    return memory["bytes_limit"] - (0 if mesh.is_multi_process else memory["bytes_in_use"])
