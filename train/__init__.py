"""Training: data, the fenced step, the run folder and its reports. Imports `models` and
`kernels`."""

from train import guard

guard.check()  # before anything of ours is imported: every entry point is a module of this package
