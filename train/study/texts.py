"""The words of a study's report, in every language it can be written in; data, no code.

`{name}` is filled in by `train.study.wording`. Headings in Indonesian are those of the course
report.
"""

LANGUAGES = ("en", "id")

TEXTS = {
    "en": {
        "title": "{models}: a paired study",
        "subtitle": "{finished} of {total} runs on `{data}`, recipe `{recipe}`: every model with "
        "the same splits, order and budget.",
        "and": "and",
        "conclusion": "Conclusion",
        "stage1": "Stage 1: the plain network, {model}",
        "stage2": "Stage 2: the residual connection, {model}",
        "plain_against": "{first} against {second}",
        "reasons": "Why the shortcut helps: three reasons, measured",
        "stage3": "Stage 3: {model}",
        "comparison": "Comparison of all models",
        "paired": "Paired tests",
        "tradeoff": "Trade-off",
        "published": "The published numbers beside ours",
        "classes": "Classes: {model}",
        "pictures": "What the network looks at: {model}",
        "data": "The split, and what a difference is worth",
        "files": "Runs and files",
        "reproduce": "Reproduce",
        "model": "model",
        "metric": "metric",
        "mean": "mean",
        "interval": "95 % interval",
        "best_val_accuracy": "best validation accuracy",
        "best_epoch": "its epoch",
        "final_val_accuracy": "final validation accuracy",
        "final_train_accuracy": "final training accuracy",
        "final_val_loss": "final validation loss",
        "final_train_loss": "final training loss",
        "parameters": "parameters",
        "flops": "GFLOPs an image",
        "images_per_second": "images/s",
        "training_seconds": "training seconds",
        "peak_memory_bytes": "peak memory, MB",
        "run": "run",
        "state": "state",
        "device": "device",
        "finished": "finished",
        "failed": "failed: {reason}",
        "class": "class",
        "images": "photos",
        "precision": "precision",
        "recall": "recall",
        "absolute": "improvement",
        "relative": "relative",
        "to": "to",
        "points": "points",
        "curves": "Loss, accuracy and the overfitting monitor (training minus validation), the "
        "mean of {runs} runs; the ring marks the best mean validation accuracy. From "
        "`metrics.jsonl` of each run.",
        "curves_alt": "Loss, accuracy and overfitting monitor of {model} by epoch.",
        "stage_caption": "{runs} runs; t interval over runs, widened for the overlap of their "
        "training sets (Nadeau and Bengio 2003). The best epoch is chosen on the photos it is "
        "measured on, as in the report, so that figure is slightly flattered.",
        "improvement_caption": "Means over the pairs of runs that share a split; the interval is "
        "that of the paired difference.",
        "all_caption": "Means with 95 % t intervals over runs. FLOPs count a multiply-add as "
        "two; seconds are those of the training steps alone, and runs at the same time slow each "
        "other; memory is the process's or the GPU's peak.",
        "paired_caption": "Best validation accuracy, second minus first, in points. t: paired t "
        "test over runs with Nadeau and Bengio's correction, p adjusted by Holm for all rows. "
        "Photos: 95 % bootstrap over pictures, all copies of one together, for these very runs. "
        "McNemar: exact test on each split, one photo a picture; known only by the first : only "
        "by the second.",
        "first": "first",
        "second": "second",
        "difference": "difference",
        "t_interval": "t interval",
        "p_holm": "p (t, Holm)",
        "photo_interval": "photos",
        "mcnemar": "McNemar, per split",
        "verdict": "verdict",
        "cost_caption": "Accuracy against cost, with 95 % t intervals cut at the frame. The line "
        "joins the models that no other beats in both.",
        "cost_alt": "Accuracy against cost of every model.",
        "class_caption": "Pooled over {runs} runs. All intervals count different pictures, so "
        "that copies of a picture, and its predictions by several runs, count once: Wilson's for "
        "precision and recall, a bootstrap for F1 and AUC. AUC: one class against the rest, mean "
        "over runs; 0.5 is guessing. Macro F1 {macro_f1:.3f}.",
        "confusion_caption": "Validation photos of all runs together ({runs}) by true and "
        "predicted class; the colour is the share of the row.",
        "confusion_alt": "Confusion matrix of {model}.",
        "calibration_caption": "How often predictions of a confidence are right. Mean distance "
        "from the diagonal: {error}.",
        "calibration_alt": "Calibration of {model}.",
        "pictures_text": "The surest mistakes of `{run}`, then of each class the photo it is "
        "surest of and right. Beside each the class activation map: what speaks for the class it "
        "named.",
        "caption_mistake": "{file}: {label}, taken for {named} ({sure})",
        "caption_known": "{file}: {label}, known ({sure})",
        "picture_alt": "A photo of {label}.",
        "published_caption": "The published values are single runs, rounded, on a random split "
        "whose share of leaked photos is not known. The report prints 21,289,989 parameters for "
        "both networks, which is not reproducible.",
        "published_value": "published",
        "ours": "ours",
        "inside": "within our interval",
        "yes": "yes",
        "no": "no",
        "worth": "A validation set has {photos:.0f} photos of {pictures:.0f} different pictures. "
        "At {accuracy} one standard error is {error:.1f} points, so two networks judged on "
        "separate photos must differ by {apart:.0f} points before chance is ruled out; pairing "
        "them on the same photos makes the tests above sharper.",
        "leak": "{share} of the validation photos have a twin among the training photos ({kind} "
        "split), so every accuracy here is too high and rewards memory; `--split grouped` keeps "
        "twins together.",
        "no_leak": "No validation photo has a twin among the training photos ({kind} split).",
        "split_paired": "Runs of one seed have the same `split.csv`; only such runs are compared.",
        "files_text": "Every number above follows from these files: `results.csv` has a row a "
        "run; `statistics.json` has all means, intervals and tests; each folder in `runs/` has "
        "the run's `summary.json`, `metrics.jsonl`, `split.csv`, `validation.csv` (probabilities "
        "of `best.pt` for each validation photo) and `measures.json` (FLOPs, memory, gradients, "
        "blocks).",
        "why": "Why it was chosen. {words}",
        "what": "What it is. {words}",
        "how": "Implementation: `python -m train.run {flags}`.",
        "no_why": "No justification is written for {part}.",
        "analysis": "Analysis. {words}",
        "gradients": "1. Gradients have a path to the early layers. Gradient norm of the first "
        "stage over that of the last, mean over the three moments: {plain:.2f} in {first}, "
        "{residual:.2f} in {second}. {verdict}",
        "identity": "2. Learning F(x) = H(x) - x is easier. Distance of a trained block from the "
        "identity, |block(x) - x| / |x|: {plain:.2f} in {first}, {residual:.2f} in {second}. "
        "{verdict}",
        "degradation": "3. The degradation problem goes away. Final training loss, paired over "
        "seeds: {plain:.3f} for {first}, {residual:.3f} for {second}. {verdict}",
        "reason_shown": "The difference, {interval}, bears the reason out.",
        "reason_not": "The difference, {interval}, does not show it.",
        "reason_opposite": "The difference, {interval}, is the opposite of what the reason says.",
        "reason_single": "One pair of runs has no interval, so this is not shown.",
        "reason_missing": "{number}. It was not measured.",
        "log_unit": "in natural logarithms",
        "gradients_caption": "Norm of the loss's gradient in the 3x3 convolutions of each block, "
        "from input to output, on {images} fixed training images; means over runs.",
        "gradients_alt": "Gradient norm by depth.",
        "gradients_axis": "gradient norm",
        "identity_axis": "|block(x) - x| / |x|",
        "identity_caption": "Distance of each block from doing nothing, |block(x) - x| / |x|, on "
        "the same images; blocks that change the shape have none.",
        "identity_alt": "Distance of blocks from the identity.",
        "start": "at the start",
        "best": "best epoch",
        "last": "last epoch",
        "better": "better",
        "worse": "worse",
        "ahead": "ahead in these runs",
        "behind": "behind in these runs",
        "none": "no difference shown",
        "unknown": "not validated",
        "say_better": "{second} is better than {first}: {difference} points of best validation "
        "accuracy (95 % t interval {interval}; p {p}, Holm; {n} paired runs).",
        "say_worse": "{second} is worse than {first}: {difference} points of best validation "
        "accuracy (95 % t interval {interval}; p {p}, Holm; {n} paired runs).",
        "say_ahead": "{second} was ahead of {first} in these runs: {difference} points, more "
        "than the choice of photos explains (bootstrap {photos}). Whether it would be with other "
        "seeds and splits is not shown: {over}.",
        "say_behind": "{second} was behind {first} in these runs: {difference} points, more than "
        "the choice of photos explains (bootstrap {photos}). Whether it would be with other "
        "seeds and splits is not shown: {over}.",
        "say_none": "No difference shown between {second} and {first}: {difference} points "
        "({over}).",
        "say_unknown": "{second} and {first} were not validated.",
        "over_runs": "95 % t interval over {n} paired runs {interval}",
        "over_one": "a single pair of runs has no interval over seeds",
        "say_cost": "{second} takes {flops} of the FLOPs, {parameters} of the parameters and "
        "{seconds} of the training time of {first}, for {difference} points ({verdict}).",
        "say_chance": "{model} ({accuracy}) is not shown to be better than always naming the "
        "most frequent class ({chance}).",
        "say_failed": "{failed} of {total} runs failed or are not finished; the table of runs "
        "says why.",
        "say_single": "Nothing was compared: it takes two models with runs on the same splits.",
        "say_reasons": "Of the three reasons the course report gives for the shortcut, the "
        "measurements bear out: {shown}. Not shown: {missing}.",
        "short_gradients": "gradients reach the early layers better",
        "short_identity": "blocks stay near the identity",
        "short_degradation": "the training loss ends lower",
        "nothing": "none",
    },
    "id": {
        "title": "{models}: studi berpasangan",
        "subtitle": "{finished} dari {total} pelatihan pada `{data}`, resep `{recipe}`: setiap "
        "model dengan pembagian data, urutan dan anggaran yang sama.",
        "and": "dan",
        "conclusion": "Ringkasan Hasil Training dan Kesimpulan",
        "stage1": "Tahap 1: Analisis Performa Model Dasar, {model}",
        "stage2": "Tahap 2: Implementasi Residual Connection, {model}",
        "plain_against": "{first} terhadap {second}",
        "reasons": "Mengapa shortcut membantu: tiga alasan, diukur",
        "stage3": "Tahap 3: Eksperimen Modifikasi Arsitektur, {model}",
        "comparison": "Perbandingan Semua Model",
        "paired": "Uji Berpasangan",
        "tradeoff": "Analisis Trade-off",
        "published": "Angka terbitan di samping angka kami",
        "classes": "Kelas: {model}",
        "pictures": "Apa yang dilihat jaringan: {model}",
        "data": "Pembagian data, dan berapa nilai sebuah selisih",
        "files": "Pelatihan dan berkas",
        "reproduce": "Mengulang",
        "model": "model",
        "metric": "metrik",
        "mean": "rata-rata",
        "interval": "interval 95 %",
        "best_val_accuracy": "Akurasi Validasi Terbaik",
        "best_epoch": "epoch-nya",
        "final_val_accuracy": "Akurasi Validasi akhir",
        "final_train_accuracy": "Akurasi Training akhir",
        "final_val_loss": "Loss Validasi akhir",
        "final_train_loss": "Loss Training akhir",
        "parameters": "Jumlah Parameter",
        "flops": "GFLOPs per gambar",
        "images_per_second": "gambar/s",
        "training_seconds": "detik pelatihan",
        "peak_memory_bytes": "memori puncak, MB",
        "run": "pelatihan",
        "state": "keadaan",
        "device": "perangkat",
        "finished": "selesai",
        "failed": "gagal: {reason}",
        "class": "kelas",
        "images": "foto",
        "precision": "presisi",
        "recall": "recall",
        "absolute": "peningkatan",
        "relative": "relatif",
        "to": "sampai",
        "points": "poin",
        "curves": "Akurasi / Loss Training dan Validasi serta Pemantau Overfitting (training "
        "dikurangi validasi), rata-rata {runs} pelatihan; lingkaran menandai rata-rata akurasi "
        "validasi terbaik. Dari `metrics.jsonl` setiap pelatihan.",
        "curves_alt": "Loss, akurasi dan pemantau overfitting {model} per epoch.",
        "stage_caption": "{runs} pelatihan; interval t atas seed, dilebarkan karena data "
        "latihnya tumpang tindih (Nadeau dan Bengio 2003). Epoch terbaik dipilih pada foto yang "
        "sama dengan pengukurannya, seperti dalam laporan, sehingga angka itu sedikit terlalu "
        "baik.",
        "improvement_caption": "Rata-rata atas pasangan pelatihan dengan pembagian data yang "
        "sama; interval adalah milik selisih berpasangan.",
        "all_caption": "Rata-rata dengan interval t 95 % atas pelatihan. FLOPs menghitung "
        "kali-tambah sebagai dua; detik hanya untuk langkah pelatihan, dan pelatihan bersamaan "
        "saling memperlambat; memori adalah puncak proses atau GPU.",
        "paired_caption": "Akurasi validasi terbaik, kedua dikurangi pertama, dalam poin. t: uji "
        "t berpasangan atas pelatihan dengan koreksi Nadeau dan Bengio, p disesuaikan menurut "
        "Holm untuk semua baris. Foto: bootstrap 95 % atas gambar, semua salinan bersama, untuk "
        "pelatihan ini. McNemar: uji eksak tiap pembagian, satu foto per gambar; dikenal hanya "
        "oleh yang pertama : hanya oleh yang kedua.",
        "first": "pertama",
        "second": "kedua",
        "difference": "selisih",
        "t_interval": "interval t",
        "p_holm": "p (t, Holm)",
        "photo_interval": "foto",
        "mcnemar": "McNemar, per pembagian",
        "verdict": "putusan",
        "cost_caption": "Akurasi terhadap biaya, dengan interval t 95 % terpotong di bingkai. "
        "Garis menghubungkan model yang tidak dikalahkan model lain dalam keduanya.",
        "cost_alt": "Akurasi terhadap biaya setiap model.",
        "class_caption": "Digabung atas {runs} pelatihan. Semua interval menghitung gambar "
        "berbeda, sehingga salinan gambar dan ramalannya oleh beberapa pelatihan dihitung "
        "sekali: Wilson untuk presisi dan recall, bootstrap untuk F1 dan AUC. AUC: satu kelas "
        "terhadap sisanya, rata-rata atas pelatihan; 0.5 berarti menebak. Macro F1 "
        "{macro_f1:.3f}.",
        "confusion_caption": "Foto validasi semua pelatihan bersama ({runs}) menurut kelas benar "
        "dan kelas ramalan; warna adalah bagian dari baris.",
        "confusion_alt": "Matriks kebingungan {model}.",
        "calibration_caption": "Seberapa sering ramalan dengan suatu keyakinan benar. Jarak "
        "rata-rata dari diagonal: {error}.",
        "calibration_alt": "Kalibrasi {model}.",
        "pictures_text": "Kesalahan `{run}` yang paling yakin, lalu dari tiap kelas foto yang "
        "paling yakin dan benar. Di sampingnya peta aktivasi kelas: apa yang mendukung kelas "
        "yang disebut.",
        "caption_mistake": "{file}: {label}, dikira {named} ({sure})",
        "caption_known": "{file}: {label}, dikenal ({sure})",
        "picture_alt": "Foto {label}.",
        "published_caption": "Nilai terbitan berasal dari satu pelatihan, dibulatkan, pada "
        "pembagian acak yang kebocorannya tidak diketahui. Laporan mencetak 21,289,989 parameter "
        "untuk kedua jaringan, yang tidak dapat diulang.",
        "published_value": "terbitan",
        "ours": "kami",
        "inside": "di dalam interval kami",
        "yes": "ya",
        "no": "tidak",
        "worth": "Satu set validasi berisi {photos:.0f} foto dari {pictures:.0f} gambar berbeda. "
        "Pada {accuracy} satu galat baku adalah {error:.1f} poin, jadi dua jaringan yang dinilai "
        "pada foto terpisah harus berselisih {apart:.0f} poin sebelum kebetulan dapat "
        "dikesampingkan; memasangkannya pada foto yang sama membuat uji di atas lebih tajam.",
        "leak": "{share} foto validasi punya kembaran di antara foto latih (pembagian {kind}), "
        "sehingga setiap akurasi di sini terlalu tinggi dan menghargai hafalan; `--split "
        "grouped` menjaga kembaran tetap bersama.",
        "no_leak": "Tidak ada foto validasi yang punya kembaran di antara foto latih (pembagian "
        "{kind}).",
        "split_paired": "Pelatihan dengan satu seed memiliki `split.csv` yang sama; hanya itu "
        "yang dibandingkan.",
        "files_text": "Setiap angka di atas berasal dari berkas ini: `results.csv` memiliki satu "
        "baris per pelatihan; `statistics.json` memuat semua rata-rata, interval dan uji; setiap "
        "folder dalam `runs/` memuat `summary.json`, `metrics.jsonl`, `split.csv`, "
        "`validation.csv` (probabilitas `best.pt` untuk tiap foto validasi) dan `measures.json` "
        "(FLOPs, memori, gradien, blok).",
        "why": "Justifikasi Pemilihan. {words}",
        "what": "Deskripsi Arsitektur. {words}",
        "how": "Implementasi: `python -m train.run {flags}`.",
        "no_why": "Tidak ada justifikasi tertulis untuk {part}.",
        "analysis": "Analisis. {words}",
        "gradients": "1. Gradien punya jalur ke lapisan awal. Norma gradien tahap pertama dibagi "
        "tahap terakhir, rata-rata tiga saat: {plain:.2f} pada {first}, {residual:.2f} pada "
        "{second}. {verdict}",
        "identity": "2. Mempelajari F(x) = H(x) - x lebih mudah. Jarak blok terlatih dari "
        "identitas, |blok(x) - x| / |x|: {plain:.2f} pada {first}, {residual:.2f} pada {second}. "
        "{verdict}",
        "degradation": "3. Masalah degradasi hilang. Loss training akhir, berpasangan atas seed: "
        "{plain:.3f} untuk {first}, {residual:.3f} untuk {second}. {verdict}",
        "reason_shown": "Selisihnya, {interval}, mendukung alasan ini.",
        "reason_not": "Selisihnya, {interval}, tidak menunjukkannya.",
        "reason_opposite": "Selisihnya, {interval}, kebalikan dari isi alasan ini.",
        "reason_single": "Satu pasang pelatihan tidak punya interval, jadi ini tidak ditunjukkan.",
        "reason_missing": "{number}. Ini tidak diukur.",
        "log_unit": "dalam logaritma natural",
        "gradients_caption": "Norma gradien loss pada konvolusi 3x3 setiap blok, dari masukan ke "
        "keluaran, pada {images} gambar latih tetap; rata-rata atas pelatihan.",
        "gradients_alt": "Norma gradien menurut kedalaman.",
        "gradients_axis": "norma gradien",
        "identity_axis": "|blok(x) - x| / |x|",
        "identity_caption": "Jarak setiap blok dari tidak melakukan apa-apa, |blok(x) - x| / "
        "|x|, pada gambar yang sama; blok yang mengubah bentuk tidak memilikinya.",
        "identity_alt": "Jarak blok dari identitas.",
        "start": "di awal",
        "best": "epoch terbaik",
        "last": "epoch terakhir",
        "better": "lebih baik",
        "worse": "lebih buruk",
        "ahead": "unggul pada pelatihan ini",
        "behind": "tertinggal pada pelatihan ini",
        "none": "perbedaan tidak ditunjukkan",
        "unknown": "tidak divalidasi",
        "say_better": "{second} lebih baik dari {first}: {difference} poin akurasi validasi "
        "terbaik (interval t 95 % {interval}; p {p}, Holm; {n} pasang pelatihan).",
        "say_worse": "{second} lebih buruk dari {first}: {difference} poin akurasi validasi "
        "terbaik (interval t 95 % {interval}; p {p}, Holm; {n} pasang pelatihan).",
        "say_ahead": "{second} unggul atas {first} pada pelatihan ini: {difference} poin, lebih "
        "dari yang dijelaskan pilihan foto (bootstrap {photos}). Apakah juga dengan seed dan "
        "pembagian lain tidak ditunjukkan: {over}.",
        "say_behind": "{second} tertinggal dari {first} pada pelatihan ini: {difference} poin, "
        "lebih dari yang dijelaskan pilihan foto (bootstrap {photos}). Apakah juga dengan seed "
        "dan pembagian lain tidak ditunjukkan: {over}.",
        "say_none": "Perbedaan antara {second} dan {first} tidak ditunjukkan: {difference} poin "
        "({over}).",
        "say_unknown": "{second} dan {first} tidak divalidasi.",
        "over_runs": "interval t 95 % atas {n} pasang pelatihan {interval}",
        "over_one": "satu pasang pelatihan tidak punya interval atas seed",
        "say_cost": "{second} memerlukan {flops} FLOPs, {parameters} parameter dan {seconds} "
        "waktu pelatihan dari {first}, untuk {difference} poin ({verdict}).",
        "say_chance": "{model} ({accuracy}) tidak ditunjukkan lebih baik dari selalu menyebut "
        "kelas tersering ({chance}).",
        "say_failed": "{failed} dari {total} pelatihan gagal atau belum selesai; tabel pelatihan "
        "menyebut alasannya.",
        "say_single": "Tidak ada yang dibandingkan: perlu dua model dengan pelatihan pada "
        "pembagian data yang sama.",
        "say_reasons": "Dari tiga alasan laporan untuk shortcut, pengukuran mendukung: {shown}. "
        "Tidak ditunjukkan: {missing}.",
        "short_gradients": "gradien lebih sampai ke lapisan awal",
        "short_identity": "blok tetap dekat identitas",
        "short_degradation": "loss training berakhir lebih rendah",
        "nothing": "tidak ada",
    },
}
