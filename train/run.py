"""The main job: `python -m train.run --model resnet34 --fused` trains on a folder of photos."""

import contextlib
import dataclasses
import json
import shlex
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from tqdm import tqdm

from models import (
    Backend,
    build_model,
    chosen_plans,
    model_label,
    parameter_counts,
    resolve_backend,
    restore_plans,
    set_backend,
)
from models.compiled import tune_allocator
from train import checkpoint
from train.command import run_command
from train.config import RECIPES, Config, check, from_dict, requested_backend, to_dict
from train.data.resident import ViewLoader
from train.data.twins import make_manifest
from train.doctor.material import material_of
from train.doctor.watch import Doctor
from train.environment import choose_amp, choose_device, device_name, prepare, versions
from train.errors import (
    DiskError,
    NumericError,
    Stopped,
    UsageError,
)
from train.files import remove_temporaries, write_atomically
from train.inputs import Inputs, check_same_data, load_inputs, make_loaders, resident_pixels
from train.lock import locked
from train.loop import Listener, fit
from train.mosaic import draw_batch, first_batch
from train.progress import Progress
from train.range_test import announce, find_rate
from train.record import create_run_folder, write_json, write_jsonl
from train.run_report import write_report
from train.stop import Stop
from train.training import NonFiniteLoss, Training


