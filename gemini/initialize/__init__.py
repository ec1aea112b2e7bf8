"""Joins the ranks that torchrun, srun or Ray started, or does nothing in a single process."""

from .process_group import launch, launch_from_slurm, launch_from_torch

__all__ = ["launch", "launch_from_slurm", "launch_from_torch"]
