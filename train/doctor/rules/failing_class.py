"""One class that the network cannot tell from the rest, while it tells the others."""

import numpy as np

from train.doctor.finding import Finding, Rule, Text
from train.doctor.signals import Signals
from train.metrics import auc_interval, wilson

FAILS, CERTAIN = 0.65, 0.75  # area under the ROC curve, and the end of its interval
OTHERS = 0.8  # median area of the other classes: the network as a whole works
# A class that is rarely shown may be ranked well, and is never named all the same.
MISSED, CERTAINLY = 0.25, 0.5  # share of its photos named right, and the end of that interval
NAMED = 0.7  # median share of the other classes
SELDOM = 0.5  # of the median class's training photos: others that are not named may be learnt late
POSITIVES = 20  # validation photos of the class; fewer say nothing certain
EPOCHS = 3  # latest, in all of which it fails
RARE = 0.2  # of the median class's training photos
TO_ONE = 0.6  # of the class's errors that name one other class


def check(signals: Signals) -> Finding | None:
    epochs = [epoch for epoch in signals.epochs if epoch.get("auc")][-EPOCHS:]
    if len(epochs) < EPOCHS or len(signals.start["classes"]) < 3:
        return None
    found = _badly_ranked(signals, epochs) or _never_named(signals, epochs)
    if found is None:
        return None
    worst, measured, sure = found
    sure = sure and signals.start["val_counts"][worst] >= POSITIVES
    cause, cure, changes = _cause(signals, epochs[-1], worst)
    evidence = f"class {signals.start['classes'][worst]}: {measured}; {cause}"
    if not sure:
        evidence = f"inconclusive, too few photos: {evidence}"
    return Finding("problem" if sure else "note", epochs[0]["step"], evidence, cure, changes)


def _badly_ranked(signals: Signals, epochs: list[dict]) -> tuple[int, str, bool] | None:
    """A class whose photos score no higher for it than others do: its number, the evidence, and
    whether it is certain."""
    areas = np.array([epoch["auc"] for epoch in epochs], dtype=float)  # [epochs, classes]
    mean = areas.mean(axis=0)
    if np.isnan(mean).all():
        return None
    worst = int(np.nanargmin(mean))
    rest = np.delete(areas, worst, axis=1)
    if (areas[:, worst] > FAILS).any() or (np.nanmedian(rest, axis=1) < OTHERS).any():
        return None
    positives = signals.start["val_counts"][worst]
    low, high = auc_interval(areas[-1, worst], positives, epochs[-1]["val_images"] - positives)
    measured = (
        f"area under the ROC curve {areas[-1, worst]:.2f} (95 % interval {low:.2f} to {high:.2f}, "
        f"{positives} photos), median of the others {np.nanmedian(rest[-1]):.2f}"
    )
    return worst, measured, high < CERTAIN


def _never_named(signals: Signals, epochs: list[dict]) -> tuple[int, str, bool] | None:
    """A class that is seldom shown and whose photos are taken for others, which are told: as
    `_badly_ranked`."""
    counts = np.array(
        [epoch["confusion"] for epoch in epochs], dtype=float
    )  # [epochs, true, named]
    shown = counts.sum(axis=2)
    recalls = np.divide(
        counts.diagonal(axis1=1, axis2=2), shown, where=shown > 0, out=np.full(shown.shape, np.nan)
    )
    if np.isnan(recalls).all():
        return None
    worst = int(np.nanargmin(recalls.mean(axis=0)))
    rest = np.delete(recalls, worst, axis=1)
    trained = signals.start["train_counts"]
    if trained[worst] >= SELDOM * np.median(np.delete(trained, worst)):
        return None
    if not (recalls[:, worst] <= MISSED).all() or (np.nanmedian(rest, axis=1) < NAMED).any():
        return None
    positives = signals.start["val_counts"][worst]
    low, high = wilson(recalls[-1, worst] * positives, positives)
    measured = (
        f"{recalls[-1, worst]:.0%} of its {positives} validation photos are named right (95 % "
        f"interval {low:.0%} to {high:.0%}), median of the others {np.nanmedian(rest[-1]):.0%}"
    )
    return worst, measured, high < CERTAINLY


