"""Butcher tableaus as data: one constant a method, and nothing that knows how to step."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

Row = tuple[float, ...]


@dataclass(frozen=True)
class Tableau:
    """An explicit Runge-Kutta method: kᵢ = f(t + cᵢh, y + h Σⱼ aᵢⱼkⱼ), y₁ = y + h Σᵢ bᵢkᵢ."""

    name: str
    order: int
    c: Row
    a: tuple[Row, ...]
    """Row i weighs the stages before stage i; the first row is empty."""
    b: Row
    error: Row = ()
    """Weights of the error estimate, b − b̂; empty for a method without one."""
    error_order: int = 0
    """The estimate is O(h^error_order)."""
    error_low: Row = ()
    """Weights of a second, cruder estimate, by which dop853 scales the first (Hairer, Nørsett, Wanner, I, p. 255)."""
    interpolant: tuple[Row, ...] = ()
    """Dense output y + h Σᵢ bᵢ(θ)kᵢ: row i holds the coefficients of θ, θ², ... of bᵢ."""
    interpolant_order: int = 3
    """Global order of the dense output; 3 is the cubic Hermite interpolant, which serves every method."""
    dense_c: Row = field(default=(), repr=False)
    dense_a: tuple[Row, ...] = field(default=(), repr=False)
    """Further stages that only the dense output needs."""

    @property
    def adaptive(self) -> bool:
        """Whether the method estimates its error."""
        return bool(self.error)

    @cached_property
    def fsal(self) -> bool:
        """First same as last: the last stage is f(t₁, y₁), the first of the next step."""
        return self.c[-1] == 1 and self.b == (*self.a[-1], 0.0)


EULER = Tableau("euler", 1, c=(0,), a=((),), b=(1,))

MIDPOINT = Tableau("midpoint", 2, c=(0, 1 / 2), a=((), (1 / 2,)), b=(0, 1))

# Heun's method with two stages, also called the explicit trapezoidal rule
HEUN2 = Tableau("heun2", 2, c=(0, 1), a=((), (1,)), b=(1 / 2, 1 / 2))

# Ralston 1962: the two-stage method with the least bound on its truncation error
RALSTON = Tableau("ralston", 2, c=(0, 2 / 3), a=((), (2 / 3,)), b=(1 / 4, 3 / 4))

HEUN3 = Tableau("heun3", 3, c=(0, 1 / 3, 2 / 3), a=((), (1 / 3,), (0, 2 / 3)), b=(1 / 4, 0, 3 / 4))

# Kutta's 3/8 rule, which torchdiffeq calls rk4
RK4 = Tableau(
    "rk4", 4, c=(0, 1 / 3, 2 / 3, 1), a=((), (1 / 3,), (-1 / 3, 1), (1, -1, 1)), b=(1 / 8, 3 / 8, 3 / 8, 1 / 8)
)

# the method that everybody else calls rk4
RK4_CLASSIC = Tableau(
    "rk4_classic", 4, c=(0, 1 / 2, 1 / 2, 1), a=((), (1 / 2,), (0, 1 / 2), (0, 0, 1)), b=(1 / 6, 1 / 3, 1 / 3, 1 / 6)
)

# Heun's second-order method with the Euler method inside it
ADAPTIVE_HEUN = Tableau(
    "adaptive_heun", 2, c=(0, 1), a=((), (1,)), b=(1 / 2, 1 / 2), error=(1 / 2, -1 / 2), error_order=2
)

# Fehlberg 1969, RKF1(2), advanced with its second-order result. Its estimate is h²/512 of the second derivative, so it
# steps far beyond its tolerance; it is here because torchdiffeq has it.
FEHLBERG2 = Tableau(
    "fehlberg2", 2, c=(0, 1 / 2, 1), a=((), (1 / 2,), (1 / 256, 255 / 256)), b=(1 / 512, 255 / 256, 1 / 512),
    error=(-1 / 512, 0, 1 / 512), error_order=2,
)  # fmt: skip

# Bogacki and Shampine 1989; its free interpolant is the cubic Hermite one
BOSH3 = Tableau(
    "bosh3", 3,
    c=(0, 1 / 2, 3 / 4, 1), a=((), (1 / 2,), (0, 3 / 4), (2 / 9, 1 / 3, 4 / 9)), b=(2 / 9, 1 / 3, 4 / 9, 0.0),
    error=(2 / 9 - 7 / 24, 1 / 3 - 1 / 4, 4 / 9 - 1 / 3, -1 / 8), error_order=3,
)  # fmt: skip

# Dormand and Prince 1980, 5(4); error estimate and dense output of order 4 by Shampine 1986, "Some practical
# Runge-Kutta formulas". The estimate is 2/3 of Dormand and Prince's own; torchdiffeq has it too.
DOPRI5 = Tableau(
    "dopri5", 5,
    c=(0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1, 1),
    a=(
        (),
        (1 / 5,),
        (3 / 40, 9 / 40),
        (44 / 45, -56 / 15, 32 / 9),
        (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
        (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
        (35 / 384, 0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
    ),
    b=(35 / 384, 0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84, 0.0),
    error=(
        35 / 384 - 1951 / 21600, 0, 500 / 1113 - 22642 / 50085, 125 / 192 - 451 / 720,
        -2187 / 6784 + 12231 / 42400, 11 / 84 - 649 / 6300, -1 / 60,
    ),
    error_order=5,
    interpolant=(
        (1, -8048581381 / 2820520608, 8663915743 / 2820520608, -12715105075 / 11282082432),
        (0, 0, 0, 0),
        (0, 131558114200 / 32700410799, -68118460800 / 10900136933, 87487479700 / 32700410799),
        (0, -1754552775 / 470086768, 14199869525 / 1410260304, -10690763975 / 1880347072),
        (0, 127303824393 / 49829197408, -318862633887 / 49829197408, 701980252875 / 199316789632),
        (0, -282668133 / 205662961, 2019193451 / 616988883, -1453857185 / 822651844),
        (0, 40617522 / 29380423, -110615467 / 29380423, 69997945 / 29380423),
    ),
    interpolant_order=4,
)  # fmt: skip


def _times_theta_squared(scale: float, r: float, s: float) -> Row:
    """The coefficients of scale · θ²(θ − r)(θ − s)."""
    return (0, scale * r * s, -scale * (r + s), scale)


# Tsitouras 2011, "Runge-Kutta pairs of order 5(4) satisfying only the first column simplifying assumption"
TSIT5 = Tableau(
    "tsit5", 5,
    c=(0, 0.161, 0.327, 0.9, 0.9800255409045097, 1, 1),
    a=(
        (),
        (0.161,),
        (-0.008480655492356989, 0.335480655492357),
        (2.8971530571054935, -6.359448489975075, 4.3622954328695815),
        (5.325864828439257, -11.748883564062828, 7.4955393428898365, -0.09249506636175525),
        (5.86145544294642, -12.92096931784711, 8.159367898576159, -0.071584973281401, -0.028269050394068383),
        (0.09646076681806523, 0.01, 0.4798896504144996, 1.379008574103742, -3.290069515436081, 2.324710524099774),
    ),
    b=(0.09646076681806523, 0.01, 0.4798896504144996, 1.379008574103742, -3.290069515436081, 2.324710524099774, 0.0),
    error=(
        0.00178001105222577714, 0.0008164344596567469, -0.007880878010261995, 0.1447110071732629,
        -0.5823571654525552, 0.45808210592918697, -1 / 66,
    ),
    error_order=5,
    interpolant=(
        (1, -2.763706197274826, 2.9132554618219126, -1.0530884977290216),
        (0, 0.13169999999999998, -0.2234, 0.1017),
        (0, 3.9302962368947516, -5.941033872131505, 2.490627285651253),
        _times_theta_squared(-16.54810288924490272, 1.21712927295533244, 0.61620406037800089),
        _times_theta_squared(47.37952196281928122, 1.203071208372362603, 0.658047292653547382),
        _times_theta_squared(-34.87065786149660974, 1.2, 2 / 3),
        _times_theta_squared(2.5, 1, 0.6),
    ),
    interpolant_order=4,
)  # fmt: skip
