"""What the compiler says about every kernel, without a GPU:

    python -m profiling.aot [--arch sm_90,sm_100] [--kernel bn_act] [--json FILE]

Each room's launches are recorded on meta tensors, for the ResNet-34 layer table in bfloat16,
float16 and (for information) float32, specialised exactly as Triton's JIT would, compiled for each
architecture, and read back from the machine code: registers, spills, shared memory, matrix and
bulk-copy instructions. The command fails on a spill, on too much shared memory, on a matrix kernel
without matrix instructions, and on a compile error.
"""

import json
import multiprocessing
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import cache
from itertools import product
from math import ceil, prod
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

import kernels
from kernels import launch
from kernels.spec import KernelSpec, Shape
from profiling.roofline import ARCHS, H200, Arch, blocks_per_multiprocessor, floor_us
from profiling.rows import read
from train.arguments import Parser

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
BATCHES = (32, 256)
RESULTS = Path(__file__).resolve().parent / "results"
CARDS = {"H100": "sm_90", "H200": "sm_90", "A100": "sm_80", "B200": "sm_100"}
INSTRUCTIONS = ("HGMMA", "HMMA", "UTCHMMA", "UTMALDG", "UTMASTG", "LDGSTS", "LDL", "STL")
MATRIX = ("HGMMA", "HMMA", "UTCHMMA")


@dataclass(frozen=True)
class Row:
    """One distinct program: a kernel of a room, compiled for an architecture, a dtype and a shape
    (at the smallest batch that runs it).

    waves: how often the multiprocessors are filled, at batch 32 and 256. predicted_us, of a matrix
    product: the floor at these batches, drawn out to whole waves; measured_us: what the room took
    on a GPU of this architecture, from `profiling/results`. flops, bytes, floor_us:
    of the room's whole forward and backward, on the roofs measured on an H200.
    """

    room: str
    kernel: str
    arch: str
    dtype: str
    shape: Shape
    options: str
    registers: int
    spills: int
    shared_bytes: int
    instructions: dict[str, int]
    occupancy: float
    waves: dict[str, float]
    predicted_us: dict[str, float]
    measured_us: dict[str, float]
    flops: float
    bytes: float
    floor_us: float
    fault: str

    @property
    def counts(self) -> bool:
        """Whether a fault fails the command: float32 has no matrix instructions and may spill."""
        return self.dtype != "float32"


@dataclass(frozen=True)
class Task:
    """A program to compile: what Triton's JIT would hand its compiler."""

    kernel: Any
    arch: str
    signature: dict[str, str]
    constexprs: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], Any]
    options: dict[str, Any]

    @property
    def key(self) -> str:
        """Equal for two launches that run the same machine code."""
        return repr((self.kernel.__module__, self.kernel.__name__, *list(vars(self).values())[1:]))


class _OnMeta(TorchFunctionMode):
    """Tensors are made without memory and without drawing: 256 images cost nothing."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if kwargs.pop("generator", None) is not None or "device" in kwargs:
            kwargs["device"] = "meta"
        return function(*args, **kwargs)


def at_batch(shape: Shape, batch: int) -> Shape:
    """A room's shape with another batch: the first number of a shape is its batch."""
    return (batch, *shape[1:])


def recorded(spec: KernelSpec, shape: Shape, dtype: torch.dtype, arch: Arch) -> list[launch.Launch]:
    """The launches of the room's forward and backward on such inputs, made on the meta device."""
    with _OnMeta():
        inputs = spec.make_inputs(shape, dtype, torch.device("meta"), torch.Generator())
    inputs = {
        name: value.detach() if isinstance(value, torch.Tensor) else value
        for name, value in inputs.items()
    }
    with launch.record(arch.capability, arch.multiprocessors) as recording:
        spec.launch(**inputs)
    return recording.launches


