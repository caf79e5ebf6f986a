"""BatchNorm on a few images: its running statistics are noise, and evaluation pays for it."""

import math

from train.doctor.finding import Finding, Rule, Text
from train.doctor.measures import run_of
from train.doctor.probe import SMALL_BATCH
from train.doctor.signals import Signals

GAIN = 0.03  # of accuracy, with the statistics of many images instead of the running ones
ERRORS = 2  # standard errors, of the images on which the two disagree
EPOCH = 3  # before it running statistics are cold: a healthy run spiked to a loss of 9 in epoch 1
PROBES = 2  # in a row, and at least


def check(signals: Signals) -> Finding | None:
    if signals.start["batch_size"] > SMALL_BATCH:
        return None
    probes = [p for p in signals.probes if p.get("epoch", 0) >= EPOCH and "batch_accuracy" in p]
    gains = [p["batch_accuracy"] - p["clean_accuracy"] for p in probes]
    errors = [math.sqrt(max(1, p["disagree"])) / p["images"] for p in probes]
    worse = [g >= max(GAIN, ERRORS * e) for g, e in zip(gains, errors, strict=True)]
    begin = run_of(worse, PROBES)
    if begin is None:
        return None
    probe = probes[-1]
    return Finding(
        "problem",
        probes[begin]["step"],
        f"with batches of {signals.start['batch_size']}, {probe['images']} training images are "
        f"classified {probe['clean_accuracy']:.0%} right with the running statistics and "
        f"{probe['batch_accuracy']:.0%} with their own: {100 * gains[-1]:.0f} points more "
        f"(standard error {100 * errors[-1]:.0f})",
        "train on larger batches, or normalise without the batch: --norm group",
        {"batch_size": 32},
    )


TEXTS = {
    "en": Text(
        title="BatchNorm on small batches",
        brief=(
            "With so few images a batch, BatchNorm's statistics are noise: the running ones that "
            "evaluation uses do not fit the network, and it generalises worse."
        ),
        what=(
            "The network classifies the same images better with the statistics of many images "
            "than with its running statistics."
        ),
        why=(
            "BatchNorm normalises with the mean and variance of the batch while training and with"
            " running averages of them in use. On two or four images those are noise: the network"
            " trains against a different, noisy normalisation in every step, the averages mix "
            "values of weights long gone, and at evaluation everything is shifted. Over-used, it "
            "hurts in the same way: statistics of a 1x1 map of few images, or dropout before a "
            "norm, whose variance in training is not that in use. So BatchNorm can worsen "
            "generalisation although it speeds training up."
        ),
        recognised=(
            "With at most 8 images a batch: the accuracy on fixed training images with their own "
            "statistics less that with the running ones, at least 3 points and two standard "
            "errors, from epoch 3 on. A spike of the validation loss in the first epoch, to 9 "
            "say, is only cold statistics and heals by itself."
        ),
        helps=(
            "Larger batches; Group or Layer Normalization, which never look at other images; "
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
            "dengan saat dipakai. Karena itu BatchNorm dapat memperburuk generalisasi walaupun "
            "mempercepat pelatihan."
        ),
        recognised=(
            "Dengan paling banyak 8 gambar per batch: akurasi pada gambar latih tetap dengan "
            "statistiknya sendiri dikurangi akurasi dengan statistik berjalan, sedikitnya 3 poin "
            "dan dua galat baku, mulai epoch 3. Lonjakan loss validasi pada epoch pertama, "
            "misalnya sampai 9, hanyalah statistik yang masih dingin dan sembuh sendiri."
        ),
        helps=(
            "Batch lebih besar; Group atau Layer Normalization, yang tidak melihat gambar lain; "
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