def _cause(signals: Signals, epoch: dict, worst: int) -> tuple[str, str, dict]:
    """What the record says of the reason, the cure, and what the command changes."""
    counts, classes = signals.start["train_counts"], signals.start["classes"]
    plain = signals.config("data", "augment") in ("none", "light")
    usual = float(np.median(np.delete(counts, worst)))
    errors = np.array(epoch["confusion"][worst])
    errors[worst] = 0
    named = int(errors.argmax())
    share = errors[named] / max(1, errors.sum())
    if counts[worst] < RARE * usual:
        return (
            f"it has {counts[worst]} training photos, the others {usual:.0f} (median)",
            "show its photos as often as the others (--sampler balanced), augmented, and add more: "
            "class weights alone scale the gradient of the same few photos",
            {"sampler": "balanced", **({"augment": "strong"} if plain else {})},
        )
    if share >= TO_ONE and counts[named] == max(counts) > 2 * counts[worst]:
        return (
            f"{share:.0%} of its errors name {classes[named]}, the largest class",
            "show the classes equally often (--sampler balanced), or turn to what is hard with "
            "--loss focal: then the largest does not pull the others",
            {"sampler": "balanced"},
        )
    if share >= TO_ONE:
        return (
            f"{share:.0%} of its errors name {classes[named]}",
            f"compare photos of the two classes: {classes[named]} looks like it, or labels are "
            "swapped; relabel, crop closer, or join them",
            {},
        )
    memory = _remembered(signals, worst)
    if memory is not None and memory > 0.8:
        return (
            f"its training photos are known by heart (own probability {memory:.0%})",
            "its photos are memorised, not understood: look for wrong labels, then add photos and "
            "augmentation",
            {"augment": "strong"} if plain else {"augment": "heavy"},
        )
    return (
        f"its errors are spread over {int((errors > 0).sum())} classes",
        "look at its photos for wrong labels and for what they have in common: their features do "
        "not tell the class",
        {},
    )


def _remembered(signals: Signals, label: int) -> float | None:
    """Mean probability that the probe's images of a class have for it; None without any."""
    if not signals.probes:
        return None
    labels = np.array(signals.start["probe_labels"])
    own = np.array(signals.probes[-1]["confidence"], dtype=float)[labels == label]
    return float(own.mean()) if own.size else None


