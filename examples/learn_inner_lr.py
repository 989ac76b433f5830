"""Train the inner learning rate through the simulator: the outer loss reaches it across the
simulated step.

    python examples/learn_inner_lr.py examples/paragraph.txt

Prints the learning rate and the perplexity of the second half of the text after each outer step.
"""

import math
import sys
from pathlib import Path

import torch

import tintc

simulator = tintc.compile("tiny-opt", tintc.SimulatorConfig.paper(inner_lr=1e-5))
simulator.prefix.requires_grad_(False)  # only the learning rate is trained here
ids = simulator.tokenizer(Path(sys.argv[1]).read_text(encoding="utf-8"), return_tensors="pt")[
    "input_ids"
][:, :512]
half = ids.shape[1] // 2
train_mask = (torch.arange(ids.shape[1]) < half).long()[None]
labels = ids.masked_fill(train_mask.bool(), -100)

for step in range(10):
    loss = simulator(ids, train_mask, labels=labels).loss
    print(
        f"outer step {step}: inner_lr {float(simulator.inner_lr.detach()):.2e}, perplexity "
        f"{math.exp(float(loss.detach())):.3f}"
    )
    (gradient,) = torch.autograd.grad(loss, simulator.inner_lr)
    with (
        torch.no_grad()
    ):  # one signed step on the logarithm of the rate: gradients of a sum vary widely in size
        simulator.inner_lr *= math.exp(-0.4 * math.copysign(1, gradient))
