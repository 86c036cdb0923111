"""The side of a line, or of a circle, on which eigenvalues are counted."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from stiffcore.eigen.powers import Ellipse, ellipse_right_of
from stiffcore.eigen.sparse import EPS, Array

# Normals of a polygon around the numerical range, in degrees: those that bound the left side, and the others.
LEFT_NORMALS = (90, 120, 150)
RIGHT_NORMALS = (0, 30, 60)


class Region(Protocol):
    """The counted side of the complex plane, closed; symmetric about the real axis."""

    @property
    def normals(self) -> tuple[int, ...]:
        """Directions, in degrees, in which the counted part of a numerical range must be bounded."""

    def has(self, values: Array) -> Array:
        """Which values are on the counted side, strictly."""

    def distance(self, values: Array) -> Array:
        """Of values from the boundary."""

    def clip(self, piece: Array) -> Array:
        """A convex polygon that holds the counted part of a convex one, and little else."""

    def boundary(self, reach: float) -> tuple[float, Callable[[Array], Array]]:
        """Half the boundary, up to |z| = reach at least: its length, and its points by arc length."""

    def ellipse(self, values: Array, scale: float) -> tuple[Ellipse, float]:
        """One with nothing of the counted side in it, that holds values on the other side with most room.

        Args:
            values: any number of them.
            scale: its size where there are none, and any will do.

        Returns:
            The ellipse, and the largest level of a value.
        """

    def level(self, ellipse: Ellipse) -> float:
        """A lower bound of the ellipse's levels on the counted side; 0 where a part of that is in the ellipse."""


@dataclass(frozen=True)
class LeftOf:
    """Re z <= threshold."""

    threshold: float

    @property
    def normals(self) -> tuple[int, ...]:
        """Of the bounds of the range: see `Region`."""
        return LEFT_NORMALS

    def has(self, values: Array) -> Array:
        """Which are beyond, strictly."""
        return values.real < self.threshold

    def distance(self, values: Array) -> Array:
        """From the boundary."""
        return np.abs(values.real - self.threshold)

    def clip(self, piece: Array) -> Array:
        """The part of a polygon that is left of the line."""
        return clipped(piece, 1, self.threshold)

    def boundary(self, reach: float) -> tuple[float, Callable[[Array], Array]]:
        """See `Region`."""
        return reach, lambda s: self.threshold + 1j * s

    def ellipse(self, values: Array, scale: float) -> tuple[Ellipse, float]:
        """See `Region`."""
        if len(values):
            return ellipse_right_of(self.threshold, values)
        c = scale or 1.0
        return Ellipse(self.threshold + c, c, c), 0.0

    def level(self, ellipse: Ellipse) -> float:
        """See `Region`."""
        away = ellipse.centre - ellipse.along - self.threshold
        if away < -4 * EPS * (abs(ellipse.centre) + ellipse.along):
            return 0.0
        return max(1.0, float(ellipse.level(np.array(self.threshold))))


@dataclass(frozen=True)
class OutsideOf:
    """|z - centre| >= radius."""

    centre: float
    radius: float

    @property
    def normals(self) -> tuple[int, ...]:
        """Of the bounds of the range: see `Region`."""
        return LEFT_NORMALS + RIGHT_NORMALS

    def has(self, values: Array) -> Array:
        """Which are beyond, strictly."""
        return np.abs(values - self.centre) > self.radius

    def distance(self, values: Array) -> Array:
        """From the boundary."""
        return np.abs(np.abs(values - self.centre) - self.radius)

    def clip(self, piece: Array) -> Array:
        """The part beyond the chord that the circle cuts off in the directions of the piece; it ends at the circle."""
        out = piece - self.centre
        if len(out) == 0 or (np.abs(out) < self.radius).all():
            return piece[:0]
        middle = out.mean()
        if (np.abs(out) == 0).any() or middle == 0:
            return piece
        turned = np.abs(np.angle(out / middle)).max()
        if turned >= np.pi / 2:
            return piece
        normal = complex(middle / abs(middle))
        edge = self.radius * math.cos(turned) * (1 - 4 * EPS)
        return clipped(piece, -normal, -edge - (normal.conjugate() * self.centre).real)

    def boundary(self, reach: float) -> tuple[float, Callable[[Array], Array]]:
        """See `Region`."""
        return np.pi * self.radius, lambda s: self.centre + self.radius * np.exp(1j * s / self.radius)

    def ellipse(self, values: Array, scale: float) -> tuple[Ellipse, float]:
        """See `Region`."""
        ellipse = Ellipse(self.centre, self.radius, self.radius)
        return ellipse, float(ellipse.level(values).max(initial=0.0))

    def level(self, ellipse: Ellipse) -> float:
        """See `Region`; from the box around the ellipse, unless it is the circle itself."""
        if ellipse == Ellipse(self.centre, self.radius, self.radius):
            return 1.0
        return float(math.hypot(abs(ellipse.centre - self.centre) + ellipse.along, ellipse.across) <= self.radius)


@dataclass(frozen=True)
class Around:
    """|z - centre| <= radius, about any number; not symmetric, so that it is no `Region`, and only counts take it."""

    centre: complex
    radius: float

    def has(self, values: Array) -> Array:
        """Which are inside, strictly."""
        return np.abs(values - self.centre) < self.radius

    def distance(self, values: Array) -> Array:
        """From the boundary."""
        return np.abs(np.abs(values - self.centre) - self.radius)

    def boundary(self, reach: float) -> tuple[float, Callable[[Array], Array]]:
        """All of it: its length, and its points by arc length."""
        return 2 * np.pi * self.radius, lambda s: self.centre + self.radius * np.exp(1j * s / self.radius)

    def level(self, ellipse: Ellipse) -> float:
        """As `Region`; of the half-plane left of it or right of it."""
        real, turned = self.centre.real, replace(ellipse, centre=-ellipse.centre)
        return max(LeftOf(real + self.radius).level(ellipse), LeftOf(self.radius - real).level(turned))


def clipped(piece: Array, normal: complex, height: float) -> Array:
    """The part of a convex polygon with Re(conj(normal) z) <= height (Sutherland & Hodgman)."""
    over = (np.conj(normal) * piece).real - height
    kept: list[complex] = []
    for i in range(len(piece)):
        j = (i + 1) % len(piece)
        if over[i] <= 0:
            kept.append(complex(piece[i]))
        if over[i] * over[j] < 0:
            kept.append(complex(piece[i] + (piece[j] - piece[i]) * (over[i] / (over[i] - over[j]))))
    return np.array(kept, complex)
