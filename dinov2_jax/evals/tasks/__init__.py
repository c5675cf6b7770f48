"""The tasks by name. Each is a file here, imported when it is asked for."""

TASKS = {
    "knn": "weighted k-nearest neighbours, also with few labels",
    "retrieval": "instance retrieval: Oxford, Paris, the Met, AmsterTime, or a list of your own",
    "video": "actions in videos by a linear probe of a few frames",
    "propagation": "masks carried through videos by patch features (DAVIS)",
    "fairness": "hit rates and associations by group of people, and the gaps between them",
}
