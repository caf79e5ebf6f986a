"""Layers that do not fit the images, and depth without shortcuts: seen from the shapes alone."""

from train.doctor.finding import Finding, Rule, Text
from train.doctor.measures import learnt
from train.doctor.signals import Signals

SMALL_MAP = 2  # pixels a side of the last feature map: below, nothing is left to look at
DEEP = 20  # convolutions without a shortcut: deeper plain networks were measured to train worse
# (He et al. 2015)
STEPS = 100  # of training without learning, which makes it more than an odd shape


def check(signals: Signals) -> Finding | None:
    convs = [layer for layer in signals.start["layers"] if layer["kind"] == "conv"]
    if not convs:
        return None
    odd, changes = [], {}
    last = convs[-1]
    height, width = last["out"][1:3]
    if min(height, width) < SMALL_MAP:
        odd.append(f"the last feature map is {height}x{width}")
        changes = {"stem": "small"}
    for layer in convs:
        if layer["padding"] is None:
            continue
        kernel, size = layer["kernel"], layer["in"][1:3]
        if any(k > s for k, s in zip(kernel, size, strict=True)):
            odd.append(
                f"{layer['name']} lays a {kernel[0]}x{kernel[1]} kernel on a map of "
                f"{size[0]}x{size[1]}"
            )
            changes = {"stem": "small"}
            break
    alone = sum(not layer["shortcut"] for layer in convs)
    if alone >= DEEP:
        odd.append(f"{alone} convolutions follow one another without a shortcut")
        model = signals.config("model", "model") or ""
        if "plain" in model:
            changes |= {"model": model.replace("plain", "resnet")}
    if not odd:
        return None
    severe = min(height, width) < SMALL_MAP or alone >= DEEP
    harm = severe and signals.steps >= STEPS and not learnt(signals)
    if harm:
        odd.append(f"and after {signals.steps} steps nothing is learnt")
    return Finding(
        "problem" if harm else "note",
        0,
        "; ".join(odd),
        "use --stem small or larger images (--image-size) where maps get too small, and a resnet "
        "where the network is deep",
        changes,
    )


TEXTS = {
    "en": Text(
        title="Shapes that do not fit",
        brief=(
            "Kernels, strides or depth do not fit the images: maps shrink to a point before the "
            "network has looked, or depth comes without shortcuts."
        ),
        what=(
            "The last feature map is smaller than 2x2, a kernel is larger than the map it slides "
            "over, or twenty and more convolutions follow one another without a shortcut."
        ),
        why=(
            "Each stride of 2 halves the map: the stem of ImageNet networks divides by 4 and the "
            "stages by 8 more, so 32 pixels end at one. A 3x3 kernel on a map of 1x1 multiplies "
            "eight of its nine weights by padding. And plain depth makes a network harder to "
            "optimise, see degradation."
        ),
        recognised=(
            "From the shapes of one forward pass; nothing is trained for it. Alone it is a note, "
            "for such networks can learn; it becomes a PROBLEM when the network learns nothing."
        ),
        helps=(
            "--stem small (3x3 with stride 1, no pooling) for images under about 64 pixels; "
            "larger images (--image-size); fewer stages; residual blocks."
        ),
        helps_not=(
            "More filters: they see as little. Enlarging tiny photos brings no detail back, "
            "though it can let the maps fit."
        ),
    ),
    "id": Text(
        title="Bentuk yang tidak cocok",
        brief=(
            "Kernel, stride, atau kedalaman tidak cocok dengan gambar: peta menyusut menjadi satu"
            " titik sebelum sempat dilihat, atau jaringan dalam tanpa shortcut."
        ),
        what=(
            "Peta fitur terakhir lebih kecil dari 2x2, ada kernel yang lebih besar daripada "
            "petanya, atau dua puluh konvolusi atau lebih berurutan tanpa shortcut."
        ),
        why=(
            "Tiap stride 2 membagi dua petanya: stem jaringan ImageNet membagi 4 dan "
            "tahap-tahapnya membagi 8 lagi, jadi 32 piksel berakhir pada satu. Kernel 3x3 pada "
            "peta 1x1 mengalikan delapan dari sembilan bobotnya dengan padding. Dan kedalaman "
            "polos membuat jaringan lebih sulit dioptimalkan, lihat degradation."
        ),
        recognised=(
            "Dari bentuk satu kali maju; tidak ada yang dilatih untuk itu. Sendirian ia hanya "
            "catatan, sebab jaringan seperti itu masih bisa belajar; ia menjadi PROBLEM bila "
            "jaringan tidak belajar apa pun."
        ),
        helps=(
            "--stem small (3x3 dengan stride 1, tanpa pooling) untuk gambar di bawah kira-kira 64"
            " piksel; gambar lebih besar (--image-size); tahap lebih sedikit; blok residual."
        ),
        helps_not=(
            "Lebih banyak filter: yang terlihat tetap sesedikit itu. Memperbesar foto mungil "
            "tidak mengembalikan rincian, meskipun petanya bisa menjadi cocok."
        ),
    ),
}

RULE = Rule(
    id="geometry",
    when="live",
    check=check,
    texts=TEXTS,
    sources=(
        "He et al. 2016, Deep Residual Learning for Image Recognition (CVPR)",
        "Richter, Byttner, Krumnack et al. 2021, (Input) Size Matters for CNN Classifiers (ICANN)",
    ),
)
