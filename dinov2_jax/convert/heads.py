"""Shapes of the heads that lie beside a backbone in one file: projection heads and a classifier.

In: the shapes found. Out: those that must be there, so that every contradiction is named.
"""

from collections.abc import Mapping


def head_shapes(
    module: str, shapes: Mapping[str, tuple[int, ...]], embed_dim: int
) -> dict[str, tuple[int, ...]]:
    """Path in our tree -> shape, of a head on features of width `embed_dim`.

    Sizes that nothing but the head itself fixes (hidden widths, prototypes, classes) are taken
    from its weights; all else must follow from them.

    Args:
      module: "dino_head", "ibot_head" or "linear_head".
      shapes: the reference's name without prefix -> shape.
      embed_dim: width `d` of the features.
    """
    if module == "linear_head":
        classes, width = (*shapes.get("weight", ()), 0, 0)[:2]
        # [cls, mean patch], or several layers' class tokens and the last one's mean patch.
        inputs = max(round(width / embed_dim), 2) * embed_dim
        return {"kernel": (inputs, classes), "bias": (classes,)}
    weights = {
        int(name.split(".")[1]): shape
        for name, shape in shapes.items()
        if name.startswith("mlp.") and name.endswith(".weight") and name.count(".") == 2
    }
    expected, width = {}, embed_dim
    for layer in sorted(weights):
        outputs = weights[layer][0]
        expected[f"mlp/{layer}/kernel"], expected[f"mlp/{layer}/bias"] = (
            (width, outputs),
            (outputs,),
        )
        width = outputs
    if "mlp.weight" in shapes:
        outputs = shapes["mlp.weight"][0]
        expected |= {"mlp/kernel": (width, outputs), "mlp/bias": (outputs,)}
        width = outputs
    prototypes = shapes.get("last_layer.weight_v", (0,))[0]
    return expected | {
        "last_layer/weight_g": (prototypes, 1),
        "last_layer/weight_v": (prototypes, width),
    }
