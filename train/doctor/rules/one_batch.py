"""Whether the network can learn a handful of photos by heart: if not, something is broken."""

from train.doctor.finding import Finding, Rule, Text
from train.doctor.signals import Signals

ACCURACY = 0.95  # on 16 images after 200 steps; healthy networks reach 1


def check(signals: Signals) -> Finding | None:
    tried = signals.others.get("one_batch")
    if tried is None or tried["accuracy"] >= ACCURACY:
        return None
    return Finding(
        "problem",
        0,
        f"after {tried['steps']} steps on the same {tried['images']} images the accuracy on them "
        f"is {tried['accuracy']:.0%} and the loss {tried['loss']:.3g} (at the start "
        f"{tried['first_loss']:.3g})",
        "look for a learning rate of nearly 0, a wrong sign, labels of other images or layers "
        "that no gradient reaches",
    )


TEXTS = {
    "en": Text(
        title="Cannot learn one batch",
        brief=(
            "A sound network learns sixteen photos by heart in two hundred steps; one that cannot"
            " has a fault, not a lack of data."
        ),
        what=(
            "The network is trained on the same sixteen photos without augmentation, and still "
            "does not name them right."
        ),
        why=(
            "Networks of this size can learn even random labels by heart. When they cannot learn "
            "sixteen photos, the gradient does not reach the weights, points the wrong way, "
            "belongs to other images, or the steps are far too small or too large."
        ),
        recognised=(
            "Accuracy under 95 % on the sixteen photos after 200 steps. The doctor trains a fresh"
            " network for it: `python -m train.doctor RUN_DIR --one-batch`."
        ),
        helps=(
            "Look for a flipped sign, labels shuffled against images, frozen layers, a learning "
            "rate of nearly nothing; then try again."
        ),
        helps_not=(
            "More data, regularisation or a longer run: this test has nothing to do with "
            "generalisation."
        ),
    ),
    "id": Text(
        title="Tidak mampu menghafal satu batch",
        brief=(
            "Jaringan yang sehat menghafal enam belas foto dalam dua ratus langkah; yang tidak "
            "mampu mengandung kesalahan, bukan kekurangan data."
        ),
        what=(
            "Jaringan dilatih pada enam belas foto yang sama tanpa augmentasi, dan tetap tidak "
            "menyebutnya dengan benar."
        ),
        why=(
            "Jaringan sebesar ini mampu menghafal label acak sekalipun. Bila enam belas foto saja"
            " tidak bisa, gradien tidak sampai ke bobot, arahnya terbalik, milik gambar lain, "
            "atau langkahnya jauh terlalu kecil atau terlalu besar."
        ),
        recognised=(
            "Akurasi di bawah 95 % pada enam belas foto itu setelah 200 langkah. Dokter melatih "
            "jaringan baru untuk itu: `python -m train.doctor RUN_DIR --one-batch`."
        ),
        helps=(
            "Cari tanda yang terbalik, label yang tertukar terhadap gambar, lapisan beku, "
            "learning rate yang nyaris nol; lalu coba lagi."
        ),
        helps_not=(
            "Lebih banyak data, regularisasi, atau pelatihan lebih lama: uji ini tidak ada "
            "hubungannya dengan generalisasi."
        ),
    ),
}

RULE = Rule(
    id="one_batch",
    when="request",
    check=check,
    texts=TEXTS,
    sources=(
        "Karpathy 2019, A Recipe for Training Neural Networks (blog)",
        "Zhang et al. 2017, Understanding deep learning requires rethinking generalization (ICLR)",
    ),
)
