"""Gradients that shrink from layer to layer on their way back: early layers do not learn."""

import numpy as np

from train.doctor.finding import Finding, Rule, Text
from train.doctor.measures import learnt, run_of, share_error, train_accuracy
from train.doctor.signals import Signals

# The median of gradient norm over weight norm in the first quarter of the layers, over that in the
# last: between 0.1 and 10 in networks with normalisation or shortcuts.
VANISHED, FAINT = 1e-3, 1e-2
FADED = 1e-4  # deviation of the last quarter's outputs over the first's: nothing arrives forward
DEAD = 0.5  # of a layer's channels
LAYERS = 8  # in fewer, quarters mean nothing
PROBES = 2  # in a row, and at least
STEPS = 100  # of training in which a network shows whether it learns
GAP = 0.1  # of training over validation accuracy: it memorises on top of layers that do not learn


def check(signals: Signals) -> Finding | None:
    if len(signals.start["layers"]) < LAYERS or not signals.probes:
        return None
    ratios, outputs = zip(*[_depth(signals, probe) for probe in signals.probes], strict=True)
    passes = [_passes(probe) for probe in signals.probes]
    gone = [
        open_ and (r < VANISHED or o < FADED)
        for open_, r, o in zip(passes, ratios, outputs, strict=True)
    ]
    begin = run_of(gone, PROBES)
    if begin is None:
        begin = run_of([p and r < FAINT for p, r in zip(passes, ratios, strict=True)], PROBES)
        if begin is None:
            return None
        severity = "note"
    else:
        severity = "problem" if _harm(signals) else "note"
    evidence = (
        f"the first quarter of the {len(signals.start['layers'])} layers receives "
        f"{ratios[-1]:.1e} times the relative gradient of the last (median), and the last "
        f"quarter's outputs vary {outputs[-1]:.1e} times as much as the first's"
    )
    plain = signals.config("model", "model") or ""
    residual = plain.replace("plain", "resnet", 1)
    return Finding(
        severity,
        signals.probes[begin]["step"],
        evidence,
        "add shortcuts (a resnet model) and normalisation; ReLU or LeakyReLU instead of sigmoid "
        "or tanh; --init kaiming",
        {"model": residual, "init": "kaiming"} if residual != plain else {"init": "kaiming"},
    )


def _passes(probe: dict) -> bool:
    """Whether no layer is dead: behind one that is, there is no gradient, for another reason."""
    return all(unit.get("dead", 0.0) < DEAD for unit in probe["units"].values())


def _depth(signals: Signals, probe: dict) -> tuple[float, float]:
    """The first quarter's relative gradient over the last's, and the last's output over the first's
    (medians)."""
    gradient = signals.layers(probe, "gradient") / signals.layers(probe, "weight").clip(1e-12)
    output = signals.layers(probe, "output")
    quarter = len(gradient) // 4
    ends = [(np.median(v[:quarter]), np.median(v[-quarter:])) for v in (gradient, output)]
    (first, last), (shallow, deep) = ends
    # where the last layers have no gradient either, none was lost on the way
    return float(first / last) if last > 0 else 1.0, float(deep / max(shallow, 1e-30))


def _harm(signals: Signals) -> bool:
    if signals.steps < STEPS:
        return False
    if not learnt(signals):
        return True
    if not signals.epochs or signals.epochs[-1].get("val_accuracy") is None:
        return False
    accuracy, images = train_accuracy(signals, signals.epochs[-1])
    val, val_images = signals.epochs[-1]["val_accuracy"], signals.epochs[-1]["val_images"]
    error = np.hypot(share_error(accuracy, images), share_error(val, val_images))
    return accuracy - val > max(GAP, 3 * error)


