"""Choosing by measurement, with times from a script: who may win, what is remembered, and what
happens when files, folders, candidates or other processes misbehave."""

import io
import json
import os
import shutil
import subprocess
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kernels import select, timing
from kernels.choices import Choice, Key, Rival, decide, key_for, source_hash
from kernels.select import Job, choose, main
from kernels.store import SHIPPED, Store, user_store

ROOT = Path(__file__).resolve().parents[1]
KEY = Key("conv [8, 4]", "float32", "GPU A", 132, "580.1", "2.11", "3.6", "91900", "abc")
SLOW, FAST = Rival(100.0, 99.0, 101.0), Rival(80.0, 79.5, 80.5)


def job(candidates=None, key=KEY, **changes) -> Job:
    """y = 2x, by candidates that are right unless a test says otherwise."""
    inputs = [torch.randn(8, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    truth = inputs[0].double() * 2

    def check(name, y):
        wrong = not torch.allclose(y.double(), truth, rtol=1e-6, equal_nan=False)
        return f"{name} is wrong" if wrong else None

    settings = {
        "key": key,
        "candidates": candidates or {"cudnn": lambda x: x * 2, "ours": lambda x: x + x},
        "baseline": "cudnn",
        "make_inputs": lambda i: inputs[i].clone(),
        "check": check,
    }
    return Job(**{**settings, **changes})


class Script:
    """A timer that gives the times it was told, and counts how often it was asked."""

    def __init__(self, **rivals: Rival):
        self.rivals, self.asked = rivals, []

    def __call__(self, calls, device):
        self.asked.append(list(calls))
        return {name: self.rivals[name] for name in calls}


def choose_one(one: Job, timer, store: Store, **options) -> Choice:
    (choice,) = choose([one], timer=timer, store=store, **options)
    return choice


@pytest.fixture
def store(tmp_path) -> Store:
    return fresh(tmp_path)


def fresh(tmp_path: Path) -> Store:
    """What another process would see."""
    return Store(tmp_path / "cache", tmp_path / "selected")


def never(calls, device):
    raise AssertionError("nothing may be measured here")


# The rule


@pytest.mark.parametrize(
    ("rivals", "winner"),
    [
        ({"cudnn": SLOW, "ours": FAST}, "ours"),
        ({"cudnn": SLOW, "ours": SLOW}, "cudnn"),  # a tie
        ({"ours": SLOW, "cudnn": SLOW}, "cudnn"),  # whatever the order
        ({"cudnn": SLOW, "ours": Rival(96.0, 95.5, 96.5)}, "cudnn"),  # twice the spread exactly
        ({"cudnn": SLOW, "ours": Rival(95.9, 95.5, 96.5)}, "ours"),
        ({"cudnn": SLOW, "ours": Rival(80.0, 70.0, 90.0)}, "cudnn"),  # noise of the rival
        ({"cudnn": Rival(100.0, 90.0, 101.0), "ours": FAST}, "cudnn"),  # noise of the baseline
        ({"cudnn": SLOW, "b": FAST, "a": FAST}, "b"),  # of equals the first
        ({"cudnn": SLOW, "a": FAST, "b": Rival(79.0, 78.5, 79.5)}, "b"),
        ({"cudnn": SLOW, "a": Rival(10.0, 1.0, 90.0), "b": FAST}, "b"),
        ({"cudnn": SLOW, "a": Rival(refused="wrong"), "b": FAST}, "b"),
        ({"cudnn": Rival(refused="wrong"), "ours": SLOW}, "ours"),
    ],
)
def test_the_fastest_wins_if_clearly_faster_than_the_baseline(rivals, winner):
    assert decide(rivals, "cudnn")[0] == winner


def test_the_speed_up_is_that_of_the_medians(store):
    choice = choose_one(job(), Script(cudnn=SLOW, ours=FAST), store)
    assert (choice.winner, choice.reason) == ("ours", "1.25x faster than cudnn")
    assert choice.speedup("ours") == pytest.approx(100 / 80)
    assert choice.rivals == {"cudnn": SLOW, "ours": FAST}


# Candidates that must not win


def raises(x):
    raise RuntimeError("no such tile\nand a second line")


def runs_out(x):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")


def reads_what_nobody_wrote(x):
    """Right whatever lies in fresh memory, but for NaN."""
    return 2 * x + torch.where(torch.empty_like(x).isnan(), torch.nan, 0.0)


def in_place(x):
    return x.mul_(2)


@pytest.mark.parametrize(
    ("run", "refusal"),
    [
        (lambda x: x * 2.01, "ours is wrong"),
        (lambda x: x * float("nan"), "ours is wrong"),
        (raises, "RuntimeError: no such tile"),
        (runs_out, "out of memory"),
        (reads_what_nobody_wrote, "ours is wrong"),
        (lambda x: (x * 2)[:3], "RuntimeError: The size of tensor a (3)"),  # raised by the check
    ],
)
def test_a_wrong_or_failing_candidate_is_refused_though_fastest(store, run, refusal):
    timer = Script(cudnn=SLOW, ours=FAST)
    choice = choose_one(job({"cudnn": lambda x: x * 2, "ours": run}), timer, store)
    assert choice.winner == "cudnn"
    assert choice.rivals["ours"].refused.startswith(refusal)
    assert "\n" not in choice.rivals["ours"].refused
    assert timer.asked == [["cudnn"]]


def test_a_candidate_that_writes_into_its_inputs_spoils_nothing_for_the_next(store):
    one = job({"ours": in_place, "cudnn": lambda x: x * 2})
    choice = choose_one(one, Script(cudnn=SLOW, ours=FAST), store)
    assert choice.rivals == {"ours": FAST, "cudnn": SLOW}


def test_the_poison_is_gone_afterwards(store):
    choose_one(job({"cudnn": lambda x: x * 2, "ours": raises}), Script(cudnn=SLOW), store)
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_refusal_by_the_timer_counts(store):
    timer = Script(cudnn=SLOW, ours=Rival(refused="RuntimeError: cannot be captured"))
    choice = choose_one(job(), timer, store)
    assert (choice.winner, choice.rivals["ours"].refused) == ("cudnn", timer.rivals["ours"].refused)


def test_all_refused_is_the_baseline_with_every_reason_and_not_remembered(store, tmp_path):
    one = job({"cudnn": raises, "ours": lambda x: x})
    choice = choose_one(one, never, store)
    assert (choice.winner, choice.reason) == ("cudnn", "every candidate was refused")
    assert [rival.refused for rival in choice.rivals.values()] == [
        "RuntimeError: no such tile",
        "ours is wrong",
    ]
    assert choose_one(one, never, store) == choice  # this process asks once
    assert fresh(tmp_path).find(KEY) is None


def test_running_out_of_memory_is_tried_again_in_the_next_process(store, tmp_path):
    one = job({"cudnn": lambda x: x * 2, "ours": runs_out})
    assert choose_one(one, Script(cudnn=SLOW), store).winner == "cudnn"
    assert choose_one(job(), Script(cudnn=SLOW, ours=FAST), fresh(tmp_path)).winner == "ours"


def test_running_out_of_memory_while_timing_is_a_refusal(store):
    def timer(calls, device):
        raise torch.OutOfMemoryError("CUDA out of memory")

    choice = choose_one(job(), timer, store)
    assert choice.winner == "cudnn"
    assert {rival.refused for rival in choice.rivals.values()} == {"out of memory"}


def test_jobs_that_cannot_be_are_refused_by_name():
    with pytest.raises(ValueError, match=r"conv \[8, 4\]: the baseline none .* cudnn, ours"):
        job(baseline="none")
    with pytest.raises(ValueError, match="make_inputs gives no tensors"):
        choose(
            [
                job(
                    make_inputs=lambda i: object(),
                    check=lambda n, y: None,
                    candidates={"cudnn": lambda x: x},
                )
            ],
            timer=never,
            store=Store(Path("/none")),
        )


def test_measuring_leaves_the_random_state_alone(store):
    torch.manual_seed(7)
    expected = torch.randn(3)
    torch.manual_seed(7)
    one = job(make_inputs=lambda i: torch.randn(8), check=lambda name, y: None)
    choose_one(one, Script(cudnn=SLOW, ours=FAST), store)
    assert torch.equal(torch.randn(3), expected)


# Timing


def test_the_real_timer_finds_the_faster_of_two_and_refuses_what_raises():
    def pause(seconds):
        return [lambda: time.sleep(seconds)] * 2

    found = select.graph_timer(
        {"slow": pause(0.004), "fast": pause(0.001), "broken": [lambda: raises(None)]},
        torch.device("cpu"),
    )
    assert 4000 <= found["slow"].low_us <= found["slow"].median_us <= found["slow"].high_us
    assert 1000 <= found["fast"].median_us < 4000
    assert found["broken"].refused == "RuntimeError: no such tile"


def test_candidates_are_timed_on_rotating_inputs(store):
    seen = []

    def timer(calls, device):
        for of_name in calls.values():
            seen.append([call().tolist() for call in of_name])
        return {"cudnn": SLOW, "ours": FAST}

    one = job()
    choose_one(one, timer, store)
    expected = [(2 * one.make_inputs(i)).tolist() for i in range(2)]
    assert seen == [expected, expected]


@pytest.mark.gpu
def test_on_a_gpu_the_work_is_captured_and_what_cannot_be_is_refused(store):
    x = torch.randn(1 << 20, device="cuda")

    def synchronises(x):
        return x * (2 if x.sum().item() > -1e9 else 3)

    one = Job(
        key=key_for("double [1048576]", torch.float32, x.device),
        candidates={
            "twice": lambda x: x * 2 + x - x,
            "once": lambda x: x * 2,
            "sync": synchronises,
        },
        baseline="twice",
        make_inputs=lambda i: x.clone(),
        check=lambda name, y: None if torch.allclose(y, x * 2, atol=1e-5) else "wrong",
    )
    choice = choose([one], store=store)[0]
    assert choice.winner == "once"
    assert choice.rivals["sync"].refused is not None


# What is remembered


def test_a_second_process_measures_nothing(store, tmp_path, capsys):
    first = choose_one(job(), Script(cudnn=SLOW, ours=FAST), store)
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"measuring plans for GPU A, to be remembered in {store.path}"
    assert choose_one(job(), never, fresh(tmp_path)) == first
    assert capsys.readouterr().err == ""
    another = job(key=replace(KEY, what="another"))
    choose_one(another, Script(cudnn=SLOW, ours=FAST), store)
    assert capsys.readouterr().err == ""  # it was said


def test_progress_shows_after_two_seconds(store, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    pauses = iter((2.1, 0.3, 0.0))

    def timer(calls, device):
        time.sleep(next(pauses))
        return {"cudnn": SLOW, "ours": FAST}

    monkeypatch.setattr(sys, "stderr", Terminal())
    jobs = [job(key=replace(KEY, what=what)) for what in "abc"]
    choose(jobs, timer=timer, store=store)
    assert "\rmeasuring plans: 1 of 3, about 4 s left" in sys.stderr.getvalue()
    assert "measuring plans: 0 of" not in sys.stderr.getvalue()


def test_two_jobs_with_one_key_are_measured_once(store):
    timer = Script(cudnn=SLOW, ours=FAST)
    choices = choose([job(), job()], timer=timer, store=store)
    assert len(timer.asked) == 1
    assert choices[0] == choices[1]


def test_each_choice_is_kept_as_soon_as_it_is_made(store, tmp_path):
    class Stop(BaseException):
        pass

    def timer(calls, device):
        if fresh(tmp_path).find(KEY):
            raise Stop
        return {"cudnn": SLOW, "ours": FAST}

    with pytest.raises(Stop):
        choose([job(), job(key=replace(KEY, what="another"))], timer=timer, store=store)
    assert fresh(tmp_path).find(KEY).winner == "ours"


@pytest.mark.parametrize(
    "field",
    ["what", "dtype", "gpu", "driver", "torch", "triton", "cudnn", "source"],
    ids="other_{}".format,  # an id that is "gpu" would be taken for the mark
)
def test_any_change_of_the_key_measures_anew(store, tmp_path, field):
    choose_one(job(), Script(cudnn=SLOW, ours=FAST), store)
    changed = job(key=replace(KEY, **{field: "other"}))
    timer = Script(cudnn=SLOW, ours=SLOW)
    assert choose_one(changed, timer, fresh(tmp_path)).winner == "cudnn"
    assert choose_one(job(), never, fresh(tmp_path)).winner == "ours"  # the old one is still there


def test_other_candidates_under_the_same_key_are_measured_anew(store):
    choose_one(job(), Script(cudnn=SLOW, ours=FAST), store)
    more = {**job().candidates, "prologue": lambda x: 2 * x}
    timer = Script(cudnn=SLOW, ours=FAST, prologue=Rival(50.0, 50.0, 50.0))
    assert choose_one(job(more), timer, store).winner == "prologue"


def test_the_key_names_this_machine_and_the_sources(tmp_path, monkeypatch):
    extra = tmp_path / "plans.py"
    extra.write_text("A = 1\n")
    device = torch.device("cpu")
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)  # a training leaves it on
    key = key_for("conv", torch.bfloat16, device)
    assert (key.what, key.dtype, key.torch) == ("conv", "bfloat16", torch.__version__)
    assert key.gpu == timing.place(device)["device"]
    assert key_for("conv", torch.bfloat16, device) == key
    assert key_for("conv", torch.bfloat16, device, (extra,)).source != key.source
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    assert key_for("conv", torch.bfloat16, device).cudnn != key.cudnn


def test_the_source_hash_sees_contents_and_names(tmp_path):
    files = (tmp_path / "a.py", tmp_path / "b.py")
    for path in files:
        path.write_text("x = 1\n")
    hashes = {source_hash(files)}
    files[1].write_text("x = 2\n")
    source_hash.cache_clear()
    hashes.add(source_hash(files))
    hashes.add(source_hash((files[0], files[1].rename(tmp_path / "c.py"))))
    assert len(hashes) == 3


# Damage


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "damaged"),
        (b'{"format": 1, "choices": [', "damaged"),
        (b"\xff\xfe\x00", "damaged"),
        (b"[]", "its format is None, not 1"),
        (b'{"format": 99, "choices": []}', "its format is 99, not 1"),
        (b'{"format": 1}', "malformed"),
        (b'{"format": 1, "choices": [{"key": {}}]}', "malformed"),
        (b'{"format": 1, "choices": [7]}', "malformed"),
        (b'{"format": 1, "choices": {"a": 1}}', "malformed"),
        ("drop winner", "malformed"),
        ("no times", "malformed"),
    ],
)
def test_a_file_that_cannot_be_used_is_set_aside_and_measured_anew(
    store, tmp_path, content, reason
):
    choose_one(job(), Script(cudnn=SLOW, ours=FAST), store)
    if isinstance(content, str):
        document = json.loads(store.path.read_text())
        rivals = document["choices"][0]["rivals"]
        if content == "drop winner":
            del rivals["ours"]
        else:
            rivals["ours"]["low_us"] = None
        del document["crc32"]  # or that would be what is wrong with it
        content = json.dumps(document).encode()
    store.path.write_bytes(content)
    timer = Script(cudnn=SLOW, ours=FAST)
    with pytest.warns(UserWarning, match=f"plans.json is not used: .*{reason}.*unusable") as caught:
        assert choose_one(job(), timer, fresh(tmp_path)).winner == "ours"
    assert len(caught) == 1
    assert "\n" not in str(caught[0].message)
    assert len(timer.asked) == 1
    assert store.path.with_suffix(".json.unusable").read_bytes() == content
    assert choose_one(job(), never, fresh(tmp_path)).winner == "ours"


