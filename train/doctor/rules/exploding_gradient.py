"""Gradients that grow without bound, and the loss with them."""

import numpy as np

from train.doctor.finding import Finding, Rule, Text
from train.doctor.measures import WINDOW, log_classes, short
from train.doctor.signals import Signals

GROWTH = 10.0  # times the median of the probes before
LARGE = 10.0  # gradient norm over weight norm before the first update: healthy networks are below 1
WORSE = 2.0  # times the lowest median loss so far
OFTEN, OF = 3, 10  # steps of the latest: one outlier of a batch is no explosion


def check(signals: Signals) -> Finding | None:
    norms = np.array([np.nan if p["grad_norm"] is None else p["grad_norm"] for p in signals.probes])
    if norms.size < 2 or signals.steps < WINDOW:
        return None
    sizes = [np.linalg.norm(signals.layers(p, "weight")) for p in signals.probes]
    usual = [
        GROWTH * np.nanmedian(norms[:i]) if np.isfinite(norms[:i]).any() else LARGE * sizes[0]
        for i in range(norms.size)
    ]
    grown = [bool(norm > limit) for norm, limit in zip(norms, usual, strict=True)]
    if not any(grown):
        return None
    loss = signals.per_step("loss")
    medians = [np.median(loss[max(0, i - OF) : i]) for i in range(OF, loss.size + 1)]
    worse = loss[-OF:] > max(WORSE * np.nanmin(medians), log_classes(signals))
    if worse.sum() < OFTEN:
        return None
    first = signals.probes[grown.index(True)]["step"]
    return Finding(
        "problem",
        first,
        f"the gradient's norm went from {norms[0]:.3g} to {np.nanmax(norms):.3g}, and the loss of "
        f"{int(worse.sum())} of the latest {OF} steps is over {WORSE:.0f} times its lowest level "
        f"({np.nanmin(medians):.3g})",
        "bound it with --clip-grad 1, and lower --lr",
        {"clip_grad": 1.0, "lr": short(signals.config("optim", "lr") / 3)},
    )


TEXTS = {
    "en": Text(
        title="Exploding gradients",
        brief=(
            "The gradient has grown many times over, and the loss with it: each step is thrown "
            "further than the last."
        ),
        what="The norm of all gradients together is ten times what it was, and the loss climbs.",
        why=(
            "Going back through the network, the gradient is multiplied by each layer's weights. "
            "Factors above 1 make it grow with depth without bound: weights initialised too "
            "large, layers without normalisation, or weights that a high learning rate has blown "
            "up."
        ),
        recognised=(
            "The gradient's norm against the median of earlier probes, or against the weights' "
            "norm at the start, together with a loss of twice its lowest level in three of ten "
            "steps and worse than guessing. One outlier is no explosion."
        ),
        helps=(
            "--clip-grad 1 keeps the direction and bounds the length; a lower learning rate; "
            "--init kaiming; normalisation and shortcuts."
        ),
        helps_not=(
            "Clipping alone when the learning rate is the cause: steps of bounded length can be "
            "too long, too. Skipping the bad batches hides them."
        ),
    ),
    "id": Text(
        title="Gradien meledak",
        brief=(
            "Gradien membesar berkali lipat, dan loss ikut naik: tiap langkah terlempar lebih "
            "jauh daripada sebelumnya."
        ),
        what="Norma seluruh gradien menjadi sepuluh kali semula, dan loss menanjak.",
        why=(
            "Saat mundur melalui jaringan, gradien dikalikan dengan bobot tiap lapisan. Faktor di"
            " atas 1 membuatnya tumbuh tanpa batas sesuai kedalaman: bobot awal terlalu besar, "
            "lapisan tanpa normalisasi, atau bobot yang dibengkakkan oleh learning rate tinggi."
        ),
        recognised=(
            "Norma gradien dibandingkan median pemeriksaan sebelumnya, atau norma bobot pada "
            "awal, bersama loss dua kali tingkat terendahnya pada tiga dari sepuluh langkah dan "
            "lebih buruk daripada menebak. Satu pencilan bukan ledakan."
        ),
        helps=(
            "--clip-grad 1 mempertahankan arah dan membatasi panjangnya; learning rate lebih "
            "kecil; --init kaiming; normalisasi dan shortcut."
        ),
        helps_not=(
            "Pembatasan saja bila penyebabnya learning rate: langkah yang dibatasi pun bisa "
            "terlalu panjang. Melewati batch yang buruk hanya menyembunyikannya."
        ),
    ),
}

RULE = Rule(
    id="exploding_gradient",
    when="live",
    check=check,
    texts=TEXTS,
    sources=(
        (
            "Pascanu, Mikolov and Bengio 2013, On the difficulty of training recurrent neural "
            "networks (ICML)"
        ),
        "He et al. 2015, Delving Deep into Rectifiers (ICCV)",
    ),
    figures=(
        "loss",
        "depth",
    ),
)
