"""Updates so small that the weights hardly leave where they began."""

import numpy as np

from train.doctor.finding import Finding, Rule, Text
from train.doctor.measures import first_loss, log_classes, recent_loss
from train.doctor.signals import Signals

RATIO = 1e-4  # of a layer's weights that one step changes, at most so far; 1e-3 is usual
TINY = 1e-5  # the report's recipe, slow but learning, is above it
MORE = 10.0  # times the run's highest rate, that the range test finds: then no guess is needed
FALLS = 0.05  # of the loss an epoch
HIGH = 0.9  # times ln K: below it, slow or not, it learns
PROBES = 2
STEPS = 50


def check(signals: Signals) -> Finding | None:
    updates = [
        (p["step"], float(np.median(signals.layers(p, "update"))))
        for p in signals.probes
        if p["layers"]["update"]
    ]
    if len(updates) < PROBES or signals.steps < STEPS:
        return None
    largest = max(ratio for _, ratio in updates)
    if recent_loss(signals) < HIGH * log_classes(signals):
        return None
    epochs = max(1.0, signals.steps / signals.start["steps_per_epoch"])
    fall = (1 - recent_loss(signals) / first_loss(signals)) / epochs
    if not 0 < largest < RATIO or fall >= FALLS:
        return None
    evidence = (
        f"a step changes the typical layer by at most {largest:.1e} of its weights (1e-3 is "
        f"usual), and the loss fell by {fall:.1%} an epoch, to {recent_loss(signals):.3g}"
    )
    certain = largest < TINY
    tested = signals.others.get("range_test")
    if tested is not None:
        more = tested["suggestion"] / float(signals.per_step("learning_rate").max())
        if more < MORE:
            return None
        certain = True
        evidence += f"; the range test finds {tested['suggestion']:g}, {more:.0f} times the rate"
    return Finding(
        "problem" if certain else "note",
        updates[0][0],
        evidence,
        "raise --lr: --lr find looks for the largest that still lowers the loss",
        {"lr": "find"},
    )


TEXTS = {
    "en": Text(
        title="Learning rate too low",
        brief=(
            "The steps are so small that the weights hardly leave where they began; nothing is "
            "wrong but the pace."
        ),
        what=(
            "One step changes the weights by less than a hundred-thousandth of their size, and "
            "the loss hardly falls."
        ),
        why=(
            "The loss falls by about the learning rate times the square of the gradient in a "
            "step. A rate a thousand times too small needs a thousand times the steps."
        ),
        recognised=(
            "The change of one step over the norm of the weights, at most 1e-5 in all probes "
            "(1e-3 is usual), while the training shows no learning. The end of a decay is no "
            "fault, so the largest counts. With --range-test the network is asked how much it "
            "takes: 10 times the rate or more makes 1e-4 enough, less clears the rate."
        ),
        helps=(
            "The range test, then a tenth of the rate that brings its loss near the lowest "
            "(--lr find); "
            "--schedule onecycle or cyclic, which visit high rates; --momentum 0.9, which makes "
            "steps in a steady direction ten times as long; AdamW, whose steps do not depend on "
            "the gradient's size."
        ),
        helps_not=(
            "More epochs alone, in the hundreds or thousands. More data or augmentation. A larger"
            " model."
        ),
    ),
    "id": Text(
        title="Learning rate terlalu rendah",
        brief=(
            "Langkahnya begitu kecil sehingga bobot nyaris tidak beranjak dari awalnya; tidak ada"
            " yang salah selain kecepatannya."
        ),
        what=(
            "Satu langkah mengubah bobot kurang dari seperseratus ribu ukurannya, dan loss hampir"
            " tidak turun."
        ),
        why=(
            "Dalam satu langkah loss turun kira-kira sebesar learning rate kali kuadrat gradien. "
            "Rate yang seribu kali terlalu kecil butuh seribu kali lebih banyak langkah."
        ),
        recognised=(
            "Perubahan satu langkah dibagi norma bobot, paling besar 1e-5 pada semua pemeriksaan "
            "(lazimnya 1e-3), sementara pelatihan tidak menunjukkan kemajuan. Akhir penurunan "
            "rate bukan kesalahan, jadi yang terbesar yang dihitung. Dengan --range-test jaringan "
            "ditanya seberapa besar rate yang sanggup diterimanya: bila 10 kali lipat atau lebih, "
            "1e-4 sudah cukup; bila kurang, rate-nya tidak bersalah."
        ),
        helps=(
            "Uji rentang, lalu sepersepuluh rate yang membawa loss mendekati titik terendahnya "
            "(--lr find); "
            "--schedule onecycle atau cyclic, yang mengunjungi rate tinggi; --momentum 0.9, yang "
            "membuat langkah searah sepuluh kali lebih panjang; AdamW, yang langkahnya tidak "
            "bergantung pada besar gradien."
        ),
        helps_not=(
            "Hanya menambah epoch, ratusan atau ribuan. Lebih banyak data atau augmentasi. Model "
            "lebih besar."
        ),
    ),
}

RULE = Rule(
    id="lr_too_low",
    when="live",
    check=check,
    texts=TEXTS,
    sources=(
        "Smith 2017, Cyclical Learning Rates for Training Neural Networks (WACV)",
        "Goodfellow, Bengio and Courville 2016, Deep Learning, section 11.4.1",
    ),
    figures=("loss",),
)