def test_a_folder_that_cannot_be_written_costs_a_warning_and_nothing_else(tmp_path):
    (tmp_path / "cache").write_text("a file, not a folder")
    store, timer = fresh(tmp_path), Script(cudnn=SLOW, ours=FAST)
    jobs = [job(), job(key=replace(KEY, what="another"))]
    with pytest.warns(UserWarning, match=r"cannot be written .*LAPIS_CACHE") as caught:
        choices = choose(jobs, timer=timer, store=store)
    assert len(caught) == 1
    assert [choice.winner for choice in choices] == ["ours", "ours"]
    assert choose(jobs, timer=never, store=store) == choices
    assert (tmp_path / "cache").read_text() == "a file, not a folder"


def test_a_disk_that_fills_up_leaves_the_old_file_whole(store, tmp_path, monkeypatch):
    choose_one(job(), Script(cudnn=SLOW, ours=FAST), store)

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    another = job(key=replace(KEY, what="another"))
    with pytest.warns(UserWarning, match="No space left"):
        choose_one(another, Script(cudnn=SLOW, ours=FAST), fresh(tmp_path))
    assert choose_one(job(), never, fresh(tmp_path)).winner == "ours"
    assert sorted(path.name for path in store.path.parent.iterdir()) == ["plans.json", "plans.lock"]


