"""Whole training steps in PyTorch, timed for `exact` by an interpreter that has it.

Answers as `torch_dense` does. ``{"case": {...}}`` is one of `exact.CASES`: the same model, with as
many numbers in the same places, the same batch and AdamW in its fused form, the fastest there. Arms
are PyTorch as one runs it, of a convolutional network in both layouts, and, where the case asks for
it, with `torch.compile`. It imports nothing of this project.
"""

import torch
from torch import nn
from torch.nn import functional
from torch_dense import answer


class Attention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, width)

    def forward(self, x, mask=None):
        split = (*x.shape[:2], self.heads, -1)
        parts = [f(x).view(split).transpose(1, 2) for f in (self.query, self.key, self.value)]
        y = functional.scaled_dot_product_attention(*parts, attn_mask=mask)
        return self.out(y.transpose(1, 2).reshape(x.shape))


class PreNorm(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norms = nn.ModuleList([nn.RMSNorm(width, eps=1e-6) for _ in range(2)])
        self.attend = Attention(width, 4)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        x = x + self.attend(self.norms[0](x))
        h = functional.gelu(self.up(self.norms[1](x)), approximate="tanh")
        return x + self.down(h)


class Blocks(nn.Module):
    def __init__(self, case):
        super().__init__()
        width = case["shape"][-1]
        self.blocks = nn.ModuleList([PreNorm(width) for _ in range(case["blocks"])])
        self.head = nn.Linear(width, 2)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))


class PostNorm(nn.Module):
    def __init__(self, width, heads, inner, eps):
        super().__init__()
        self.attend = Attention(width, heads)
        self.norms = nn.ModuleList([nn.LayerNorm(width, eps=eps) for _ in range(2)])
        self.up, self.down = nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x, mask):
        x = self.norms[0](x + self.attend(x, mask))
        return self.norms[1](x + self.down(functional.gelu(self.up(x))))


class Bert(nn.Module):
    def __init__(self, case):
        super().__init__()
        c = case["config"]
        width, self.pad, eps = c["hidden_size"], c["pad_token_id"], c["layer_norm_eps"]
        self.word = nn.Embedding(c["vocab_size"], width)
        self.position = nn.Embedding(c["max_position_embeddings"], width)
        self.token_type = nn.Embedding(c["type_vocab_size"], width)
        self.norm = nn.LayerNorm(width, eps=eps)
        sizes = width, c["num_attention_heads"], c["intermediate_size"], eps
        self.blocks = nn.ModuleList([PostNorm(*sizes) for _ in range(c["num_hidden_layers"])])
        self.head = nn.Linear(width, 2)

    def forward(self, tokens):
        mask = tokens != self.pad
        place = self.position.weight[: tokens.shape[1]] + self.token_type.weight[0]
        x = self.norm(self.word(tokens) + place)
        for block in self.blocks:
            x = block(x, mask[:, None, None])
        weights = mask.to(x.dtype)[..., None]
        return self.head((x * weights).sum(1) / weights.sum(1).clamp(min=1))


def rotated(x, cos, sin):
    one, other = x.chunk(2, -1)
    return torch.cat([one * cos - other * sin, other * cos + one * sin], -1)


class Llama(nn.Module):
    """A block with rotary positions, fewer keys and values than queries, and a gated MLP."""

    def __init__(self, c):
        super().__init__()
        width, inner, eps = c["hidden_size"], c["intermediate_size"], c["rms_norm_eps"]
        self.size = width // c["num_attention_heads"]
        shared = c["num_key_value_heads"] * self.size
        linear = lambda *sizes: nn.Linear(*sizes, bias=False)  # noqa: E731
        self.norms = nn.ModuleList([nn.RMSNorm(width, eps=eps) for _ in range(2)])
        self.query, self.out = linear(width, width), linear(width, width)
        self.key, self.value = linear(width, shared), linear(width, shared)
        self.gate, self.up, self.down = (
            linear(width, inner), linear(width, inner), linear(inner, width)
        )  # fmt: skip

    def forward(self, x, cos, sin):
        h = self.norms[0](x)
        split = (*x.shape[:2], -1, self.size)
        q, k, v = (f(h).view(split).transpose(1, 2) for f in (self.query, self.key, self.value))
        q, k = rotated(q, cos, sin), rotated(k, cos, sin)
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + self.out(y.transpose(1, 2).reshape(x.shape))
        h = self.norms[1](x)
        return x + self.down(functional.silu(self.gate(h)) * self.up(h))


