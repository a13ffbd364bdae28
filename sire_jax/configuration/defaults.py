"""The config with every key, which files change."""

from ml_collections import ConfigDict

from sire_jax.configuration.sections import optimizer, task, update_rule

SPLITS = ("train", "validation", "test")


def default() -> ConfigDict:
    """Returns a config with every key; a file changes what it needs."""
    return ConfigDict(
        {
            "name": "",
            # Run i has the seed `seed + i`, alone or as one of several.
            "seed": 0,
            "seeds": 1,
            "seeds_at_once": 0,  # vectorized together; 0: all on an accelerator, 1 on a CPU
            "parallel": "jit",  # over a mesh of devices; or "pmap"
            "devices": 0,  # of all processes together, made of a CPU's cores; 0: all
            "devices_share": "batch",  # that of each run; or the "runs", whose batches stay whole
            "batch_norm": "batch",  # statistics over the whole batch; or each "device", with pmap
            "epochs": 1,
            "batch_size": 100,
            # At most so many steps of one call of the compiled program, within an epoch.
            "steps_per_call": 100,
            "data": {
                "name": "digits",
                "dir": "~/tensorflow_datasets",
                "feed": "device",  # all images on the device; or a "stream" of batches from disk
                "cache": "~/.cache/sire_jax",  # decoded images; "" for none
                # That make the training images; also shares of splits: "train[:80%]".
                "train_splits": ("train",),
                "test_split": "test",
                "draw_classes": 0,  # of the labels, at random; other kinds of labels go; 0: all
                "draw_seed": 0,  # of that draw, which is the same for all runs
                "shape": (8, 8, 1),
                "classes": {"label": 10},  # after the draw
                "groups": {},  # of the labels, as further targets
                "images": 0,  # that training has, which schedules in epochs need; 0: unknown
                "crop": 0,  # side of the square that the network sees of an image; 0: all of it
                "ten_crop": False,  # measures by the mean logits of ten crops, not by the central
                "resize": 0,  # what the shorter side of images is scaled to, as they are read
                "random_resized_crop": False,  # in training, of streamed images, to `crop`
                "workers": 0,  # processes that read and decode a stream; 0: threads of this one
                "threads": 8,  # of each of these processes; those that decode, of either feed
                "damaged": "raise",  # on an image that can't be decoded; or "skip" and count it
                "scale": 1 / 255,  # what pixels are multiplied by
                "mean": (),  # what is then subtracted from each channel, if anything
                "std": (),  # what it is then divided by
                "task": task("images"),
            },
            "augmentation": {},
            "initialization": "modules",  # each module's own; or that of layers of "pytorch"
            "backbone": {},
            "heads": {},
            "objectives": {},
            "predictions": {},
            "update_rule": update_rule("joint"),
            "aggregator": {"name": "sum"},  # how gradients of shared parameters are put together
            "weighting": {"name": "fixed"},  # what the objectives' weights are multiplied by
            "optimizer": optimizer("adam"),
            "evaluate_every": 1,  # epochs
            "evaluate_splits": ("train", "test"),
            "evaluate_batch_size": 1000,
            "checkpoint_every": 10,  # epochs; and at the end and when interrupted
            "checkpoint_steps": 0,  # further checkpoints, after every so many steps; 0: none
            "checkpoints_kept": 2,  # the newest
            # Where compiled programs are kept for the next start; "" for nowhere.
            "compilation_cache": "~/.cache/sire_jax/compiled",
            "on_diverged": "stop",  # of a loss that is not finite; or "record" it, others go on
            "peer_timeout": 12.0,  # seconds without a sign of a process, or of its next step
            "chance_after": 10,  # epochs after which a run at chance level says so; 0: never
            "gradient_flow_every": 0,  # epochs between measurements of gradients; 0: none
            "tensorboard": False,
        }
    )
