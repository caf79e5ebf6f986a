"""Updates so large that each throws away what the last one learnt."""

import numpy as np

from train.doctor.finding import Finding, Rule, Text
from train.doctor.measures import learnt, log_classes, recent_loss
from train.doctor.signals import Signals

RATIO = 0.1  # of a layer's weights that one step changes; 1e-3 is usual, a tenth forgets
GROWTH = 2.0  # times the weights' first norm: with a norm layer behind them, they flee outwards
AFTER = 50  # steps without learning; the same as dying_relu's, whose cause this is
RUNAWAY, SOON = 1.25, 30  # times the loss of guessing: that need not be watched for as long


def check(signals: Signals) -> Finding | None:
    probes = signals.probes
    if len(probes) < 2:
        return None
    ratios = [_median(signals, p, "update") for p in probes]
    sizes = [float(np.linalg.norm(signals.layers(p, "weight"))) for p in probes]
    growths = [size / max(sizes[0], 1e-12) for size in sizes]
    high = [
        p["step"]
        for p, ratio, growth in zip(probes, ratios, growths, strict=True)
        if ratio > RATIO or growth > GROWTH
    ]
    if not high:
        return None
    guessing = max(probes[0]["loss"] or 0.0, log_classes(signals))
    runs_away = recent_loss(signals) > RUNAWAY * guessing and signals.steps >= SOON
    harm = not learnt(signals) and (signals.steps >= AFTER or runs_away)
    evidence = (
        f"one step changed the typical layer by up to {np.nanmax([0.0, *ratios]):.1%} of its "
        f"weights, and all weights grew to {max(growths):.3g} times their norm; the loss was "
        f"{probes[0]['loss'] or np.inf:.3g} before it and is {recent_loss(signals):.3g} after "
        f"{signals.steps} steps"
    )
    return Finding(
        "problem" if harm else "note",
        high[0],
        evidence,
        "let --lr find look for a rate that lowers the loss, or lower --lr tenfold"
        if harm
        else "nothing while the loss falls; a lower --lr may fall further",
        {"lr": "find"} if harm else {},
    )


def _median(signals: Signals, probe: dict, name: str) -> float:
    values = probe["layers"][name]
    return float(np.median(signals.layers(probe, name))) if values else float("nan")


TEXTS = {
    "en": Text(
        title="Learning rate too high",
        brief=(
            "Each step moves the weights so far that it undoes the one before; the loss jumps "
            "about, or runs away, instead of falling."
        ),
        what=(
            "The updates are a large share of the weights themselves, and the loss stays at or "
            "above where it began."
        ),
        why=(
            "A gradient describes the loss only nearby. A step beyond that leaps over the valley "
            "and lands on the other side, often higher; the next leaps back. With BatchNorm the "
            "weights escape outwards instead: their norm grows until the relative step is small "
            "again, and what they had learnt is lost on the way."
        ),
        recognised=(
            "One step's change over the norm of the weights, layer by layer. About 1e-3 is usual,"
            " a tenth is destructive. Or weights of several times their first norm. It is a "
            "PROBLEM when the network meanwhile learns nothing over fifty steps."
        ),
        helps=(
            "A learning rate ten times lower; the range test (--lr find); a warm-up, as "
            "--schedule onecycle has; a bound on the gradient (--clip-grad 1)."
        ),
        helps_not=(
            "More epochs, or patience. A loss that oscillates a little is no proof: noise alone "
            "changes its sign in two of three steps. A larger model makes it worse."
        ),
    ),
    "id": Text(
        title="Learning rate terlalu tinggi",
        brief=(
            "Tiap langkah memindahkan bobot begitu jauh sehingga membatalkan langkah sebelumnya; "
            "loss melompat-lompat atau lari menjauh, bukan turun."
        ),
        what=(
            "Pembaruan merupakan bagian besar dari bobot itu sendiri, dan loss tetap di tempat "
            "mulainya atau di atasnya."
        ),
        why=(
            "Gradien menggambarkan loss hanya di dekatnya. Langkah yang lebih jauh melompati "
            "lembah dan mendarat di seberang, sering lebih tinggi; langkah berikutnya melompat "
            "kembali. Dengan BatchNorm bobot justru lari ke luar: normanya membesar sampai "
            "langkah relatifnya kecil lagi, dan yang telah dipelajari hilang di jalan."
        ),
        recognised=(
            "Perubahan satu langkah dibagi norma bobot, lapisan demi lapisan. Sekitar 1e-3 itu "
            "lazim, sepersepuluh merusak. Atau bobot yang menjadi beberapa kali norma awalnya. "
            "Disebut PROBLEM bila sementara itu jaringan tidak belajar apa pun selama lima puluh "
            "langkah."
        ),
        helps=(
            "Learning rate sepuluh kali lebih kecil; uji rentang (--lr find); pemanasan, seperti "
            "pada --schedule onecycle; batas gradien (--clip-grad 1)."
        ),
        helps_not=(
            "Lebih banyak epoch, atau kesabaran. Loss yang sedikit berosilasi bukan bukti: derau "
            "saja sudah berganti tanda pada dua dari tiga langkah. Model lebih besar "
            "memperburuknya."
        ),
    ),
}

RULE = Rule(
    id="lr_too_high",
    when="live",
    check=check,
    texts=TEXTS,
    sources=(
        "Smith 2017, Cyclical Learning Rates for Training Neural Networks (WACV)",
        "Goyal et al. 2017, Accurate, Large Minibatch SGD: Training ImageNet in 1 Hour",
        "Lewkowycz et al. 2020, The large learning rate phase of deep learning",
    ),
    figures=("loss",),
)