class Decoder(nn.Module):
    """A class behind the last token."""

    def __init__(self, case):
        super().__init__()
        c = case["config"]
        width, size = c["hidden_size"], c["hidden_size"] // c["num_attention_heads"]
        self.embed = nn.Embedding(c["vocab_size"], width)
        self.blocks = nn.ModuleList([Llama(c) for _ in range(c["num_hidden_layers"])])
        self.norm = nn.RMSNorm(width, eps=c["rms_norm_eps"])
        self.head = nn.Linear(width, 2, bias=False)
        frequency = c["rope_theta"] ** -(torch.arange(0, size, 2) / size)
        angles = torch.arange(case["shape"][1])[:, None] * frequency
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())

    def forward(self, tokens):
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x, self.cos, self.sin)
        return self.head(self.norm(x))[:, -1]


class Recurrent(nn.Module):
    def __init__(self, case):
        super().__init__()
        width, both = case["width"], case["both_ways"]
        kind = {"lstm": nn.LSTM, "gru": nn.GRU}[case["cell"]]
        self.rnn = kind(case["shape"][-1], width, batch_first=True, bidirectional=both)
        self.head = nn.Linear(width * (1 + both), 2)

    def forward(self, x):
        return self.head(self.rnn(x)[0].mean(1))


class Residual(nn.Module):
    def __init__(self, inputs, outputs, stride):
        super().__init__()
        conv = lambda *sizes, **more: nn.Conv2d(*sizes, bias=False, **more)  # noqa: E731
        self.norms = nn.ModuleList([nn.GroupNorm(8, inputs), nn.GroupNorm(8, outputs)])
        self.first = conv(inputs, outputs, 3, stride=stride, padding=1)
        self.second = conv(outputs, outputs, 3, padding=1)
        shortcut = stride > 1 or inputs != outputs
        self.skip = conv(inputs, outputs, 1, stride=stride) if shortcut else None

    def forward(self, x):
        h = functional.relu(self.norms[0](x))
        skip = x if self.skip is None else self.skip(h)
        return skip + self.second(functional.relu(self.norms[1](self.first(h))))


class ResNet(nn.Module):
    def __init__(self, case):
        super().__init__()
        width = channels = case["width"]
        self.stem = nn.Conv2d(case["shape"][-1], width, 3, padding=1, bias=False)
        blocks = []
        for group in range(3):
            for i in range(case["depth"]):
                outputs = width * 2**group
                blocks.append(Residual(channels, outputs, 2 if group and i == 0 else 1))
                channels = outputs
        self.blocks = nn.Sequential(*blocks)
        self.norm, self.head = nn.GroupNorm(8, channels), nn.Linear(channels, 10)

    def forward(self, x):
        x = self.blocks(self.stem(x))
        return self.head(functional.relu(self.norm(x)).mean((2, 3)))


KINDS = {
    "list": Blocks, "scan": Blocks, "bert": Bert, "decoder": Decoder, "rnn": Recurrent,
    "resnet": ResNet,
}  # fmt: skip


def stepper(case, *, channels_last=False, compiled=False):
    torch.manual_seed(0)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    model = KINDS[case["kind"]](case)
    shape = case["shape"]
    if case["kind"] in ("bert", "decoder"):
        x = torch.randint(1, case["config"]["vocab_size"], shape)
    elif case["kind"] == "resnet":
        x = torch.randn(shape).permute(0, 3, 1, 2).contiguous(memory_format=layout)
        model = model.to(memory_format=layout)
    else:
        x = torch.randn(shape)
    y = torch.arange(len(x)) % 2
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=1e-4, fused=True)
    forward = torch.compile(model) if compiled else model

    def step():
        optimizer.zero_grad()
        functional.cross_entropy(forward(x), y).backward()
        optimizer.step()

    step()
    return step


def programs(case):
    found = {"torch": stepper(case)}
    if case["kind"] == "resnet":
        found["torch, channels last"] = stepper(case, channels_last=True)
    if case.get("compile"):
        found["torch, compiled"] = stepper(case, compiled=True, channels_last=True)
    return found


if __name__ == "__main__":
    answer(programs)