def task_of(made: launch.Launch, arch: str) -> Task:
    """Specialise a launch as the JIT does: 1 is a constant, divisibility by 16 is an attribute,
    None is a constant, an integer is 64-bit only when its value needs it."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    major, minor = ARCHS[arch].capability
    backend = make_backend(GPUTarget("cuda", 10 * major + minor, 32))
    kernel = made.kernel
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, options = bind(*made.args, **made.options)
    options, signature, constexprs, attributes = kernel._pack_args(
        backend, dict(made.options), bound, specialization, options
    )
    return Task(kernel, arch, signature, constexprs, attributes, dict(vars(options)))


def compile_task(task: Task) -> dict[str, Any]:
    """Compile and read the machine code; {"error": sentence} when that fails."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    major, minor = ARCHS[task.arch].capability
    source = ASTSource(task.kernel, task.signature, task.constexprs, task.attributes)
    try:
        program = triton.compile(
            source, target=GPUTarget("cuda", 10 * major + minor, 32), options=task.options
        )
        found = machine_code(program.asm["cubin"])
    except Exception as error:  # the compiler raises anything; each is a row that says so
        lines = [line for line in str(error).splitlines() if line.strip()]
        return {"error": f"{type(error).__name__}: {lines[-1][:200] if lines else ''}"}
    return {
        **found,
        "shared_bytes": program.metadata.shared,
        "warps": program.metadata.num_warps,
        "multiplies": "tt.dot" in program.asm["ttir"],
    }


def machine_code(cubin: bytes) -> dict[str, Any]:
    """Registers a thread and the counted instructions of a cubin, by Triton's own cuobjdump."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _tool("cuobjdump", "--dump-resource-usage", file.name)
        listing = _tool("nvdisasm", "-c", file.name)
    registers = max(int(found) for found in re.findall(r"REG:(\d+)", usage))
    opcodes = Counter(re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?\w+\s+)?(\w+)", listing, re.M))
    return {
        "registers": registers,
        "instructions": {name: opcodes[name] for name in INSTRUCTIONS if opcodes[name]},
    }


def _tool(name: str, *arguments: str) -> str:
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run(
        [str(path), *arguments], capture_output=True, text=True, check=True, timeout=120
    ).stdout


@dataclass
class Program:
    """A task at work in a room: how many instances of it are launched at each batch."""

    spec: KernelSpec
    shape: Shape
    dtype: torch.dtype
    task: Task
    instances: dict[int, int]


def plan(
    specs: Iterable[KernelSpec],
    archs: Iterable[str],
    dtypes: Iterable[torch.dtype],
    shapes_of: Callable[[KernelSpec], Iterable[Shape]],
) -> tuple[list[Program], list[Row]]:
    """Every distinct program of every room, and a faulty row where a room cannot be recorded."""
    programs, faulty = [], []
    for spec, arch, dtype in product(specs, archs, dtypes):
        for shape in shapes_of(spec):
            try:
                programs += _programs(spec, shape, dtype, arch)
            except Exception as error:  # any bug of a launcher: a row that says so
                fault = f"not recorded: {type(error).__name__}: {str(error).strip()[:200]}"
                faulty.append(_faulty(spec, shape, dtype, arch, "", fault))
    return programs, faulty


def plan_quick(
    archs: Iterable[str], specs: Iterable[KernelSpec] | None = None
) -> tuple[list[Program], list[Row]]:
    """The same in bfloat16 for the first and the last shape of every room (or of `specs`)."""
    return plan(
        kernels.KERNELS if specs is None else specs,
        archs,
        DTYPES[:1],
        lambda spec: dict.fromkeys((spec.shapes[0], spec.shapes[-1])),
    )


def _programs(spec: KernelSpec, shape: Shape, dtype: torch.dtype, arch: str) -> list[Program]:
    found: dict[str, Program] = {}
    for batch in BATCHES:
        for made in recorded(spec, at_batch(shape, batch), dtype, ARCHS[arch]):
            task = task_of(made, arch)
            first_seen = Program(spec, at_batch(shape, batch), dtype, task, {})
            program = found.setdefault(task.key, first_seen)
            program.instances[batch] = prod(made.grid)
    return list(found.values())


def row_of(program: Program, found: dict[str, Any]) -> Row:
    """What the compiler found, as a row with its fault, if it has one."""
    spec, task = program.spec, program.task
    if "error" in found:
        return _faulty(spec, program.shape, program.dtype, task.arch, _name(task), found["error"])
    arch, counts, warps = ARCHS[task.arch], found["instructions"], found["warps"]
    blocks = blocks_per_multiprocessor(arch, found["registers"], found["shared_bytes"], warps)
    spills = counts.get("LDL", 0) + counts.get("STL", 0)
    faults = []
    if spills:
        faults.append(f"{spills} spills")
    if found["shared_bytes"] > arch.shared_per_block:
        faults.append(f"{found['shared_bytes']} bytes of shared memory > {arch.shared_per_block}")
    if found["multiplies"] and not any(counts.get(name) for name in MATRIX):
        faults.append("a dot without matrix instructions")
    resident = max(1, blocks) * arch.multiprocessors
    return Row(
        room=spec.name,
        kernel=_name(task),
        arch=task.arch,
        dtype=_short(program.dtype),
        shape=program.shape,
        options=_describe(task),
        registers=found["registers"],
        spills=spills,
        shared_bytes=found["shared_bytes"],
        instructions=counts,
        occupancy=round(blocks * warps / arch.warps, 3),
        waves={str(batch): round(n / resident, 2) for batch, n in program.instances.items()},
        predicted_us=_predicted(program, resident) if found["multiplies"] else {},
        measured_us=_measured(program),
        **_cost(spec, program.shape, program.dtype),
        fault="; ".join(faults),
    )


def _faulty(
    spec: KernelSpec, shape: Shape, dtype: torch.dtype, arch: str, kernel: str, fault: str
) -> Row:
    blank = {"registers": 0, "spills": 0, "shared_bytes": 0, "instructions": {}, "occupancy": 0.0}
    place = {"room": spec.name, "kernel": kernel, "arch": arch, "dtype": _short(dtype)}
    cost = _cost(spec, shape, dtype)
    times = {"waves": {}, "predicted_us": {}, "measured_us": {}}
    return Row(**place, shape=shape, options="", **blank, **times, **cost, fault=fault)


def _predicted(program: Program, resident: int) -> dict[str, float]:
    """The room's floor at each batch, times what its last, partly filled wave costs."""
    predicted = {}
    for batch, instances in program.instances.items():
        cost = program.spec.cost(at_batch(program.shape, batch), program.dtype.itemsize)
        floor = sum(floor_us(one, H200) for one in cost.values())
        predicted[str(batch)] = round(floor * ceil(instances / resident) * resident / instances, 1)
    return predicted


