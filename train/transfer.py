"""Where a training starts when it does not start from random numbers: weights that other photos
made."""

import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from train import checkpoint
from train.config import Config
from train.errors import CheckpointError, UsageError
from train.predictor import weights_file

HEAD = ("fc.weight", "fc.bias")
WRAPPERS = ("state_dict", "model")  # under which other trainers keep their weights


def start_from(model: nn.Module, config: Config) -> str | None:
    """Load the weights that `config` names into `model` and return what was done, as a sentence;
    None where training starts from random weights.

    A head for another number of classes keeps its random weights. Raises CheckpointError for a file
    that is missing, damaged, or made by another network; UsageError where torchvision has no such
    weights or they cannot be downloaded.
    """
    if config.optim.pretrained:
        weights, origin = _torchvision_weights(config.model.model)
    elif config.optim.init_from is not None:
        path = config.optim.init_from
        weights, origin = read_weights(path), str(path)
    else:
        return None
    return f"weights: {origin}, {take_over(model, weights, origin)}"


def read_weights(path: Path) -> dict[str, Tensor]:
    """The weights in a run folder, a checkpoint of ours, a .safetensors file, or a state_dict
    written by `torch.save`, by parameter name. Raises CheckpointError."""
    if not path.exists():
        raise CheckpointError(f"{path} does not exist: --init-from takes a run folder or a file")
    if path.is_dir():
        return checkpoint.load(weights_file(path))["weights"]
    if checkpoint.is_sealed(path):
        return checkpoint.load(path)["weights"]
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        if zipfile.is_zipfile(path):  # PyTorch does not look at the checksums in it
            with zipfile.ZipFile(path) as archive:
                if damaged := archive.testzip():
                    raise ValueError(f"the checksum of {damaged} does not fit")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # safetensors, zip and pickle have classes of their own
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{path} holds no weights that can be read ({reason})") from error
    for key in WRAPPERS:
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    if not isinstance(state, Mapping) or not all(isinstance(v, Tensor) for v in state.values()):
        raise CheckpointError(f"{path} is no state_dict: save model.state_dict() alone")
    return {name.removeprefix("module."): value for name, value in state.items()}


def take_over(model: nn.Module, weights: Mapping[str, Tensor], origin: str) -> str:
    """Load `weights` into `model`, a head of other classes excepted; returns which part that was.
    Raises CheckpointError, naming the first difference, when they are those of another network."""
    own = model.state_dict()
    given = dict(weights)
    classes = [len(state[HEAD[1]]) if HEAD[1] in state else 0 for state in (given, own)]
    anew = classes[0] != classes[1]
    if anew:
        given |= {name: own[name] for name in HEAD}
    for name in own:
        if name.endswith("num_batches_tracked"):
            given.setdefault(name, own[name])  # older files have none
    strange = sorted(own.keys() ^ given.keys())
    strange += [n for n in own if n in given and own[n].shape != given[n].shape]
    if strange:
        name = strange[0]
        raise CheckpointError(
            f"{origin} is of another network than --model and its flags describe ({name}: "
            f"{_shape(given.get(name))} there, {_shape(own.get(name))} here): give the flags of "
            "the network that made it"
        )
    model.load_state_dict(given)
    if anew:
        return f"all but the last layer ({classes[0]} classes there, {classes[1]} here)"
    return "all of them"


def _shape(tensor: Tensor | None) -> str:
    return "not" if tensor is None else "x".join(map(str, tensor.shape)) or "a number"


def _torchvision_weights(name: str) -> tuple[dict[str, Tensor], str]:
    from torchvision.models import get_model_weights, list_models

    if name not in list_models():
        raise UsageError(
            f"torchvision has no weights of {name}: choose --model resnet18, resnet34 or resnet50, "
            "or name a file with --init-from"
        )
    url = get_model_weights(name).DEFAULT.url
    try:
        weights = torch.hub.load_state_dict_from_url(url, map_location="cpu", check_hash=True)
    except (OSError, RuntimeError) as error:
        raise UsageError(
            f"{url} cannot be downloaded ({error}): fetch it where there is a network, then give "
            f"--init-from {Path(url).name} instead of --pretrained"
        ) from None
    return weights, f"torchvision's {Path(url).name}"
