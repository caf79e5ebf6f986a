"""Channels that are 0 whatever the image: they receive no gradient and never come back."""

import numpy as np

from train.doctor.finding import Finding, Rule, Text
from train.doctor.measures import learnt, log_classes, run_of
from train.doctor.signals import Signals

LAYER = 0.5  # share of a layer's channels, 0 on every one of the images and at every position;
# healthy networks of which 80 % of the values are 0 have almost none
NETWORK = 0.2  # share of all channels
PROBES = 2  # in a row, and at least
STEPS = 50  # of training: a layer may need some to find its range
FALLS = 0.05  # of the loss, under which the training counts as standing still
HIGH = 0.5  # times ln K: a loss that stands still below it has nothing left to learn


def check(signals: Signals) -> Finding | None:
    if not signals.probes:
        return None
    dead = [_dead(probe) for probe in signals.probes]
    many = [worst >= LAYER or share >= NETWORK for worst, share, _ in dead]
    begin = run_of(many, PROBES)
    if begin is None:
        return None
    worst, share, name = dead[-1]
    evidence = (
        f"{share:.0%} of all channels are 0 on every one of {signals.probes[-1]['images']} images, "
        f"at most {worst:.0%} of a layer ({name})"
    )
    harm = signals.steps >= STEPS and (not learnt(signals) or _stands_still(signals))
    return Finding(
        "problem" if harm else "note",
        signals.probes[begin]["step"],
        evidence,
        "use --act leaky_relu, which lets a gradient through everywhere; lower --lr; --init kaiming"
        if harm
        else "nothing while it learns; --act leaky_relu would use those channels",
        {"act": "leaky_relu", "init": "kaiming"} if harm else {},
    )


def _dead(probe: dict) -> tuple[float, float, str]:
    """The worst layer's share of dead channels, the whole network's, and the layer's name."""
    units = {name: unit for name, unit in probe["units"].items() if "dead" in unit}
    if not units:
        return 0.0, 0.0, ""
    channels = sum(unit["channels"] for unit in units.values())
    share = sum(unit["dead"] * unit["channels"] for unit in units.values()) / channels
    name = max(units, key=lambda name: units[name]["dead"])
    return units[name]["dead"], share, name


def _stands_still(signals: Signals) -> bool:
    loss = signals.per_step("loss")
    quarter = loss.size // 4
    before, now = np.median(loss[-2 * quarter : -quarter]), np.median(loss[-quarter:])
    clean = signals.probes[-1]["clean_loss"]
    high = clean is None or clean > HIGH * log_classes(signals)
    return bool(high and now > (1 - FALLS) * before)


TEXTS = {
    "en": Text(
        title="Dying ReLU",
        brief=(
            "Channels output 0 for every image; ReLU's slope there is 0, so no gradient reaches "
            "them and they never come back."
        ),
        what=(
            "A ReLU unit is dead when its input is negative for every image and every position. "
            "It outputs 0 and the network behaves as if the unit were not there."
        ),
        why=(
            "The gradient flows back through a ReLU multiplied by 1 where the input was positive "
            "and by 0 where it was not. A dead unit multiplies by 0 everywhere: its own weights "
            "and bias get no gradient, the layers before it get none through it, and since "
            "nothing changes it stays dead. A step that is too large pushes a bias far below "
            "zero, or the initialisation begins there; with every unit that dies capacity is "
            "lost."
        ),
        recognised=(
            "Channels that are 0 on all of the doctor's training images and at all positions, "
            "with batch statistics and with running ones. Sparse is not dead: a healthy network "
            "may have 80 % zeros and hardly one dead channel. Half of a layer or a fifth of all "
            "channels is a note, and a PROBLEM when the network does not learn, or stands still."
        ),
        helps=(
            "LeakyReLU, whose slope below zero is small but not 0 (--act leaky_relu), or silu, "
            "gelu; a lower learning rate or a warm-up; --init kaiming and biases at 0; BatchNorm "
            "before the ReLU, which centres its input."
        ),
        helps_not=(
            "Tuning the learning rate after the units have died: a gradient of 0 times any rate "
            "is 0. Longer training. More dropout, which takes away from what is left."
        ),
    ),
    "id": Text(
        title="ReLU mati (dying ReLU)",
        brief=(
            "Ada kanal yang keluarannya 0 untuk setiap gambar; kemiringan ReLU di sana 0, jadi "
            "gradien tidak sampai dan kanal itu tidak pernah pulih."
        ),
        what=(
            "Unit ReLU disebut mati bila masukannya negatif untuk setiap gambar dan setiap "
            "posisi. Keluarannya 0, dan jaringan bekerja seolah-olah unit itu tidak ada."
        ),
        why=(
            "Gradien mundur melalui ReLU dikalikan 1 di tempat masukannya positif dan 0 di tempat"
            " lain. Unit mati mengalikan dengan 0 di mana-mana: bobot dan biasnya sendiri tidak "
            "menerima gradien, lapisan sebelumnya tidak menerima apa pun lewat unit itu, dan "
            "karena tidak ada yang berubah ia tetap mati. Langkah yang terlalu besar mendorong "
            "bias jauh ke bawah nol, atau inisialisasinya memang mulai di sana; setiap unit yang "
            "mati mengurangi kapasitas."
        ),
        recognised=(
            "Kanal yang bernilai 0 pada semua gambar latih milik dokter dan di semua posisi, baik"
            " dengan statistik batch maupun statistik berjalan. Jarang aktif bukan berarti mati: "
            "jaringan sehat boleh berisi 80 % nol dan hampir tanpa kanal mati. Separuh dari satu "
            "lapisan atau seperlima dari semua kanal menjadi catatan, dan menjadi PROBLEM bila "
            "jaringan tidak belajar atau berhenti maju."
        ),
        helps=(
            "LeakyReLU, yang kemiringannya di bawah nol kecil tetapi tidak 0 (--act leaky_relu), "
            "atau silu, gelu; learning rate lebih kecil atau pemanasan; --init kaiming dan bias "
            "0; BatchNorm sebelum ReLU, yang memusatkan masukannya."
        ),
        helps_not=(
            "Menyetel learning rate setelah unit mati: gradien 0 dikali rate berapa pun tetap 0. "
            "Pelatihan lebih lama. Dropout lebih besar, yang mengurangi sisa unit yang hidup."
        ),
    ),
}

RULE = Rule(
    id="dying_relu",
    when="live",
    check=check,
    texts=TEXTS,
    sources=(
        (
            "Maas, Hannun and Ng 2013, Rectifier Nonlinearities Improve Neural Network Acoustic "
            "Models (ICML workshop)"
        ),
        "Lu, Shin, Su and Karniadakis 2020, Dying ReLU and Initialization (Commun. Comput. Phys.)",
        "He et al. 2015, Delving Deep into Rectifiers (ICCV)",
    ),
    figures=("dead",),
)
