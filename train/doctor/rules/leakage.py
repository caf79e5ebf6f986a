"""Validation photos that the network has trained on."""

from train.doctor.finding import Finding, Rule, Text
from train.doctor.signals import Signals


def check(signals: Signals) -> Finding | None:
    twins, photos = signals.start["twins"], sum(signals.start["val_counts"])
    other = signals.config("data", "split") != "grouped"
    changes = {"split": "grouped", "accept_leak": False} if other else {}
    cure = (
        "--split grouped keeps all copies of a picture on one side"
        if other
        else "remove the copies from one side of the split"
    )
    if twins["identical"]:
        return Finding(
            "note" if signals.config("data", "accept_leak") else "problem",
            0,
            f"{twins['identical']} of {photos} validation photos are, byte for byte, training "
            f"photos too, and {twins['alike']} show a picture that is in train",
            cure,
            changes,
        )
    if twins["alike"]:
        return Finding(
            "note",
            0,
            f"{twins['alike']} of {photos} validation photos show a picture that is in train",
            cure,
            changes,
        )
    return None


TEXTS = {
    "en": Text(
        title="Leaked validation",
        brief=(
            "The same pictures stand in training and validation, so validation measures memory, "
            "and its accuracy is too high."
        ),
        what="Photos of the validation set, or copies of them, are training photos too.",
        why=(
            "Collections gathered from the web hold many copies: the same file twice, saved "
            "again, cropped or mirrored. A random split puts some on each side. Two data sets "
            "shuffled independently do the same to any photo."
        ),
        recognised=(
            "Equal SHA-256 of the files is a leak for certain. Pictures that look alike to a "
            "perceptual comparison are near copies; a few may be honest look-alikes, so they "
            "alone are a note."
        ),
        helps=(
            "--split grouped, the default, keeps all copies of a picture on one side. `python -m "
            "train.data.check` lists the copies, so that they can be deleted."
        ),
        helps_not=(
            "A larger validation set leaks as much. More augmentation does not help: a network "
            "that knows a photo knows its mirror image. Comparing models on a leaking split "
            "prefers the one that memorises best."
        ),
    ),
    "id": Text(
        title="Validasi bocor",
        brief=(
            "Gambar yang sama ada di data latih dan validasi, jadi validasi mengukur ingatan dan "
            "akurasinya terlalu tinggi."
        ),
        what="Foto validasi, atau salinannya, juga menjadi foto latih.",
        why=(
            "Koleksi dari web memuat banyak salinan: berkas yang sama dua kali, disimpan ulang, "
            "dipotong, atau dicerminkan. Pembagian acak menaruh sebagian di tiap sisi. Dua "
            "dataset yang diacak sendiri-sendiri berbuat sama pada foto apa pun."
        ),
        recognised=(
            "SHA-256 berkas yang sama berarti pasti bocor. Gambar yang mirip menurut perbandingan"
            " perseptual adalah salinan dekat; beberapa mungkin memang hanya mirip, maka itu saja"
            " baru menjadi catatan."
        ),
        helps=(
            "--split grouped, pilihan bawaan, menaruh semua salinan suatu gambar di satu sisi. "
            "`python -m train.data.check` mendaftar salinan-salinan itu agar dapat dihapus."
        ),
        helps_not=(
            "Set validasi yang lebih besar bocor sama banyaknya. Augmentasi lebih kuat tidak "
            "menolong: jaringan yang hafal sebuah foto juga mengenal bayangan cerminnya. "
            "Membandingkan model pada pembagian bocor memenangkan yang paling hafal."
        ),
    ),
}

RULE = Rule(
    id="leakage",
    when="live",
    check=check,
    texts=TEXTS,
    sources=(
        (
            "Barz and Denzler 2020, Do We Train on Test Data? Purging CIFAR of Near-Duplicates "
            "(J. Imaging)"
        ),
        (
            "Kapoor and Narayanan 2023, Leakage and the reproducibility crisis in "
            "machine-learning-based science (Patterns)"
        ),
    ),
)
