"""Lapis is run from its checkout (`python -m train.run`); installing brings the dependencies.

The package list is explicit: `kernels` and `profiling` are names others use too, and tests are
not installed. `constraints.txt` pins the validated set.
"""

from setuptools import setup

ONNX = ["onnx>=1.18", "onnxruntime>=1.20", "onnxscript>=0.5"]
TENSORBOARD = ["tensorboard>=2.18"]
TEST = [
    *ONNX,
    *TENSORBOARD,
    "hypothesis>=6.100",
    "packaging>=24",
    "pytest>=8",
    "pytest-timeout>=2.3",
    "pytest-xdist>=3.5",
    "timm>=1.0",
    "webdataset>=1.0",
]

setup(
    name="lapis",
    version="0.1.0",
    description=(
        "Plain-34 and ResNet-34 on food photos, with fused Triton kernels and a training doctor"
    ),
    license="MIT",
    license_files=["LICENSE"],
    packages=[
        "kernels",
        "models",
        "train",
        "train.data",
        "train.doctor",
        "train.doctor.bench",
        "train.doctor.rules",
        "train.study",
        "profiling",
    ],
    package_data={"kernels": ["selected/*.json"]},  # plans chosen on GPUs the project has measured
    python_requires=">=3.11,<3.15",
    install_requires=[
        "torch>=2.11",
        "torchvision>=0.26",
        "triton>=3.6; sys_platform == 'linux'",
        "nvtx>=0.2.10; sys_platform == 'linux'",
        "matplotlib>=3.9",
        "numpy>=2.0",
        "opencv-python-headless>=4.10",
        "pillow>=11",
        "safetensors>=0.4.5",
        "scikit-learn>=1.5",
        "scipy>=1.13",
        "threadpoolctl>=3.1",
        "tqdm>=4.66",
        "tyro>=0.9",
    ],
    extras_require={
        "onnx": ONNX,
        "tensorboard": TENSORBOARD,
        "test": TEST,
        "dev": [*TEST, "ruff>=0.8"],
    },
    classifiers=["Private :: Do Not Upload", "Programming Language :: Python :: 3"],
)
