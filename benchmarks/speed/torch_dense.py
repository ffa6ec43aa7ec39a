"""Dense layers in PyTorch, timed for `sparse_layers` by an interpreter that has it.

Reads a JSON object a line and answers with one. ``{"case": {...}}`` makes the layer of a case of
`sparse_layers.CASES`, and is answered by the names of what can be run; ``{"run": name}`` runs it
once, and is answered by the seconds that it took. It imports nothing of this project.
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


def runs(programs):
    found = {}
    for name, (forward, parameters) in programs.items():
        y = forward()
        dy = torch.randn_like(y)  # in the layout of y

        def backward(y=y, dy=dy, parameters=parameters):
            torch.autograd.grad(y, parameters, dy, retain_graph=True)

        found[f"{name}/forward"] = forward
        found[f"{name}/backward"] = backward
    return found


def main():
    torch.set_num_threads(int(sys.argv[1]))
    known = {}
    for line in sys.stdin:
        asked = json.loads(line)
        if "case" in asked:
            case = asked["case"]
            known = runs(conv(case) if case["kind"] == "conv" else linear(case))
            answer = {"runs": list(known), "version": torch.__version__}
        else:
            start = time.perf_counter()
            known[asked["run"]]()
            answer = {"seconds": time.perf_counter() - start}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
