"""Filters that are all alike: they compute the same, learn the same, and stay alike."""

from train.doctor.finding import Finding, Rule, Text
from train.doctor.signals import Signals

ALIKE = 1e-8  # variance across filters over their mean square: equal but for rounding; random
# filters are near 1
AFTER = 20  # steps in which a layer that starts at zero on purpose has moved apart
SHARE = 0.5  # of the layers below the head


def check(signals: Signals) -> Finding | None:
    seen = []
    for probe in signals.probes:
        alike = signals.layers(probe, "filter_variance")[:-1] < ALIKE  # heads may start at zero
        if alike.size and alike.mean() >= SHARE:
            seen.append((probe["step"], int(alike.sum()), alike.size))
    if not seen or seen[-1][0] != signals.probes[-1]["step"]:
        return None  # never, or no longer
    step, count, layers = seen[-1]
    lasts = step - seen[0][0] >= AFTER
    evidence = f"in {count} of {layers} layers all filters are equal"
    evidence += f", still after {step} steps" if lasts else " before the first update"
    return Finding(
        "problem" if lasts else "note",
        seen[0][0],
        evidence,
        "initialise at random: --init kaiming",
        {"init": "kaiming"},
    )


TEXTS = {
    "en": Text(
        title="Symmetric initialisation",
        brief=(
            "All filters of a layer start equal, receive equal gradients and stay equal: the "
            "layer has one filter, however wide it is."
        ),
        what=(
            "The filters of a layer hold the same numbers, all zeros for example, and training "
            "does not tell them apart."
        ),
        why=(
            "Equal filters give equal outputs, so the layer behind sends them equal gradients. "
            "With zeros it is worse: the outputs are zero, and so are the gradients of the layers"
            " on both sides. Only chance can break the symmetry, and initialisation is where "
            "chance comes in."
        ),
        recognised=(
            "The variance across a layer's filters over their mean square. Random filters are "
            "near 1, equal ones at 0. A head, or the last norm of a residual block, may start at "
            "zero on purpose: it moves apart in the first steps, and the doctor waits for that."
        ),
        helps=(
            "Random weights of the right size: --init kaiming (He) for ReLU and its relatives, "
            "--init xavier (Glorot) for tanh and sigmoid."
        ),
        helps_not=(
            "A higher learning rate, momentum, more epochs or another optimizer: each moves all "
            "filters by the same step. Biases may be zero; that is harmless."
        ),
    ),
    "id": Text(
        title="Inisialisasi simetris",
        brief=(
            "Semua filter suatu lapisan mulai sama, menerima gradien sama, dan tetap sama: "
            "lapisan itu hanya punya satu filter, selebar apa pun."
        ),
        what=(
            "Filter-filter suatu lapisan berisi angka yang sama, misalnya semuanya nol, dan "
            "pelatihan tidak membedakannya."
        ),
        why=(
            "Filter yang sama menghasilkan keluaran sama, jadi lapisan sesudahnya mengirim "
            "gradien yang sama. Dengan nol lebih buruk lagi: keluarannya nol, begitu pula gradien"
            " lapisan di kedua sisinya. Hanya kebetulan yang dapat memecah simetri, dan kebetulan"
            " masuk lewat inisialisasi."
        ),
        recognised=(
            "Ragam antarfilter suatu lapisan dibagi rata-rata kuadratnya. Filter acak bernilai "
            "sekitar 1, filter sama bernilai 0. Lapisan terakhir, atau norm terakhir blok "
            "residual, boleh sengaja mulai dari nol: ia terpisah pada langkah-langkah pertama, "
            "dan dokter menunggu itu."
        ),
        helps=(
            "Bobot acak dengan ukuran tepat: --init kaiming (He) untuk ReLU dan kerabatnya, "
            "--init xavier (Glorot) untuk tanh dan sigmoid."
        ),
        helps_not=(
            "Learning rate lebih tinggi, momentum, lebih banyak epoch, atau optimizer lain: "
            "semuanya menggerakkan semua filter dengan langkah yang sama. Bias boleh nol; itu "
            "tidak berbahaya."
        ),
    ),
}

RULE = Rule(
    id="symmetric_init",
    when="live",
    check=check,
    texts=TEXTS,
    sources=(
        "Goodfellow, Bengio and Courville 2016, Deep Learning, section 8.4",
        "He et al. 2015, Delving Deep into Rectifiers (ICCV)",
        (
            "Glorot and Bengio 2010, Understanding the difficulty of training deep feedforward "
            "neural networks (AISTATS)"
        ),
    ),
)
