"""A trained network as its users see it: photos in, probabilities of named classes out.

It is read from a run folder, a checkpoint, or a file of `train.export`; photos are prepared as the
validation photos of its run were.
"""

import hashlib
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

import kernels
from models import build_model, folded, set_backend
from train import checkpoint
from train.config import Config, from_dict
from train.data.cache import square
from train.data.duplicates import in_order
from train.data.loader import normalisation_table, normalise
from train.data.photos import UnreadablePhoto
from train.errors import FOREIGN, CheckpointError, DataError, UsageError
from train.inputs import evaluated, stored_size
from train.loop import logits_of
from train.metrics import probabilities

FILE_KEYS = ("classes", "config", "temperature")  # what an exported file says of itself
SHA256_ENTRY = (
    b"\x0a\x06sha256\x12\x40"  # in ONNX's metadata, before 64 digits: protobuf's encoding
)

# (name, shorter side wanted) -> upright RGB picture; raises UnreadablePhoto, as `Photos.load` does
Load = Callable[[str, int], Image.Image]


@dataclass(frozen=True)
class Trained:
    """A trained network.

    classes      names, in the order of the logits
    config       of its run
    temperature  by which the logits are divided; 1 where it was not fitted
    forward      images [N, 3, S, S] of `dtype` on `device` -> logits float32 [N, K]
    model        the network behind `forward`; None where it is an ONNX program
    manifest     of the photos it was trained on, where it is a checkpoint
    """

    classes: tuple[str, ...]
    config: Config
    temperature: float
    forward: Callable[[Tensor], Tensor]
    dtype: torch.dtype
    device: torch.device
    model: nn.Module | None = None
    manifest: dict[str, Any] | None = None

    @property
    def image_size(self) -> int:
        """Height and width of what the network sees, in pixels."""
        return self.config.data.evaluated_size

    def square(self, load: Load, name: str) -> np.ndarray:
        """The photo's centre square: uint8 [image_size, image_size, 3]. Raises what `load` does."""
        store = stored_size(self.config.data)
        return evaluated(square(load(name, store), store), self.config.data)

    def images(self, squares: Sequence[np.ndarray]) -> Tensor:
        """The squares as the network takes them, normalised: [N, 3, S, S]."""
        table = normalisation_table(self.dtype)
        images = normalise(np.stack(squares), table, self.dtype).permute(0, 3, 1, 2)
        return images.to(self.device, non_blocking=True)

    def probabilities(self, images: Tensor, flips: bool) -> np.ndarray:
        """Probabilities [N, K]; `flips` takes the mean of the logits of the mirrored images in."""
        logits = logits_of(self.forward, images, flips)
        return probabilities(logits.cpu().numpy(), self.temperature)


def load_trained(path: Path, device: torch.device, amp_dtype: torch.dtype | None) -> Trained:
    """What `path` holds: a run folder, a checkpoint, or a .safetensors or .onnx file of
    `train.export`, ready for inference in `amp_dtype` (None: float32).

    A run folder stands for its best.pt, or last.pt where it had no validation. Raises
    CheckpointError for what is missing, damaged or foreign.
    """
    if path.suffix == ".onnx":
        return _load_onnx(path)
    if path.suffix == ".safetensors":
        weights, facts = _read_safetensors(path)
    else:
        path = weights_file(path)
        state = checkpoint.load(path)
        weights, facts = state.get("weights"), state
    config, classes, temperature = described(facts, path)
    model = network(config, len(classes), weights, path)
    forward, dtype, model = _for_inference(model, config.data.evaluated_size, device, amp_dtype)
    return Trained(
        classes,
        config,
        temperature,
        forward,
        dtype,
        device,
        model,
        facts.get("manifest"),
    )


def weights_file(path: Path) -> Path:
    """The checkpoint that a run folder or a checkpoint's own path stands for."""
    if not path.is_dir():
        return path
    folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    best = folder / "best.pt"
    return best if best.exists() else folder / "last.pt"


def described(facts: Mapping[str, Any], path: Path) -> tuple[Config, tuple[str, ...], float]:
    """Configuration, classes and temperature of a network, as the file at `path` tells them.
    Raises CheckpointError."""
    config, classes = from_dict(facts.get("config"), path), facts.get("classes")
    if not isinstance(classes, list | tuple) or not all(isinstance(one, str) for one in classes):
        raise CheckpointError(f"{path} names no classes: it was written by another program")
    temperature = facts.get("temperature", 1.0)
    if not isinstance(temperature, int | float) or not 0 < temperature < float("inf"):
        raise CheckpointError(
            f"{path} holds the temperature {temperature!r}: it was written by another program"
        )
    return config, tuple(classes), temperature


