"""Plain and residual networks whose blocks are written once and run eagerly, compiled or on Triton
kernels."""

from models.backend import BACKENDS, Backend, BackendUnavailable, resolve_backend
from models.folding import folded
from models.fusion import fuse, fuse_report
from models.layers import chosen_plans, restore_plans
from models.names import model_label, parse_model
from models.resnet import (
    INITS,
    LAST_STAGE,
    MODELS,
    STEMS,
    ResNet,
    build_model,
    check_model,
    parameter_counts,
    stage_of,
)
from models.units import set_backend, synchronise

__all__ = [
    "BACKENDS",
    "INITS",
    "LAST_STAGE",
    "MODELS",
    "STEMS",
    "Backend",
    "BackendUnavailable",
    "ResNet",
    "build_model",
    "check_model",
    "chosen_plans",
    "folded",
    "fuse",
    "fuse_report",
    "model_label",
    "parameter_counts",
    "parse_model",
    "resolve_backend",
    "restore_plans",
    "set_backend",
    "stage_of",
    "synchronise",
]
