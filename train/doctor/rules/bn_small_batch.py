"""BatchNorm on a few images: its running statistics are noise, and evaluation pays for it."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from train.doctor.finding import Finding, Rule, Text
from train.doctor.measures import run_of, share_error
from train.doctor.probe import SMALL_BATCH
from train.doctor.signals import Signals

GAIN = 0.03  # of accuracy, with the images' own statistics instead of the running ones
ERRORS = 2  # standard errors of that gain
EPOCH = 3  # before it running statistics are cold: a healthy run spiked to a loss of 9 in epoch 1
PROBES = 2  # in a row, and at least
LATEST = 2  # epochs, over which training steps are compared with the running statistics
ENOUGH = 32  # images together, whose statistics serve
FEWEST = 2  # values of a channel that BatchNorm makes +1 and -1, whatever they are
KNOWN = 0.9  # of the training images: a network that knows them has found a way around


def check(signals: Signals) -> Finding | None:
    if signals.start["norm_images"] > SMALL_BATCH:
        return None
    probes = [p for p in signals.probes if p.get("epoch", 0) >= EPOCH and "batch_accuracy" in p]
    found = _no_way_through(signals, probes) or _stale(probes) or _used_to_few(signals, probes)
    if found is None:
        return None
    step, measured = found
    how, remedy, changes = _larger(signals)
    return Finding(
        "problem",
        step,
        f"with {how}, {measured}",
        f"{remedy}, or normalise without the batch: --norm group",
        changes,
    )


def _no_way_through(
    signals: Signals, probes: Sequence[Mapping[str, Any]]
) -> tuple[int, str] | None:
    """A norm that sees two values a channel, and a network that does not learn its training images:
    as `_stale`."""
    values = signals.start.get("norm_values")  # not in runs of before it was recorded
    if values is None or values > FEWEST or len(probes) < PROBES:
        return None
    known = float(np.mean([p["clean_accuracy"] for p in probes[-PROBES:]]))
    if known >= KNOWN:
        return None
    return probes[0]["step"], (
        f"a norm sees {values} values a channel, which become +1 and -1 whatever they are, so that "
        f"no gradient passes; {probes[-1]['images']} training images are classified {known:.0%} "
        f"right in the latest {PROBES} probes"
    )


def _stale(probes: Sequence[Mapping[str, Any]]) -> tuple[int, str] | None:
    """Running statistics that fit worse than those of many images: since which step, and the
    evidence."""
    gains = [p["batch_accuracy"] - p["clean_accuracy"] for p in probes]
    errors = [math.sqrt(max(1, p["disagree"])) / p["images"] for p in probes]
    worse = [g >= max(GAIN, ERRORS * e) for g, e in zip(gains, errors, strict=True)]
    begin = run_of(worse, PROBES)
    if begin is None:
        return None
    probe = probes[-1]
    return probes[begin]["step"], (
        f"{probe['images']} training images are "
        f"classified {probe['clean_accuracy']:.0%} right with the running statistics and "
        f"{probe['batch_accuracy']:.0%} with their own: {100 * gains[-1]:.0f} points more "
        f"(standard error {100 * errors[-1]:.0f})"
    )


def _used_to_few(signals: Signals, probes: Sequence[Mapping[str, Any]]) -> tuple[int, str] | None:
    """A network that works with the statistics of a few images, as it was trained, and with no
    others: as `_stale`. In use it should know its training images better than in training, where
    weights still move and images are altered."""
    per_epoch = signals.start["steps_per_epoch"]
    probes = [p for p in probes if p["step"] > probes[-1]["step"] - LATEST * per_epoch]
    if len(probes) < PROBES:
        return None
    images = probes[-1]["images"]
    used = float(np.mean([p["clean_accuracy"] for p in probes]))
    # averaged weights are those of so many steps ago; the mean over twice as many is as old
    lag = 1 / (1 - (signals.config("optim", "ema") or 0.0))
    span = LATEST * per_epoch + round(2 * lag)
    steps = signals.per_step("accuracy")[: probes[-1]["step"]][-span:]
    trained = float(np.nanmean(steps))
    shown = steps.size * signals.start["batch_size"]
    # as if all probes were one: they see the same images
    error = math.hypot(share_error(used, images), share_error(trained, shown))
    if trained - used < max(GAIN, ERRORS * error):
        return None
    return probes[0]["step"], (
        f"the latest {steps.size} steps classified {trained:.0%} of their images right, with the "
        f"statistics of a batch, and {len(probes)} probes of {images} training images {used:.0%}, "
        f"with the running ones: {100 * (trained - used):.0f} points less (standard error "
        f"{100 * error:.0f})"
    )


def _larger(signals: Signals) -> tuple[str, str, dict]:
    """What BatchNorm sees together, the remedy, and what its command changes: parts of a batch are
    joined before it gets larger."""
    together, batch = signals.start["norm_images"], signals.start["batch_size"]
    parts = signals.config("optim", "accumulate")
    if together == batch:
        return f"batches of {batch}", "train on larger batches", {"batch_size": ENOUGH}
    how = f"batches of {batch}, of which BatchNorm sees {together} at a time"
    cures = ["send a batch through the network in fewer parts (--accumulate)"] if parts > 1 else []
    if signals.start["processes"] > 1:  # the command of one process is that of another training
        return how, ", ".join([*cures, "normalise over all processes (--sync-bn)"]), {}
    fewer = {"accumulate": max(1, batch // ENOUGH), "batch_size": max(batch, ENOUGH)}
    return how, cures[0], fewer


TEXTS = {
    "en": Text(
        title="BatchNorm on small batches",
        brief=(
            "With so few images a batch, BatchNorm's statistics are noise: the running ones that "
            "evaluation uses do not fit the network, and it generalises worse."
        ),
        what=(
            "The network classifies the same images better with the statistics of many images "
            "than with its running statistics, or it works with those of a few images alone, as in "
            "training."
        ),
        why=(
            "BatchNorm normalises with the mean and variance of the batch while training and with"
            " running averages of them in use. On two or four images those are noise: the network"
            " trains against a different, noisy normalisation in every step, the averages mix "
            "values of weights long gone, and at evaluation everything is shifted. Over-used, it "
            "hurts in the same way: statistics of a 1x1 map of few images, or dropout before a "
            "norm, whose variance in training is not that in use. Two values of a channel become "
            "+1 and -1 whatever they are, and no gradient passes at all. So BatchNorm can worsen "
            "generalisation although it speeds training up."
        ),
        recognised=(
            "With at most 8 images that BatchNorm sees together: the accuracy on fixed training "
            "images with their own statistics less that with the running ones, at least 3 points "
            "and two standard errors, from epoch 3 on. Or, by as much, the accuracy of the "
            "training steps less that with the running statistics, over two epochs: in use a "
            "network knows its training images at least as well, unless it leans on their "
            "companions in the batch. Or a norm that sees two values a channel in a step (two "
            "images of 1x1 pixels), while 10 % of the training images or more are not known. A "
            "spike of the validation loss in the first epoch, to 9 "
            "say, is only cold statistics and heals by itself."
        ),
        helps=(
            "Larger batches, or fewer parts of one (--accumulate); --sync-bn under torchrun; Group "
            "or Layer Normalization, which never look at other images; "
            "Dropout, weight decay or augmentation for the regularisation that BatchNorm gave; "
            "statistics estimated anew over many images before use."
        ),
        helps_not=(
            "A lower momentum of the running averages alone, when the batch statistics in "
            "training are the noise. Accumulating gradients over small batches: BatchNorm still "
            "sees the small ones."
        ),
    ),
    "id": Text(
        title="BatchNorm pada batch kecil",
        brief=(
            "Dengan gambar sesedikit ini per batch, statistik BatchNorm hanyalah derau: statistik"
            " berjalan yang dipakai saat evaluasi tidak cocok dengan jaringannya, dan "
            "generalisasinya memburuk."
        ),
        what=(
            "Jaringan mengenali gambar yang sama lebih baik dengan statistik banyak gambar "
            "daripada dengan statistik berjalannya."
        ),
        why=(
            "BatchNorm menormalkan dengan rata-rata dan ragam batch saat latihan, dan dengan "
            "rata-rata berjalan saat dipakai. Dari dua atau empat gambar nilainya derau: jaringan"
            " berlatih melawan normalisasi yang berbeda dan berisik di tiap langkah, rata-ratanya"
            " mencampur nilai dari bobot yang sudah lama lewat, dan saat evaluasi semuanya "
            "bergeser. Pemakaian berlebihan merusak dengan cara sama: statistik peta 1x1 dari "
            "sedikit gambar, atau dropout sebelum norm, yang ragamnya saat latihan tidak sama "
            "dengan saat dipakai. Dua nilai sebuah kanal menjadi +1 dan -1 apa pun nilainya, dan "
            "tidak ada gradien yang lewat sama sekali. Karena itu BatchNorm dapat memperburuk "
            "generalisasi walaupun mempercepat pelatihan."
        ),
        recognised=(
            "Dengan paling banyak 8 gambar yang dilihat BatchNorm sekaligus: akurasi pada gambar "
            "latih tetap dengan statistiknya sendiri dikurangi akurasi dengan statistik berjalan, "
            "sedikitnya 3 poin dan dua galat baku, mulai epoch 3. Atau, sebesar itu pula, akurasi "
            "langkah latihan dikurangi akurasi dengan statistik berjalan, selama dua epoch: saat "
            "dipakai jaringan mengenali gambar latihnya sedikitnya sama baik, kecuali bila ia "
            "bergantung pada gambar lain dalam batch. Atau norm yang melihat dua nilai per kanal "
            "dalam satu langkah (dua gambar 1x1 piksel), sementara 10 % gambar latih atau lebih "
            "tidak dikenali. Lonjakan loss validasi pada "
            "epoch pertama, misalnya sampai 9, hanyalah statistik yang masih dingin dan sembuh "
            "sendiri."
        ),
        helps=(
            "Batch lebih besar, atau lebih sedikit bagian per batch (--accumulate); --sync-bn di "
            "bawah torchrun; Group atau Layer Normalization, yang tidak melihat gambar lain; "
            "Dropout, weight decay, atau augmentasi sebagai ganti regularisasi dari BatchNorm; "
            "statistik yang ditaksir ulang dari banyak gambar sebelum dipakai."
        ),
        helps_not=(
            "Hanya menurunkan momentum rata-rata berjalan, bila yang berderau adalah statistik "
            "batch saat latihan. Mengakumulasi gradien dari batch-batch kecil: BatchNorm tetap "
            "melihat yang kecil."
        ),
    ),
}

RULE = Rule(
    id="bn_small_batch",
    when="live",
    check=check,
    texts=TEXTS,
    sources=(
        "Ioffe and Szegedy 2015, Batch Normalization (ICML)",
        "Ioffe 2017, Batch Renormalization (NeurIPS)",
        "Wu and He 2018, Group Normalization (ECCV)",
        (
            "Li et al. 2019, Understanding the Disharmony between Dropout and Batch Normalization"
            " by Variance Shift (CVPR)"
        ),
    ),
    figures=("gap",),
)
