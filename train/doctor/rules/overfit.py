"""The training photos known by heart, and others not."""

import numpy as np

from train.doctor.finding import Finding, Rule, Text
from train.doctor.measures import run_of, share_error, train_accuracy
from train.doctor.signals import Signals

GAP = 0.10  # of training over validation accuracy
ERRORS = 3  # standard errors of the gap
RISEN = 1.10  # times the lowest validation loss
EPOCHS = 5  # in a row
SEVERE_GAP, SEVERE_TRAIN = 0.25, 0.95  # then the validation loss need not rise
SEVERE_EPOCHS = 3


def check(signals: Signals) -> Finding | None:
    epochs = [e for e in signals.epochs if e.get("val_accuracy") is not None]
    if not epochs:
        return None
    lowest = np.inf
    wide, rising, severe, seen = [], [], [], []
    for epoch in epochs:
        train, images = train_accuracy(signals, epoch)
        val, loss = epoch["val_accuracy"], epoch["val_loss"]
        loss = np.inf if loss is None else loss
        lowest = min(lowest, loss)
        error = np.hypot(share_error(train, images), share_error(val, epoch["val_images"]))
        wide.append(train - val >= GAP and train - val > ERRORS * error)
        rising.append(wide[-1] and loss >= RISEN * lowest)
        severe.append(wide[-1] and train - val >= SEVERE_GAP and train >= SEVERE_TRAIN)
        seen.append((train, val, loss, error))
    begin = run_of(rising, EPOCHS)
    heavy = run_of(severe, SEVERE_EPOCHS)
    noted = run_of(wide, SEVERE_EPOCHS)
    if noted is None:
        return None
    first = min((i for i in (begin, heavy) if i is not None), default=noted)
    train, val, loss, error = seen[-1]
    return Finding(
        "note" if begin is None and heavy is None else "problem",
        epochs[first]["step"],
        f"accuracy {train:.0%} on training images and {val:.0%} on validation: a gap of "
        f"{100 * (train - val):.0f} points (standard error {100 * error:.0f}); the validation loss "
        f"is {loss:.3g}, its lowest was {lowest:.3g} in epoch "
        f"{int(np.argmin([s[2] for s in seen])) + 1}",
        "more photos; --augment strong, --mixup 0.2, --dropout, --weight-decay; a smaller model; "
        "best.pt already is the best epoch",
        _changes(signals),
    )


def _changes(signals: Signals) -> dict[str, object]:
    """What the run does not do yet."""
    found = {}
    if signals.config("data", "augment") in ("none", "light"):
        found["augment"] = "strong"
    if not signals.config("data", "mixup"):
        found["mixup"] = 0.2
    if not signals.config("optim", "weight_decay"):
        found["weight_decay"] = 5e-4
    return found or {"augment": "heavy", "dropout": 0.3}


TEXTS = {
    "en": Text(
        title="Overfitting",
        brief=(
            "The network knows its training photos by heart and fails on others: it has more "
            "freedom than the photos can tie down."
        ),
        what=(
            "Training accuracy is far above validation accuracy, 98 % against 65 % say, and the "
            "validation loss climbs from its minimum while the training loss falls."
        ),
        why=(
            "Too many layers and parameters for so few photos, too little regularisation "
            "(dropout, weight decay), data without variety (no augmentation). When more capacity "
            "makes validation fall, from 85 % to 65 % say, three design errors are usual: a "
            "network too deep without shortcuts, in which early layers stay poor and the rest "
            "memorises; no dropout and no normalisation between all the new layers; kernels and "
            "strides that do not fit the images, so that details are gone before anything has "
            "looked at them."
        ),
        recognised=(
            "Accuracy on clean training images in eval mode less that on validation: 10 points or"
            " more and three standard errors, with a validation loss 10 % above its minimum for "
            "five epochs; or 25 points at 95 % on training. The rules geometry, degradation and "
            "leakage look for the design errors and for copies."
        ),
        helps=(
            "More, and more varied, photos; --augment strong, --mixup 0.2; --dropout 0.3; "
            "--weight-decay 5e-4; a smaller model, or a residual one; --stem small for small "
            "images; the best epoch instead of the last, as best.pt is."
        ),
        helps_not=(
            "More epochs or a lower training loss. A larger validation set only measures the gap "
            "better. Tuning on validation until it fits: it then overfits, too."
        ),
    ),
    "id": Text(
        title="Overfitting",
        brief=(
            "Jaringan hafal foto latihnya dan gagal pada foto lain: kebebasannya lebih besar "
            "daripada yang dapat diikat foto-foto itu."
        ),
        what=(
            "Akurasi latih jauh di atas akurasi validasi, misalnya 98 % lawan 65 %, dan loss "
            "validasi naik dari minimumnya sementara loss latih turun."
        ),
        why=(
            "Terlalu banyak lapisan dan parameter untuk foto sesedikit itu, regularisasi terlalu "
            "kecil (dropout, weight decay), data tanpa keragaman (tanpa augmentasi). Bila "
            "kapasitas ditambah lalu validasi turun, misalnya dari 85 % ke 65 %, ada tiga "
            "kesalahan desain yang lazim: jaringan terlalu dalam tanpa shortcut, sehingga lapisan"
            " awal tetap buruk dan sisanya menghafal; tanpa dropout dan normalisasi di antara "
            "lapisan-lapisan baru; kernel dan stride yang tidak cocok dengan ukuran gambar, "
            "sehingga rincian hilang sebelum sempat dilihat."
        ),
        recognised=(
            "Akurasi pada gambar latih bersih dalam mode eval dikurangi akurasi validasi: 10 poin"
            " atau lebih dan tiga galat baku, dengan loss validasi 10 % di atas minimumnya selama"
            " lima epoch; atau 25 poin saat akurasi latih 95 %. Aturan geometry, degradation, dan"
            " leakage mencari kesalahan desain dan salinan foto."
        ),
        helps=(
            "Foto lebih banyak dan lebih beragam; --augment strong, --mixup 0.2; --dropout 0.3; "
            "--weight-decay 5e-4; model lebih kecil, atau yang residual; --stem small untuk "
            "gambar kecil; epoch terbaik sebagai ganti yang terakhir, seperti best.pt."
        ),
        helps_not=(
            "Lebih banyak epoch atau loss latih lebih rendah. Set validasi lebih besar hanya "
            "mengukur jaraknya lebih baik. Menyetel sampai cocok dengan validasi: validasi pun "
            "ikut ter-overfit."
        ),
    ),
}

RULE = Rule(
    id="overfit",
    when="live",
    check=check,
    texts=TEXTS,
    sources=(
        "Goodfellow, Bengio and Courville 2016, Deep Learning, chapter 7",
        (
            "Srivastava et al. 2014, Dropout: A Simple Way to Prevent Neural Networks from "
            "Overfitting (JMLR)"
        ),
        "Zhang et al. 2018, mixup: Beyond Empirical Risk Minimization (ICLR)",
        "Zhang et al. 2017, Understanding deep learning requires rethinking generalization (ICLR)",
    ),
    figures=("gap",),
)
