"""Names in a checkpoint of a training run.

::

    folder/checkpoint-000012/
        model.safetensors, config.json ...         the Hugging Face layout, see `model_contents`
        optimizer.json, optimizer.safetensors      see `optimizer_files`
        lr_scheduler.pt
        dataloader-00000.pt, rng-00000.pt          one for each rank
        extra.pt                                   what the user gave
        manifest.json                              see `manifest`; written last

Parts that are given as a dict (the models of a GAN) are in a folder for each name.
"""

SCHEDULER_FILE = "lr_scheduler.pt"
EXTRA_FILE = "extra.pt"
RNG, EXTRA = "rng", "extra"
"""Parts in the manifest beside those that are given by kind."""


def rank_name(rank: int) -> str:
    return f"{rank:05d}"


def rng_file(rank: int) -> str:
    return f"rng-{rank_name(rank)}.pt"


def dataloader_file(rank: int) -> str:
    return f"dataloader-{rank_name(rank)}.pt"
