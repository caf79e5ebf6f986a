"""Parameters that never change, and modes that nobody set: nothing fails, and nothing is learnt."""

from train.doctor.finding import Finding, Rule, Text
from train.doctor.signals import Signals

STEPS = 20  # without any change of a bit: rounding lets tiny updates vanish for a few steps
SHARE = 0.01  # of the parameters; less is a scale or a bias that nothing depends on


def check(signals: Signals) -> Finding | None:
    for epoch in signals.epochs:
        for key, words, cure in (
            ("trained_in_eval", "steps ran in eval mode", "call model.train() before each epoch"),
            ("evaluated_in_train", "the evaluation ran in training mode", "call model.eval()"),
        ):
            if epoch.get(key):
                return Finding(
                    "problem", epoch["step"], f"{words}, dropout and norms with it", cure
                )
    if not signals.probes:
        return None
    probe, sizes = signals.probes[-1], signals.start["parameters"]
    still = {name for name, steps in probe["still"].items() if steps >= STEPS}
    if len(still) == len(sizes):
        return None  # nothing moves at all: the learning rate, not a part left out
    for names, words, cure in (
        (signals.start["frozen"], "frozen (requires_grad is False)", "set requires_grad on them"),
        (signals.start["not_optimised"], "not among the optimizer's", "hand them to the optimizer"),
        (probe["no_gradient"], "reached by no gradient", "look for detach() or an unused layer"),
    ):
        stuck = [name for name in names if name in still]
        count = sum(sizes[name] for name in stuck)
        if count > SHARE * sum(sizes.values()):
            shown = ", ".join(stuck[:3]) + (", ..." if len(stuck) > 3 else "")
            return Finding(
                "problem",
                0,
                f"{count:,} of {sum(sizes.values()):,} parameters did not change in "
                f"{min(probe['still'][name] for name in stuck)} steps: they are {words} ({shown})",
                cure,
            )
    return None


TEXTS = {
    "en": Text(
        title="A part that does not train",
        brief=(
            "Part of the network never changes, or runs in the wrong mode: nothing fails, and "
            "that part learns nothing."
        ),
        what=(
            "Parameters keep every bit over many steps while others move, or training runs in "
            "eval mode, or evaluation in training mode."
        ),
        why=(
            "A stage was frozen for another purpose; a layer was made after the optimizer and is "
            "not in its list; a detach() or an unused branch cuts the gradient; model.train() was"
            " forgotten after an evaluation."
        ),
        recognised=(
            "Parameters that are equal bit by bit over at least 20 steps, together with the "
            "reason: requires_grad is off, the optimizer does not hold them, or no gradient "
            "arrives. Exactly zero gradients alone are another illness, see dying_relu."
        ),
        helps=(
            "Set requires_grad; build the optimizer after the model is complete; remove the "
            "detach(); call train() and eval() where they belong."
        ),
        helps_not=(
            "Another learning rate or more epochs. Freezing early layers on purpose is sound only"
            " when they hold weights that were trained elsewhere."
        ),
    ),
    "id": Text(
        title="Bagian yang tidak berlatih",
        brief=(
            "Sebagian jaringan tidak pernah berubah atau berjalan dalam mode yang salah: tidak "
            "ada galat, tetapi bagian itu tidak belajar apa pun."
        ),
        what=(
            "Sejumlah parameter tetap sama sampai bit terakhir selama banyak langkah sementara "
            "yang lain bergerak, atau pelatihan berjalan dalam mode eval, atau evaluasi dalam "
            "mode latih."
        ),
        why=(
            "Satu tahap dibekukan untuk keperluan lain; sebuah lapisan dibuat setelah optimizer "
            "dan tidak masuk daftarnya; detach() atau cabang yang tak terpakai memutus gradien; "
            "model.train() lupa dipanggil setelah evaluasi."
        ),
        recognised=(
            "Parameter yang sama bit demi bit selama sedikitnya 20 langkah, beserta alasannya: "
            "requires_grad mati, optimizer tidak memuatnya, atau gradien tidak sampai. Gradien "
            "yang tepat nol saja adalah penyakit lain, lihat dying_relu."
        ),
        helps=(
            "Nyalakan requires_grad; buat optimizer setelah model lengkap; hapus detach(); "
            "panggil train() dan eval() di tempatnya."
        ),
        helps_not=(
            "Learning rate lain atau lebih banyak epoch. Membekukan lapisan awal dengan sengaja "
            "hanya masuk akal bila bobotnya sudah dilatih di tempat lain."
        ),
    ),
}

RULE = Rule(
    id="silent_bug",
    when="live",
    check=check,
    texts=TEXTS,
    sources=(
        "Jiang et al. 2025, TrainCheck: Training with Confidence (OSDI)",
        "Humbatova et al. 2020, Taxonomy of Real Faults in Deep Learning Systems (ICSE)",
    ),
)
