"""The loss before the first update, against that of a network that knows nothing."""

import numpy as np

from train.doctor.finding import Finding, Rule, Text
from train.doctor.measures import log_classes
from train.doctor.signals import Signals

HIGH = 2.0  # times ln K; healthy networks of ours begin at 0.97 to 1.3 times
LOW = 0.5  # times ln K; nothing that has not seen the labels is that sure and right
STEPS = 5  # first steps whose median must agree: one odd batch is no fault


def check(signals: Signals) -> Finding | None:
    if signals.start["first_step"] or not signals.probes or signals.steps < STEPS:
        return None
    expected = log_classes(signals)
    start = signals.probes[0]["loss"]
    early = float(np.median(signals.per_step("loss")[:STEPS]))
    if start is None or not np.isfinite(early):
        return None
    evidence = (
        f"the loss is {start:.3g} before the first update and {early:.3g} over {STEPS} steps; "
        f"{len(signals.start['classes'])} classes and no knowledge give {expected:.3g}"
    )
    if start > HIGH * expected and early > HIGH * expected:
        return Finding(
            "problem",
            0,
            evidence,
            "initialise the last layer with smaller weights; --init kaiming leaves it as PyTorch "
            "does",
            {"init": "kaiming"},
        )
    if start < LOW * expected and early < LOW * expected:
        return Finding(
            "problem",
            0,
            evidence,
            "look for the label in the input: an image that shows it, or weights trained on these "
            "photos",
        )
    return None


TEXTS = {
    "en": Text(
        title="Wrong loss at the start",
        brief=(
            "Before the first update a network should guess, with a loss of ln K; this one is "
            "sure of something it cannot know."
        ),
        what=(
            "The first loss is far from ln K, the loss of equal probability for each of K classes."
        ),
        why=(
            "Too high: the last layer's weights are so large that the network is certain and "
            "wrong; the first steps only unlearn that. Too low: it knows the answer already, "
            "because the input shows the label or because the weights have seen these photos."
        ),
        recognised=(
            "The loss on fixed training images before the first update, and the median of the "
            "first steps, against ln K."
        ),
        helps=(
            "A last layer with small weights; for very unequal classes, a bias set to the "
            "logarithms of their frequencies. For a low start: look for the label in the picture,"
            " in the file name's order, or in the weights that were loaded."
        ),
        helps_not=(
            "A warm-up alone: it takes longer to unlearn the same certainty. Label smoothing "
            "lowers the number, not the fault."
        ),
    ),
    "id": Text(
        title="Loss awal yang salah",
        brief=(
            "Sebelum pembaruan pertama jaringan semestinya menebak dengan loss ln K; yang ini "
            "yakin akan sesuatu yang tak mungkin diketahuinya."
        ),
        what=(
            "Loss pertama jauh dari ln K, yaitu loss jika setiap dari K kelas diberi peluang sama."
        ),
        why=(
            "Terlalu tinggi: bobot lapisan terakhir begitu besar sehingga jaringan yakin tetapi "
            "salah; langkah-langkah pertama hanya menghapus keyakinan itu. Terlalu rendah: "
            "jawabannya sudah diketahui, karena masukan memperlihatkan label atau bobotnya pernah"
            " melihat foto-foto ini."
        ),
        recognised=(
            "Loss pada gambar latih yang tetap sebelum pembaruan pertama, dan median "
            "langkah-langkah pertama, dibandingkan dengan ln K."
        ),
        helps=(
            "Lapisan terakhir dengan bobot kecil; untuk kelas yang sangat timpang, bias yang "
            "diisi logaritma frekuensinya. Jika awalnya rendah: cari label di dalam gambar, dalam"
            " urutan nama berkas, atau pada bobot yang dimuat."
        ),
        helps_not=(
            "Pemanasan saja: ia hanya memperlambat penghapusan keyakinan yang sama. Label "
            "smoothing menurunkan angkanya, bukan kesalahannya."
        ),
    ),
}

RULE = Rule(
    id="start_loss",
    when="live",
    check=check,
    texts=TEXTS,
    sources=(
        "Karpathy 2019, A Recipe for Training Neural Networks (blog)",
        (
            "Glorot and Bengio 2010, Understanding the difficulty of training deep feedforward "
            "neural networks (AISTATS)"
        ),
    ),
    figures=("loss",),
)
