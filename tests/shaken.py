"""Models with nothing at its neutral start."""

import torch


def shaken(model, size=0.2):
    """Random parameters, so that no norm, bias or LayerScale is at its neutral start."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * size)
    return model.eval()