def _measured(program: Program) -> dict[str, float]:
    """Microseconds of the room's forward and backward at each batch, where there are results."""
    found = {}
    for batch in program.instances:
        shape = "x".join(map(str, at_batch(program.shape, batch)))
        key = (program.spec.name, shape, _short(program.dtype), program.task.arch)
        if key in _results():
            found[str(batch)] = round(_results()[key], 1)
    return found


@cache
def _results() -> dict[tuple[str, str, str, str], float]:
    """Microseconds of our kernels by room, shape, dtype and architecture, passes together; of
    several measurements the last."""
    last = {}
    for path in sorted(RESULTS.glob("*/results.csv")):
        for row in read(path):
            arch = next((a for name, a in CARDS.items() if name in row["device"]), None)
            if row["provider"] == "fused" and row["numerics"] == "ok" and arch:
                us = float(row["us_per_image"]) * int(row["batch"])
                key = (row["model"], row["shape"], row["dtype"], arch)
                last[(*key, row["mode"])] = us
    summed: dict[tuple[str, str, str, str], float] = {}
    for (*key, _), us in last.items():
        summed[tuple(key)] = summed.get(tuple(key), 0.0) + us
    return summed


def _cost(spec: KernelSpec, shape: Shape, dtype: torch.dtype) -> dict[str, float]:
    costs = spec.cost(shape, dtype.itemsize).values()
    return {
        "flops": sum(cost.flops for cost in costs),
        "bytes": sum(cost.bytes for cost in costs),
        "floor_us": round(sum(floor_us(cost, H200) for cost in costs), 3),
    }


def _name(task: Task) -> str:
    return task.kernel.__name__.lstrip("_")


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _describe(task: Task) -> str:
    """Constants and warps of a program, in one cell: ACT=relu BLOCK=2048 w4 s3."""
    names = list(task.signature)
    constants = [f"{names[path[0]]}={value}" for path, value in task.constexprs.items()]
    options = task.options
    return " ".join([*constants, f"w{options['num_warps']}", f"s{options['num_stages']}"])


