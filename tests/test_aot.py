"""Ahead-of-time compilation: what Triton's compiler makes of the kernels, without a GPU.

The compiler cannot run in this process (Triton interprets here), so it runs in one of its own.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import kernels
from profiling import counts

ROOT = Path(__file__).resolve().parent.parent
MATRIX = {"sm_80": "HMMA", "sm_90": "HGMMA"}


def _python(*arguments, cwd=ROOT):
    environment = {name: v for name, v in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True
    )


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    path = tmp_path_factory.mktemp("aot") / "rows.json"
    done = _python("-m", "profiling.aot", "--arch", "sm_90", "--quick", "--json", str(path))
    assert path.exists(), done.stderr
    return done, json.loads(path.read_text())


def test_every_room_compiles_for_hopper_without_a_fault(quick):
    done, rows = quick
    assert {row["room"] for row in rows} == {spec.name for spec in kernels.KERNELS}
    assert [row for row in rows if row["fault"]] == []
    assert done.returncode == 0


def test_the_rows_carry_what_a_reader_compares(quick):
    row = next(row for row in quick[1] if row["room"] == "add_relu")
    assert 8 <= row["registers"] <= 255
    assert row["spills"] == 0
    assert row["shape"] == [32, 64, 56, 56]
    # 3 tensors each way at 4.3 TB/s; 3136 programs of 2048 elements on 132 multiprocessors
    assert row["floor_us"] == pytest.approx(2 * 3 * 32 * 64 * 56 * 56 * 2 / 4.3e6, rel=1e-3)
    assert row["waves"]["256"] == pytest.approx(8 * row["waves"]["32"], rel=0.01)


def test_no_kernel_costs_more_than_the_committed_counts(quick):
    known = counts.load()
    if counts.triton_version() != known["triton"]:
        pytest.skip(f"the counts are those of triton {known['triton']}: {counts.RENEW}")
    grown, _ = counts.changes(known["kernels"], counts.of_kernels(quick[1]))
    assert grown == [], f"if that is meant: {counts.RENEW}"


def test_no_plan_launches_or_moves_more_than_the_committed_counts():
    grown, _ = counts.changes(counts.load()["plans"], counts.of_plans())
    assert grown == [], f"if that is meant: {counts.RENEW}"


def test_what_grew_is_named_and_what_fell_is_no_regression(quick):
    before = counts.of_kernels(quick[1])
    rows = json.loads(json.dumps(quick[1]))
    worse, better = (next(r for r in rows if r["room"] == room) for room in ("bn_act", "avg_pool"))
    worse["registers"] = 256
    worse["spills"] = 3
    better["registers"] = 8
    grown, fallen = counts.changes(before, counts.of_kernels(rows))
    name = f"{worse['room']} {worse['kernel']} {'x'.join(map(str, worse['shape']))} bfloat16"
    assert [line.partition(":")[0] for line in grown] == [name, name]
    assert grown[0].endswith("-> 256")
    assert grown[1].endswith("spills 0 -> 3")
    assert len(fallen) == 1
    rows = [row for row in rows if row["room"] != "add_relu"]
    gone, _ = counts.changes(before, counts.of_kernels(rows))
    assert any("add_relu" in line and "gone" in line for line in gone)


def test_registers_count_in_eights_and_bytes_may_wobble():
    row = {"room": "r", "kernel": "k", "shape": [2, 3], "dtype": "bfloat16", "registers": 33,
           "spills": 0, "shared_bytes": 1024}  # fmt: skip
    one = counts.of_kernels([row])
    assert one["r k 2x3 bfloat16"]["registers"] == 40
    assert counts.changes(one, counts.of_kernels([row | {"registers": 40}])) == ([], [])
    plan = {"P1": {"launches": 10, "bytes_per_image": 100_000}}
    assert counts.changes(plan, {"P1": {"launches": 10, "bytes_per_image": 100_050}})[0] == []
    grown, _ = counts.changes(plan, {"P1": {"launches": 11, "bytes_per_image": 101_000}})
    assert grown == ["P1: bytes_per_image 100,000 -> 101,000", "P1: launches 10 -> 11"]


FAULTY = """
import torch, sys
from kernels.launch import run, tl, triton
from kernels.numerics import dot
from kernels.spec import Cost, KernelSpec
import kernels
from profiling import aot

@triton.jit
def _wasteful_kernel(x_ptr, n, m, none_ptr, SIZE: tl.constexpr, STAGES: tl.constexpr):
    i = tl.arange(0, SIZE)
    a = tl.load(x_ptr + i[:, None] * SIZE + i[None, :])
    acc = tl.zeros((SIZE, SIZE), tl.float32)
    for k in range(n):
        acc = dot(a, tl.load(x_ptr + k + i[:, None] * SIZE + i[None, :]), acc)
    if none_ptr is None:
        tl.store(x_ptr + m + i[:, None] * SIZE + i[None, :], acc.to(x_ptr.dtype.element_ty))

@triton.jit
def _wrong_kernel(x_ptr):
    tl.store(x_ptr, no_such_name)

def launch(x):
    run(_wasteful_kernel, (7,), x, 33, 1, None, SIZE=256, STAGES=1, num_warps=4)
    run(_wrong_kernel, (1,), x)

def inputs(shape, dtype, device, generator):
    return {"x": torch.randn(shape, generator=generator, device=generator.device).to(device, dtype)}

def cost(shape, itemsize):
    return {"forward": Cost(1, 1)}

spec = KernelSpec("faulty", None, None, inputs, launch, cost, ((32, 256, 256),))
kernels.KERNELS = (spec,)
made = aot.recorded(spec, (32, 256, 256), torch.bfloat16, aot.ARCHS["sm_90"])[0]
task = aot.task_of(made, "sm_90")
print(task.signature, task.constexprs, task.attributes)
sys.exit(aot.main(["--arch", "sm_80,sm_90", "--quick", "--workers", "1", "--json", sys.argv[1]]))
"""


def test_spills_and_compile_errors_fail_the_command_and_are_named(tmp_path):
    script, out = tmp_path / "faulty.py", tmp_path / "rows.json"
    script.write_text(f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n{FAULTY}")
    done = _python(str(script), str(out))
    assert done.returncode == 1, done.stderr
    rows = json.loads(out.read_text())
    wasteful = [row for row in rows if row["kernel"] == "wasteful_kernel"]
    assert {row["arch"] for row in wasteful} == set(MATRIX)
    for row in wasteful:
        assert row["instructions"].get(MATRIX[row["arch"]])
        assert row["spills"] > 0
        assert "spills" in row["fault"]
    wrong = [row for row in rows if row["kernel"] == "wrong_kernel"]
    assert all("no_such_name" in row["fault"] for row in wrong)
    assert len(wrong) == 2
    assert done.stdout.count("FAULT") == 4
    # specialised as the JIT does: 1 and None are constants, 33 is not divisible by 16
    signature = done.stdout.splitlines()[0]
    assert "'x_ptr': '*bf16', 'n': 'i32', 'm': 'constexpr', 'none_ptr': 'constexpr'" in signature
    assert "(0,): [['tt.divisibility', 16]]" in signature
    assert "(1,): []" in signature


def test_making_inputs_for_256_images_allocates_nothing():
    from profiling.aot import ARCHS, at_batch, recorded

    spec = kernels.KERNELS[0]
    launches = recorded(spec, at_batch(spec.shapes[0], 1 << 20), torch.bfloat16, ARCHS["sm_90"])
    tensors = [arg for made in launches for arg in made.args if isinstance(arg, torch.Tensor)]
    assert tensors
    assert all(tensor.is_meta for tensor in tensors)
