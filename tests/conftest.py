"""Decided before anything imports triton (torchvision does): interpret where there is no GPU."""

import os
import subprocess
import sys
import zlib

import pytest


def _has_cuda() -> bool:
    # in a process of its own: asking torch here would import triton before TRITON_INTERPRET is set
    ask = "import torch, sys; sys.exit(0 if torch.cuda.is_available() else 1)"
    return subprocess.run([sys.executable, "-W", "ignore", "-c", ask], check=False).returncode == 0


if "PYTEST_XDIST_WORKER" in os.environ:  # a process a core: threads of their own would only queue
    os.environ.setdefault("OMP_NUM_THREADS", "1")
HAS_CUDA = _has_cuda()
if not HAS_CUDA:
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_collection_modifyitems(items):
    for item in items:
        if "gpu" in item.keywords and not HAS_CUDA:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture
def poisoned():
    """Every torch.empty comes filled with NaN (integers: their maximum), so an element nobody
    wrote is seen."""
    import torch

    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def exact_float32():
    """PyTorch's own float32 convolution is what ours is held against: not in TF32."""
    import torch

    before, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
    yield
    torch.backends.cudnn.allow_tf32 = before


@pytest.fixture(autouse=True, scope="session")
def cache_folder(tmp_path_factory):
    """No test writes into the user's cache, or reads it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LAPIS_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def seeded():
    """PyTorch's own generator starts alike in every test, whatever ran before in the process, and
    the threads that a run has set are its own: another number of them rounds otherwise."""
    import torch

    torch.manual_seed(0)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def generator(request):
    """Random numbers of this test alone: the same in every run, others with LAPIS_SEED=<number>,
    and fresh ones with LAPIS_SEED=fresh. A failure prints the seed it was drawn with."""
    import torch

    wanted = os.environ.get("LAPIS_SEED", "")
    by_name = zlib.crc32(request.node.nodeid.encode())
    seed = torch.seed() % 2**31 if wanted == "fresh" else int(wanted or by_name)
    print(f"LAPIS_SEED={seed}")
    return torch.Generator().manual_seed(seed)
