"""The main job: `python -m train.run --model resnet34 --fused` trains on a folder of photos."""

import contextlib
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
from tqdm import tqdm

from models import (
    Backend,
    chosen_plans,
    model_label,
    parameter_counts,
    resolve_backend,
    restore_plans,
)
from models.compiled import tune_allocator
from train import checkpoint, distributed, precise_bn
from train.assembly import build, make_training
from train.auto_batch import with_largest_batch
from train.command import run_command
from train.config import Config, epoch_sizes, requested_backend, to_dict
from train.data.resident import ViewLoader
from train.data.twins import make_manifest
from train.doctor.material import material_of
from train.doctor.watch import Doctor
from train.environment import choose_amp, choose_device, device_name, prepare, versions
from train.errors import (
    DiskError,
    NumericError,
    Stopped,
)
from train.files import remove_temporaries, write_atomically
from train.flags import parse
from train.inputs import Inputs, check_same_data, load_inputs, make_loaders, resident_pixels
from train.lock import locked
from train.loop import Listener, fit
from train.mosaic import draw_batch, first_batch
from train.progress import Progress
from train.range_test import announce, find_rate
from train.record import create_run_folder, read_json, write_json, write_jsonl
from train.run_report import write_report
from train.stop import Stop
from train.tensorboard import TensorBoard
from train.training import NonFiniteLoss, Training
from train.transfer import start_from
from train.validation import ValidationKeeper, validation_square