def test_only_the_newest_choices_are_kept(store, tmp_path, monkeypatch):
    monkeypatch.setattr("kernels.store.MOST_CHOICES", 2)
    for what in ("a", "b", "a", "c"):
        store.add(
            Choice(replace(KEY, what=what), "ours", "cudnn", {"cudnn": SLOW, "ours": FAST}, "")
        )
    assert [key.what for key in fresh(tmp_path).read()] == ["a", "c"]


WRITER = """
import sys, time
from pathlib import Path
from kernels.choices import Choice, Key, Rival
from kernels.store import Store
folder, name = Path(sys.argv[1]), sys.argv[2]
(folder / name).touch()
while len(list(folder.glob("ready*"))) < 2:
    time.sleep(0.001)
store = Store(folder / "cache", folder)
for i in range(30):
    key = Key(f"{name} {i}", "float32", "GPU A", 132, "580.1", "2.11", "3.6", "91900", "abc")
    store.add(Choice(key, "cudnn", "cudnn", {"cudnn": Rival(2.0, 1.0, 3.0)}, ""))
"""


def test_two_processes_at_once_lose_nothing_and_no_reader_meets_half_a_file(store, tmp_path):
    command = [sys.executable, "-W", "error::UserWarning", "-c", WRITER, str(tmp_path)]
    pair = [subprocess.Popen([*command, f"ready{i}"], cwd=ROOT) for i in range(2)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # setting aside warns
        while any(process.poll() is None for process in pair):
            if store.path.exists():
                json.loads(store.path.read_text())  # without the lock: what any reader meets
            store.read()
    assert [process.returncode for process in pair] == [0, 0]
    expected = {f"ready{i} {j}" for i in range(2) for j in range(30)}
    assert {key.what for key in fresh(tmp_path).read()} == expected
    assert sorted(p.name for p in (tmp_path / "cache").iterdir()) == ["plans.json", "plans.lock"]


# Shipped tables and deterministic runs


def ship(tmp_path: Path, key=KEY, winner="ours", **rivals: Rival) -> None:
    """A table with one choice, as the project would ship it."""
    rivals = rivals or {"cudnn": SLOW, "ours": FAST}
    measured = Store(tmp_path / "measured", tmp_path / "none")
    measured.add(Choice(key, winner, "cudnn", rivals, "measured by the project"))
    (tmp_path / "selected").mkdir()
    measured.path.rename(tmp_path / "selected" / "gpu_a.json")


def test_a_shipped_choice_is_used_whatever_the_driver_but_after_the_users_own(tmp_path):
    ship(tmp_path, replace(KEY, driver="570.0"))
    assert choose_one(job(), never, fresh(tmp_path)).winner == "ours"
    newer = job(key=replace(KEY, torch="2.12"))
    assert choose_one(newer, Script(cudnn=SLOW, ours=SLOW), fresh(tmp_path)).winner == "cudnn"
    own = Choice(KEY, "cudnn", "cudnn", {"cudnn": SLOW, "ours": SLOW}, "mine")
    fresh(tmp_path).add(own)
    assert choose_one(job(), never, fresh(tmp_path)) == own


def test_deterministic_takes_the_shipped_choice_never_the_users_and_never_measures(tmp_path):
    fresh(tmp_path).add(Choice(KEY, "ours", "cudnn", {"cudnn": SLOW, "ours": FAST}, "mine"))
    choice = choose_one(job(), never, fresh(tmp_path), deterministic=True)
    assert choice.winner == "cudnn"
    assert choice.reason == "no shipped choice for GPU A, and nothing is measured"
    assert "not measured" in choice.describe()
    ship(tmp_path, replace(KEY, torch="2.10", source="older"))
    choice = choose_one(job(), never, fresh(tmp_path), deterministic=True)
    assert (choice.winner, choice.key, choice.rivals["ours"]) == ("ours", KEY, FAST)
    other = job(key=replace(KEY, gpu="GPU B"))
    assert choose_one(other, never, fresh(tmp_path), deterministic=True).winner == "cudnn"


def test_deterministic_still_checks_the_numbers_of_the_shipped_winner(tmp_path):
    ship(tmp_path)
    one = job({"cudnn": lambda x: x * 2, "ours": lambda x: x * 3})
    choice = choose_one(one, never, fresh(tmp_path), deterministic=True)
    assert (choice.winner, choice.rivals["ours"].refused) == ("cudnn", "ours is wrong")


def test_a_damaged_shipped_table_is_named_and_left_alone(tmp_path):
    (tmp_path / "selected").mkdir()
    table = tmp_path / "selected" / "gpu_a.json"
    table.write_text("{")
    with pytest.warns(UserWarning, match=r"gpu_a.json is not used: it is damaged"):
        assert choose_one(job(), Script(cudnn=SLOW, ours=FAST), fresh(tmp_path)).winner == "ours"
    assert table.read_text() == "{"


def test_ship_writes_the_newest_choice_for_every_site_of_one_gpu(store, tmp_path):
    older, newer = replace(KEY, source="older"), replace(KEY, source="newer")
    another, elsewhere = replace(KEY, what="conv [4, 4]"), replace(KEY, gpu="GPU B")
    rivals = {"cudnn": SLOW, "ours": FAST}
    for key, winner in ((older, "cudnn"), (another, "ours"), (newer, "ours"), (elsewhere, "ours")):
        store.add(Choice(key, winner, "cudnn", rivals, ""))
    assert store.ship("GPU A") == (tmp_path / "selected" / "gpu-a.json", 2)
    (table,) = fresh(tmp_path).shipped.values()
    assert {(one.key, one.winner) for one in table} == {(newer, "ours"), (another, "ours")}
    store.path.unlink()
    store.add(Choice(replace(KEY, source="newest"), "cudnn", "cudnn", rivals, ""))
    assert store.ship("GPU A")[1] == 2  # the table's other choice stays
    (table,) = fresh(tmp_path).shipped.values()
    assert {one.key.what: one.winner for one in table} == {KEY.what: "cudnn", "conv [4, 4]": "ours"}


def test_a_shipped_table_is_installed_and_found(store, tmp_path):
    """From a user's plans.json over the checkout's table to a process that runs what is installed
    and has no plans of its own."""
    checkout, installed = tmp_path / "checkout", tmp_path / "installed"
    for package in ("kernels", "models", "train", "profiling"):
        shutil.copytree(
            ROOT / package, checkout / package, ignore=shutil.ignore_patterns("__pycache__")
        )
    for name in ("setup.py", "LICENSE"):
        shutil.copy(ROOT / name, checkout)
    choose_one(job(), Script(cudnn=SLOW, ours=FAST), store)
    table, _ = Store(store.path.parent, checkout / "kernels" / "selected").ship("GPU A")
    subprocess.run(
        [sys.executable, "setup.py", "--quiet", "build", "--build-lib", str(installed)],
        cwd=checkout,
        check=True,
        capture_output=True,
    )
    assert (installed / "kernels/selected/gpu-a.json").read_bytes() == table.read_bytes()
    show = subprocess.run(
        [sys.executable, "-m", "kernels.select", "--show"],
        cwd=installed,
        env={**os.environ, "LAPIS_CACHE": str(tmp_path / "empty"), "PYTHONPATH": ""},
        capture_output=True,
        text=True,
        check=True,
    )
    assert show.stdout.startswith("conv [8, 4], float32, GPU A: ours (1.25x faster than cudnn)")
    there = Store(tmp_path / "empty", installed / "kernels" / "selected")
    assert choose_one(job(), never, there, deterministic=True).winner == "ours"


def test_the_tables_shipped_with_this_checkout_are_sound(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tables = Store(tmp_path).shipped
    assert set(tables) == set(SHIPPED.glob("*.json"))


# The command


@pytest.fixture
def users(tmp_path, monkeypatch) -> Store:
    """The store the command finds."""
    monkeypatch.setenv("LAPIS_CACHE", str(tmp_path))
    monkeypatch.setattr("kernels.store.Store.__init__.__defaults__", (tmp_path / "selected",))
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)  # main replaces it
    user_store.cache_clear()
    return user_store(tmp_path)


def test_show_prints_every_rival_with_time_spread_and_ratio_or_refusal(users, capsys):
    one = job({**job().candidates, "prologue": lambda x: x})
    choose_one(one, Script(cudnn=SLOW, ours=FAST), users)
    assert main(["--show"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "conv [8, 4], float32, GPU A: ours (1.25x faster than cudnn)",
        "  132 multiprocessors, driver 580.1, torch 2.11, triton 3.6, cuDNN 91900, kernels abc",
        "  cudnn         100.0 us (99.0 to 101.0)   1.00x",
        "* ours           80.0 us (79.5 to 80.5)   1.25x",
        "  prologue  refused: prologue is wrong",
        f"  from {users.path}",
    ]


def test_show_as_json(users, capsys):
    choose_one(job(), Script(cudnn=SLOW, ours=FAST), users)
    assert main(["--show", "--json"]) == 0
    (entry,) = json.loads(capsys.readouterr().out)
    assert (entry["file"], entry["winner"]) == (str(users.path), "ours")
    assert entry["key"]["what"] == KEY.what
    assert entry["rivals"]["cudnn"]["median_us"] == 100.0


def test_show_without_choices_and_clear(users, capsys):
    assert main(["--show"]) == 0
    assert capsys.readouterr().out.startswith("No plan has been chosen: ")
    assert main(["--clear"]) == 0
    assert "nothing to remove" in capsys.readouterr().out
    choose_one(job(), Script(cudnn=SLOW, ours=FAST), users)
    assert main(["--clear"]) == 0
    assert not users.path.exists()


def test_ship_as_a_command(users, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["--ship"]) == 2
    assert "no CUDA device here" in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "GPU A")
    assert main(["--ship"]) == 2
    assert "has no choices for GPU A: measure first" in capsys.readouterr().err
    users.add(Choice(KEY, "ours", "cudnn", {"cudnn": SLOW, "ours": FAST}, ""))
    assert main(["--ship"]) == 0
    table = tmp_path / "selected" / "gpu-a.json"
    assert capsys.readouterr().out.startswith(f"{table}: the choices for GPU A, 1 in all")
    table.write_text("{")
    assert main(["--ship"]) == 7
    assert "the table of GPU A cannot be written: it is damaged" in capsys.readouterr().err


def test_the_command_runs_as_it_is_documented(tmp_path):
    command = [sys.executable, "-W", "error::RuntimeWarning", "-m", "kernels.select", "--show"]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "LAPIS_CACHE": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert str(tmp_path / "plans.json") in done.stdout
