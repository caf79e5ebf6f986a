"""The modifications a study can compare, each with the reasons for it; data, no code."""

# modification: {language: (why it was chosen, in two sentences; what it is)}
MODIFICATIONS = {
    "se": {
        "en": (
            "Dishes differ in colour and texture as much as in shape, and a gate for every "
            "channel lets the network weigh such cues by what the whole photo shows. It costs "
            "two small matrices a block and under one per cent more computation.",
            "Squeeze-and-excitation (Hu et al. 2018): after the second BatchNorm of a block its "
            "channels are averaged over the picture, two small layers make a factor of 0 to 1 of "
            "each, and the block's output is multiplied by it before the addition.",
        ),
        "id": (
            "Hidangan berbeda dalam warna dan tekstur sama seperti dalam bentuk, dan gerbang "
            "untuk setiap kanal membuat jaringan menimbang petunjuk itu menurut isi seluruh "
            "foto. Biayanya dua matriks kecil per blok dan komputasi kurang dari satu persen.",
            "Squeeze-and-excitation (Hu dkk. 2018): setelah BatchNorm kedua, kanal blok "
            "dirata-rata atas gambar, dua lapisan kecil menghasilkan faktor 0 sampai 1 untuk "
            "tiap kanal, dan keluaran blok dikalikan dengannya sebelum penjumlahan.",
        ),
    },
    "preact": {
        "en": (
            "Normalisation and activation move in front of the convolutions, so that nothing "
            "stands on the shortcut and the signal passes from the first block to the last "
            "unchanged. It costs nothing and tests the report's claim about the gradient's path "
            "directly.",
            "Pre-activation (He et al. 2016): a block is x + conv(relu(bn(conv(relu(bn(x)))))), "
            "and after the last block comes one more BatchNorm and ReLU.",
        ),
        "id": (
            "Normalisasi dan aktivasi dipindah ke depan konvolusi, sehingga jalur pintas bersih "
            "dan sinyal lewat dari blok pertama sampai terakhir tanpa berubah. Ini tanpa biaya "
            "dan langsung menguji klaim laporan tentang jalur gradien.",
            "Pre-activation (He dkk. 2016): sebuah blok adalah x + "
            "conv(relu(bn(conv(relu(bn(x)))))), dan setelah blok terakhir ada satu BatchNorm dan "
            "ReLU lagi.",
        ),
    },
    "norm": {
        "en": (
            "BatchNorm's statistics are noisy in small batches and differ between training and "
            "inference. Normalising within a photo makes every photo independent of its batch.",
            "GroupNorm (Wu and He 2018) or LayerNorm in place of every BatchNorm.",
        ),
        "id": (
            "Statistik BatchNorm tidak stabil pada batch kecil dan berbeda antara pelatihan dan "
            "inferensi. Normalisasi di dalam satu foto membuat setiap foto lepas dari batch-nya.",
            "GroupNorm (Wu dan He 2018) atau LayerNorm sebagai ganti setiap BatchNorm.",
        ),
    },
    "act": {
        "en": (
            "A ReLU that outputs 0 for every photo has no gradient and stays dead. Activations "
            "that pass a little below zero keep such channels learning.",
            "Another activation in place of every ReLU.",
        ),
        "id": (
            "ReLU yang keluarannya 0 untuk setiap foto tidak punya gradien dan tetap mati. "
            "Aktivasi yang meloloskan sedikit nilai negatif membuat kanal itu tetap belajar.",
            "Aktivasi lain sebagai ganti setiap ReLU.",
        ),
    },
    "dropout": {
        "en": (
            "With few photos the last layer learns them by heart. Leaving out features at random "
            "keeps it from leaning on single ones.",
            "Dropout before the fully connected layer.",
        ),
        "id": (
            "Dengan sedikit foto, lapisan terakhir menghafalnya. Menghilangkan fitur secara acak "
            "mencegahnya bersandar pada fitur tunggal.",
            "Dropout sebelum lapisan fully connected.",
        ),
    },
    "drop_path": {
        "en": (
            "Skipping blocks at random trains an ensemble of shallower networks and shortens the "
            "gradient's path. It is a regulariser made for residual networks.",
            "Stochastic depth (Huang et al. 2016): in training an image skips a block by a "
            "chance that grows with depth.",
        ),
        "id": (
            "Melewati blok secara acak melatih kumpulan jaringan yang lebih dangkal dan "
            "memendekkan jalur gradien. Ini regularisasi yang dibuat untuk jaringan residual.",
            "Stochastic depth (Huang dkk. 2016): saat pelatihan, gambar melewati blok dengan "
            "peluang yang naik menurut kedalaman.",
        ),
    },
    "stem": {
        "en": (
            "The first convolution sees every pixel and decides what is lost. Three small ones "
            "see the same area with more non-linearity.",
            "Another first layer; `deep` is the three 3x3 convolutions of ResNet-D (He et al. "
            "2019).",
        ),
        "id": (
            "Konvolusi pertama melihat setiap piksel dan menentukan apa yang hilang. Tiga "
            "konvolusi kecil melihat luas yang sama dengan non-linearitas lebih banyak.",
            "Lapisan pertama lain; `deep` adalah tiga konvolusi 3x3 dari ResNet-D (He dkk. 2019).",
        ),
    },
    "shortcut": {
        "en": (
            "A 1x1 convolution of stride 2 ignores three quarters of its input. Averaging first "
            "uses all of it at almost no cost.",
            "Average pooling before the 1x1 convolution of a shortcut (ResNet-D, He et al. 2019).",
        ),
        "id": (
            "Konvolusi 1x1 dengan stride 2 mengabaikan tiga perempat masukannya. Merata-rata "
            "lebih dulu memakai semuanya hampir tanpa biaya.",
            "Average pooling sebelum konvolusi 1x1 pada shortcut (ResNet-D, He dkk. 2019).",
        ),
    },
    "antialias": {
        "en": (
            "Leaving out pixels without a filter makes the output jump when a photo is shifted. "
            "A small blur before it keeps shifted photos alike.",
            "A fixed blur wherever the resolution is halved (Zhang 2019).",
        ),
        "id": (
            "Membuang piksel tanpa filter membuat keluaran melompat saat foto digeser. Sedikit "
            "pengaburan sebelumnya menjaga foto yang digeser tetap serupa.",
            "Pengaburan tetap di setiap tempat resolusi dibagi dua (Zhang 2019).",
        ),
    },
    "zero_init_residual": {
        "en": (
            "Blocks that begin as identities make the network shallow at first, which calms the "
            "early steps. It costs nothing.",
            "The last normalisation of each residual block starts at 0 (Goyal et al. 2017).",
        ),
        "id": (
            "Blok yang mulai sebagai identitas membuat jaringan dangkal pada awalnya, sehingga "
            "langkah awal lebih tenang. Ini tanpa biaya.",
            "Normalisasi terakhir setiap blok residual mulai dari 0 (Goyal dkk. 2017).",
        ),
    },
    "width": {
        "en": (
            "More channels give every depth more features to choose from. Computation and "
            "parameters grow with the square, so this asks what capacity alone is worth.",
            "All channel counts multiplied by a factor (Zagoruyko and Komodakis 2016).",
        ),
        "id": (
            "Lebih banyak kanal memberi setiap kedalaman lebih banyak fitur. Komputasi dan "
            "parameter naik kuadratis, jadi ini menanyakan nilai kapasitas semata.",
            "Semua jumlah kanal dikalikan satu faktor (Zagoruyko dan Komodakis 2016).",
        ),
    },
}
