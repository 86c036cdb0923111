"""Networks as people have them: complex numbers, hooks, randomness, state, and blocks that cannot be had."""

import numpy as np
import pytest
import torch
from torch import nn

import stiffcore
from tests.cases import seeded
from tests.reference import dense_eigenvalues, matched_distance

COMPLEX = torch.complex64


# ---------------------------------------------------------------------------------------------- complex numbers


def drawn(*shape, dtype=COMPLEX):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=dtype)


class Modes(nn.Module):
    """A Fourier layer with a complex weight."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(drawn(9))

    def forward(self, x):
        return x + torch.fft.irfft(torch.fft.rfft(torch.relu(x)) * self.weight, n=16)


class Modulus(nn.Module):
    """A function of moduli alone, at values with no real part: a slope along the real axis is 0 there."""

    def __init__(self):
        super().__init__()
        self.register_buffer("weight", 1j * drawn(16, 16, dtype=torch.float32))

    def forward(self, x):
        return x + (x.to(self.weight.dtype) @ self.weight).abs()


class ComplexTanh(nn.Module):
    """Complex arithmetic between two real layers, as real pairs at the end."""

    def __init__(self):
        super().__init__()
        self.weight, self.up = nn.Parameter(drawn(16, 8) / 4), nn.Parameter(drawn(16, 16, dtype=torch.float32) / 4)

    def forward(self, x):
        inside = torch.tanh(torch.complex(x, 0.3 * x) @ self.weight)
        return torch.relu(x + torch.view_as_real(inside).flatten(1) @ self.up)


class ComplexConvolution(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = (nn.Conv2d(1, 1, 3, padding=1, dtype=COMPLEX) for _ in range(2))

    def forward(self, x):
        z = self.a(x.reshape(1, 1, 4, 4).to(self.a.weight.dtype))
        z = self.b(torch.complex(torch.relu(z.real), torch.relu(z.imag)))
        return torch.relu(x + (z.real + 0.5 * z.imag).reshape(1, 16))


@pytest.mark.parametrize("kind", [Modes, Modulus, ComplexTanh, ComplexConvolution])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_complex_weights_keep_their_imaginary_parts(kind, dtype):
    torch.manual_seed(0)
    module, x = kind(), seeded((1, 16), 1)
    exact = kind()
    exact.load_state_dict(module.state_dict())
    exact._apply(lambda t: t.to(torch.complex128 if t.is_complex() else torch.float64))
    truth = dense_eigenvalues(exact, x)
    assert np.abs(truth.imag).max() > 0.01
    found = stiffcore.spectrum(module, x, dtype=dtype)
    assert found.certificate.passed
    assert matched_distance(found.values, truth) < (1e-12 if dtype == "float64" else 1e-4)
    assert {t.dtype for t in module.state_dict().values()} <= {torch.complex64, torch.float32}