def network(config: Config, classes: int, weights: Any, path: Path) -> nn.Module:
    """The network of `config` with `weights` (name -> tensor), in float32 on the CPU. Raises
    CheckpointError, also for weights that are none."""
    options = dict(vars(config.model))
    try:
        model = build_model(options.pop("model"), classes, **options)
        model.load_state_dict(weights)
    except (RuntimeError, ValueError, TypeError, AttributeError) as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(f"{path} does not fit its own configuration ({reason})") from error
    return model.eval()


def _for_inference(
    model: nn.Module, image_size: int, device: torch.device, dtype: torch.dtype | None
) -> tuple[Callable[[Tensor], Tensor], torch.dtype, nn.Module]:
    dtype = dtype or torch.float32
    if device.type == "cuda" and dtype != torch.float32 and not kernels.why_not_triton(device):
        set_backend(model, "triton")
        for module in model.modules():  # norms stay in float32, as the kernels take them
            if isinstance(module, nn.Conv2d | nn.Linear):
                module.to(dtype)
    else:
        model = folded(model, image_size).to(dtype)
    model = model.to(device, memory_format=torch.channels_last)

    @torch.inference_mode()
    def forward(images: Tensor) -> Tensor:
        return model(images).float()

    return forward, dtype, model


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise CheckpointError(f"{path} does not exist: name a run folder or an exported file")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        facts = _facts(metadata)
        if metadata["sha256"] != digest_of(weights, metadata):
            raise ValueError("its SHA-256 is another than it says")
        return weights, facts
    except (SafetensorError, RuntimeError, *FOREIGN) as error:
        raise _foreign(path, error) from error


def digest_of(weights: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """The SHA-256 of all that a safetensors file tells, whose format has no checksum."""
    digest = hashlib.sha256(repr([metadata[key] for key in FILE_KEYS]).encode())
    for name, tensor in sorted(weights.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _facts(metadata: dict[str, str]) -> dict[str, Any]:
    return {key: json.loads(metadata[key]) for key in FILE_KEYS}


def _foreign(path: Path, error: Exception) -> CheckpointError:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return CheckpointError(f"{path} is damaged, or was not written by train.export ({reason})")


def _load_onnx(path: Path) -> Trained:
    try:
        import onnxruntime
    except ImportError:
        raise UsageError(f"{path} needs onnxruntime: pip install 'onnxruntime>=1.20'") from None
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist: name a run folder or an exported file")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    data = path.read_bytes()
    try:
        named, found = onnx_digests(data)
        if named != found:  # before foreign code parses it
            raise ValueError("its SHA-256 is another than it says")
        session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
        facts = _facts(session.get_modelmeta().custom_metadata_map)
    except Exception as error:  # onnxruntime has a class of its own for each kind of damage
        raise _foreign(path, error) from error

    def forward(images: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {"images": images.contiguous().numpy()})[0])

    config, classes, temperature = described(facts, path)
    return Trained(classes, config, temperature, forward, torch.float32, torch.device("cpu"))


def onnx_digests(data: bytes) -> tuple[str, str]:
    """The SHA-256 that an ONNX program names in its metadata, and that of all around this name: the
    format has no checksum of its own. The first is no digest where none is named."""
    before, entry, after = data.rpartition(SHA256_ENTRY)
    return after[:64].decode("latin1"), hashlib.sha256(before + entry + after[64:]).hexdigest()


class Prediction(NamedTuple):
    """What the network says of one photo, or why the photo cannot be shown to it."""

    name: str
    square: np.ndarray | None
    probability: np.ndarray | None
    reason: str | None


def predict(
    trained: Trained,
    names: Iterable[str],
    load: Load,
    *,
    batch_size: int = 32,
    flips: bool | None = None,
) -> Iterator[Prediction]:
    """Predictions for the photos that `load` finds under `names`, in their order; threads decode
    ahead of the network. flips: None is as the network was validated."""
    flips = trained.config.data.flips if flips is None else flips

    def prepare(name: str) -> tuple[str, np.ndarray | str]:
        try:
            return name, trained.square(load, name)
        except (UnreadablePhoto, DataError) as error:
            return name, str(error)
        except OSError as error:
            return name, error.strerror or str(error)

    prepared = in_order(prepare, names)
    while chunk := list(islice(prepared, batch_size)):
        squares = [found for _, found in chunk if not isinstance(found, str)]
        rows = iter(())
        if squares:
            rows = iter(trained.probabilities(trained.images(squares), flips))
        for name, found in chunk:
            if isinstance(found, str):
                yield Prediction(name, None, None, found)
            else:
                yield Prediction(name, found, next(rows), None)


def progress(total: int) -> tqdm:
    """The bar of predictions, on stderr."""
    return tqdm(
        desc="predicting",
        total=total,
        unit=" images",
        delay=2,
        leave=False,
        mininterval=0.2 if sys.stderr.isatty() else 10.0,
    )