def main(argv: list[str] | None = None, watching: Sequence[Listener] = ()) -> int:
    """Train as the flags say, with more listeners `watching`; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    command = shlex.join(["python", "-m", "train.run", *argv])
    return run_command(
        lambda: train(parse(argv), command, watching),
        debug="--debug" in argv,
        interrupted="interrupted before the training: the same command starts again",
        no_memory="halve --batch-size, or let --auto-batch choose it",
        silent=distributed.is_silent(),
    )


def train(config: Config, command: str, watching: Sequence[Listener] = ()) -> dict[str, Any]:
    """Run the job of `config`, with more listeners `watching`; returns what summary.json holds.

    Raises LapisError, and Stopped when a signal ended the training and its state is saved.
    """
    with contextlib.ExitStack() as held:
        return _train(config, command, watching, held)


def _train(
    config: Config, command: str, watching: Sequence[Listener], held: contextlib.ExitStack
) -> dict[str, Any]:
    """As `train`, with what must be given back at its end in `held`; of several processes the first
    alone writes, and returns it."""
    started = time.perf_counter()
    device = choose_device(config.run.device)
    held.enter_context(distributed.joined(device))
    distributed.check_batch(config.optim.batch_size, config.optim.accumulate)
    first = distributed.is_first()
    amp_dtype = choose_amp(config.run.amp, device)
    prepare(config.run)
    if config.run.tensorboard and first:
        watching = [*watching, TensorBoard()]
    resumed = None
    if config.run.resume is not None:
        if first:
            held.enter_context(locked(config.run.resume))
        resumed, name = distributed.from_first(partial(_take_up, config.run.resume))
        distributed.check_processes(resumed)
        if _is_finished(config, resumed):
            print(f"{config.run.resume} is finished: {config.run.resume / 'report.html'}")
            return read_json(config.run.resume / "summary.json")
        print(f"resuming {config.run.resume} {_place(resumed)} ({name})")
    inputs = distributed.one_after_the_other(partial(load_inputs, config))
    _announce(inputs, config.data.sampler)
    if resumed is not None:
        check_same_data(resumed, inputs)
        backend = Backend(resumed["backend"], resumed["backend_reason"])
    else:
        passes = sum((size / 224) ** 2 for size in epoch_sizes(config))
        images = passes * len(inputs.split.train)
        backend = distributed.from_first(
            partial(resolve_backend, requested_backend(config), device, images)
        )
    if distributed.size() > 1:
        print(f"processes: {distributed.size()}, each with its share of every batch")
        if device.type == "cuda" and backend.name == "triton":
            warnings.warn(
                "no CUDA graph on several GPUs: the kernels are launched one by one, which was "
                "slower than eager on an H100; leave --fused out",
                stacklevel=1,
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
    if config.run.auto_batch:  # never of a resumed run, whose batch stands in its checkpoint
        config = with_largest_batch(config, inputs, device, amp_dtype, backend, pixels)
    dtype = amp_dtype or torch.float32
    train_loader, val_loader = make_loaders(inputs, config, dtype, device, pixels)
    torch.manual_seed(config.run.seed)
    model = build(config, len(classes), backend, device)
    if config.optim.sync_bn:
        distributed.synchronise_norms(model, backend)
    if resumed is None and first and (begun := start_from(model, config)):
        print(begun)
    distributed.start_alike(model)
    if not first:  # dropout draws otherwise than on the first
        torch.manual_seed(config.run.seed + (distributed.rank() << 32))
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
    training = make_training(config, inputs, model, train_loader, backend, amp_dtype)
    stop = held.enter_context(Stop())
    if resumed is not None:
        training.restore(resumed)
        restore_plans(model, resumed["plans"])
        folder = config.run.resume
    else:
        folder = distributed.from_first(partial(create_run_folder, config.run.out, label))
    if resumed is None and first:
        held.enter_context(locked(folder))
        for place in (folder, folder / "checkpoints"):  # of one killed before it was a run
            remove_temporaries(place)
        write_atomically(folder / "split.csv", inputs.split_csv())
        try:
            draw_batch(*first_batch(train_loader, training), classes, folder / "batch.png")
        except Exception as error:  # no picture stops a training
            warnings.warn(f"batch.png was not made ({error})", stacklevel=1)
    if backend.name == "triton":
        distributed.agree_on_plans(model, train_loader, val_loader, dtype, training.autocast())
    print(f"run folder: {folder}")
    if found is not None and first:
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
        if first:
            write_json(folder / "config.json", {"command": command, **to_dict(config)})
    listeners: list[Listener] = [
        recorder,
        Progress(config.optim.epochs, done=len(training.history)),
        *watching,
    ]
    if first:  # ahead of the checkpoint that speaks of it
        listeners.insert(0, ValidationKeeper(folder, inputs))
    doctor = None
    if config.run.doctor and first:
        material = partial(material_of, inputs, config, dtype, device)
        doctor = Doctor(folder, training, material)
        listeners.insert(0, doctor)  # a checkpoint is last: none is ahead of the signals
    for listener in listeners:
        listener.run_started(folder, training)
    try:
        fed = train_loader if pixels is None else ViewLoader(train_loader)
        every = config.run.steps_per_checkpoint
        fit(
            training,
            fed,
            val_loader,
            len(classes),
            listeners,
            stop,
            every,
            config.data.flips,
            precise_bn.make_loader(inputs, config, dtype, device),
        )
    except Stopped as stopped:
        tqdm.write(
            f"{stopped} {_place(training.state())} and saved; to go on: "
            f"python -m train.run --resume {shlex.quote(str(folder))}",
            file=sys.stderr,
        )
        raise
    except NonFiniteLoss as error:
        files = [inputs.photos.files[i] for i in error.indices]
        if first:
            write_json(folder / "bad_batch.json", files)
        raise NumericError(
            f"{error} (photos {', '.join(files[:3])}, ...; all in bad_batch.json): "
            "lower --lr, or look at these photos"
        ) from error

    if not first:
        return {}
    summary = {
        "model": label,
        "backend": backend.name,
        "backend_reason": backend.reason,
        "plans": chosen_plans(model),
        "cuda_graph": training.graph_steps(),
        "device": device_name(device),
        "processes": distributed.size(),
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
        square=partial(validation_square, inputs, config.data),
    )
    print(f"done in {summary['seconds']:.0f} s: {folder / 'report.html'}")
    return summary


class Recorder(Listener):
    """Writes metrics.jsonl after each epoch and checkpoints then and at each pause.

    A full disk ends the training only where nothing follows; else it goes on with a warning. Of
    several processes the first writes, with what all of them hold.
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
        state = {**self.fixed, "plans": chosen_plans(training.model), **training.state()}
        if not distributed.is_first():
            return
        # whole, so that neither a full disk nor a resumed run leaves a gap or a line twice
        write_jsonl(self.folder / "metrics.jsonl", training.history)
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
        f"pictures that occur more than once: {split.duplicate_groups}"
    )
    if sampler == "balanced":
        counts = np.bincount(photos.labels[split.train], minlength=len(photos.classes))
        print(
            f"sampler: balanced, an epoch shows each class {counts.sum() / len(counts):.0f} times, "
            f"drawn with replacement from its {counts.min()} to {counts.max()} photos"
        )


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
