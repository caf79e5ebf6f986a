"""Losses or gradients that are no numbers, and float16 that overflows again and again."""

import numpy as np

from train.doctor.finding import Finding, Rule, Text
from train.doctor.measures import first_loss, short
from train.doctor.signals import Signals

SKIPS_IN_A_ROW = 3  # the scale halves at each: a single overflow every 2000 steps is how it works
SKIPPED_SHARE = 0.05  # of RECENT steps: a twentieth of the photos has then been wasted
RECENT = 200  # steps
SETTLING = 20  # first steps in which the scale looks for its place
LEAST_SCALE = 1.0  # below it the scaling makes gradients smaller: it has lost its purpose
RISEN = 2.0  # times the first loss: the loss ran away before it overflowed


def check(signals: Signals) -> Finding | None:
    loss = signals.per_step("loss")
    bad = np.flatnonzero(~np.isfinite(loss))
    fp16 = signals.start.get("amp") == "float16"
    if "stop" in signals.others or (bad.size and not fp16):
        step = int(bad[0]) if bad.size else signals.others["stop"]["step"]
        return _loss(signals, loss, step)
    gradients = [p["step"] for p in signals.probes if p["grad_norm"] is None]
    if gradients and not fp16:
        many = len(gradients) > 1
        return Finding(
            "problem" if many else "note",
            gradients[0],
            f"the gradient was not finite in {len(gradients)} of {len(signals.probes)} probes",
            "lower --lr, and look at the photos of those steps",
            _slower(signals),
        )
    return _scaling(signals) if fp16 else None


def _loss(signals: Signals, loss: np.ndarray, step: int) -> Finding:
    before = loss[max(0, step - 5) : step]
    before = before[np.isfinite(before)]
    evidence = f"the loss is not finite after {step} steps"
    if not signals.start["input"]["finite"]:
        evidence += ", and neither are pixels of the images that the network is fed"
        return Finding("problem", step, evidence, "repair the images that hold such pixels")
    remedy = "look at the photos in bad_batch.json; if they are sound, lower --lr"
    if before.size:
        evidence += f"; it began at {first_loss(signals):.3g} and was {before[-1]:.3g} before"
        if before.max() > RISEN * first_loss(signals) or step < SETTLING:
            remedy = "lower --lr: the loss grew before it overflowed, so the updates are too large"
    return Finding("problem", step, evidence, remedy, _slower(signals))


def _scaling(signals: Signals) -> Finding | None:
    skipped = signals.per_step("skipped")[SETTLING:] > 0
    first = int(np.argmax(skipped)) + SETTLING if skipped.any() else 0
    remedy = "use bfloat16, whose range is that of float32"
    changes = {"amp": "bf16"}
    scale = signals.probes[-1]["scale"] if signals.probes else None
    if scale is not None and scale < LEAST_SCALE:
        evidence = f"the loss scale of float16 has fallen to {scale:.2g}"
        return Finding("problem", signals.probes[-1]["step"], evidence, remedy, changes)
    if skipped.size < SKIPS_IN_A_ROW:
        return None
    runs = np.convolve(skipped, np.ones(SKIPS_IN_A_ROW), "valid")
    share = float(skipped[-RECENT:].mean()) if skipped.size else 0.0
    if (runs == SKIPS_IN_A_ROW).any() or (skipped.size >= RECENT and share > SKIPPED_SHARE):
        evidence = (
            f"{int(skipped.sum())} of {skipped.size} float16 updates were skipped because a "
            f"gradient overflowed, {share:.0%} of the latest"
        )
        return Finding("problem", first, evidence, remedy, changes)
    return None


def _slower(signals: Signals) -> dict[str, float]:
    rate = signals.config("optim", "lr")
    return {"lr": short(rate / 10)} if rate else {}


TEXTS = {
    "en": Text(
        title="Numbers that are none",
        brief=(
            "A loss or gradient overflowed or was undefined; every weight it reached would be "
            "lost with it, so the update was not made."
        ),
        what=(
            "The loss or a gradient is NaN or infinite. One such update turns every weight into "
            "NaN, and nothing after it can be repaired."
        ),
        why=(
            "Usually the updates are too large: weights and activations grow from step to step "
            "until a number leaves its range. float16 ends at 65,504 and meets this first. "
            "Otherwise an input holds a pixel that is not finite, or a logarithm or division "
            "meets 0."
        ),
        recognised=(
            "The loss of a step is not finite. Under float16 the loss scale falls again and again"
            " and updates are skipped. A loss that grew over the steps before points to the "
            "learning rate; one that was calm points to a photo of that very batch."
        ),
        helps=(
            "A lower learning rate or a warm-up; bounded gradients (--clip-grad 1); bfloat16, "
            "which has the range of float32, instead of float16; a look at the photos listed in "
            "bad_batch.json."
        ),
        helps_not=(
            "Starting again from the same checkpoint with the same settings: order and "
            "augmentation are the same, and so is the end. Replacing NaN by 0 hides the step and "
            "keeps its cause."
        ),
    ),
    "id": Text(
        title="Nilai bukan bilangan",
        brief=(
            "Loss atau gradien meluap atau tidak terdefinisi; semua bobot yang dicapainya akan "
            "rusak, maka pembaruan itu tidak dilakukan."
        ),
        what=(
            "Loss atau gradien bernilai NaN atau tak hingga. Satu pembaruan seperti itu mengubah "
            "semua bobot menjadi NaN, dan setelahnya tidak ada yang dapat diperbaiki."
        ),
        why=(
            "Biasanya pembaruan terlalu besar: bobot dan aktivasi membesar dari langkah ke "
            "langkah sampai sebuah bilangan keluar dari rentangnya. Rentang float16 hanya sampai "
            "65.504, jadi ia yang pertama mengalaminya. Kemungkinan lain: ada piksel masukan yang"
            " bukan bilangan, atau logaritma dan pembagian yang bertemu 0."
        ),
        recognised=(
            "Loss suatu langkah bukan bilangan hingga. Pada float16, skala loss turun berulang "
            "kali dan pembaruan dilewati. Loss yang membesar sebelum kejadian menunjuk ke "
            "learning rate; loss yang tenang menunjuk ke foto dalam batch itu sendiri."
        ),
        helps=(
            "Learning rate yang lebih kecil atau pemanasan (warm-up); gradien yang dibatasi "
            "(--clip-grad 1); bfloat16, yang rentangnya sama dengan float32, sebagai ganti "
            "float16; memeriksa foto-foto di bad_batch.json."
        ),
        helps_not=(
            "Mengulang dari checkpoint yang sama dengan pengaturan yang sama: urutan dan "
            "augmentasinya sama, jadi akhirnya pun sama. Mengganti NaN dengan 0 hanya "
            "menyembunyikan langkah itu; penyebabnya tetap ada."
        ),
    ),
}

RULE = Rule(
    id="non_finite",
    when="live",
    check=check,
    texts=TEXTS,
    sources=(
        "Micikevicius et al. 2018, Mixed Precision Training (ICLR)",
        (
            "Pascanu, Mikolov and Bengio 2013, On the difficulty of training recurrent neural "
            "networks (ICML)"
        ),
    ),
    figures=("loss",),
)
