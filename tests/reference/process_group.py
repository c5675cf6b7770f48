"""One gloo process: the reference's iBOT Sinkhorn-Knopp calls all_reduce unconditionally."""

import contextlib
import pathlib
import tempfile

from tests.parity import require


@contextlib.contextmanager
def one_process_group():
    """A torch.distributed process group of this process alone."""
    torch = require("torch")
    with tempfile.TemporaryDirectory() as folder:
        store = torch.distributed.FileStore(str(pathlib.Path(folder) / "store"), 1)
        torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
        try:
            yield
        finally:
            torch.distributed.destroy_process_group()
