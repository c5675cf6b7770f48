"""The released task heads, transcribed for PyTorch with the released names; the oracle of ours.

Sources: dinov2/hub/depth/decode_heads.py (DPTHead, BNHead, FeatureFusionBlock, HeadDepth),
dinov2/eval/segmentation/models/decode_heads/linear_head.py. Call each function with torch.
"""


def randomize(torch, module):
    """Random parameters and statistics, so that nothing is 0 or 1 by chance."""
    torch.manual_seed(0)
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            if tensor.is_floating_point():
                tensor.copy_(0.2 * torch.randn_like(tensor))
        for name, tensor in module.named_buffers():
            if name.endswith("running_var"):
                tensor.copy_(0.5 + torch.rand_like(tensor))
    return module.eval()


def resize(torch, x, *, align_corners, **size):
    return torch.nn.functional.interpolate(x, mode="bilinear", align_corners=align_corners, **size)


def segmentation(torch, channels, classes):
    nn = torch.nn

    class Head(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = nn.BatchNorm2d(channels)
            self.conv_seg = nn.Conv2d(channels, classes, 1)

        def forward(self, maps):  # [(patches [b, d, h, w], cls [b, d])]
            return self.conv_seg(self.bn(torch.cat([patches for patches, _ in maps], dim=1)))

    return randomize(torch, Head())


def linear_depth(torch, channels, bins, depth_range):
    nn = torch.nn

    class Head(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv_depth = nn.Conv2d(channels, bins, 1)

        def forward(self, maps):
            parts = []
            for patches, cls in maps:
                spread = cls[:, :, None, None].expand_as(patches)
                x = torch.cat([patches, spread], dim=1)
                parts.append(resize(torch, x, scale_factor=4, align_corners=False))
            logits = torch.relu(self.conv_depth(torch.cat(parts, dim=1))) + 0.1
            weights = logits / logits.sum(dim=1, keepdim=True)
            centers = torch.linspace(*depth_range, bins)
            depth = torch.einsum("bkhw,k->bhw", weights, centers)
            return depth.clamp(*depth_range)

    return randomize(torch, Head())


def dpt(torch, width, channels, fusion, outputs, min_depth):
    nn = torch.nn

    class Conv(nn.Module):  # mmcv's ConvModule: the convolution is called `conv`
        def __init__(self, *arguments, **settings):
            super().__init__()
            self.conv = nn.Conv2d(*arguments, **settings)

        def forward(self, x):
            return self.conv(x)

    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1 = Conv(fusion, fusion, 3, padding=1, bias=False)
            self.conv2 = Conv(fusion, fusion, 3, padding=1, bias=False)

        def forward(self, x):
            return x + self.conv2(torch.relu(self.conv1(torch.relu(x))))

    class Fusion(nn.Module):
        def __init__(self, is_first):
            super().__init__()
            self.project = Conv(fusion, fusion, 1)
            if not is_first:
                self.res_conv_unit1 = Residual()
            self.res_conv_unit2 = Residual()

        def forward(self, x, finer=None):
            if finer is not None:
                finer = resize(torch, finer, size=x.shape[2:], align_corners=False)
                x = x + self.res_conv_unit1(finer)
            x = resize(torch, self.res_conv_unit2(x), scale_factor=2, align_corners=True)
            return self.project(x)

    class Reassemble(nn.Module):
        def __init__(self):
            super().__init__()
            self.projects = nn.ModuleList(Conv(width, c, 1) for c in channels)
            self.resize_layers = nn.ModuleList(
                [
                    nn.ConvTranspose2d(channels[0], channels[0], 4, stride=4),
                    nn.ConvTranspose2d(channels[1], channels[1], 2, stride=2),
                    nn.Identity(),
                    nn.Conv2d(channels[3], channels[3], 3, stride=2, padding=1),
                ]
            )
            self.readout_projects = nn.ModuleList(
                nn.Sequential(nn.Linear(2 * width, width), nn.GELU()) for _ in channels
            )

        def forward(self, maps):
            levels = []
            for i, (patches, cls) in enumerate(maps):
                tokens = patches.flatten(2).transpose(1, 2)
                readout = cls[:, None].expand_as(tokens)
                tokens = self.readout_projects[i](torch.cat([tokens, readout], dim=-1))
                x = tokens.transpose(1, 2).reshape(patches.shape)
                levels.append(self.resize_layers[i](self.projects[i](x)))
            return levels

    class Double(nn.Module):
        def forward(self, x):
            return resize(torch, x, scale_factor=2, align_corners=True)

    class Depth(nn.Module):
        def __init__(self):
            super().__init__()
            first, second = outputs
            self.head = nn.Sequential(
                nn.Conv2d(fusion, first, 3, padding=1),
                Double(),
                nn.Conv2d(first, second, 3, padding=1),
                nn.ReLU(),
                nn.Conv2d(second, 1, 1),
            )

        def forward(self, x):
            return self.head(x)

    class Head(nn.Module):
        def __init__(self):
            super().__init__()
            self.reassemble_blocks = Reassemble()
            self.convs = nn.ModuleList(Conv(c, fusion, 3, padding=1, bias=False) for c in channels)
            self.fusion_blocks = nn.ModuleList(Fusion(i == 0) for i in range(4))
            self.project = Conv(fusion, fusion, 3, padding=1)
            self.conv_depth = Depth()

        def forward(self, maps):
            levels = self.reassemble_blocks(maps)
            levels = [conv(level) for conv, level in zip(self.convs, levels, strict=True)]
            x = self.fusion_blocks[0](levels[3])
            for i in (1, 2, 3):
                x = self.fusion_blocks[i](x, levels[3 - i])
            x = torch.relu(self.project(x))
            return torch.relu(self.conv_depth(x))[:, 0] + min_depth

    return randomize(torch, Head())