def compile_all(programs: list[Program], workers: int) -> Iterator[Row]:
    """The rows of `programs`, each distinct task compiled once, in `workers` forked processes."""
    global _tasks
    _tasks = list({program.task.key: program.task for program in programs}.values())
    found: dict[str, dict[str, Any]] = {}
    with multiprocessing.get_context("fork").Pool(workers) as pool:
        for index, result in pool.imap_unordered(_compile_numbered, range(len(_tasks))):
            found[_tasks[index].key] = result
            _progress(len(found), len(_tasks), _name(_tasks[index]))
    for program in programs:
        yield row_of(program, found[program.task.key])


_tasks: list[Task] = []  # what the forked workers see; a JIT function does not travel by pickle


def _compile_numbered(index: int) -> tuple[int, dict[str, Any]]:
    return index, compile_task(_tasks[index])


def _progress(done: int, total: int, name: str) -> None:
    if sys.stderr.isatty():
        end = "\n" if done == total else ""
        print(f"\r\033[Kcompiled {done}/{total} {name}", end=end, file=sys.stderr, flush=True)


def table(rows: list[Row]) -> str:
    """One line a row."""
    heads = ("room", "kernel", "arch", "dtype", "shape", "regs", "spills", "shared", "occ",
             "waves", "floor us", "predicted us", "measured us", "instructions", "options",
             "fault")  # fmt: skip
    cells = [heads]
    for row in rows:
        cells.append(
            (
                row.room,
                row.kernel,
                row.arch,
                row.dtype,
                "x".join(map(str, row.shape)),
                str(row.registers),
                str(row.spills),
                str(row.shared_bytes),
                f"{row.occupancy:.2f}",
                _by_batch(row.waves),
                f"{row.floor_us:.1f}",
                _by_batch(row.predicted_us),
                _by_batch(row.measured_us),
                " ".join(f"{name}:{count}" for name, count in row.instructions.items()),
                row.options,
                row.fault,
            )
        )
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ("  ".join(map(str.ljust, line, widths)).rstrip() for line in cells)
    return "\n".join(lines)


def _by_batch(values: dict[str, float]) -> str:
    return " ".join(f"{batch}:{value:g}" for batch, value in values.items())


def main(argv: list[str] | None = None) -> int:
    parser = Parser("profiling.aot", __doc__)
    parser.add_argument("--arch", default=",".join(ARCHS), help="comma separated; default: all")
    parser.add_argument("--kernel", default="", help="rooms, comma separated; default: all")
    parser.add_argument("--quick", action="store_true", help="bfloat16, first and last shape only")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    parser.add_argument(
        "--workers", type=int, default=2, help="processes that compile (%(default)s)"
    )
    args = parser.parse_args(argv)
    if launch.INTERPRET or launch.TRITON_MISSING:
        parser.error("needs Triton's compiler: install triton and unset TRITON_INTERPRET")
    archs, names = args.arch.split(","), [spec.name for spec in kernels.KERNELS]
    wanted = args.kernel.split(",") if args.kernel else names
    for value, known in [*((a, list(ARCHS)) for a in archs), *((w, names) for w in wanted)]:
        if value not in known:
            parser.error(f"{value!r} is unknown: choose from {', '.join(known)}")
    specs = [spec for spec in kernels.KERNELS if spec.name in wanted]
    if args.quick:
        programs, rows = plan_quick(archs, specs)
    else:
        programs, rows = plan(specs, archs, DTYPES, lambda spec: spec.shapes)
    rows += compile_all(programs, args.workers)
    print(table(rows))
    if args.json:
        args.json.write_text(json.dumps([asdict(row) for row in rows], indent=1))
    bad = [row for row in rows if row.fault and row.counts]
    print(f"{len(rows)} rows, {len({p.task.key for p in programs})} programs, {len(bad)} faults")
    for row in bad:
        print(f"FAULT {row.room} {row.kernel} {row.arch} {row.dtype} {row.shape}: {row.fault}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
