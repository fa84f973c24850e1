"""Device helpers of the warp-specialised weight gradient: which tile a program takes, and where its rows are."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .ws import HALF


@gluon.jit
def locate(
    turn,
    spans_E,
    M: gl.constexpr,
    N: gl.constexpr,
    BN: gl.constexpr,
    GROUP: gl.constexpr,
    P: gl.constexpr,
    PIECES: gl.constexpr,
):
    """(where its expert's spans stand, row tile, column tile) of this program's tile in round `turn`.

    Odd rounds run backwards: tiles come longest first, and the program that got the longest of one round should get
    the shortest of the next.
    """
    M_TILES: gl.constexpr = (M + 2 * HALF - 1) // (2 * HALF)
    N_TILES: gl.constexpr = (N + BN - 1) // BN
    PER_EXPERT: gl.constexpr = M_TILES * N_TILES
    pid = gl.program_id(0)
    tile = turn * P + gl.where(turn % 2 == 0, pid, P - 1 - pid)
    at = spans_E + (1 + 2 * PIECES) * (tile // PER_EXPERT)
    inside = tile % PER_EXPERT
    first = inside // (GROUP * N_TILES) * GROUP
    size = gl.minimum(M_TILES - first, GROUP)
    m = first + inside % (GROUP * N_TILES) % size
    return at, m, inside % (GROUP * N_TILES) // size


@gluon.jit
def rows_of(at, piece: gl.constexpr):
    """(first row, end row) of an expert in a piece."""
    return gl.load(at + 1 + 2 * piece), gl.load(at + 2 + 2 * piece)


@gluon.jit
def count_turns(TILES: gl.constexpr, P: gl.constexpr):
    """Rounds in which this program has a tile."""
    pid = gl.program_id(0)
    full: gl.constexpr = TILES // P
    rest: gl.constexpr = TILES % P
    place = pid if full % 2 == 0 else P - 1 - pid
    return full + (place < rest).to(gl.int32)
