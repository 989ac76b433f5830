"""Train the inner learning rate through the simulator: the outer loss reaches it across the
simulated step.

    python examples/learn_inner_lr.py [TEXT.txt]

Prints the learning rate and the perplexity of the second half of the text after each outer step.
"""

import math
import sys
from pathlib import Path

import torch

import tintc

text = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).with_name("paragraph.txt"))
simulator = tintc.compile("tiny-opt", tintc.SimulatorConfig.paper(inner_lr=1e-5))
simulator.prefix.requires_grad_(False)  # only the learning rate is trained here
ids = simulator.tokenizer(text.read_text(encoding="utf-8"), return_tensors="pt")["input_ids"]
ids = ids[:, :512]
half = ids.shape[1] // 2
train_mask = (torch.arange(ids.shape[1]) < half).long()[None]
labels = ids.masked_fill(train_mask.bool(), -100)

# Gradients of a sum vary widely in size, so only their signs count: Rprop's steps on the logarithm
# of the rate become a quarter where the sign turns.
log_rate = simulator.inner_lr.detach().log().requires_grad_()
optimizer = torch.optim.Rprop([log_rate], lr=0.4, etas=(0.25, 1.01))

for step in range(16):
    simulator.inner_lr.data.copy_(log_rate.exp())
    loss = simulator(ids, train_mask, labels=labels).loss
    print(
        f"outer step {step}: inner_lr {float(simulator.inner_lr.detach()):.2e}, perplexity "
        f"{math.exp(float(loss.detach())):.3f}"
    )
    (gradient,) = torch.autograd.grad(loss, simulator.inner_lr)
    log_rate.grad = gradient * simulator.inner_lr.detach()  # the chain rule
    optimizer.step()
