"""A loss that stays high for epochs."""

import math

from train.doctor.finding import Finding, Rule, Text
from train.doctor.measures import flat, full_rate, log_classes
from train.doctor.signals import Signals

EPOCHS, STEPS = 5, 200  # it lasts; the longer of the two
# Times ln K, of the loss on clean training images: 1 is knowing nothing. Hard photos plateau at 0.7
# and are learnt all the same, so that is a note.
HIGH, NOTED = 0.9, 0.7


def check(signals: Signals) -> Finding | None:
    span = max(EPOCHS, math.ceil(STEPS / signals.start["steps_per_epoch"]))
    epochs = full_rate(signals, signals.epochs)[-span:]
    if len(epochs) < span or not signals.probes:
        return None
    losses = [epoch["train_loss"] for epoch in epochs]
    clean = signals.probes[-1]["clean_loss"]
    if None in losses or clean is None or clean <= NOTED * log_classes(signals):
        return None
    if not flat(losses):
        return None
    high = min(clean, losses[-1]) > HIGH * log_classes(signals)
    return Finding(
        "problem" if high else "note",
        epochs[0]["step"],
        f"over the latest {len(losses)} epochs the training loss stood still at {losses[0]:.3g} "
        f"to {losses[-1]:.3g}; on clean training images it is {clean:.3g}, and no knowledge gives "
        f"{log_classes(signals):.3g}",
        "look for a better --lr (--lr find), use --schedule cyclic or onecycle with --momentum "
        "0.9, check labels, initialisation and the size of the model",
        {"lr": "find", "schedule": "onecycle", "momentum": 0.9},
    )


TEXTS = {
    "en": Text(
        title="Stagnating loss",
        brief=(
            "The training loss stays high for epochs: the steps lead nowhere, too long, too "
            "short, or in a network that cannot do better."
        ),
        what="The loss on training photos no longer falls and is near that of guessing.",
        why=(
            "Three causes are usual. The learning rate: too high, and the loss oscillates across "
            "the valley; too low, and it creeps. The initialisation: all zeros or constants, "
            "where filters cannot become different, or sizes under which signals fade. The model:"
            " too small for the task, or crippled by too much regularisation. Labels that do not "
            "belong to the photos look the same."
        ),
        recognised=(
            "A line through the training loss of at least five epochs and 200 steps that does not"
            " fall by 1 % an epoch, while the loss on clean training images is above 0.9 ln K. "
            "Epochs in which the rate has nearly decayed to 0 do not count. lr_too_high, "
            "lr_too_low, symmetric_init and dying_relu name their cause first."
        ),
        helps=(
            "The range test (--lr find). A cyclic rate (--schedule cyclic or onecycle): its high "
            "phases carry the weights across saddle points and out of sharp, poor regions where a"
            " small rate would stay, its low phases let them settle. Momentum (--momentum 0.9): "
            "it sums past gradients, so that components which change their sign cancel, which "
            "damps oscillation, and steady ones add up to ten times the step, which passes "
            "plateaus and small minima. --init kaiming; a larger model. `--one-batch` tells "
            "whether the network can learn at all."
        ),
        helps_not=(
            "Hundreds more epochs of the same. A small random change of the rate. Early stopping,"
            " which ends the symptom."
        ),
    ),
    "id": Text(
        title="Loss mandek",
        brief=(
            "Loss latih tetap tinggi selama beberapa epoch: langkahnya tidak ke mana-mana, "
            "terlalu panjang, terlalu pendek, atau jaringannya memang tidak mampu lebih baik."
        ),
        what="Loss pada foto latih tidak lagi turun dan mendekati loss menebak.",
        why=(
            "Ada tiga penyebab lazim. Learning rate: terlalu tinggi, loss berosilasi melintasi "
            "lembah; terlalu rendah, ia merayap. Inisialisasi: semua nol atau konstan sehingga "
            "filter tidak dapat menjadi berbeda, atau ukuran yang membuat sinyal memudar. Model: "
            "terlalu kecil untuk tugasnya (underfitting), atau dilumpuhkan regularisasi "
            "berlebihan. Label yang bukan milik fotonya tampak sama."
        ),
        recognised=(
            "Garis melalui loss latih sedikitnya lima epoch dan 200 langkah yang tidak turun 1 % "
            "per epoch, sementara loss pada gambar latih bersih di atas 0,9 ln K. Epoch saat rate"
            " hampir habis tidak dihitung. lr_too_high, lr_too_low, symmetric_init, dan "
            "dying_relu menyebut penyebabnya lebih dulu."
        ),
        helps=(
            "Uji rentang (--lr find). Rate siklik (--schedule cyclic atau onecycle): fase "
            "tingginya membawa bobot melewati titik pelana dan keluar dari daerah sempit yang "
            "buruk, tempat rate kecil akan terjebak; fase rendahnya membiarkan bobot menetap. "
            "Momentum (--momentum 0.9): ia menjumlahkan gradien masa lalu, sehingga komponen yang"
            " berganti tanda saling menghapus dan osilasi teredam, sedangkan komponen yang tetap "
            "berlipat sampai sepuluh kali langkah dan melewati dataran serta minimum kecil. "
            "--init kaiming; model lebih besar. `--one-batch` memberi tahu apakah jaringan bisa "
            "belajar sama sekali."
        ),
        helps_not=(
            "Ratusan epoch lagi dengan cara yang sama. Perubahan kecil acak pada rate. Early "
            "stopping, yang hanya mengakhiri gejalanya."
        ),
    ),
}

RULE = Rule(
    id="stagnation",
    when="live",
    check=check,
    texts=TEXTS,
    sources=(
        "Smith 2017, Cyclical Learning Rates for Training Neural Networks (WACV)",
        (
            "Sutskever, Martens, Dahl and Hinton 2013, On the importance of initialization and "
            "momentum in deep learning (ICML)"
        ),
        (
            "Dauphin et al. 2014, Identifying and attacking the saddle point problem in "
            "high-dimensional non-convex optimization (NeurIPS)"
        ),
    ),
    figures=("loss",),
)
