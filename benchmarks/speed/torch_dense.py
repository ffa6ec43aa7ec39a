"""Dense layers in PyTorch, timed for `sparse_layers` by an interpreter that has it.

Reads a JSON object a line and answers with one. ``{"case": {...}}`` makes the layer of a case of
`sparse_layers.CASES`, and is answered by the names of what can be run; ``{"run": name}`` runs it
once, and is answered by the seconds that it took; ``{"version": true}`` by PyTorch's. It imports
nothing of this project.
"""

import json
import sys
import time

import torch
from torch.nn import functional


def linear(case):
    width, batch = case["width"], case["batch"]
    x = torch.randn(batch, width, requires_grad=True)
    weight = (torch.randn(width, width) / width**0.5).requires_grad_()
    bias = torch.zeros(width, requires_grad=True)
    return {"torch": (lambda: functional.linear(x, weight, bias), (x, weight, bias))}


def conv(case):
    programs = {}
    padding = (case["kernel"] - 1) // 2
    layouts = {"torch": torch.contiguous_format, "torch, channels last": torch.channels_last}
    for name, layout in layouts.items():
        shape = (case["batch"], case["channels"], case["size"], case["size"])
        x = torch.randn(shape).contiguous(memory_format=layout).requires_grad_()
        kernel = torch.randn(case["features"], case["channels"], case["kernel"], case["kernel"])
        kernel = (kernel / 100).contiguous(memory_format=layout).requires_grad_()

        def forward(x=x, kernel=kernel):
            return functional.conv2d(x, kernel, None, case["stride"], padding)

        programs[name] = (forward, (x, kernel))
    return programs


def runs(case):
    programs = conv(case) if case["kind"] == "conv" else linear(case)
    found = {}
    for name, (forward, parameters) in programs.items():
        y = forward()
        dy = torch.randn_like(y)  # in the layout of y

        def backward(y=y, dy=dy, parameters=parameters):
            torch.autograd.grad(y, parameters, dy, retain_graph=True)

        found[f"{name}/forward"] = forward
        found[f"{name}/backward"] = backward
    return found


def answer(programs):
    """Makes the programs of cases, and runs them, as they are asked for on standard input."""
    torch.set_num_threads(int(sys.argv[1]))
    known = {}
    for line in sys.stdin:
        asked = json.loads(line)
        if "case" in asked:
            known = programs(asked["case"])
            found = {"runs": list(known)}
        elif "version" in asked:
            found = {"version": torch.__version__}
        else:
            start = time.perf_counter()
            known[asked["run"]]()
            found = {"seconds": time.perf_counter() - start}
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    answer(runs)
