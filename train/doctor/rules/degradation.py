"""A deeper or plain network that fits its training photos worse than its residual counterpart."""

import numpy as np

from train.doctor.finding import Finding, Rule, Text
from train.doctor.signals import Signals

ERRORS = 2  # standard errors of the difference
RUNS = 3  # of each kind, with seeds of their own


def check(signals: Signals) -> Finding | None:
    paired = signals.others.get("degradation")
    if paired is None:
        return None
    plain, residual = np.array(paired["plain"]), np.array(paired["residual"])
    difference = float(plain.mean() - residual.mean())
    if min(plain.size, residual.size) < 2:
        error = float("inf")
    else:
        error = float(
            np.sqrt(plain.var(ddof=1) / plain.size + residual.var(ddof=1) / residual.size)
        )
    if difference <= ERRORS * error and min(plain.size, residual.size) >= RUNS:
        return None
    sure = difference > ERRORS * error and min(plain.size, residual.size) >= RUNS
    if difference <= 0:
        return None
    return Finding(
        "problem" if sure else "note",
        0,
        f"the plain network's final training loss is {difference:.3g} higher than the residual "
        f"one's (standard error {error:.2g}, {plain.size} and {residual.size} runs): "
        f"{plain.mean():.4g} against {residual.mean():.4g}"
        + ("" if sure else "; inconclusive with so few runs"),
        "use the residual model: its training loss, not only its validation accuracy, is lower",
        {"model": paired["residual_model"]},
    )


TEXTS = {
    "en": Text(
        title="Degradation of deep plain networks",
        brief=(
            "The plain network fits even its training photos worse than the same network with "
            "shortcuts: it is too deep to be optimised, not too large to generalise."
        ),
        what=(
            "With depth the TRAINING loss of plain networks rises, though a deeper network could "
            "copy a shallower one and add identities."
        ),
        why=(
            "Not vanishing gradients: with BatchNorm their norms are healthy. Stacked layers find"
            " it hard to learn the identity; a residual block learns F(x) = H(x) - x instead, for"
            " which the identity is F = 0. Without shortcuts gradients of neighbouring inputs "
            "also decorrelate with depth, and the loss surface turns rough."
        ),
        recognised=(
            "Final training losses of plain and residual runs that differ in nothing else, over "
            "at least three seeds each: a difference above two standard errors. `python -m "
            "train.doctor RUN RUN ...` compares the runs it is given."
        ),
        helps=(
            "Residual blocks (--model resnet34): the same parameters and one addition a block. "
            "Less depth."
        ),
        helps_not=(
            "More epochs, which shrink the difference but do not close it; dropout and weight "
            "decay, which are for networks that fit too well; validation accuracy of single runs "
            "as evidence, which mixes this with overfitting and chance."
        ),
    ),
    "id": Text(
        title="Degradasi jaringan polos dalam",
        brief=(
            "Jaringan polos mencocokkan foto latihnya sendiri lebih buruk daripada jaringan sama "
            "yang memakai shortcut: ia terlalu dalam untuk dioptimalkan, bukan terlalu besar "
            "untuk menggeneralisasi."
        ),
        what=(
            "Makin dalam, loss LATIH jaringan polos naik, padahal jaringan yang lebih dalam bisa "
            "menyalin yang dangkal dan menambah identitas."
        ),
        why=(
            "Bukan gradien menghilang: dengan BatchNorm normanya sehat. Tumpukan lapisan sulit "
            "mempelajari identitas; blok residual mempelajari F(x) = H(x) - x, dan identitas "
            "baginya adalah F = 0. Tanpa shortcut, gradien masukan yang berdekatan juga makin tak"
            " berkorelasi sesuai kedalaman, dan permukaan loss menjadi kasar."
        ),
        recognised=(
            "Loss latih akhir dari pelatihan polos dan residual yang sama dalam hal lain, "
            "sedikitnya tiga seed masing-masing: selisih di atas dua galat baku. `python -m "
            "train.doctor RUN RUN ...` membandingkan pelatihan yang diberikan."
        ),
        helps=(
            "Blok residual (--model resnet34): parameter yang sama dan satu penjumlahan per blok."
            " Kedalaman yang lebih kecil."
        ),
        helps_not=(
            "Lebih banyak epoch, yang mengecilkan selisih tetapi tidak menutupnya; dropout dan "
            "weight decay, yang untuk jaringan yang terlalu cocok; akurasi validasi dari satu "
            "pelatihan sebagai bukti, yang mencampurnya dengan overfitting dan kebetulan."
        ),
    ),
}

RULE = Rule(
    id="degradation",
    when="request",
    check=check,
    texts=TEXTS,
    sources=(
        "He et al. 2016, Deep Residual Learning for Image Recognition (CVPR)",
        "Balduzzi et al. 2017, The Shattered Gradients Problem (ICML)",
        "Li et al. 2018, Visualizing the Loss Landscape of Neural Nets (NeurIPS)",
    ),
)
