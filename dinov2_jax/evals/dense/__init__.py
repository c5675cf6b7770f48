"""Dense evaluation of frozen features: semantic segmentation and depth.

`pairs`, `mask_sets`, `depth_sets` find the files of a data set; `resample`, `mask_views`,
`depth_views` make what the network sees; `heads`, `losses`, `schedules`, `train_step`, `train` make
a head; `windows`, `predict`, `bank` predict with one, or without; `metrics`, `charts` judge it.
"""
