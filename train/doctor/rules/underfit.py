"""A model that does not even learn its training photos."""

import math

from train.doctor.finding import Finding, Rule, Text
from train.doctor.measures import flat, full_rate, learnt, share_error, train_accuracy
from train.doctor.signals import Signals

PAST = 0.6  # of the epochs: a verdict before is impatience
LEAST_EPOCHS = 12  # of the run; fewer are a trial
ACCURACY = 0.7  # on training images
GAP, ERRORS = 0.05, 2  # of training over validation accuracy, and that in standard errors; more is
# another illness
SPAN = 6  # epochs over which the training loss stands still
USUAL_DECAY = {"sgd": 1e-2, "adamw": 0.2}  # more may keep a model from learning: AdamW's is one of
# the learning rate, SGD's of the gradient
LARGER = {
    "micro_plain": "plain18",
    "micro_resnet": "resnet18",
    "plain18": "plain34",
    "resnet18": "resnet34",
}


def check(signals: Signals) -> Finding | None:
    total, done = signals.start["epochs"], len(signals.epochs)
    epochs = full_rate(signals, signals.epochs)[-SPAN:]
    if total < LEAST_EPOCHS or done < PAST * total or len(epochs) < SPAN:
        return None
    losses = [epoch["train_loss"] for epoch in epochs]
    accuracy, images = train_accuracy(signals, signals.epochs[-1])
    val = signals.epochs[-1].get("val_accuracy")
    if None in losses or val is None or accuracy >= ACCURACY:
        return None
    val_images = signals.epochs[-1]["val_images"]
    error = math.hypot(share_error(accuracy, images), share_error(val, val_images))
    if accuracy - val >= max(GAP, ERRORS * error):
        return None
    # where nothing at all is learnt there is another reason
    if not learnt(signals) or not flat(losses, sure=math.inf):
        return None
    model = signals.config("model", "model")
    usual = USUAL_DECAY[signals.config("optim", "optimizer") or "sgd"]
    decays = (signals.config("optim", "weight_decay") or 0) > usual
    changes = {"weight_decay": 5e-4} if decays else {}
    if not decays and model in LARGER:
        changes = {"model": LARGER[model]}
    return Finding(
        "problem",
        epochs[0]["step"],
        f"accuracy {accuracy:.0%} on {images} training images and {val:.0%} on validation, and the "
        f"training loss stood still over {len(losses)} epochs ({losses[0]:.3g} to "
        f"{losses[-1]:.3g})",
        "give the model more room: a larger --model, less --weight-decay, --dropout and --augment, "
        "a better --lr",
        changes,
    )


TEXTS = {
    "en": Text(
        title="Underfitting",
        brief=(
            "The model does not even learn its training photos: it is too small, too restrained, "
            "or not trained to the end."
        ),
        what=(
            "Accuracy is low on training photos and hardly lower on validation, and both stand "
            "still."
        ),
        why=(
            "The network has too few filters or layers for what tells the classes apart, or "
            "weight decay, dropout and augmentation leave it too little room, or the learning "
            "rate ends the descent early."
        ),
        recognised=(
            "Past 60 % of a run of at least 12 epochs: accuracy under 70 % on clean training "
            "images, above validation by less than 5 points or two standard errors, and a training "
            "loss that falls by less than 1 % an epoch while the rate is high. If nothing at all "
            "is learnt the cause is another."
        ),
        helps=(
            "A larger model; less weight decay, dropout and augmentation; a better learning rate "
            "and schedule; larger images, when the details that matter are lost."
        ),
        helps_not=(
            "More data and more regularisation: they close a gap between training and validation,"
            " and here is none."
        ),
    ),
    "id": Text(
        title="Underfitting",
        brief=(
            "Model bahkan tidak mempelajari foto latihnya: terlalu kecil, terlalu dikekang, atau "
            "belum selesai dilatih."
        ),
        what=(
            "Akurasi rendah pada foto latih, hampir sama rendah pada validasi, dan keduanya diam "
            "di tempat."
        ),
        why=(
            "Jaringan memiliki terlalu sedikit filter atau lapisan untuk hal yang membedakan "
            "kelas, atau weight decay, dropout, dan augmentasi tidak menyisakan ruang, atau "
            "learning rate mengakhiri penurunan terlalu dini."
        ),
        recognised=(
            "Setelah 60 % dari pelatihan sedikitnya 12 epoch: akurasi di bawah 70 % pada gambar "
            "latih bersih, di atas validasi kurang dari 5 poin atau dua galat baku, dan loss latih "
            "yang turun kurang dari 1 % per epoch selagi rate masih tinggi. Bila tidak ada yang "
            "dipelajari sama sekali, penyebabnya lain."
        ),
        helps=(
            "Model lebih besar; weight decay, dropout, dan augmentasi lebih kecil; learning rate "
            "dan jadwal yang lebih baik; gambar lebih besar bila rincian pentingnya hilang."
        ),
        helps_not=(
            "Lebih banyak data dan regularisasi: keduanya menutup jarak antara latih dan "
            "validasi, sedangkan di sini jarak itu tidak ada."
        ),
    ),
}

RULE = Rule(
    id="underfit",
    when="after",
    check=check,
    texts=TEXTS,
    sources=(
        "Goodfellow, Bengio and Courville 2016, Deep Learning, section 5.2",
        "Zhang et al. 2017, Understanding deep learning requires rethinking generalization (ICLR)",
    ),
    figures=("gap",),
)