def main(argv: list[str] | None = None, watching: Sequence[Listener] = ()) -> int:
    """Train as the flags say, with more listeners `watching`; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    command = shlex.join(["python", "-m", "train.run", *argv])
    return run_command(
        lambda: train(parse(argv), command, watching),
        debug="--debug" in argv,
        interrupted="interrupted before the training: the same command starts again",
        no_memory="halve --batch-size",
    )


def parse(argv: list[str]) -> Config:
    """The configuration the flags describe, on top of their recipe, or the one --resume names.

    Raises UsageError for combinations that cannot work; unknown flags and values end in exit 2.
    """
    recipe = "default"
    for i, word in enumerate(argv):
        if word == "--recipe" and i + 1 < len(argv):
            recipe = argv[i + 1]
        elif word.startswith("--recipe="):
            recipe = word.removeprefix("--recipe=")
    config = tyro.cli(
        tyro.conf.configure(tyro.conf.OmitArgPrefixes)(Config),
        prog="python -m train.run",
        description="Train a plain or residual network on a folder of photos.",
        default=RECIPES.get(recipe, RECIPES["default"]),
        args=argv,
    )
    if config.run.resume is not None:
        return _resumed(config, argv)
    check(config)
    return config


def _resumed(config: Config, argv: list[str]) -> Config:
    allowed = {"--resume", "--threads", "--debug", "--workers"}
    others = [w.split("=")[0] for w in argv if w.startswith("--")]
    extra = [flag for flag in others if flag not in allowed]
    if extra:
        raise UsageError(
            f"--resume takes its settings from the run's config.json: leave out {extra[0]}"
        )
    folder = config.run.resume
    state, _ = checkpoint.load_newest(folder / "checkpoints")
    old = from_dict(state["config"])
    threads = old.run.threads if config.run.threads is None else config.run.threads
    run = replace(old.run, resume=folder, out=folder, threads=threads, debug=config.run.debug)
    data = (
        old.data if config.data.workers is None else replace(old.data, workers=config.data.workers)
    )
    return replace(old, run=run, data=data)


def train(config: Config, command: str, watching: Sequence[Listener] = ()) -> dict[str, Any]:
    """Run the job of `config`, with more listeners `watching`; returns what summary.json holds.

    Raises LapisError, and Stopped when a signal ended the training and its state is saved.
    """
    with contextlib.ExitStack() as held:
        return _train(config, command, watching, held)


def _train(
    config: Config, command: str, watching: Sequence[Listener], held: contextlib.ExitStack
) -> dict[str, Any]:
    """As `train`, with what must be given back at its end in `held`."""
    started = time.perf_counter()
    device = choose_device(config.run.device)
    amp_dtype = choose_amp(config.run.amp, device)
    prepare(config.run)
    resumed = None
    if config.run.resume is not None:
        held.enter_context(locked(config.run.resume))
        resumed, name = _take_up(config.run.resume)
        if _is_finished(config, resumed):
            print(f"{config.run.resume} is finished: {config.run.resume / 'report.html'}")
            return json.loads((config.run.resume / "summary.json").read_text("utf-8"))
        print(f"resuming {config.run.resume} {_place(resumed)} ({name})")
    inputs = load_inputs(config)
    _announce(inputs, config.data.sampler)
    if resumed is not None:
        check_same_data(resumed, inputs)
        backend = Backend(resumed["backend"], resumed["backend_reason"])
    else:
        images = config.optim.epochs * len(inputs.split.train)
        backend = resolve_backend(
            requested_backend(config), device, images * (config.data.image_size / 224) ** 2
        )

    if device.type == "cpu" and requested_backend(config) != "eager":
        tune_allocator()  # brings 1.06x to 1.16x there even where compiling does not pay

    classes = list(inputs.photos.classes)
    pixels = None
    if device.type == "cuda":
        pixels, reason = resident_pixels(inputs, device, backend.name, config.data.augment)
        print(f"batches: made on the {'CPU' if pixels is None else 'GPU'} ({reason})")
        if pixels is not None and config.data.workers is not None:
            warnings.warn("--workers has no effect: the GPU makes the batches", stacklevel=1)
    dtype = amp_dtype or torch.float32
    train_loader, val_loader = make_loaders(inputs, config, dtype, device, pixels)
    torch.manual_seed(config.run.seed)
    model = build(config, len(classes), backend, device)
    parameters, trainable = parameter_counts(model)
    precision = {None: "float32", torch.bfloat16: "bf16", torch.float16: "fp16"}[amp_dtype]
    label = model_label(config.model.model, vars(config.model))
    print(f"model: {label}, {parameters:,} parameters, {precision}, on {device}")
    print(f"backend: {backend.name} ({backend.reason})")
    found = None
    if config.optim.lr == "find":
        counts = inputs.train_counts()
        found = find_rate(model, config.optim, train_loader, amp_dtype, counts)
        config = replace(config, optim=replace(config.optim, lr=found.suggestion))
    training = Training(
        model,
        config.optim,
        total_steps=config.optim.epochs * len(train_loader),
        amp_dtype=amp_dtype,
        mixup_alpha=config.data.mixup,
        cutmix_alpha=config.data.cutmix,
        seed=config.run.seed,
        fused=backend.name == "triton",
        make_batch=None if pixels is None else train_loader.make,
        class_counts=inputs.train_counts(),
        cuda_graph=device.type == "cuda" and backend.name == "triton",
    )
    stop = held.enter_context(Stop())
    if resumed is not None:
        training.restore(resumed)
        restore_plans(model, resumed["plans"])
        folder = config.run.resume
    else:
        folder = create_run_folder(config.run.out, config.model.model)
        held.enter_context(locked(folder))
        for place in (folder, folder / "checkpoints"):  # of one killed before it was a run
            remove_temporaries(place)
        write_atomically(folder / "split.csv", inputs.split_csv())
        try:
            draw_batch(*first_batch(train_loader, training), classes, folder / "batch.png")
        except Exception as error:  # no picture stops a training
            warnings.warn(f"batch.png was not made ({error})", stacklevel=1)
    print(f"run folder: {folder}")
    if found is not None:
        announce(found, folder / "lr_find.png")

    fixed = {
        "config": to_dict(config),
        "classes": classes,
        "backend": backend.name,
        "backend_reason": backend.reason,
        "data_digest": inputs.digest(),
        "manifest": make_manifest(inputs.images, inputs.photos, inputs.split.train),
        "versions": versions(),
    }
    recorder = Recorder(folder, fixed)
    if resumed is None:  # what has a config.json has a checkpoint, and can be resumed
        recorder.save(training)
        write_json(folder / "config.json", {"command": command, **to_dict(config)})
    listeners: list[Listener] = [
        recorder,
        Progress(config.optim.epochs, done=len(training.history)),
        *watching,
    ]
    doctor = None
    if config.run.doctor:
        material = partial(material_of, inputs, config, dtype, device)
        doctor = Doctor(folder, training, material)
        listeners.insert(0, doctor)  # a checkpoint is last: none is ahead of the signals
    for listener in listeners:
        listener.run_started(folder, training)
    try:
        fed = train_loader if pixels is None else ViewLoader(train_loader)
        every = config.run.steps_per_checkpoint
        fit(training, fed, val_loader, len(classes), listeners, stop, every)
    except Stopped as stopped:
        tqdm.write(
            f"{stopped} {_place(training.state())} and saved; to go on: "
            f"python -m train.run --resume {shlex.quote(str(folder))}",
            file=sys.stderr,
        )
        raise
    except NonFiniteLoss as error:
        files = [inputs.photos.files[i] for i in error.indices]
        write_json(folder / "bad_batch.json", files)
        raise NumericError(
            f"{error} (photos {', '.join(files[:3])}, ...; all in bad_batch.json): "
            "lower --lr, or look at these photos"
        ) from error

    summary = {
        "model": config.model.model,
        "backend": backend.name,
        "backend_reason": backend.reason,
        "plans": chosen_plans(model),
        "cuda_graph": training.graph_steps(),
        "device": device_name(device),
        "precision": precision,
        "parameters": parameters,
        "trainable_parameters": trainable,
        **_results(training),
        "seconds": time.perf_counter() - started,
        "seed": config.run.seed,
        "recipe": config.run.recipe,
        "split": inputs.facts(),
        "classes": classes,
        "doctor": doctor and doctor.summary(),
        "versions": fixed["versions"],
        "command": command,
    }
    write_json(folder / "summary.json", summary)
    write_report(
        folder,
        config=to_dict(config),
        summary=summary,
        history=training.history,
        confusion=training.best and training.best["confusion"],
        classes=classes,
    )
    print(f"done in {summary['seconds']:.0f} s: {folder / 'report.html'}")
    return summary


class Recorder(Listener):
    """Writes metrics.jsonl after each epoch and checkpoints then and at each pause.

    A full disk ends the training only where nothing follows; else it goes on with a warning.
    """

    def __init__(self, folder: Path, fixed: dict[str, Any]):
        self.folder = folder
        self.fixed = fixed
        self.best_due = False  # best.pt is not that of the history yet

    def paused(self, training: Training, stopping: bool) -> None:
        self._try_to_save(training, last=stopping)

    def epoch_ended(self, training: Training, record: dict[str, Any]) -> None:
        best = training.best
        self.best_due |= best is not None and best["epoch"] == record["epoch"]
        self._try_to_save(training, last=record["epoch"] == training.config.epochs)

    def _try_to_save(self, training: Training, last: bool) -> None:
        try:
            self.save(training)
        except DiskError as error:
            if last:
                raise
            warnings.warn(f"{error}: not saved, the training goes on", stacklevel=1)

    def save(self, training: Training) -> None:
        """Save what `training` holds. Raises DiskError."""
        # whole, so that neither a full disk nor a resumed run leaves a gap or a line twice
        write_jsonl(self.folder / "metrics.jsonl", training.history)
        state = {**self.fixed, "plans": chosen_plans(training.model), **training.state()}
        checkpoint.save(self.folder / "checkpoints", state, self.best_due)
        self.best_due = False


def _take_up(folder: Path) -> tuple[dict[str, Any], str]:
    """The newest checkpoint of the run in `folder`, which is made ready to go on from it, and its
    name."""
    state, path = checkpoint.load_newest(folder / "checkpoints")
    remove_temporaries(folder)
    checkpoint.tidy(folder / "checkpoints", path)
    return state, path.name


def _place(state: dict[str, Any]) -> str:
    """Where in the training a checkpoint stands."""
    epochs, tally = len(state["history"]), state["tally"]
    if tally["epoch"] > epochs:
        return f"after step {tally['steps']} of epoch {tally['epoch']}"
    return f"after epoch {epochs}" if epochs else "before its first step"


def _is_finished(config: Config, state: dict[str, Any]) -> bool:
    done = len(state["history"]) == config.optim.epochs
    return done and (config.run.resume / "report.html").exists()


def _announce(inputs: Inputs, sampler: str) -> None:
    photos, split = inputs.photos, inputs.split
    if done := inputs.relabelled:
        print(f"{done.table}: {done.changed} labels changed, {done.dropped} photos dropped")
    for excluded in photos.excluded[:10]:
        print(f"left out {excluded.file}: {excluded.reason}")
    if len(photos.excluded) > 10:
        print(f"left out {len(photos.excluded) - 10} more")
    print(
        f"data: {photos.name}, {len(photos)} photos of {len(photos.classes)} classes: "
        f"{len(split.train)} train, {len(split.val)} validation ({split.kind}); "
        f"{split.duplicate_groups} pictures occur more than once"
    )
    if sampler == "balanced":
        counts = np.bincount(photos.labels[split.train], minlength=len(photos.classes))
        print(
            f"sampler: balanced, an epoch shows each class {counts.sum() / len(counts):.0f} times, "
            f"drawn with replacement from its {counts.min()} to {counts.max()} photos"
        )


def build(
    config: Config, num_classes: int, backend: Backend, device: torch.device
) -> torch.nn.Module:
    """The network of `config`, on its device and backend."""
    options = dataclasses.asdict(config.model)
    model = build_model(options.pop("model"), num_classes, **options)
    set_backend(model, backend.name, backend.plan)
    layout = torch.channels_last if config.run.channels_last else torch.contiguous_format
    return model.to(device, memory_format=layout)


def _results(training: Training) -> dict[str, Any]:
    history, best = training.history, training.best or {}
    last = history[-1]
    seconds = sum(record["seconds"] for record in history)
    images = sum(record["seconds"] * record["images_per_second"] for record in history)
    return {
        "epochs": len(history),
        "best_val_accuracy": best.get("val_accuracy"),
        "best_epoch": best.get("epoch"),
        "final_train_loss": last["train_loss"],
        "final_train_accuracy": last["train_accuracy"],
        "final_val_loss": last["val_loss"],
        "final_val_accuracy": last["val_accuracy"],
        "images_per_second": images / seconds,
    }


if __name__ == "__main__":
    sys.exit(main())
