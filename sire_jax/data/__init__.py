"""Data: sources of images, tasks that say what an example is, augmentation, the on-device feed."""
