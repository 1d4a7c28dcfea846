"""The supernet and the retrained network a second time, in the plainest way, to compare the project's with.

Written from the published description (arXiv 1904.00420, section 3.4 and table 1) and the official parameter names; it
uses torch and nothing of this project, and no cleverness: every layer is spelled out, channels are shuffled by reshape
and permute, and the pooling is an AvgPool of the last feature map's size.
"""

import torch
from torch import nn

WINNER = (2, 1, 0, 1, 2, 0, 2, 0, 2, 0, 2, 3, 0, 0, 0, 0, 3, 2, 3, 3)
STAGES = [(64, 4), (160, 4), (320, 8), (640, 4)]  # output channels, blocks
KERNELS = [3, 5, 7]


def shuffle(x):
    """The even and the odd channels."""
    n, c, h, w = x.shape
    x = x.reshape(n * c // 2, 2, h * w)
    x = x.permute(1, 0, 2)
    x = x.reshape(2, n, c // 2, h, w)
    return x[0], x[1]


class Unit(nn.Module):
    """Operation 0, 1, 2: ShuffleNetV2 unit with kernel 3, 5, 7. Operation 3: the Xception-like unit."""

    def __init__(self, operation, inp, oup, stride, affine):
        super().__init__()
        self.stride = stride
        mid = oup // 2
        if stride == 1:
            inp = inp // 2
        out = oup - inp
        if operation < 3:
            k = KERNELS[operation]
            self.branch_main = nn.Sequential(
                nn.Conv2d(inp, mid, 1, 1, 0, bias=False),
                nn.BatchNorm2d(mid, affine=affine),
                nn.ReLU(),
                nn.Conv2d(mid, mid, k, stride, k // 2, groups=mid, bias=False),
                nn.BatchNorm2d(mid, affine=affine),
                nn.Conv2d(mid, out, 1, 1, 0, bias=False),
                nn.BatchNorm2d(out, affine=affine),
                nn.ReLU(),
            )
        else:
            k = 3
            self.branch_main = nn.Sequential(
                nn.Conv2d(inp, inp, 3, stride, 1, groups=inp, bias=False),
                nn.BatchNorm2d(inp, affine=affine),
                nn.Conv2d(inp, mid, 1, 1, 0, bias=False),
                nn.BatchNorm2d(mid, affine=affine),
                nn.ReLU(),
                nn.Conv2d(mid, mid, 3, 1, 1, groups=mid, bias=False),
                nn.BatchNorm2d(mid, affine=affine),
                nn.Conv2d(mid, mid, 1, 1, 0, bias=False),
                nn.BatchNorm2d(mid, affine=affine),
                nn.ReLU(),
                nn.Conv2d(mid, mid, 3, 1, 1, groups=mid, bias=False),
                nn.BatchNorm2d(mid, affine=affine),
                nn.Conv2d(mid, out, 1, 1, 0, bias=False),
                nn.BatchNorm2d(out, affine=affine),
                nn.ReLU(),
            )
        if stride == 2:
            self.branch_proj = nn.Sequential(
                nn.Conv2d(inp, inp, k, stride, k // 2, groups=inp, bias=False),
                nn.BatchNorm2d(inp, affine=affine),
                nn.Conv2d(inp, inp, 1, 1, 0, bias=False),
                nn.BatchNorm2d(inp, affine=affine),
                nn.ReLU(),
            )

    def forward(self, x):
        if self.stride == 2:
            return torch.cat((self.branch_proj(x), self.branch_main(x)), 1)
        straight, x = shuffle(x)
        return torch.cat((straight, self.branch_main(x)), 1)


class Network(nn.Module):
    """The supernet (`path` None; forward takes images and a path) or one path as a network (images alone)."""

    def __init__(self, path=None, classes=1000, affine=False, stem_stride=2, last_size=7):
        super().__init__()
        self.path = path
        self.first_conv = nn.Sequential(
            nn.Conv2d(3, 16, 3, stem_stride, 1, bias=False),
            nn.BatchNorm2d(16, affine=affine),
            nn.ReLU(),
        )
        self.features = nn.ModuleList()
        channels = 16
        for oup, blocks in STAGES:
            for i in range(blocks):
                stride = 2 if i == 0 else 1
                if path is None:
                    block = nn.ModuleList([Unit(op, channels, oup, stride, affine) for op in range(4)])
                else:
                    block = Unit(path[len(self.features)], channels, oup, stride, affine)
                self.features.append(block)
                channels = oup
        self.conv_last = nn.Sequential(
            nn.Conv2d(640, 1024, 1, 1, 0, bias=False),
            nn.BatchNorm2d(1024, affine=affine),
            nn.ReLU(),
        )
        self.globalpool = nn.AvgPool2d(last_size)
        self.dropout = nn.Dropout(0.1)
        self.classifier = nn.Sequential(nn.Linear(1024, classes, bias=False))

    def forward(self, x, path=None):
        x = self.first_conv(x)
        for i, block in enumerate(self.features):
            x = block(x) if path is None else block[path[i]](x)
        x = self.conv_last(x)
        x = self.globalpool(x)
        x = self.dropout(x)
        x = x.reshape(-1, 1024)
        return self.classifier(x)
