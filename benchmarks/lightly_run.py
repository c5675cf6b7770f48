"""A run of lightly-train's DINOv2, for the benchmarks beside it; its own Python runs this file.

python lightly_run.py ARGUMENTS      a JSON object: `folder` of images, `workdir`, `steps`,
                                     `batch_size`, `model`, ..., and arguments of `pretrain`
"""

import json
import pathlib
import sys
import time

import lightly_train
import torch
from lightly_train._methods.dinov2.dinov2 import DINOv2


class Snapshots:
    """Keeps the teacher's backbone every so many steps; the seconds of keeping do not count."""

    def __init__(self, folder: pathlib.Path, every: int, batch_size: int):
        self.folder, self.every, self.batch_size = folder, every, batch_size
        self.saving = 0.0

    def attach(self) -> None:
        """To the hooks of the method: `pretrain` takes no callback objects."""
        after_step = DINOv2.on_train_batch_end

        def on_train_start(module):
            self.folder.mkdir(parents=True, exist_ok=True)
            self.started = time.perf_counter()
            self.keep(0, module)

        def on_train_batch_end(module, *args, **kwargs):
            after_step(module, *args, **kwargs)
            if module.trainer.global_step % self.every == 0:
                self.keep(module.trainer.global_step, module)

        DINOv2.on_train_start, DINOv2.on_train_batch_end = on_train_start, on_train_batch_end

    def keep(self, step: int, module) -> None:
        """Writes the weights, and a line of snapshots.jsonl that says when."""
        seconds = time.perf_counter() - self.started - self.saving
        file = self.folder / f"teacher-{step}.pth"
        torch.save(module.teacher_embedding_model.wrapped_model.get_model().state_dict(), file)
        row = {"images": step * self.batch_size, "seconds": seconds, "file": str(file)}
        with open(self.folder / "snapshots.jsonl", "a") as lines:
            lines.write(json.dumps(row) + "\n")
        self.saving = time.perf_counter() - self.started - seconds


def main(folder: str, workdir: str, steps: int, snapshot_every: int = 0, **arguments) -> None:
    if snapshot_every:
        Snapshots(pathlib.Path(workdir), snapshot_every, arguments["batch_size"]).attach()
    lightly_train.pretrain(
        out=str(pathlib.Path(workdir) / "lightly"),
        data=folder,
        method="dinov2",
        accelerator="cpu",
        precision="32-true",
        trainer_args={"max_steps": steps},
        **arguments,
    )


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