TEXTS = {
    "en": Text(
        title="A failing class",
        brief=(
            "The network tells all classes but one: for that one its score is hardly better than "
            "a coin, whatever the average says."
        ),
        what="The area under one class's ROC curve stays near 0.55 while the others pass 0.85.",
        why=(
            "Extreme imbalance: a handful of photos cannot show what the class has in common. "
            "Features that do not tell it, or that another class shares, at this resolution at "
            "least. Wrong labels in that class. A model large enough to learn the few photos by "
            "heart, and to fit the majority, towards which every doubtful photo is pulled. Class "
            "weights do not help, for they only multiply the gradient of the same few photos: "
            "they bring no new information, and a network that can separate its training photos "
            "ends at nearly the same boundary whatever the weights, only with noisier steps on "
            "the way."
        ),
        recognised=(
            "The one-vs-rest area of each class on validation with its interval (Hanley and "
            "McNeil): at most 0.65 in three evaluations with the interval below 0.75, and 0.80 "
            "for the median of the others. Or, as a class that is shown less than half as often "
            "may be ranked well and never be named, the share of its photos named right: at most "
            "25 % with the interval below 50 %, and 70 % for the median of the others. With fewer "
            "than 20 photos of the class it is "
            "inconclusive. Its training photos, their probabilities, and where its errors go tell"
            " the causes apart."
        ),
        helps=(
            "Depending on the cause: more photos of it, or stronger augmentation; showing the "
            "classes equally often; the focal loss, which turns to what is hard instead of what "
            "is rare; relabelling, when its photos contradict; larger images or joining two "
            "classes that cannot be told apart; an early stop where the class is memorised. And a"
            " threshold of its own when its scores rank well."
        ),
        helps_not=(
            "Larger class weights, more epochs, a larger network. Accuracy over all classes, "
            "which hides a small one altogether."
        ),
    ),
    "id": Text(
        title="Satu kelas gagal",
        brief=(
            "Jaringan mengenali semua kelas kecuali satu: untuk kelas itu skornya nyaris sama "
            "dengan melempar koin, apa pun kata rata-ratanya."
        ),
        what=(
            "Luas di bawah kurva ROC satu kelas bertahan di sekitar 0,55 sementara kelas lain "
            "melewati 0,85."
        ),
        why=(
            "Ketimpangan ekstrem: segelintir foto tidak dapat memperlihatkan ciri bersama kelas "
            "itu. Fitur yang tidak membedakannya, atau sama dengan kelas lain, setidaknya pada "
            "resolusi ini. Label yang salah di kelas itu. Model yang cukup besar untuk menghafal "
            "foto yang sedikit itu dan mencocokkan kelas mayoritas, ke mana setiap foto meragukan"
            " tertarik. Bobot kelas tidak menolong karena hanya mengalikan gradien dari foto yang"
            " sama dan sedikit: tidak ada informasi baru, dan jaringan yang mampu memisahkan foto"
            " latihnya berakhir pada batas yang hampir sama berapa pun bobotnya, hanya dengan "
            "langkah yang lebih berisik."
        ),
        recognised=(
            "Luas satu-lawan-sisanya tiap kelas pada validasi beserta selangnya (Hanley dan "
            "McNeil): paling tinggi 0,65 pada tiga evaluasi dengan selang di bawah 0,75, dan "
            "median kelas lain 0,80. Atau, karena kelas yang tampil kurang dari separuh dapat baik "
            "peringkatnya namun tak pernah disebut, bagian fotonya yang disebut benar: paling "
            "tinggi 25 % dengan selang di bawah 50 %, dan median kelas lain 70 %. Dengan kurang "
            "dari 20 foto kelas "
            "itu, hasilnya belum dapat disimpulkan. Jumlah foto latihnya, peluangnya, dan arah "
            "kesalahannya membedakan penyebabnya."
        ),
        helps=(
            "Bergantung penyebabnya: lebih banyak foto kelas itu, atau augmentasi lebih kuat; "
            "menampilkan kelas sama sering; focal loss, yang memperhatikan yang sulit, bukan yang"
            " langka; melabeli ulang bila foto-fotonya bertentangan; gambar lebih besar, atau "
            "menggabungkan dua kelas yang tak dapat dibedakan; berhenti dini bila kelas itu "
            "dihafal. Dan ambang tersendiri bila urutan skornya baik."
        ),
        helps_not=(
            "Bobot kelas lebih besar, lebih banyak epoch, jaringan lebih besar. Akurasi seluruh "
            "kelas, yang sama sekali menyembunyikan kelas kecil."
        ),
    ),
}

RULE = Rule(
    id="failing_class",
    when="live",
    check=check,
    texts=TEXTS,
    sources=(
        "Hanley and McNeil 1982, The meaning and use of the area under a ROC curve (Radiology)",
        (
            "Byrd and Lipton 2019, What is the Effect of Importance Weighting in Deep Learning? "
            "(ICML)"
        ),
        (
            "Buda, Maki and Mazurowski 2018, A systematic study of the class imbalance problem in"
            " convolutional neural networks (Neural Networks)"
        ),
        "Lin et al. 2017, Focal Loss for Dense Object Detection (ICCV)",
    ),
    figures=("classes",),
)
