"""CUDA graphs for the training step: the model's forward and backward become one launch each.

At small batches the host needs longer to launch hundreds of kernels than the GPU to run them.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn


def graphed_forward(
    model: nn.Module, images: Tensor, amp_dtype: torch.dtype | None
) -> Callable[[Tensor], Tensor]:
    """model(images) in training mode, replayed for batches of the shape and dtype of `images`.

    Other batches, such as the last of an epoch, run as they would without a graph. Capturing runs
    the model a few times on `images`; weights, buffers and the random state are as before.
    Raises RuntimeError when something in the model cannot be captured.
    """
    # the capture's stream is not the one gradients are accumulated on; nothing waits for it
    torch.autograd.graph.set_warn_on_accumulate_grad_stream_mismatch(False)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    random_state = torch.cuda.get_rng_state(images.device)
    try:
        # inside a capture a cached cast of the weights would outlive the memory it stands in
        with torch.autocast("cuda", amp_dtype, amp_dtype is not None, cache_enabled=False):
            torch.cuda.make_graphed_callables(model, (images.clone(),))
        replay = model.forward
    finally:
        model.__dict__.pop("forward", None)  # evaluation and other shapes keep the plain one
        model.load_state_dict(state)
        torch.cuda.set_rng_state(random_state, images.device)
    captured = (images.shape, images.dtype)

    def forward(batch: Tensor) -> Tensor:
        return replay(batch) if (batch.shape, batch.dtype) == captured else model(batch)

    return forward
