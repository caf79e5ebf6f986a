"""Images as they are fed: normalised, or not."""

from train.doctor.finding import Finding, Rule, Text
from train.doctor.signals import Signals

# Ranges that photos normalised with ImageNet's mean and deviation cannot leave: 0 becomes -2.1 and
# 255 becomes 2.6. A check for mean 0 and deviation 1 alone alarmed on 35 of 35 healthy networks,
# and dark or pale photos are no fault.
MEAN = 3.0
LARGE = 5.0  # deviation
SMALL = 0.02  # deviation; all images of one colour
ODD_MEAN, FAINT = 1.0, 0.1  # worth a note: far from the centre, or faint


def check(signals: Signals) -> Finding | None:
    fed = signals.start["input"]
    means, deviations = fed["mean"], fed["std"]
    spelled = (
        f"channel means {', '.join(map(_short, means))}, "
        f"deviations {', '.join(map(_short, deviations))} over {_count(signals)} training images"
    )
    if not fed["finite"]:
        return Finding(
            "problem",
            0,
            f"some pixels that the network is fed are not finite ({spelled})",
            "find and repair the images that hold such pixels",
        )
    if max(map(abs, means)) > MEAN or max(deviations) > LARGE or min(deviations) < SMALL:
        return Finding(
            "problem",
            0,
            spelled,
            "feed pixels in 0..1, less the mean and over the deviation of the training images",
        )
    if max(map(abs, means)) > ODD_MEAN or min(deviations) < FAINT:
        return Finding(
            "note",
            0,
            spelled,
            "nothing, if the photos are that dark, pale or faint; else check the normalisation",
        )
    return None


def _short(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.3g}"


def _count(signals: Signals) -> int:
    return len(signals.start["probe_labels"])


TEXTS = {
    "en": Text(
        title="Input out of range",
        brief=(
            "The images are not normalised as the network expects, so its first layer works far "
            "from where it was initialised to work."
        ),
        what=(
            "The pixels that reach the first layer are far from mean 0 and deviation 1, hardly "
            "differ from one another, or are not finite."
        ),
        why=(
            "Initialisations assume inputs of about unit variance. Pixels of 0 to 255 make the "
            "first activations a hundred times too large, and so the gradient of the first layer;"
            " normalising twice makes them all but constant."
        ),
        recognised=(
            "Mean and deviation of each colour channel over the training images that the doctor "
            "keeps. Photos normalised with ImageNet's numbers cannot leave -2.2 to 2.7, dark or "
            "pale ones included."
        ),
        helps=(
            "Pixels as shares of 1, less the mean and over the deviation of the training images; "
            "the same numbers for validation and for use."
        ),
        helps_not=(
            "A BatchNorm behind the first layer hides the scale but not pixels that are constant "
            "or not finite. A range check alone says little: healthy networks are fed many "
            "ranges."
        ),
    ),
    "id": Text(
        title="Masukan di luar rentang",
        brief=(
            "Gambar tidak dinormalisasi seperti yang diharapkan jaringan, sehingga lapisan "
            "pertamanya bekerja jauh dari titik inisialisasinya."
        ),
        what=(
            "Piksel yang sampai ke lapisan pertama jauh dari rata-rata 0 dan simpangan baku 1, "
            "hampir tidak berbeda satu sama lain, atau bukan bilangan hingga."
        ),
        why=(
            "Inisialisasi menganggap ragam masukan kira-kira satu. Piksel 0 sampai 255 membuat "
            "aktivasi pertama seratus kali terlalu besar, begitu juga gradien lapisan pertama; "
            "normalisasi dua kali membuatnya nyaris konstan."
        ),
        recognised=(
            "Rata-rata dan simpangan baku tiap kanal warna pada gambar latih yang disimpan "
            "dokter. Foto yang dinormalisasi dengan angka ImageNet tidak dapat keluar dari -2,2 "
            "sampai 2,7, termasuk foto yang gelap atau pucat."
        ),
        helps=(
            "Piksel sebagai bagian dari 1, dikurangi rata-rata dan dibagi simpangan baku gambar "
            "latih; angka yang sama untuk validasi dan pemakaian."
        ),
        helps_not=(
            "BatchNorm di belakang lapisan pertama menyembunyikan skala, tetapi tidak menolong "
            "piksel yang konstan atau bukan bilangan. Pemeriksaan rentang saja tidak banyak "
            "berarti: jaringan sehat menerima bermacam rentang."
        ),
    ),
}

RULE = Rule(
    id="input",
    when="live",
    check=check,
    texts=TEXTS,
    sources=(
        "LeCun, Bottou, Orr and Müller 1998, Efficient BackProp",
        "Schoop, Huang and Hartmann 2021, UMLAUT: Debugging Deep Learning Programs (CHI)",
    ),
)
