"""The tasks by name. Each is a file here, imported when it is asked for."""

TASKS = {
    "knn": "weighted k-nearest neighbours, also with few labels",
    "linear": "the grid of linear classifiers, also judged on further sets",
    "logreg": "logistic regression with C from a grid, as on the fine-grained sets",
    "segmentation": "semantic segmentation by a linear head, or by votes of similar patches",
    "depth": "depth by linear heads, or a DPT head",
    "retrieval": "instance retrieval: Oxford, Paris, the Met, AmsterTime, or a list of your own",
    "video": "actions in videos by a linear probe of a few frames",
    "propagation": "masks carried through videos by patch features (DAVIS)",
    "fairness": "hit rates and associations by group of people, and the gaps between them",
}
