"""The tasks by name. Each is a file here, imported when it is asked for."""

TASKS = {
    "segmentation": "semantic segmentation by a linear head, or by votes of similar patches",
    "depth": "depth by linear heads, or a DPT head",
    "knn": "weighted k-nearest neighbours, also with few labels",
    "linear": "the grid of linear classifiers, also judged on further sets",
    "logreg": "logistic regression with C from a grid, as on the fine-grained sets",
}
