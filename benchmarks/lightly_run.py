"""A run of lightly-train's DINOv2, for benchmarks/end_to_end.py; its own Python runs this file.

python lightly_run.py ARGUMENTS      a JSON object, see `end_to_end.run_lightly`
"""

import json
import sys

import lightly_train


def main(arguments: dict) -> None:
    k = arguments["num_prototypes"]
    lightly_train.pretrain(
        out=arguments["workdir"],
        data=arguments["folder"],
        model=arguments["model"],
        method="dinov2",
        accelerator="cpu",
        precision="32-true",
        batch_size=arguments["batch_size"],
        num_workers=arguments["num_workers"],
        epochs=arguments["epochs"],
        trainer_args={"max_steps": arguments["steps"]},
        model_args={"drop_path_rate": arguments["drop_path_rate"]},
        method_args={
            "ibot_separate_head": True,
            "output_dim": k,
            "center_method": "sinkhorn_knopp",
        },
    )


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
