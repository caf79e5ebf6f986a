"""Starting from other weights: --init-from, --pretrained, --layer-decay, --freeze-epochs."""

import json
import urllib.error
from dataclasses import replace

import pytest
import torch
import torchvision
from safetensors.torch import save_file

from models import build_model, stage_of
from tests.helpers import SGD
from train import checkpoint, run
from train.config import DEFAULT, ModelConfig
from train.errors import CheckpointError, UsageError
from train.optim import build_optimizer, set_rate
from train.training import Training
from train.transfer import read_weights, start_from

TINY = ["--model", "micro_resnet", "--data", "synthetic", "--limit", "24", "--image-size", "32"]
TINY += ["--batch-size", "8", "--augment", "light"]


def config(**options):
    model = options.pop("model", "resnet18")
    return replace(DEFAULT, model=ModelConfig(model=model), optim=replace(SGD, **options))


@pytest.fixture(scope="module")
def imagenet():
    """torchvision's ResNet-18 with weights of its own, as a file of theirs holds them."""
    torch.manual_seed(3)
    return torchvision.models.resnet18().state_dict()


def write(folder, state, kind):
    path = folder / f"weights.{kind}"
    if kind == "safetensors":
        save_file(state, path)
    elif kind == "pth":
        torch.save(state, path)
    else:  # a trainer's own file, of a network that was trained on several GPUs
        wrapped = {f"module.{name}": value for name, value in state.items()}
        torch.save({"state_dict": wrapped, "epoch": 90}, path)
    return path


@pytest.mark.parametrize("kind", ["pth", "safetensors", "wrapped"])
def test_torchvisions_weights_become_ours_but_for_the_head(tmp_path, imagenet, kind):
    path = write(tmp_path, imagenet, kind)
    model = build_model("resnet18", 5)
    head = model.fc.weight.clone()
    said = start_from(model, config(init_from=path))
    assert said == f"weights: {path}, all but the last layer (1000 classes there, 5 here)"
    assert torch.equal(model.fc.weight, head)
    for name, value in model.state_dict().items():
        assert name.startswith("fc.") or torch.equal(value, imagenet[name]), name
    same = build_model("resnet18", 1000)
    assert start_from(same, config(init_from=path)).endswith("all of them")
    assert torch.equal(same.fc.weight, imagenet["fc.weight"])


def test_files_without_a_head_or_batch_counts_are_taken(tmp_path, imagenet):
    state = {n: v for n, v in imagenet.items() if not n.startswith("fc.") and "num_b" not in n}
    path = write(tmp_path, state, "pth")
    model = build_model("resnet18", 5)
    assert "all but the last layer (0 classes there" in start_from(model, config(init_from=path))
    assert torch.equal(model.conv1.weight, imagenet["conv1.weight"])


@pytest.mark.parametrize(
    ("options", "word"),
    [({"se": True}, "se.fc1"), ({"width": 0.5}, "64x3x7x7 there, 32x3x7x7 here")],
)
def test_weights_of_another_network_name_the_difference(tmp_path, imagenet, options, word):
    path = write(tmp_path, imagenet, "pth")
    with pytest.raises(CheckpointError, match="another network") as caught:
        start_from(build_model("resnet18", 5, **options), config(init_from=path))
    assert word in str(caught.value)


def test_what_holds_no_weights_is_refused(tmp_path, imagenet):
    path = tmp_path / "photo.pth"
    with pytest.raises(CheckpointError, match="does not exist"):
        read_weights(path)
    path.write_bytes(b"\xff\xd8 a photo")
    with pytest.raises(CheckpointError, match="no weights that can be read"):
        read_weights(path)
    torch.save({"epoch": 3}, path)
    with pytest.raises(CheckpointError, match="no state_dict"):
        read_weights(path)
    cut = write(tmp_path, imagenet, "safetensors")
    cut.write_bytes(cut.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="no weights that can be read"):
        read_weights(cut)


def test_pretrained_says_what_to_do_without_a_network(monkeypatch):
    def offline(*_, **__):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", offline)
    with pytest.raises(UsageError, match=r"resnet18-\w+\.pth cannot be downloaded .*--init-from"):
        start_from(build_model("resnet18", 5), config(pretrained=True))
    with pytest.raises(UsageError, match="torchvision has no weights of plain34"):
        start_from(build_model("plain34", 5), config(model="plain34", pretrained=True))


def test_pretrained_takes_what_the_download_gives(monkeypatch, imagenet):
    urls = []

    def download(url, map_location, check_hash):
        assert check_hash
        urls.append(url)
        return imagenet

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", download)
    model = build_model("resnet18", 5)
    assert start_from(model, config(pretrained=True)).startswith("weights: torchvision's resnet18-")
    assert torch.equal(model.layer4[1].bn2.weight, imagenet["layer4.1.bn2.weight"])
    assert urls[0].startswith("https://download.pytorch.org/")


def test_each_stage_has_its_share_of_the_learning_rate():
    model = build_model("micro_resnet", 5)
    options = replace(SGD, layer_decay=0.5, weight_decay=0.0, momentum=0.0)
    optimizer = build_optimizer(model, replace(options, nesterov=False))
    set_rate(optimizer, 0.4)
    before = [p.detach().clone() for p in model.parameters()]
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    for (name, p), old in zip(model.named_parameters(), before, strict=True):
        step = 0.4 * 0.5 ** (5 - stage_of(name))
        torch.testing.assert_close(p, old - step, msg=name)
    assert stage_of("layer3.0.conv1.weight") == 3
    assert stage_of("fc.bias") == 5


def test_only_the_last_layer_trains_in_the_first_epochs():
    model = build_model("micro_resnet", 5)
    options = replace(SGD, freeze_epochs=1, lr=0.1, schedule="constant")
    training = Training(model, options, total_steps=4, amp_dtype=None)
    images, labels = torch.randn(8, 3, 32, 32), torch.arange(8) % 5
    changed = []
    for epoch in (1, 2):
        before = {name: value.clone() for name, value in model.state_dict().items()}
        training.begin(epoch, 32)
        training.average.prepare(1)
        set_rate(training.step.optimizer, 0.1)
        training.step(images, labels)
        changed.append({n for n, v in model.state_dict().items() if not torch.equal(v, before[n])})
    assert changed[0] == {"fc.weight", "fc.bias"}
    assert changed[1] >= {n for n, _ in model.named_parameters()} | {"bn1.running_mean"}


def test_a_run_starts_from_another_and_the_doctor_is_content(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("LAPIS_CACHE", str(tmp_path / "cache"))
    first = tmp_path / "first"
    assert run.main([*TINY, "--epochs", "1", "--out", str(first)]) == 0
    flags = ["--init-from", str(first), "--freeze-epochs", "1", "--layer-decay", "0.5"]
    capsys.readouterr()
    words = [*TINY, *flags, "--lr", "0.1", "--epochs", "2", "--out", str(tmp_path / "second")]
    assert run.main(words) == 0
    assert f"weights: {first}, all of them" in capsys.readouterr().out
    start = checkpoint.load(first / "checkpoints" / "best.pt")["weights"]
    end = checkpoint.load(tmp_path / "second" / "checkpoints" / "last.pt")["model"]
    assert start.keys() == end.keys()
    assert not torch.equal(start["conv1.weight"], end["conv1.weight"])
    found = json.loads((tmp_path / "second" / "doctor.json").read_text())
    assert "silent_bug" not in json.dumps(found)
    assert run.main([*TINY, "--pretrained", "--init-from", str(first)]) == 2
    assert "two beginnings" in capsys.readouterr().err