TEXTS = {
    "en": Text(
        title="Vanishing gradients",
        brief=(
            "The gradient shrinks from layer to layer on its way back, so the early layers keep "
            "their random filters and only the last ones learn."
        ),
        what=(
            "The first layers receive a gradient thousands of times smaller than the last ones, "
            "measured against their weights. Training accuracy can still reach 98 %: the last "
            "layers learn the training photos by heart on top of random features, and validation "
            "stays behind, at 62 % say."
        ),
        why=(
            "Each layer multiplies the gradient by its weights and by the slope of its "
            "activation. The sigmoid's slope is at most 0.25, tanh's falls to 0 where it "
            "saturates; thirty such factors leave nothing. Weights that are too small do the "
            "same. BatchNorm and shortcuts keep the factors near 1, so a deep plain network WITH "
            "BatchNorm that trains badly suffers from something else, see degradation."
        ),
        recognised=(
            "The median of gradient norm over weight norm in the first quarter of the layers, "
            "over that of the last quarter: under 1e-2 a note, under 1e-3 with no learning or a "
            "wide gap between training and validation a PROBLEM. Or outputs that fade on their "
            "way forward."
        ),
        helps=(
            "ReLU or LeakyReLU, whose slope is 1 (--act leaky_relu); He initialisation for them, "
            "Glorot's for tanh (--init kaiming, xavier); residual blocks, which give the gradient"
            " a path without factors (--model resnet34); normalisation. BatchNorm can in turn "
            "worsen generalisation: with small batches its statistics are noise, and used "
            "everywhere it adds noise on top of other regularisation; then Group or Layer "
            "Normalization, or Dropout, are the alternatives (see bn_small_batch)."
        ),
        helps_not=(
            "More epochs or a higher learning rate for all layers: what is right for the last "
            "layers is thousands of times too small for the first. More data; a larger head."
        ),
    ),
    "id": Text(
        title="Gradien menghilang",
        brief=(
            "Gradien menyusut dari lapisan ke lapisan saat mundur, sehingga lapisan awal tetap "
            "memakai filter acaknya dan hanya lapisan akhir yang belajar."
        ),
        what=(
            "Lapisan-lapisan pertama menerima gradien ribuan kali lebih kecil daripada yang "
            "terakhir, diukur terhadap bobotnya. Akurasi latih tetap dapat mencapai 98 %: lapisan"
            " akhir menghafal foto latih di atas fitur acak, dan validasi tertinggal, misalnya di"
            " 62 %."
        ),
        why=(
            "Tiap lapisan mengalikan gradien dengan bobotnya dan dengan kemiringan aktivasinya. "
            "Kemiringan sigmoid paling besar 0,25, kemiringan tanh mendekati 0 saat jenuh; tiga "
            "puluh faktor seperti itu tidak menyisakan apa-apa. Bobot yang terlalu kecil "
            "berakibat sama. BatchNorm dan shortcut menjaga faktor itu di sekitar 1, jadi "
            "jaringan polos dalam yang MEMAKAI BatchNorm tetapi buruk dilatih menderita hal lain,"
            " lihat degradation."
        ),
        recognised=(
            "Median norma gradien dibagi norma bobot pada seperempat lapisan pertama, dibagi "
            "dengan nilai seperempat terakhir: di bawah 1e-2 menjadi catatan, di bawah 1e-3 tanpa"
            " kemajuan belajar atau dengan jarak lebar antara latih dan validasi menjadi PROBLEM."
            " Atau keluaran yang memudar saat maju."
        ),
        helps=(
            "ReLU atau LeakyReLU, yang kemiringannya 1 (--act leaky_relu); inisialisasi He untuk "
            "keduanya, Glorot untuk tanh (--init kaiming, xavier); blok residual, yang memberi "
            "gradien jalan tanpa faktor (--model resnet34); normalisasi. BatchNorm sendiri dapat "
            "memperburuk generalisasi: pada batch kecil statistiknya hanya derau, dan bila "
            "dipakai berlebihan ia menambah derau di atas regularisasi lain; penggantinya Group "
            "atau Layer Normalization, atau Dropout (lihat bn_small_batch)."
        ),
        helps_not=(
            "Lebih banyak epoch atau learning rate lebih tinggi untuk semua lapisan: yang pas "
            "bagi lapisan akhir ribuan kali terlalu kecil bagi lapisan awal. Lebih banyak data; "
            "kepala yang lebih besar."
        ),
    ),
}

RULE = Rule(
    id="vanishing_gradient",
    when="live",
    check=check,
    texts=TEXTS,
    sources=(
        (
            "Bengio, Simard and Frasconi 1994, Learning long-term dependencies with gradient "
            "descent is difficult (IEEE TNN)"
        ),
        (
            "Glorot and Bengio 2010, Understanding the difficulty of training deep feedforward "
            "neural networks (AISTATS)"
        ),
        "He et al. 2015, Delving Deep into Rectifiers (ICCV)",
        "Ioffe and Szegedy 2015, Batch Normalization (ICML)",
        "He et al. 2016, Deep Residual Learning for Image Recognition (CVPR)",
    ),
    figures=("depth",),
)
