"""The kernels in a network and a training loop of your own: `python examples/own_resnet.py`.

`models.fuse` changes the classes of a ResNet's modules; its parameters, its state_dict, your
optimizer and your loop stay.
"""

import torch
import torchvision
from torch.nn import functional as F

import models

device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
network = torchvision.models.resnet18(num_classes=5)
keys = list(network.state_dict())
network = network.to(device, memory_format=torch.channels_last)
# "auto" takes the kernels on a GPU, and on a CPU compiles for half a minute at the first step
network = models.fuse(network, backend="auto" if device.type == "cuda" else "eager")
assert list(network.state_dict()) == keys
print(models.fuse_report(network))

optimizer = torch.optim.SGD(network.parameters(), lr=0.02, momentum=0.9)
images = torch.randn(8, 3, 64, 64, device=device).to(memory_format=torch.channels_last)
labels = torch.arange(8, device=device) % 5
for step in range(5):
    with torch.autocast(device.type, torch.bfloat16):
        loss = F.cross_entropy(network(images), labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    print(f"step {step}: loss {loss.item():.3f}")
